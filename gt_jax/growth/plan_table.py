"""What a plan does, in lines for a reader: layer by layer, asked for and granted, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gt_jax.growth.plan import disorder
from gt_jax.growth.plan_entries import DEAD, Plan


def plan_lines(plan: Plan) -> list[str]:
    """The plan as two tables: every target layer, and every source layer's request beside what it was granted.

    `mass` is the sum of a layer's coefficients: what the recurrence would add over its k_exec passes, what the copies
    add, and their ratio. A slot that no pass asked for has no copy number: the layer is the identity. Copies and mass
    granted are those of layers that run; the others are marked as dead.
    """
    layers = [[target, kind, entry.source, entry.copy or "-", f"{entry.coefficient:.4f}",
               "dead" if entry.dead else ""]
              for target, (kind, entry) in enumerate(zip(plan.target_layout.types, plan.entries, strict=True))]
    served = zip(plan.source_layout.types, plan.demands, plan.granted, plan.copies, plan.mass_granted, plan.mass_kept,
                 strict=True)
    asked = [[source, kind, _copies(demand.passes), got, f"{demand.mass:.3f}", f"{given:.3f}", f"{kept:.0%}",
              _remark(demand.passes, got, copies)]
             for source, (kind, demand, got, copies, given, kept) in enumerate(served)]
    options = ", ".join(f"{name} {value}" for name, value in plan.options.items()
                        if value is not None)
    running, dead = len(plan.entries) - len(plan.dead), len(plan.dead)
    return [
        f"{plan.kind} plan: {plan.source_layout} ({len(plan.source_layout)} layers) -> "
        f"{plan.target_layout} ({len(plan.target_layout)} layers)",
        *([options] if options else []),
        *(["copies keep their gates: a coefficient is times each token's own weight"] if plan.keeps_gates else []), "",
        *table(["target", "type", "source", "copy", "coefficient", ""], layers), "",
        *table(["source", "type", "asked", "got", "mass asked", "mass got", "kept", ""], asked),
        f"asked for {_copies(sum(demand.passes for demand in plan.demands))} copies by "
        f"{plan.options.get('from', 'k_exec')}, got {running} layers that run"
        + (f" and {dead} dead {'layer' if dead == 1 else 'layers'}" if dead else "")
        + f"; coefficient mass kept in all: {plan.total_mass_kept:.0%}",
    ]


def warnings(plan: Plan, carry: str, gains: Sequence[float] | None = None, streams: bool = False) -> list[str]:
    """What a reader should know of a plan before it is carried out; `gains` are the source layers' own, if known."""
    return [*(f"the list loses the source's order: {line}" for line in disorder(plan)), *dead_layers(plan),
            *([] if gains is None else stopped_layers(plan, gains)), *unasked_layers(plan),
            *silent_layers(plan, carry, streams)]


def dead_layers(plan: Plan) -> list[str]:
    """One line that names the target layers that do next to nothing, and what they stand for; none where all run."""
    named = [f"{target} ({_stands_for(plan, target)})" for target in plan.dead]
    if not named:
        return []
    return [f"dead layers: the coefficient is below {DEAD:g} in {len(named)} of {len(plan.entries)} target layers: "
            + ", ".join(named)]


def stopped_layers(plan: Plan, gains: Sequence[float]) -> list[str]:
    """One line that names the target layers that a gain of the source keeps from running; none where all are open."""
    named = [f"{target} ({_stands_for(plan, target)}, of gain {gains[plan.entries[target].source]:.2g})"
             for target in plan.stopped(gains)]
    if not named:
        return []
    return [f"layers dead in the source stay so: coefficient times the source's gain is below {DEAD:g} in target "
            "layers " + ", ".join(named)]


def unasked_layers(plan: Plan) -> list[str]:
    """One line that names the copies that run at the schedule's strength though their layer asked for fewer passes.

    Block and stack plans repeat whole units, so they have such copies; none under `expected`, where a pass that few
    tokens run is weak.
    """
    named = [f"{target} ({_stands_for(plan, target)}, at {entry.coefficient:.2f})"
             for target, entry in enumerate(plan.entries)
             if not entry.dead and entry.copy - 1 >= plan.demands[entry.source].passes]
    if not named or plan.options.get("coefficient") != "schedule":
        return []
    return ["passes that nobody asked for run in target layers " + ", ".join(named)]


def silent_layers(plan: Plan, carry: str, streams: bool) -> list[str]:
    """What a coefficient of 0 means where the gain does not carry it; `streams`: with hyper-connections."""
    silent = ", ".join(str(target) for target, entry in enumerate(plan.entries) if entry.coefficient == 0)
    if not silent or carry == "gain":
        return []
    warnings = []
    if carry == "weights":
        warnings.append(f"carry weights at coefficient 0 makes every weight of target layers {silent} 0; "
                        "such layers get no gradient (carry gain or output does not have this)")
    if streams:
        warnings.append(f"carry {carry} at coefficient 0 does not make target layers {silent} the identity: they still "
                        "mix the streams of the hyper-connections (carry gain does make them)")
    return warnings


def tensor_lines(tensors: Sequence[dict[str, Any]], dropped: Sequence[str], moments: int = 0) -> list[str]:
    """Every target tensor with its source shape, its shape, rule and bytes, then the dropped tensors by name; so many
    bytes of second `moments` are written too."""
    rows = [[row["path"], _shape(row["old_shape"]), _shape(row["shape"]), row["dtype"], row["rule"],
             size(row["bytes"])] for row in tensors]
    total = sum(row["bytes"] for row in tensors)
    return [*table(["tensor", "old shape", "new shape", "dtype", "rule", "bytes"], rows),
            f"{len(tensors)} tensors, {with_moments(total + moments, moments)}", f"dropped: {len(dropped)} tensors",
            *[f"  {path}" for path in dropped]]


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Columns of equal width; a column whose cells are all numbers is set to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    right = [all(_numeric(row[index]) for row in cells) for index in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = [cell.rjust(width) if to_right else cell.ljust(width)
                  for cell, width, to_right in zip(row, widths, right, strict=True)]
        return "  ".join(padded).rstrip()

    return [line(head), *map(line, cells)]


def with_moments(total: int, moments: int) -> str:
    """Bytes for a reader, and how many of them are second moments."""
    return size(total) + (f" ({size(moments)} of it second moments)" if moments else "")


def size(count: int) -> str:
    """Bytes for a reader: 640 B, 1.5 KiB, 15.5 GiB."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _copies(count: float) -> str:
    """Whole numbers as such, means with two digits."""
    return f"{count:.0f}" if count == int(count) else f"{count:.2f}"


def _remark(asked: float, got: int, copies: int) -> str:
    """What a layer lacks or has too much of, and how many of its copies are dead."""
    said = []
    if got < asked:
        said.append(f"{_copies(asked - got)} short")
    elif got > asked:
        said.append(f"{_copies(got - asked)} more")
    if copies > got:
        said.append(f"{copies - got} dead")
    return ", ".join(said)


def _stands_for(plan: Plan, target: int) -> str:
    entry = plan.entries[target]
    return f"pass {entry.copy} of layer {entry.source}" if entry.copy else "the identity"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _numeric(cell: str) -> bool:
    return bool(cell) and set(cell) <= set("0123456789.%-")
