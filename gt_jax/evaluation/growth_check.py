"""What a growth says of itself at its end: the child as it lies on the disk, beside its source.

- Every byte of the child is read back and compared with its checksums.
- Pass 1 of the source's layers stands in their order, and every gain on the disk is its source's times the coefficient
  that the plan gives it (where gains carry the coefficients).
- A few held-out batches of the source's own text go through both models: loss gap, KL divergence, top-1 agreement, with
  intervals over documents. Where that cannot be done the reason is said: no text is known, the text cannot be read any
  more, or the machine does not hold both models. It is no reason to fail.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.check import check
from gt_jax.configs.lineage import trainings
from gt_jax.devices.sharding import Rules, mesh_for_rows
from gt_jax.errors import Failed, Refused
from gt_jax.evaluation.held_out_rows import held_out_rows
from gt_jax.evaluation.loading import data_config
from gt_jax.evaluation.model_files import Checkpoint, open_checkpoint
from gt_jax.evaluation.predictions import compare_predictions
from gt_jax.growth.plan_entries import Plan
from gt_jax.growth.provenance import stored_plan
from gt_jax.monitoring.metrics import json_values
from gt_jax.text.batches import Text, open_text

BATCHES = 4
ROOM = 1.5  # bytes for two models, their activations and what compiling takes, over the bytes of the two models

Say = Callable[[str], None]


def check_growth(
    source: Path, target: Path, say: Say = lambda line: None, *, alone: bool = True
) -> dict[str, Any]:  # fmt: skip
    """Read `target` back and compare it with the `source` that it was grown from; JSON values.

    "files" and "bytes" compared, "order", and "predictions" (those of `compare_predictions`) or "not_compared", the
    reason. Not `alone`, as one process of several, it compares no predictions. Raises `Failed` where the child on the
    disk is not what was written, or not what its plan says.
    """
    say("reading the child back")
    read = check(target)
    if read.damaged:
        raise Failed(f"{target} was written, but does not read back: "
                     + "; ".join(f"{one['file']} differs" for one in read.damaged)
                     + "; test memory and disk, remove it and grow again")  # fmt: skip
    before, after = open_checkpoint(source), open_checkpoint(target)
    wrong = _wrong_gains(before, after)
    if wrong:
        raise Failed(f"{target} is not what its plan says: {'; '.join(wrong)}; remove it and grow again")
    plan = stored_plan(after.metadata, target)
    found: dict[str, Any] = {"files": read.checked, "bytes": read.bytes, "order": order_of(plan)}
    try:
        if not alone:
            raise Refused("several processes grew it; python -m gt_jax.verify runs on a mesh of all of them")
        text = _own_text(before)
        _refuse_no_room(before, after)
    except Refused as reason:
        return {**found, "not_compared": str(reason)}
    rows = held_out_rows(text, BATCHES)
    with jax.set_mesh(mesh_for_rows(1)):
        compared = compare_predictions((before.config, before.load()), (after.config, after.load()), rows, Rules(), say)
    return json_values({**found, "text": text.summary(), "predictions": compared})


def order_of(plan: Plan) -> str:
    """Whether pass 1 of the source's layers stands in their order: "kept", or what does not."""
    firsts = [entry.source for entry in plan.entries if entry.copy == 1]
    return "kept" if firsts == sorted(firsts) else f"pass 1 of the source's layers stands as {firsts}"


def check_lines(found: Mapping[str, Any]) -> list[str]:
    """The result for a reader."""
    lines = [f"read back: {found['files']} files, {found['bytes']:,} bytes, as they were written; order of the "
             f"source's layers: {found['order']}"]
    if "not_compared" in found:
        return [*lines, f"predictions are not compared: {found['not_compared']}"]
    compared = found["predictions"]
    units = f"{compared['units']['count']} {compared['units']['kind']}s"
    gap, kl, top1 = (compared["intervals"][name] for name in ("gap", "kl", "same_top1"))
    return [*lines, f"held out, {compared['tokens']:,} tokens of {units}: loss {compared['source_loss']:.4f} -> "
            f"{compared['target_loss']:.4f}, gap {_with_limits(gap, 100.0, '+.2f')} %, {compared['verdict']}; KL "
            f"{_with_limits(kl, 1.0, '.5f')} nats a token; same top-1 {_with_limits(top1, 100.0, '.1f')} %"]


def _with_limits(interval: Mapping[str, Any], scale: float, digits: str) -> str:
    value, low, high = (None if one is None else f"{scale * float(one):{digits}}" for one in
                        (interval["value"], interval["low"], interval["high"]))  # fmt: skip
    return f"{value}" if low is None or high is None else f"{value} ({low} to {high})"


def _own_text(source: Checkpoint) -> Text:
    """The text that the source was trained on; raises `Refused` where none is known, or it cannot be read."""
    if not trainings(source.metadata):
        raise Refused(f"nothing says what {source.path} was trained on; python -m gt_jax.verify takes a --text")
    return open_text(data_config(source.metadata, None, source.path))


def _refuse_no_room(*models: Checkpoint) -> None:
    need = ROOM * sum(int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
                      for one in models for name, leaf in one.tensors.items() if name.startswith(checkpoint.MODEL))
    room = _room()
    if room is not None and need > room:
        raise Refused(f"both models need some {need / 2**30:.1f} GiB, {room / 2**30:.1f} GiB are free here; "
                      "python -m gt_jax.verify runs on a mesh")


def _room() -> int | None:
    """Bytes that the default device has left, or the machine where that is a CPU; None where nothing says."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _reclaimable()
        except (ValueError, OSError):
            return None
    known = device.memory_stats() or {}
    return known["bytes_limit"] - known.get("bytes_in_use", 0) if "bytes_limit" in known else None


def _reclaimable() -> int:
    """Bytes of files that the kernel keeps in memory as long as nobody needs it; 0 where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = {line.partition(":")[0]: line.split()[1] for line in lines if len(line.split()) > 1}
    return 1024 * int(found.get("Cached", 0))


def _wrong_gains(source: Checkpoint, target: Checkpoint) -> list[str]:
    """The target layers whose gain on the disk is not its source's times the plan's coefficient."""
    grown = target.metadata["grown_from"]
    plan, carries = Plan.from_json(grown["plan"]), grown["carry"] == "gain"
    wrong = []
    before, after = _gains(source), _gains(target)
    for layer, entry in enumerate(plan.entries):
        want = np.float32(before[entry.source]) * np.float32(entry.coefficient if carries else 1.0)  # without noise
        if np.float32(after[layer]) != want:
            wrong.append(f"the gain of layer {layer} is {after[layer]}, {want} was to be written")
    return wrong


def _gains(one: Checkpoint) -> list[float]:
    """By layer, as they lie on the disk."""
    places = [one.config.depth.position(layer) for layer in range(len(one.config.depth))]
    paths = [f"params/segment{segment}/layer{slot}/gain" for segment, _, slot in places]
    values = checkpoint.load_paths(one.place, set(paths))
    return [float(values[path][block]) for path, (_, block, _) in zip(paths, places, strict=True)]
