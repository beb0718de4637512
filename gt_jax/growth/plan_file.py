"""A plan in a file, with the pass counts that it was made from: what was measured, of which values and layers.

The counts go along so that a plan meets the same refusals, and leaves the same record, as the counts themselves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gt_jax.configs.layout import Layout
from gt_jax.errors import Refused, refuse_all
from gt_jax.growth.plan import disorder
from gt_jax.growth.plan_entries import Plan, plan_of, read_object
from gt_jax.growth.repetition import Repetition, from_json

COUNTS = "counts"


def plan_json(plan: Plan, counts: Repetition | None) -> dict[str, Any]:
    """`plan.to_json()`, and under `counts` the counts behind it: `origin`, the file's `sha256`, and its `values`."""
    if counts is None:
        return plan.to_json()
    values = finite_json(counts.to_json())
    return {**plan.to_json(), COUNTS: {"origin": counts.origin, "sha256": counts.sha256, "values": values}}


def finite_json(value: Any) -> Any:
    """A JSON value whose numbers that are none, such as NaN, are texts."""
    if isinstance(value, Mapping):
        return {name: finite_json(one) for name, one in value.items()}
    if isinstance(value, list):
        return [finite_json(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class PlanFile(NamedTuple):
    """A plan, the counts behind it where the file has any, and the file's whole object: it may be a pipe, read once."""

    plan: Plan
    counts: Repetition | None
    data: Mapping[str, Any]


def read_plan_file(path: Path) -> PlanFile:
    """The plan in a JSON file, one that --plan-out or a dry run with --json wrote, and its counts where it has any.

    Raises `Refused` naming the file and all that is wrong with it.
    """
    data = read_object(path)
    plan = plan_of(path, data)
    if (found := data.get(COUNTS)) is None:
        return PlanFile(plan, None, data)
    text = isinstance(found, Mapping) and isinstance(found.get("origin"), str)
    if not text or not isinstance(found.get("sha256"), str | None):
        raise Refused(f"plan file {path}: key 'counts' is no object with the texts origin and sha256, and values; "
                      "leave it as --plan-out wrote it")
    read = from_json(found.get("values"), f"plan file {path}: counts.values")
    if len(read.layers) != len(plan.source_layout):
        raise Refused(f"plan file {path}: counts are of {len(read.layers)} layers, source_layout {plan.source_layout} "
                      f"has {len(plan.source_layout)}")
    return PlanFile(plan, dataclasses.replace(read, origin=found["origin"], sha256=found.get("sha256")), data)


def plan_for(path: Path, depth: Layout | None) -> PlanFile:
    """`read_plan_file`; raises `Refused` where the plan is for other layers than those of `depth` (None: any), or
    loses their order without being a map.
    """
    file = read_plan_file(path)
    plan = file.plan
    if depth is not None and depth != plan.source_layout:
        raise Refused(f"plan file {path} is for a source of layout {plan.source_layout} ({len(plan.source_layout)} "
                      f"layers); this source is {depth} ({len(depth)} layers)")
    if plan.kind != "map":
        refuse_all(disorder(plan), f"plan file {path}: its {plan.kind} plan loses the source's order; make the plan "
                                   'anew, or where this order is meant, write "kind": "map" into the file:')
    return file


def unread(path: Path, there: Mapping[str, Any], used: Mapping[str, Any]) -> list[str]:
    """One line for each option of the growth that the file's object names, as a dry run's JSON does, and `used` has
    else."""
    return [f"plan file {path} says {name} {there[name]!r:.40}; the command line says it, and {value} is used"
            for name, value in used.items() if name in there and there[name] != value]
