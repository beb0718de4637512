"""Where a grown checkpoint comes from, as its metadata say: the plan, and the values of its source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gt_jax.checkpoints.folders import StrPath
from gt_jax.configs.lineage import newest
from gt_jax.configs.standing import standing
from gt_jax.errors import Refused
from gt_jax.growth.plan_entries import Plan
from gt_jax.growth.plan_file import finite_json
from gt_jax.growth.repetition import Repetition


def grown_plan(metadata: Mapping[str, Any]) -> Plan | None:
    """The plan that a grown checkpoint, or one trained on from it, carries; None for one that was not grown."""
    grown = newest(metadata, "grown_from")
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

    known = newest(metadata, "grown_from").get("content_hash")
    if known is None:
        return None
    found = checkpoint.content_hash(source, ("params", "statistics"))
    return None if found == known else found


def counts_record(counts: Repetition | None) -> dict[str, Any]:
    """{"counts": where the counts behind a plan came from}, as a grown checkpoint keeps it; {} without counts.

    Numbers that are none, which a file of another program may have in its `_meta`, are texts, as in a plan file.
    """
    if counts is None:
        return {}
    measured = finite_json(counts.meta)
    record: dict[str, Any] = {"origin": counts.origin, "k_exec": list(counts.k_exec), "measured": measured}
    return {"counts": record if counts.sha256 is None else {**record, "sha256": counts.sha256}}


def standing_record(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """{"stood": where in its schedule the source's training stood}, as a grown checkpoint keeps it; {} if unknown."""
    at = standing(metadata)
    return {} if at is None else {"stood": at.to_json()}


def refuse_other_counts(counts: Repetition | None, content_hash: str, source: StrPath) -> None:
    """Raise `Refused` where the counts say that they were measured on other values than those of `source`."""
    measured = None if counts is None else counts.content_hash
    if counts is not None and measured is not None and measured != content_hash:
        raise Refused(f"{counts.origin} was measured on a checkpoint of other values (_meta.content_hash "
                      f"{measured[:12]}, {counts.meta.get('source')} at step {counts.meta.get('step')}) than {source} "
                      f"({content_hash[:12]}); measure this source")
