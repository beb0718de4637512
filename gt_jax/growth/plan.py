"""A growth plan: which source layer stands at which target position, as which pass, at which strength.

- Every kind is an order of source layers; the target layout follows from their types (`entries.Plan` is the data).
- Copy j of a layer stands for pass j of the recurrence: j - 1 copies of it come before in the plan (but see split).
- A block plan copies whole blocks of the pattern (DDDG), so every target layer has the type of its source layer, and
  a copy exists for every layer of the block, also for one that asked for fewer passes: `schedule` still gives it
  alpha_j (the block repeats as a whole, as in the growth README), `expected` gives it alpha_j * survival_j, which is
  near 0 there because few tokens are left.
- A split plan follows the order of the recurrence as far as the pattern lets it: within a block the type that ends
  the pattern (G) is dealt to the last groups, the others (D) to the first, and what is left over is the identity. G
  counts its passes from the last group: in the recurrence its first, strongest pass comes after all passes of D.
- A dealt plan is a split plan with the depth of the block plan: the slots of a block's copies go to the strongest
  passes of each type. Order is what a block plan loses most by (experiments/growth_operators.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import groupby
from typing import Any, NamedTuple

from gt_jax.configs.layout import Layout, Segment, parse
from gt_jax.errors import Refused, refuse_all
from gt_jax.growth.coefficients import COEFFICIENTS, CORRECTIONS, own_mass, pass_weights, strengths
from gt_jax.growth.layer_map import spelled
from gt_jax.growth.plan_entries import Entry, Plan, depth_of
from gt_jax.growth.repetition import MOST_PASSES, Repetition
from gt_jax.growth.rounding import ROUNDS, rounded, unit

PLANS = ("block", "dealt", "layer", "split", "map", "stack")
PASSES_FROM = ("k_exec", "mean_weight", "passes_run")
PATTERN = "DDDG"


class _Slot(NamedTuple):
    """One target layer before it has a strength: a copy of `layer`, or its slot filled with the identity.

    `last_first`: the copies of this layer stand for its passes from the last one backwards.
    """

    layer: int
    runs: bool = True
    last_first: bool = False


class _Block(NamedTuple):
    """One repeat of a segment's pattern, and its source layers in order."""

    segment: int
    pattern: str
    layers: tuple[int, ...]


def identity_plan(layout: Layout) -> Plan:
    """Every layer once at strength 1: the source's own layers without the recurrence, the baseline of every table."""
    once = range(len(layout))
    return Plan("identity", layout, layout, tuple(Entry(layer, 1, 1.0) for layer in once),
                tuple(1 for _ in once), tuple(1.0 for _ in once))


