"""What a growth says of itself at its end: the child as it lies on the disk, beside its source.

- Every byte of the child is read back and compared with its checksums.
- Every small tensor of each layer, its gain among them, is made again from the source layer that the plan names and
  compared; pass 1 of the source's layers stands in their order.
- A few held-out batches of the source's own text go through both models: loss gap, KL divergence, top-1 agreement, with
  intervals over documents. Where that cannot be done the reason is said: no text is known, the text cannot be read any
  more, or the machine does not hold both models. It is no reason to fail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.check import Checked, check
from gt_jax.configs.lineage import trainings
from gt_jax.devices.sharding import Rules, mesh_for_rows
from gt_jax.errors import Failed, Refused
from gt_jax.evaluation.held_out_rows import held_out_rows
from gt_jax.evaluation.loading import data_config
from gt_jax.evaluation.model_files import Checkpoint, open_checkpoint
from gt_jax.evaluation.predictions import compare_predictions
from gt_jax.evaluation.verification import verify
from gt_jax.evaluation.verification_table import report_lines
from gt_jax.growth.plan_entries import Plan
from gt_jax.growth.provenance import stored_plan
from gt_jax.growth.slices_on_host import grow_slice
from gt_jax.growth.transform import child_abstract, match
from gt_jax.models.language_model import abstract
from gt_jax.monitoring.metrics import json_values
from gt_jax.text.batches import Text
from gt_jax.text.data import Data, open_data
from gt_jax.text.flags import file_fields

BATCHES = 4
SMALL = 4096  # values of a block that is made again: gains, norms, biases
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
    read = read_back(target, "grow")
    before, after = open_checkpoint(source), open_checkpoint(target)
    plan = stored_plan(after.metadata, target)
    if wrong := _wrong_blocks(before, after, plan):
        raise Failed(f"{target} is not what its plan says: {'; '.join(wrong)}; remove it and grow again")
    found: dict[str, Any] = {"files": read.checked, "bytes": read.bytes, "order": order_of(plan)}
    try:
        if not alone:
            raise Refused("several processes grew it; python -m gt_jax.verify runs on a mesh of all of them")
        text = _own_text(before)
        refuse_no_room(before, after)
        compared = _predictions(before, after, text, say)
    except (Refused, OSError, MemoryError) as reason:
        return {**found, "not_compared": str(reason)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {**found, "not_compared": f"memory does not suffice ({error})"}
    return json_values({**found, "text": text.summary(), "predictions": compared})


def verify_growth(
    source: Path, target: Path, files: Sequence[Path], tokenizer: str | None
) -> tuple[dict[str, Any] | None, list[str], Exception | None]:
    """`verify` of a child that is whole, on text `files`: what it found, its lines, and what kept it from that.

    What there is to say of the growth itself is not lost for it.
    """
    named = file_fields([str(path) for path in files])
    try:
        refuse_no_room(open_checkpoint(source), open_checkpoint(target))
        found = verify(source, target, text=named["text"], json_lines=named["json_lines"], tokenizer=tokenizer)
    except (Refused, Failed, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        return None, [], error
    return found, report_lines(found), None


def read_back(target: Path, command: str) -> Checked:
    """Every byte of what `command` wrote, compared with its checksums; raises `Failed` where one differs."""
    read = check(target)
    if read.damaged:
        raise Failed(f"{target} was written, but does not read back: "
                     + "; ".join(f"{one['file']} differs" for one in read.damaged)
                     + f"; test memory and disk, remove it and {command} again")  # fmt: skip
    return read


def _predictions(before: Checkpoint, after: Checkpoint, text: Text | Data, say: Say) -> dict[str, Any]:
    rows = held_out_rows(text, BATCHES)
    with jax.set_mesh(mesh_for_rows(1)):
        # Growing has compared the source with its checksums, and `check` the child.
        source, target = ((one.config, checkpoint.load(one.folder, abstract(one.config), compare=False))
                          for one in (before, after))  # fmt: skip
        return compare_predictions(source, target, rows, Rules(), say)


def order_of(plan: Plan) -> str:
    """Whether pass 1 of the source's layers stands in their order: "kept", or what does not."""
    firsts = [entry.source for entry in plan.entries if entry.copy == 1]
    if any(later <= before for before, later in pairwise(firsts)):
        return f"pass 1 of the source's layers stands as {', '.join(map(str, firsts))}"
    missing = [layer for layer in range(len(plan.source_layout)) if layer not in firsts]
    return f"kept, without layer {', '.join(map(str, missing))}" if missing else "kept"


