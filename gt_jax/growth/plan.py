"""A growth plan: which source layer stands at which target position, as which pass, at which strength.

Plans are data. They are printed, stored in the grown checkpoint and read back from JSON; nothing here needs jax.

- A block plan copies whole blocks of the pattern (DDDG), so every target layer has the type of its source layer.
- Copy j of a layer stands for pass j of the recurrence. It exists for every layer of the block, also for one that
  asked for fewer passes: `schedule` still gives it alpha_j (the block repeats as a whole, as in the growth README),
  `expected` gives it alpha_j * survival_j, which is near 0 there because few tokens are left.
- Passes beyond the last alpha go on at the last alpha; survival beyond the measured passes is 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from gt_jax.errors import Refused, refuse_all
from gt_jax.growth.repetition import MOST_PASSES, LayerRepetition, Repetition
from gt_jax.layout import Layout, Segment, parse

ROUNDS = ("up", "down", "nearest", "balance")
COEFFICIENTS = ("schedule", "expected")
CORRECTIONS = ("none", "ratio", "capped", "mass")
PATTERN = "DDDG"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One target layer: a copy of layer `source` that stands for pass `copy` (from 1) at strength `coefficient`.

    `copy` 0 with coefficient 0 fills a slot that no pass asked for: the layer is the identity.
    """

    source: int
    copy: int
    coefficient: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """Entries by target layer, and what every source layer asked for.

    `requested` holds k_exec and `mass_requested` the recurrence's own sum of coefficients over those passes, both by
    source layer; `options` says how the plan was made. Raises `Refused` listing every entry that does not fit.
    """

    kind: str
    source_layout: Layout
    target_layout: Layout
    entries: tuple[Entry, ...]
    requested: tuple[int, ...]
    mass_requested: tuple[float, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        refuse_all(_problems(self), f"the {self.kind} plan does not fit:")

    @property
    def granted(self) -> tuple[int, ...]:
        """Copies by source layer."""
        copies = [entry.source for entry in self.entries if entry.copy > 0]
        return tuple(copies.count(layer) for layer in range(len(self.source_layout)))

    @property
    def mass_granted(self) -> tuple[float, ...]:
        """Sum of the coefficients of a source layer's copies, by source layer."""
        return tuple(math.fsum(entry.coefficient for entry in self.entries if entry.source == layer)
                     for layer in range(len(self.source_layout)))

    @property
    def mass_kept(self) -> tuple[float, ...]:
        """mass_granted / mass_requested by source layer (1 where nothing was asked for)."""
        return tuple(map(_share, self.mass_granted, self.mass_requested))

    @property
    def total_mass_kept(self) -> float:
        """The same share over all layers together."""
        return _share(math.fsum(self.mass_granted), math.fsum(self.mass_requested))

    def to_json(self) -> dict[str, Any]:
        """One JSON object: the dry run's contract (layout, layers, requested, granted) and what `from_json` needs."""
        layers = [{"target": target, "type": kind, **dataclasses.asdict(entry)}
                  for target, (kind, entry) in enumerate(zip(self.target_layout.types, self.entries, strict=True))]
        mass = {"requested": list(self.mass_requested), "granted": list(self.mass_granted),
                "kept": list(self.mass_kept), "total_kept": self.total_mass_kept}
        return {"layout": str(self.target_layout), "layers": layers, "requested": list(self.requested),
                "granted": list(self.granted), "mass": mass, "kind": self.kind,
                "source_layout": str(self.source_layout), "options": dict(self.options)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Read `to_json`'s object; raises `Refused` naming every key that is missing or of the wrong kind."""
        refuse_all(_json_problems(data), "the plan does not read from this JSON:")
        entries = tuple(Entry(row["source"], row["copy"], float(row["coefficient"])) for row in data["layers"])
        mass = tuple(float(value) for value in data["mass"]["requested"])
        return cls(data["kind"], parse(data["source_layout"]), parse(data["layout"]), entries,
                   tuple(data["requested"]), mass, dict(data.get("options", {})))


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 1.0


def _problems(plan: Plan) -> list[str]:
    source, target = plan.source_layout.types, plan.target_layout.types
    wrong = []
    if len(plan.entries) != len(target):
        wrong.append(f"{len(plan.entries)} entries for the {len(target)} layers of {plan.target_layout}")
    for name, values in (("requested", plan.requested), ("mass_requested", plan.mass_requested)):
        if len(values) != len(source):
            wrong.append(f"{name} has {len(values)} values for the {len(source)} layers of {plan.source_layout}")
    for index, (kind, entry) in enumerate(zip(target, plan.entries, strict=False)):
        if not 0 <= entry.source < len(source):
            wrong.append(f"target layer {index}: source layer {entry.source} is not in 0..{len(source) - 1}")
        elif source[entry.source] != kind:
            wrong.append(f"target layer {index} is {kind}, its source layer {entry.source} is {source[entry.source]}")
        if not math.isfinite(entry.coefficient) or entry.copy < 0 or (entry.copy == 0 and entry.coefficient != 0):
            wrong.append(f"target layer {index}: copy {entry.copy} at coefficient {entry.coefficient}; a copy from 1 "
                         "with a finite coefficient is needed, or copy 0 at coefficient 0 for the identity")
    return wrong


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _json_problems(data: Mapping[str, Any]) -> list[str]:
    number = (int, float)
    wrong = [f"key {key!r} is {data.get(key)!r}; a text is needed" for key in ("kind", "source_layout", "layout")
             if not _is(data.get(key), str)]
    requested, layers, mass = data.get("requested"), data.get("layers"), data.get("mass")
    masses = mass.get("requested") if isinstance(mass, Mapping) else None
    if not isinstance(requested, list) or not all(_is(value, int) for value in requested):
        wrong.append("key 'requested' is not a list of whole numbers, one a source layer")
    if not isinstance(masses, list) or not all(_is(value, number) for value in masses):
        wrong.append("key 'mass.requested' is not a list of numbers, one a source layer")
    if not isinstance(data.get("options", {}), Mapping):
        wrong.append("key 'options' is not an object")
    if not isinstance(layers, list):
        return [*wrong, "key 'layers' is not a list, one object a target layer"]
    fields: dict[str, type | tuple[type, ...]] = {"source": int, "copy": int, "coefficient": number}
    for index, row in enumerate(layers):
        missing = [name for name, kind in fields.items()
                   if not isinstance(row, Mapping) or not _is(row.get(name), kind)]
        wrong += [f"layers[{index}].{name} is missing or not a number" for name in missing]
        if not missing and row.get("target", index) != index:
            wrong.append(f"layers[{index}].target is {row['target']}; layers stand in order from 0")
    return wrong


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
    if len(found) != count:
        raise Refused(f"{repetition.origin}: {count} layers, but _meta.layout {found} has {len(found)}")
    return found


@dataclasses.dataclass(frozen=True)
class _Block:
    """One repeat of a segment's pattern: its source layers in order, and the passes that they ask for together."""

    segment: int
    layers: tuple[int, ...]
    passes: int

    @property
    def wanted(self) -> Fraction:
        return Fraction(self.passes, len(self.layers))


def block_plan(repetition: Repetition, source_layout: Layout, *, round: str = "up", target_layers: int | None = None,
               coefficient: str = "expected", correct: str = "none") -> Plan:
    """Copy whole blocks: n_b = (sum of k_exec in block b) / (layers of its pattern), rounded, at least 1.

    `round` up, down, nearest (a half goes up), or balance: the largest remainder method spreads `target_layers`
    (by default the nearest depth to the sum of k_exec) over the blocks in proportion to their sums, ties to the
    earlier block. Coefficients c of copy j of layer l, w_j = alpha_j (schedule) or alpha_j * survival_j (expected):
    none c = w_j; ratio c = w_j * k_l / mean k of the block; capped c = w_j * min(that ratio, 1);
    mass c = w_j * (sum of w over the k_l passes) / (sum of w over the copies).

    Raises `Refused` for a repetition of another depth, an unknown option, or `target_layers` that the rounding does
    not give (the message says which depths can be reached, and how). Source: growth README, GROWTH.md 2.
    """
    _check_options(round, coefficient, correct)
    if len(repetition.layers) != len(source_layout):
        raise Refused(f"{repetition.origin} counts {len(repetition.layers)} layers, the source layout {source_layout} "
                      f"has {len(source_layout)}")
    blocks = _blocks(repetition, source_layout)
    copies = _rounded(blocks, round, target_layers)
    depth = _depth(blocks, copies)
    if target_layers is not None and depth != target_layers:
        raise Refused(f"--target-layers {target_layers} is not what --round {round} gives ({depth} layers); "
                      + _reachable(blocks, target_layers))
    entries: list[Entry] = []
    for block, count in zip(blocks, copies, strict=True):
        strengths = {layer: _coefficients(repetition, layer, block, count, coefficient, correct)
                     for layer in block.layers}
        entries += [Entry(layer, copy + 1, strengths[layer][copy]) for copy in range(count) for layer in block.layers]
    target = Layout(tuple(
        Segment(segment.pattern, sum(n for block, n in zip(blocks, copies, strict=True) if block.segment == index))
        for index, segment in enumerate(source_layout.segments)))
    masses = tuple(math.fsum(_weights(layer, repetition.alpha, layer.k_exec, coefficient))
                   for layer in repetition.layers)
    options = {"round": round, "target_layers": target_layers, "coefficient": coefficient, "correct": correct,
               "alpha": list(repetition.alpha)}
    return Plan("block", source_layout, target, tuple(entries), repetition.k_exec, masses, options)


def _check_options(round: str, coefficient: str, correct: str) -> None:
    given = (("round", round, ROUNDS), ("coefficient", coefficient, COEFFICIENTS), ("correct", correct, CORRECTIONS))
    refuse_all([f"{name} {value!r} is not one of {', '.join(known)}" for name, value, known in given
                if value not in known], "the plan's options are not valid:")


def _blocks(repetition: Repetition, layout: Layout) -> tuple[_Block, ...]:
    blocks, first = [], 0
    for index, segment in enumerate(layout.segments):
        for _ in range(segment.repeats):
            layers = tuple(range(first, first + len(segment.pattern)))
            blocks.append(_Block(index, layers, sum(repetition.layers[layer].k_exec for layer in layers)))
            first += len(segment.pattern)
    return tuple(blocks)


def _depth(blocks: Sequence[_Block], copies: Sequence[int]) -> int:
    return sum(len(block.layers) * count for block, count in zip(blocks, copies, strict=True))


def _rounded(blocks: Sequence[_Block], round: str, target_layers: int | None) -> tuple[int, ...]:
    if round == "balance":
        return _balanced(blocks, target_layers)
    if round == "up":
        return tuple(math.ceil(block.wanted) for block in blocks)
    half = Fraction(1, 2) if round == "nearest" else Fraction(0)
    return tuple(max(1, math.floor(block.wanted + half)) for block in blocks)


def _balanced(blocks: Sequence[_Block], target_layers: int | None) -> tuple[int, ...]:
    widths = {len(block.layers) for block in blocks}
    if len(widths) > 1:
        raise Refused("--round balance needs blocks of one length; this layout has segments of different patterns")
    (width,) = widths
    total = sum(block.passes for block in blocks)
    depth = target_layers if target_layers is not None else width * max(len(blocks), math.floor(
        Fraction(total, width) + Fraction(1, 2)))
    least, most = width * len(blocks), width * len(blocks) * MOST_PASSES
    if depth % width or not least <= depth <= most:
        raise Refused(f"--target-layers {depth} cannot be reached: --round balance gives any multiple of {width} "
                      f"from {least} (every block once) to {most}")
    shares = [Fraction(block.passes * depth, total * width) for block in blocks]
    copies = [max(1, math.floor(share)) for share in shares]
    while (missing := depth // width - sum(copies)) != 0:
        step = 1 if missing > 0 else -1
        movable = [index for index, count in enumerate(copies) if step > 0 or count > 1]
        copies[max(movable, key=lambda index: (step * (shares[index] - copies[index]), -index))] += step
    return tuple(copies)


def _reachable(blocks: Sequence[_Block], target_layers: int) -> str:
    ways = [f"--round {way} gives {_depth(blocks, _rounded(blocks, way, None))}" for way in ROUNDS[:3]]
    try:
        _balanced(blocks, target_layers)
        ways.append(f"--round balance gives {target_layers} with this --target-layers")
    except Refused as error:
        ways.append(str(error))
    return "; ".join(ways)


def _weights(layer: LayerRepetition, alpha: Sequence[float], passes: int, coefficient: str) -> list[float]:
    """The recurrence's weight of passes 1..`passes`: alpha_j, times survival_j for `expected`."""
    strengths = [alpha[min(j, len(alpha) - 1)] for j in range(passes)]
    if coefficient == "schedule":
        return strengths
    survival = [*layer.survival, *[0.0] * passes]
    return [strength * survival[j] for j, strength in enumerate(strengths)]


def _coefficients(repetition: Repetition, layer: int, block: _Block, copies: int, coefficient: str,
                  correct: str) -> list[float]:
    counts = repetition.layers[layer]
    weights = _weights(counts, repetition.alpha, copies, coefficient)
    factor = 1.0
    if correct in ("ratio", "capped"):
        factor = float(counts.k_exec / block.wanted)
    if correct == "capped":
        factor = min(factor, 1.0)
    if correct == "mass":
        own = math.fsum(_weights(counts, repetition.alpha, counts.k_exec, coefficient))
        factor = _share(own, math.fsum(weights))
    return [weight * factor for weight in weights]
