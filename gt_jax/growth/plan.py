"""A growth plan: which source layer stands at which target position, as which pass, at which strength.

- Every kind is an order of source layers; the target layout follows from their types (`plan_entries.Plan` is the data).
- Copy j of a layer stands for pass j of the recurrence. In every plan made from counts the copies 1, the strongest
  passes, stand in the source's order; `make_plan` refuses to give another one.
- What is copied together is a block: the pattern of a segment (DDDG), cut where a type comes back (`blocks`).
- A block plan copies whole blocks, so a copy exists for every layer of the block, also for one that asked for fewer
  passes: `schedule` still gives it alpha_j (the block repeats as a whole, as in the growth README), `expected` gives it
  alpha_j * survival_j, which is near 0 there because few tokens are left.
- A split plan follows the order of the recurrence as far as the pattern lets it (`dealing`): in DDDG the D layers are
  dealt to the first groups, G to the last, and what is left over is the identity. G counts its passes from the last
  group: in the recurrence its first, strongest pass comes after all passes of D.
- A dealt plan is a split plan with a number of groups as in a block plan: the slots of a block's copies go to the
  strongest passes of each type. Order is what a block plan loses most by (experiments/growth_operators.py).
- Depth is not bought for passes without strength. Block, dealt and stack plans round the passes to groups, and leave
  out the groups of which less than half of the layers would run (coefficient `DEAD` or more), unless a depth or a
  layout is asked for that needs them. Layer and split plans grant every pass that is asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from itertools import groupby, pairwise
from typing import Any

from gt_jax.configs.layout import Layout, Segment
from gt_jax.errors import Refused, refuse_all
from gt_jax.growth.blocks import blocks, with_copies
from gt_jax.growth.coefficients import COEFFICIENTS, CORRECTIONS, own_mass, pass_weights, strengths
from gt_jax.growth.dealing import Slot, deal, own_layers, running_groups, strongest
from gt_jax.growth.layer_map import spelled
from gt_jax.growth.plan_entries import DEAD, Demand, Entry, Plan, depth_of
from gt_jax.growth.repetition import MOST_PASSES, Repetition
from gt_jax.growth.rounding import ROUNDS, Unit, depth, rounded, unit

PLANS = ("block", "dealt", "layer", "split", "map", "stack")
PASSES_FROM = ("k_exec", "mean_weight", "passes_run")
PATTERN = "DDDG"

_Strengths = Sequence[Sequence[float]]  # [layer][j]: of pass j + 1


def identity_plan(layout: Layout) -> Plan:
    """Every layer once at strength 1: the source's own layers without the recurrence, the baseline of every table."""
    once = range(len(layout))
    return Plan("identity", layout, layout, tuple(Entry(layer, 1, 1.0) for layer in once),
                tuple(Demand(1, 1.0, 1.0) for _ in once))