def default_layout(repetition: Repetition, pattern: str = PATTERN) -> Layout:
    """The source layout where no checkpoint names one: the file's `_meta.layout`, else whole blocks of `pattern`.

    Raises `Refused` when neither fits the number of layers.
    """
    count, measured = len(repetition.layers), repetition.meta.get("layout")
    if measured is None:
        if count % len(pattern) or not count:
            raise Refused(f"{repetition.origin}: {count} layers are not a multiple of the pattern {pattern} "
                          f"({len(pattern)} layers)")
        return Layout((Segment(pattern, count // len(pattern)),))
    try:
        found = parse(str(measured))
    except Refused as error:
        raise Refused(f"{repetition.origin}: _meta.layout: {error}") from None
    if depth_of(found) != count:
        raise Refused(f"{repetition.origin}: {count} layers, but _meta.layout {found} has {depth_of(found)}")
    return found


def block_plan(repetition: Repetition, source_layout: Layout, *, round: str = "up", target_layers: int | None = None,
               coefficient: str = "expected", correct: str = "none", passes_from: str = "k_exec") -> Plan:
    """`make_plan` of the kind block: n_b = (sum of k in block b) / (layers of its pattern) copies."""
    return make_plan("block", repetition, source_layout, round=round, target_layers=target_layers,
                     coefficient=coefficient, correct=correct, passes_from=passes_from)


def make_plan(kind: str, repetition: Repetition, source_layout: Layout, *, round: str = "up",
              target_layers: int | None = None, coefficient: str = "expected", correct: str = "none",
              passes_from: str = "k_exec", layers: Sequence[int] = (), target_layout: Layout | None = None) -> Plan:
    """The plan of a kind, from the passes k of every layer (`passes_from`).

    - block: whole blocks, as often as the mean of their k, rounded; copy j of the block follows copy j-1.
    - dealt: as many slots as block, each given to one of the strongest passes of its type, in the recurrence's order.
    - layer: each layer k times in a row, the exact order of the recurrence; the layout is runs of one type.
    - split: each layer k times, dealt into groups of its block's pattern; a slot left over is the identity.
    - map: the source layers `layers` (counted from 0) in this order.
    - stack: the whole stack, as often as the mean of all k, rounded.

    `round` (see `rounding`) is for what is copied together: the block, the layer, the stack; copies are at least 1.
    `coefficient` and `correct` are those of `coefficients`. `target_layout` is the layout that must come out.

    Raises `Refused` for a repetition of another depth, an unknown option, and a `target_layers` or `target_layout` that
    the plan does not give (the message says what would be right); also for a map that breaks the source's pattern
    where no `target_layout` says so. Source: growth README, GROWTH.md 2.
    """
    _check(kind, repetition, source_layout, round, coefficient, correct, passes_from)
    asked = _asked(repetition, passes_from)
    if kind == "split":
        slots, natural = _split(source_layout, asked, round)
    elif kind == "dealt":
        weights = [pass_weights(layer, repetition.alpha, MOST_PASSES, coefficient) for layer in repetition.layers]
        slots, natural = _dealt(source_layout, asked, weights, round, target_layers)
    elif kind == "map":
        slots, natural = _mapped(source_layout, layers, strict=target_layout is None)
    else:
        slots, natural = _repeated(kind, source_layout, asked, round, target_layers)
    if target_layers is not None and len(slots) != target_layers:
        raise Refused(f"--target-layers {target_layers} is not what the {kind} plan gives: {len(slots)} layers in the "
                      f"layout {natural}" + _other_roundings(kind, source_layout, asked))
    options: dict[str, Any] = {"coefficient": coefficient, "correct": correct, "from": passes_from,
                               "alpha": list(repetition.alpha)}
    if kind != "map":
        options = {"round": round, "target_layers": target_layers} | options
    masses = tuple(own_mass(layer, repetition.alpha, coefficient) for layer in repetition.layers)
    entries = _entries(slots, repetition, source_layout, asked, coefficient, correct)
    plan = Plan(kind, source_layout, natural, entries, repetition.k_exec, masses, options, tuple(map(float, asked)))
    return plan if target_layout is None else fitted(plan, target_layout)


def fitted(plan: Plan, wanted: Layout) -> Plan:
    """The same plan with its target layout written as `wanted`; raises `Refused` when its types are others."""
    given = plan.target_layout
    right = f"--target-layout {given} is what this plan gives"
    if plan.kind == "map":
        right += f"; the source's layers, counted from 1, are {_by_type(plan.source_layout)}"
    elif plan.kind == "layer":
        right += "; --plan block and --plan split keep the pattern of the source"
    if depth_of(wanted) != len(given):
        raise Refused(f"--target-layout {wanted} has {depth_of(wanted)} layers, the {plan.kind} plan {len(given)}; "
                      f"{right}")
    wrong = [f"target layer {target} is {need} in {wanted}, the plan puts source layer {entry.source} there, a {kind} "
             "layer (both counted from 0)" for target, (need, kind, entry) in
             enumerate(zip(wanted.types, given.types, plan.entries, strict=True)) if need != kind]
    if wrong:
        more = [f"and {len(wrong) - 4} more"] if len(wrong) > 4 else []
        refuse_all([*wrong[:4], *more, right], f"the {plan.kind} plan does not fit --target-layout {wanted}:")
    return dataclasses.replace(plan, target_layout=wanted)


def _check(kind: str, repetition: Repetition, source_layout: Layout, round: str, coefficient: str, correct: str,
           passes_from: str) -> None:
    given = (("kind", kind, PLANS), ("round", round, ROUNDS), ("coefficient", coefficient, COEFFICIENTS),
             ("correct", correct, CORRECTIONS), ("from", passes_from, PASSES_FROM))
    wrong = [f"{name} {value!r} is not one of {', '.join(known)}" for name, value, known in given if value not in known]
    if kind == "split" and round == "balance":
        wrong.append("--round balance does not go with the split plan, whose depth also depends on the slots left "
                     "over; use up, down or nearest")
    refuse_all(wrong, "the plan's options are not valid:")
    if len(repetition.layers) != len(source_layout):
        raise Refused(f"{repetition.origin} counts {len(repetition.layers)} layers, the source layout {source_layout} "
                      f"has {len(source_layout)}")


def _asked(repetition: Repetition, passes_from: str) -> tuple[Fraction, ...]:
    """The passes of every layer. Measured means are taken to six decimals, so that 0.7 + 0.3 is one."""
    if passes_from == "k_exec":
        return tuple(map(Fraction, repetition.k_exec))
    means = [getattr(layer, passes_from) for layer in repetition.layers]
    if None in means:
        known = [name for name in PASSES_FROM if all(getattr(layer, name) is not None for layer in repetition.layers)]
        raise Refused(f"{repetition.origin}: no {passes_from} of layer{means.index(None)}, and no `alive` to sum: "
                      f"measure the source anew, or take --from {' or --from '.join(known)}")
    refuse_all([f"layer{index}.{passes_from} is {mean}; a number above 0, at most {MOST_PASSES}, is needed"
                for index, mean in enumerate(means) if not 1e-6 <= mean <= MOST_PASSES],
               f"{repetition.origin} gives no plan from {passes_from}:")
    return tuple(Fraction(mean).limit_denominator(10**6) for mean in means)


def _blocks(layout: Layout) -> Iterator[_Block]:
    first = 0
    for index, segment in enumerate(layout.segments):
        for _ in range(segment.repeats):
            yield _Block(index, segment.pattern, tuple(range(first, first + len(segment.pattern))))
            first += len(segment.pattern)


def _repeated(kind: str, source: Layout, asked: Sequence[Fraction], round: str,
              target_layers: int | None) -> tuple[list[_Slot], Layout]:
    """Units of layers that are copied as a whole, each copy after the other: block, layer and stack plans."""
    blocks = list(_blocks(source))
    every = range(len(source))
    together: dict[str, list[Sequence[int]]] = {
        "block": [block.layers for block in blocks], "layer": [[layer] for layer in every], "stack": [every]}
    units = [unit(layers, asked) for layers in together[kind]]
    copies = rounded(units, round, target_layers)
    slots = [_Slot(layer) for one, count in zip(units, copies, strict=True) for _ in range(count)
             for layer in one.layers]
    if kind == "layer" or (kind == "stack" and len(source.segments) == 1):
        return slots, _layout(slots, source)
    if kind == "stack":
        return slots, Layout(source.segments * copies[0])
    return slots, _with_repeats(source, _repeats(source, blocks, copies))


def _split(source: Layout, asked: Sequence[Fraction], round: str) -> tuple[list[_Slot], Layout]:
    """Each layer's copies, dealt into groups of its block's pattern; groups are as many as the fullest type needs."""
    copies = rounded([unit((layer,), asked) for layer in range(len(source))], round, None)
    slots: list[_Slot] = []
    groups_by_segment = [0] * len(source.segments)
    for block in _blocks(source):
        hands = {kind: [layer for own, layer in zip(block.pattern, block.layers, strict=True) if own == kind
                        for _ in range(copies[layer])] for kind in block.pattern}
        groups = max(math.ceil(Fraction(len(hand), block.pattern.count(kind))) for kind, hand in hands.items())
        groups_by_segment[block.segment] += groups
        slots += _groups(block, hands, groups)
    return slots, _with_repeats(source, groups_by_segment)


def _dealt(source: Layout, asked: Sequence[Fraction], weights: Sequence[Sequence[float]], round: str,
           target_layers: int | None) -> tuple[list[_Slot], Layout]:
    """As many groups of each block as the block plan has copies; `weights` [l][j] is the strength of pass j + 1."""
    blocks = list(_blocks(source))
    copies = rounded([unit(block.layers, asked) for block in blocks], round, target_layers)
    slots: list[_Slot] = []
    for block, groups in zip(blocks, copies, strict=True):
        hands = {}
        for kind in dict.fromkeys(block.pattern):
            own = [layer for other, layer in zip(block.pattern, block.layers, strict=True) if other == kind]
            # one pass of every layer, then what was asked for before what was not, strong before weak
            rank = sorted((j > 0, j >= asked[layer], -weights[layer][j], j, layer)
                          for layer in own for j in range(MOST_PASSES))
            hands[kind] = sorted(layer for *_, layer in rank[: groups * len(own)])
        slots += _groups(block, hands, groups)
    return slots, _with_repeats(source, _repeats(source, blocks, copies))


def _groups(block: _Block, hands: Mapping[str, Sequence[int]], groups: int) -> list[_Slot]:
    """Hands of layers by type, dealt into `groups` of the block's pattern; the type that ends it to the last ones."""
    dealt = {}
    for kind, hand in hands.items():
        empty: list[int | None] = [None] * (groups * block.pattern.count(kind) - len(hand))
        dealt[kind] = iter([*empty, *hand] if kind == block.pattern[-1] else [*hand, *empty])
    slots = []
    for _ in range(groups):
        for kind, own in zip(block.pattern, block.layers, strict=True):
            layer = next(dealt[kind])
            closing = kind == block.pattern[-1] and block.pattern.count(kind) == 1 < len(block.pattern)
            slots.append(_Slot(own, runs=False) if layer is None else _Slot(layer, last_first=closing))
    return slots


def _repeats(source: Layout, blocks: Sequence[_Block], copies: Sequence[int]) -> list[int]:
    """Groups by segment."""
    return [sum(count for block, count in zip(blocks, copies, strict=True) if block.segment == index)
            for index in range(len(source.segments))]


def _mapped(source: Layout, layers: Sequence[int], strict: bool) -> tuple[list[_Slot], Layout]:
    outside = [layer for layer in layers if not 0 <= layer < len(source)]
    if outside or not layers:
        raise Refused(f"the map names the source layers {outside}; layers are 0 to {len(source) - 1}" if outside else
                      "the map names no layer; name one source layer for each target layer")
    slots = [_Slot(layer) for layer in layers]
    target = _layout(slots, source)
    if strict and len(source.segments) == 1:
        _refuse_mixed(layers, source, target)
    return slots, target


def _refuse_mixed(layers: Sequence[int], source: Layout, target: Layout) -> None:
    """Refuse a map whose types are not whole groups of the source's pattern."""
    pattern = source.segments[0].pattern
    need = pattern * math.ceil(Fraction(len(layers), len(pattern)))
    fits = [source.types[layer] == kind for layer, kind in zip(layers, need, strict=False)]
    if all(fits) and len(need) == len(layers):
        return
    at = len(layers) if all(fits) else fits.index(False)
    found = "is missing" if at == len(layers) else f"is layer {layers[at] + 1}, of type {source.types[layers[at]]}"
    raise Refused(f"the map mixes types: for whole groups of {pattern} its entry {at + 1} must be of type {need[at]}, "
                  f"and {found} (the source's layers, counted from 1, are {_by_type(source)}). Name layers that repeat "
                  f"{pattern}, or say that the other layout is meant: --target-layout {target}")


def _by_type(source: Layout) -> str:
    return "; ".join(f"{kind}: {spelled(layer for layer, other in enumerate(source.types) if other == kind)}"
                     for kind in dict.fromkeys(source.types))


def _with_repeats(source: Layout, repeats: Sequence[int]) -> Layout:
    return Layout(tuple(Segment(segment.pattern, count)
                        for segment, count in zip(source.segments, repeats, strict=True)))


def _layout(slots: Sequence[_Slot], source: Layout) -> Layout:
    """Whole repeats of the source's pattern where it has one and the types are that, else runs of one type."""
    types = "".join(source.types[slot.layer] for slot in slots)
    pattern = source.segments[0].pattern
    repeats, rest = divmod(len(types), len(pattern))
    if len(source.segments) == 1 and rest == 0 and types == pattern * repeats:
        return Layout((Segment(pattern, repeats),))
    return Layout(tuple(Segment(kind, len(list(run))) for kind, run in groupby(types)))


def _entries(slots: Sequence[_Slot], repetition: Repetition, source: Layout, asked: Sequence[Fraction],
             coefficient: str, correct: str) -> tuple[Entry, ...]:
    copies = [slot.layer for slot in slots if slot.runs]
    ratios = {layer: asked[layer] / unit(block.layers, asked).wanted for block in _blocks(source)
              for layer in block.layers}
    backwards = {slot.layer for slot in slots if slot.last_first}
    left = {}
    for layer in dict.fromkeys(copies):
        passes = list(enumerate(strengths(repetition.layers[layer], repetition.alpha, copies.count(layer),
                                          ratios[layer], coefficient=coefficient, correct=correct), 1))
        left[layer] = iter(passes[::-1] if layer in backwards else passes)
    return tuple(Entry(slot.layer, *next(left[slot.layer])) if slot.runs else Entry(slot.layer, 0, 0.0)
                 for slot in slots)


def _other_roundings(kind: str, source: Layout, asked: Sequence[Fraction]) -> str:
    if kind != "split":
        return ""
    return "; " + ", ".join(f"--round {way} gives {len(_split(source, asked, way)[0])}" for way in ROUNDS[:3])
