"""Where a grown checkpoint comes from, as its metadata say: the plan, and the values of its source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gt_jax.checkpoints.folders import StrPath
from gt_jax.errors import Refused
from gt_jax.growth.plan_entries import Plan


def grown_plan(metadata: Mapping[str, Any]) -> Plan | None:
    """The plan that a grown checkpoint, or one trained on from it, carries; None for one that was not grown."""
    grown = metadata.get("grown_from")
    return Plan.from_json(grown["plan"]) if isinstance(grown, Mapping) and "plan" in grown else None


def stored_plan(metadata: Mapping[str, Any], path: StrPath) -> Plan:
    """`grown_plan`; raises `Refused` where there is none."""
    plan = grown_plan(metadata)
    if plan is None:
        raise Refused(f"{path} was not grown: its metadata has no grown_from with a plan; name a checkpoint that "
                      "gt_jax.grow wrote")
    return plan


def changed_content_hash(metadata: Mapping[str, Any], source: StrPath) -> str | None:
    """The content hash of `source` where `metadata` name another one; None where they agree or do not say.

    Reads all of the source's model.
    """
    from gt_jax.checkpoints import checkpoint

    known = metadata["grown_from"].get("content_hash")
    if known is None:
        return None
    found = checkpoint.content_hash(source, ("params", "statistics"))
    return None if found == known else found