def check_lines(found: Mapping[str, Any]) -> list[str]:
    """The result for a reader."""
    lines = [f"read back: {found['files']} files, {found['bytes']:,} bytes, as they were written; order of the "
             f"source's layers: {found['order']}"]
    if "not_compared" in found:
        return [*lines, f"predictions are not compared: {found['not_compared']}"]
    compared = found["predictions"]
    units = f"{compared['units']['count']} {compared['units']['kind']}s"
    before, after = (f"{float(compared[name]):.4f}" for name in ("source_loss", "target_loss"))
    gap, kl, top1 = (compared["intervals"][name] for name in ("gap", "kl", "same_top1"))
    return [*lines, f"held out, {compared['tokens']:,} tokens of {units}: loss {before} -> {after}, "
            f"gap {_with_limits(gap, 100.0, '+.2f')} %, {compared['verdict']}; KL "
            f"{_with_limits(kl, 1.0, '.5f')} nats a token; same top-1 {_with_limits(top1, 100.0, '.1f')} %"]


def _with_limits(interval: Mapping[str, Any], scale: float, digits: str) -> str:
    value, low, high = (None if one is None else f"{scale * float(one):{digits}}" for one in
                        (interval["value"], interval["low"], interval["high"]))  # fmt: skip
    return f"{value}" if low is None or high is None else f"{value} ({low} to {high})"


def _own_text(source: Checkpoint) -> Text | Data:
    """The text that the source was trained on; raises `Refused` where none is known, or it cannot be read."""
    if not trainings(source.metadata):
        raise Refused(f"nothing says what {source.path} was trained on; python -m gt_jax.verify takes a --text")
    return open_data(data_config(source.metadata, None, source.path))


def refuse_no_room(*models: Checkpoint) -> None:
    """Raise `Refused` where this machine does not hold these models at once."""
    need = ROOM * sum(int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
                      for one in models for name, leaf in one.tensors.items() if name.startswith(checkpoint.MODEL))
    room = _room()
    if room is not None and need > room:
        raise Refused(f"both models need some {need / 2**30:.1f} GiB, {room / 2**30:.1f} GiB are free here; "
                      "python -m gt_jax.verify runs on a mesh")


def _room() -> int | None:
    """Bytes that the default device has left, or the machine where that is a CPU; None where nothing says."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        known = device.memory_stats() or {}
        return known["bytes_limit"] - known.get("bytes_in_use", 0) if "bytes_limit" in known else None
    left = [_of_file("/proc/meminfo", "MemAvailable", 1024)]
    limit, used = _of_file("/sys/fs/cgroup/memory.max", "", 1), _of_file("/sys/fs/cgroup/memory.stat", "anon", 1)
    left.append(None if limit is None or used is None else limit - used)
    return min((one for one in left if one is not None), default=None)


def _of_file(path: str, name: str, scale: int) -> int | None:
    """The number behind `name` in a file of the kernel's, in bytes; None where it says none."""
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith(name)]
    numbers = [word for word in (found[0] if found else []) if word.isdigit()]
    return scale * int(numbers[0]) if numbers else None


def _wrong_blocks(source: Checkpoint, target: Checkpoint, plan: Plan) -> list[str]:
    """The target layers of which a small tensor on the disk is not what the plan makes of its source layer's."""
    grown = target.metadata["grown_from"]
    how = {name: grown[name] for name in ("carry", "noise_std", "seed")}
    child = child_abstract(source.config, plan, grown["dtype"])
    leaves = [leaf for leaf in match(source.model, child, plan, grown["carry"]).leaves
              if leaf.stacked and int(np.prod(leaf.shape[1:], dtype=np.int64)) <= SMALL]  # fmt: skip
    before = checkpoint.load_paths(source.folder, {part.source for leaf in leaves for part in leaf.parts})
    after = checkpoint.load_paths(target.folder, {leaf.path for leaf in leaves})
    wrong: dict[int, str] = {}
    for leaf in leaves:
        for block, part in enumerate(leaf.parts):
            layer = part.layer or 0
            want = grow_slice(leaf, block, before[part.source][part.block or 0].reshape(-1), **how)
            if not np.array_equal(after[leaf.path][block].reshape(-1), want):
                wrong.setdefault(layer, f"layer {layer} is not made of source layer {plan.entries[layer].source} "
                                        f"({leaf.path}, block {block})")  # fmt: skip
    return [wrong[layer] for layer in sorted(wrong)]