def default_layout(repetition: Repetition, pattern: str = PATTERN) -> Layout:
    """The source layout where no checkpoint names one: the file's `_meta.layout`, else whole blocks of `pattern`.

    Raises `Refused` when neither fits the number of layers.
    """
    count, found = len(repetition.layers), repetition.layout
    if found is None:
        if count % len(pattern) or not count:
            raise Refused(f"{repetition.origin}: {count} layers are not a multiple of the pattern {pattern} "
                          f"({len(pattern)} layers)")
        return Layout((Segment(pattern, count // len(pattern)),))
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
    - dealt: slots as in a block plan, each given to one of the strongest passes of its type, in the recurrence's order.
    - layer: each layer k times in a row, the exact order of the recurrence; the layout is runs of one type.
    - split: each layer k times, dealt into groups of its block's pattern; a slot left over is the identity.
    - map: the source layers `layers` (counted from 0) in this order.
    - stack: the whole stack, as often as the mean of all k, rounded.

    `round` (see `rounding`) is for what is copied together: the block, the layer, the stack; copies are at least 1.
    Of n copies of a block, a dealt block or the stack only those are made of which half of the layers run:

        n = the largest n <= rounded(k) with  running(m) - running(m - 1) >= width / 2  for m = 2..n

    `running(m)` counts coefficients (before a correction) of `DEAD` and more. A depth that is asked for wins, by
    `target_layers` or by `target_layout`, the layout that must come out. `coefficient` and `correct` are those of
    `coefficients`; under `schedule` a pass that no layer asked for has no strength in dealt, layer and split plans.

    Raises `Refused` for a repetition of another depth, an unknown option, and a `target_layers` or `target_layout` that
    the plan does not give (the message says what would be right); also for a map that breaks the source's pattern
    where no `target_layout` says so. Source: growth README, GROWTH.md 2.
    """
    _check(kind, repetition, source_layout, round, coefficient, correct, passes_from)
    asked = _asked(repetition, passes_from)
    limits = asked if kind in ("dealt", "layer", "split") else [None] * len(asked)
    weights = [pass_weights(layer, repetition.alpha, MOST_PASSES, coefficient, limit)
               for layer, limit in zip(repetition.layers, limits, strict=True)]
    depths = (target_layers, None if target_layout is None else depth_of(target_layout))
    if kind == "split":
        slots, natural = _split(source_layout, asked, round)
    elif kind == "dealt":
        slots, natural = _dealt(source_layout, asked, weights, round, depths)
    elif kind == "map":
        slots, natural = _mapped(source_layout, layers, strict=target_layout is None)
    else:
        slots, natural = _repeated(kind, source_layout, asked, weights, round, depths)
    if target_layers is not None and len(slots) != target_layers:
        raise Refused(f"--target-layers {target_layers} is not what the {kind} plan gives: {len(slots)} layers in the "
                      f"layout {natural}" + _other_roundings(kind, source_layout, asked))
    options: dict[str, Any] = {"coefficient": coefficient, "correct": correct, "from": passes_from,
                               "alpha": list(repetition.alpha)}
    if kind != "map":
        options = {"round": round, "target_layers": target_layers} | options
    demands = tuple(Demand(layer.k_exec, float(passes), own_mass(layer, repetition.alpha, coefficient))
                    for layer, passes in zip(repetition.layers, asked, strict=True))
    entries = _entries(slots, repetition, source_layout, asked, limits, coefficient, correct)
    plan = Plan(kind, source_layout, natural, entries, demands, options)
    if kind != "map":
        refuse_disorder(plan)
    return plan if target_layout is None else fitted(plan, target_layout)


def disorder(plan: Plan) -> list[str]:
    """The places where copies 1 do not stand in the order of the source."""
    firsts = [(target, entry.source) for target, entry in enumerate(plan.entries) if entry.copy == 1]
    return [f"target layer {later} is pass 1 of source layer {source}, target layer {earlier} before it that of source "
            f"layer {before}" for (earlier, before), (later, source) in pairwise(firsts) if source <= before]


def refuse_disorder(plan: Plan) -> None:
    """Raise `Refused`, naming the plan and its entries, where copies 1 do not stand in the order of the source."""
    refuse_all(disorder(plan),
               f"the {plan.kind} plan from {plan.source_layout} to {plan.target_layout} loses the source's order:")


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


def _repeated(kind: str, source: Layout, asked: Sequence[Fraction], weights: _Strengths, round: str,
              depths: tuple[int | None, int | None]) -> tuple[list[Slot], Layout]:
    """Units of layers that are copied as a whole, each copy after the other: block, layer and stack plans."""
    every = range(len(source))
    together: dict[str, list[Sequence[int]]] = {
        "block": [block.layers for block in blocks(source)], "layer": [[layer] for layer in every], "stack": [every]}
    units = [unit(layers, asked) for layers in together[kind]]

    def running(index: int, copies: int) -> int:
        return sum(weights[layer][j] >= DEAD for layer in units[index].layers for j in range(copies))

    copies = rounded(units, round, depths[0]) if kind == "layer" else _copies(units, running, round, depths)
    slots = [Slot(layer, copy) for one, count in zip(units, copies, strict=True) for copy in range(1, count + 1)
             for layer in one.layers]
    if kind == "layer" or (kind == "stack" and len(source.segments) == 1):
        return slots, _layout(slots, source)
    if kind == "stack":
        return slots, Layout(source.segments * copies[0])
    return slots, with_copies(source, copies)


def _copies(units: Sequence[Unit], running: Callable[[int, int], int], round: str,
            depths: tuple[int | None, int | None]) -> tuple[int, ...]:
    """Copies by unit: rounded, without those that mostly do not run; running(u, n) counts layers of n copies of unit u.

    `depths`: the depth that must come out, and the one of a layout that must.
    """
    def worth_it() -> tuple[int, ...]:
        return tuple(running_groups(most, len(units[index].layers), partial(running, index))
                     for index, most in enumerate(rounded(units, round, None)))

    wanted, of_layout = depths
    if wanted is None:
        copies = rounded(units, round, None)
        return copies if depth(units, copies) == of_layout else worth_it()
    try:
        return rounded(units, round, wanted)
    except Refused:
        if depth(units, copies := worth_it()) == wanted:
            return copies
        raise


def _split(source: Layout, asked: Sequence[Fraction], round: str) -> tuple[list[Slot], Layout]:
    """Each layer's copies, dealt into groups of its block's pattern; groups are as many as the fullest type needs."""
    copies = rounded([unit((layer,), asked) for layer in range(len(source))], round, None)
    slots: list[Slot] = []
    groups = []
    for block in blocks(source):
        own = own_layers(block)
        hands = {kind: [Slot(layer, copy) for layer in layers for copy in range(1, copies[layer] + 1)]
                 for kind, layers in own.items()}
        groups.append(max(math.ceil(Fraction(len(hand), len(own[kind]))) for kind, hand in hands.items()))
        slots += deal(block, hands, groups[-1])
    return slots, with_copies(source, groups)


def _dealt(source: Layout, asked: Sequence[Fraction], weights: _Strengths, round: str,
           depths: tuple[int | None, int | None]) -> tuple[list[Slot], Layout]:
    """As many groups of each block as the block has copies, each slot given to the strongest pass that is left."""
    all_blocks = blocks(source)
    own = [own_layers(block) for block in all_blocks]
    units = [unit(block.layers, asked) for block in all_blocks]

    def hands(index: int, groups: int) -> dict[str, list[Slot]]:
        return {kind: strongest(layers, asked, weights, groups * len(layers)) for kind, layers in own[index].items()}

    def running(index: int, groups: int) -> int:
        return sum(weights[layer][copy - 1] >= DEAD for hand in hands(index, groups).values() for layer, copy in hand)

    copies = _copies(units, running, round, depths)
    slots = [slot for index, (block, groups) in enumerate(zip(all_blocks, copies, strict=True))
             for slot in deal(block, hands(index, groups), groups)]
    return slots, with_copies(source, copies)


def _mapped(source: Layout, layers: Sequence[int], strict: bool) -> tuple[list[Slot], Layout]:
    outside = [layer for layer in layers if not 0 <= layer < len(source)]
    if outside or not layers:
        raise Refused(f"the map names the source layers {outside}; layers are 0 to {len(source) - 1}" if outside else
                      "the map names no layer; name one source layer for each target layer")
    slots = [Slot(layer, layers[: at + 1].count(layer)) for at, layer in enumerate(layers)]
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


def _layout(slots: Sequence[Slot], source: Layout) -> Layout:
    """Whole repeats of the source's pattern where it has one and the types are that, else runs of one type."""
    types = "".join(source.types[slot.layer] for slot in slots)
    pattern = source.segments[0].pattern
    repeats, rest = divmod(len(types), len(pattern))
    if len(source.segments) == 1 and rest == 0 and types == pattern * repeats:
        return Layout((Segment(pattern, repeats),))
    return Layout(tuple(Segment(kind, len(list(run))) for kind, run in groupby(types)))


def _entries(slots: Sequence[Slot], repetition: Repetition, source: Layout, asked: Sequence[Fraction],
             limits: Sequence[Fraction | None], coefficient: str, correct: str) -> tuple[Entry, ...]:
    ratios = {layer: asked[layer] / unit(block.layers, asked).wanted for block in blocks(source)
              for layer in block.layers}
    copies = Counter(slot.layer for slot in slots if slot.copy > 0)
    given = {layer: strengths(repetition.layers[layer], repetition.alpha, count, ratios[layer], asked=limits[layer],
                              coefficient=coefficient, correct=correct) for layer, count in copies.items()}
    return tuple(Entry(layer, copy, given[layer][copy - 1] if copy else 0.0) for layer, copy in slots)


def _other_roundings(kind: str, source: Layout, asked: Sequence[Fraction]) -> str:
    if kind != "split":
        return ""
    return "; " + ", ".join(f"--round {way} gives {len(_split(source, asked, way)[0])}" for way in ROUNDS[:3])
