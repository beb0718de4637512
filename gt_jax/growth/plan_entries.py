"""The plan as data: entries by target layer, what each source layer asked for and got, to JSON and back.

Plans are data. They are printed, stored in the grown checkpoint and read back from JSON; nothing here needs jax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gt_jax.configs.layout import Layout, parse
from gt_jax.errors import Refused, refuse_all
from gt_jax.files import is_number, read_json

GATES = "gates"  # in place of a way to strengths: each token's own weight, in the model itself
DEAD = 0.02  # a layer that adds less than this part of its update is dead: it costs a layer and does next to nothing


@dataclasses.dataclass(frozen=True)
class Entry:
    """One target layer: a copy of layer `source` that stands for pass `copy` (from 1) at strength `coefficient`.

    `copy` 0 with coefficient 0 fills a slot that no pass asked for: the layer is the identity.
    """

    source: int
    copy: int
    coefficient: float

    @property
    def dead(self) -> bool:
        """Whether the layer does next to nothing."""
        return abs(self.coefficient) < DEAD


class Demand(NamedTuple):
    """What a source layer asks of a plan.

    `k_exec`: passes that nearly all tokens need. `passes`: those that the plan was made from, which may be a mean.
    `mass`: the recurrence's own sum of coefficients over k_exec passes.
    """

    k_exec: int
    passes: float
    mass: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """Entries by target layer, and what every source layer asked for.

    A target layer whose coefficient is below `DEAD` does next to nothing: `dead` names it, and `granted` and
    `mass_granted` do not count it. `options` says how the plan was made. Raises `Refused` listing every entry that does
    not fit.
    """

    kind: str
    source_layout: Layout
    target_layout: Layout
    entries: tuple[Entry, ...]
    demands: tuple[Demand, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        refuse_all(_problems(self), f"the {self.kind} plan does not fit:")

    @property
    def keeps_gates(self) -> bool:
        """Whether the child's layers keep halting gates; then coefficients are the strength without the weight."""
        return self.options.get("coefficient") == GATES

    @property
    def k_exec(self) -> tuple[int, ...]:
        """Passes that nearly all tokens need, by source layer."""
        return tuple(demand.k_exec for demand in self.demands)

    @property
    def copies(self) -> tuple[int, ...]:
        """Copies by source layer, dead ones among them."""
        return self._count([entry for entry in self.entries if entry.copy > 0])

    @property
    def granted(self) -> tuple[int, ...]:
        """Copies that run, by source layer."""
        return self._count([entry for entry in self.entries if not entry.dead])

    @property
    def dead(self) -> tuple[int, ...]:
        """Target layers that do next to nothing, the identity among them."""
        return tuple(target for target, entry in enumerate(self.entries) if entry.dead)

    def stopped(self, gains: Sequence[float]) -> tuple[int, ...]:
        """Target layers with a coefficient that would run, of source layers whose own gain stops them: `gains` [l]."""
        return tuple(target for target, entry in enumerate(self.entries)
                     if not entry.dead and abs(entry.coefficient * gains[entry.source]) < DEAD)

    @property
    def mass_granted(self) -> tuple[float, ...]:
        """Sum of the coefficients of a source layer's copies that run, by source layer."""
        return tuple(math.fsum(entry.coefficient for entry in self.entries if entry.source == layer and not entry.dead)
                     for layer in range(len(self.source_layout)))

    @property
    def mass_kept(self) -> tuple[float, ...]:
        """mass_granted / the mass asked for, by source layer (1 where nothing was asked for)."""
        return tuple(share(got, demand.mass) for got, demand in zip(self.mass_granted, self.demands, strict=True))

    @property
    def total_mass_kept(self) -> float:
        """The same share over all layers together."""
        return share(math.fsum(self.mass_granted), math.fsum(demand.mass for demand in self.demands))

    def _count(self, entries: Sequence[Entry]) -> tuple[int, ...]:
        sources = [entry.source for entry in entries]
        return tuple(sources.count(layer) for layer in range(len(self.source_layout)))

    def to_json(self) -> dict[str, Any]:
        """One JSON object: the dry run's contract (layout, layers, requested, granted) and what `from_json` needs.

        Under `requested` stands every layer's k_exec, under `asked` its passes, under `mass.requested` its mass.
        """
        layers = [{"target": target, "type": kind, **dataclasses.asdict(entry)}
                  for target, (kind, entry) in enumerate(zip(self.target_layout.types, self.entries, strict=True))]
        mass = {"requested": [demand.mass for demand in self.demands], "granted": list(self.mass_granted),
                "kept": list(self.mass_kept), "total_kept": self.total_mass_kept}
        return {"layout": str(self.target_layout), "layers": layers, "requested": list(self.k_exec),
                "asked": [demand.passes for demand in self.demands], "granted": list(self.granted),
                "dead": list(self.dead), "mass": mass, "kind": self.kind, "source_layout": str(self.source_layout),
                "options": dict(self.options)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Read `to_json`'s object, `asked` as k_exec where an earlier version left it out.

        Raises `Refused` naming every key that is missing or of the wrong kind.
        """
        refuse_all(_json_problems(data), "the plan does not read from this JSON:")
        entries = tuple(Entry(row["source"], row["copy"], float(row["coefficient"])) for row in data["layers"])
        source = parse(data["source_layout"])
        k_exec, asked, masses = data["requested"], data.get("asked") or data["requested"], data["mass"]["requested"]
        refuse_all([f"{name} has {len(values)} values for the {depth_of(source)} layers of {source}"
                    for name, values in (("requested", k_exec), ("asked", asked), ("mass.requested", masses))
                    if len(values) != depth_of(source)], f"the {data['kind']} plan does not fit:")
        demands = tuple(Demand(k, float(passes), float(mass))
                        for k, passes, mass in zip(k_exec, asked, masses, strict=True))
        return cls(data["kind"], source, parse(data["layout"]), entries, demands, dict(data.get("options", {})))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a plan file; raises `Refused` naming the file."""
    if path.is_dir():
        raise Refused(f"plan file {path} is a directory; name a JSON file that --plan-out wrote")
    try:
        data = read_json(path, finite=False)
    except FileNotFoundError:
        raise Refused(f"plan file {path} does not exist; --plan-out writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"plan file {path} cannot be read: {error}") from None
    except ValueError as error:
        raise Refused(f"plan file {path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise Refused(f"plan file {path} is not an object with the keys layout, source_layout, layers, ...")
    return data


def plan_of(path: Path, data: Mapping[str, Any]) -> Plan:
    """The plan in the object of file `path`; raises `Refused` naming the file and all that is wrong with it."""
    try:
        return Plan.from_json(data)
    except Refused as error:
        raise Refused(f"plan file {path}: {error}") from None


def depth_of(layout: Layout) -> int:
    """Layers of a layout that a user wrote: `len` and `types` fail on DDDG*99999999999999999999, this does not."""
    return sum(len(segment.pattern) * segment.repeats for segment in layout.segments)


def share(part: float, whole: float) -> float:
    """part / whole, and 1 where the whole is nothing."""
    return part / whole if whole > 0 else 1.0


def _problems(plan: Plan) -> list[str]:
    wrong = []
    if len(plan.entries) != depth_of(plan.target_layout):
        wrong.append(f"{len(plan.entries)} entries for the {depth_of(plan.target_layout)} layers of "
                     f"{plan.target_layout}")
    if len(plan.demands) != depth_of(plan.source_layout):
        wrong.append(f"{len(plan.demands)} demands for the {depth_of(plan.source_layout)} layers of "
                     f"{plan.source_layout}")
    for layer, demand in enumerate(plan.demands):  # by the names that they have in a plan file
        wrong += [f"{name}[{layer}] is {value}; a finite number, 0 or more, is needed"
                  for name, value in zip(("requested", "asked", "mass.requested"), demand, strict=True)
                  if not (math.isfinite(value) and value >= 0)]
    if wrong:
        return wrong
    source, target = plan.source_layout.types, plan.target_layout.types
    for index, (kind, entry) in enumerate(zip(target, plan.entries, strict=True)):
        if not 0 <= entry.source < len(source):
            wrong.append(f"target layer {index}: source layer {entry.source} is not in 0..{len(source) - 1}")
        elif source[entry.source] != kind:
            wrong.append(f"target layer {index} is {kind}, its source layer {entry.source} is {source[entry.source]}")
        if not math.isfinite(entry.coefficient) or entry.copy < 0 or (entry.copy == 0 and entry.coefficient != 0):
            wrong.append(f"target layer {index}: copy {entry.copy} at coefficient {entry.coefficient}; a copy from 1 "
                         "with a finite coefficient is needed, or copy 0 at coefficient 0 for the identity")
        elif entry.copy > len(target):
            wrong.append(f"target layer {index}: copy {entry.copy}; there are {len(target)} layers in all, so copies "
                         "are numbered from 1 to that")
    return wrong


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return _is(value, int) and is_number(value)


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number inside a JSON value, with the keys that lead to it."""
    if isinstance(value, Mapping | list):
        for key, one in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _numbers(one, f"{name}.{key}" if name else str(key))
    elif _is(value, int) or _is(value, float):
        yield name, value


def _text_or_none(value: Any) -> bool:
    return value is None or _is(value, str)


_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{name: (_text_or_none, "a text") for name in ("round", "coefficient", "correct", "from")},
    "target_layers": (lambda value: value is None or _whole(value), "a whole number"),
    "alpha": (lambda value: value is None or (isinstance(value, list) and all(map(is_number, value))),
              "a list of finite numbers"),
}  # fmt: skip


def _json_problems(data: Mapping[str, Any]) -> list[str]:
    wrong = [f"key {key!r} is {data.get(key)!r}; a text is needed" for key in ("kind", "source_layout", "layout")
             if not _is(data.get(key), str)]
    layers, mass, options = data.get("layers"), data.get("mass"), data.get("options", {})
    masses = mass.get("requested") if isinstance(mass, Mapping) else None
    for name, values, fits, what in (("requested", data.get("requested"), _whole, "whole numbers"),
                                     ("mass.requested", masses, is_number, "finite numbers"),
                                     ("asked", data.get("asked", []), is_number, "finite numbers")):
        if not isinstance(values, list) or not all(map(fits, values)):
            wrong.append(f"key {name!r} is not a list of {what}, one a source layer")
    if not isinstance(options, Mapping):
        wrong.append("key 'options' is not an object")
    else:
        wrong += [f"key 'options.{name}' is {options[name]!r:.60}; {words} is needed"
                  for name, (fits, words) in _OPTIONS.items() if not fits(options.get(name))]
        wrong += [f"key 'options.{name}' is {value}; a finite number is needed"
                  for name, value in _numbers(options) if name not in _OPTIONS and not is_number(value)]
        if options.get("coefficient") == GATES and not isinstance(options.get("alpha"), list):
            wrong.append(f"key 'options.alpha' is {options.get('alpha')!r:.60}; of a plan that keeps gates the "
                         "strengths of the source's passes are needed, a list of finite numbers")
    if not isinstance(layers, list):
        return [*wrong, "key 'layers' is not a list, one object a target layer"]
    fields = {"source": _whole, "copy": _whole, "coefficient": is_number}
    for index, row in enumerate(layers):
        missing = [name for name, fits in fields.items() if not isinstance(row, Mapping) or not fits(row.get(name))]
        wrong += [f"layers[{index}].{name} is missing or not a finite {'' if name == 'coefficient' else 'whole '}number"
                  for name in missing]
        if not missing and row.get("target", index) != index:
            wrong.append(f"layers[{index}].target is {row['target']}; layers stand in order from 0")
    return wrong
