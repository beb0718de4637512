"""Checkpoint to checkpoint, leaf by leaf: a growth that needs little memory and survives being killed.

- The source is read once to see that every value is finite and to take its hash, then again leaf by leaf.
- Finished leaves are written in groups. A group is there or it is not; TARGET is there when it is whole, not before.
- `--resume` keeps the groups of a growth with the same source content, plan, carry, noise, seed and versions.
- Values do not depend on grouping, on the budget, or on interruptions: every block has its own key (see transform).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import resource
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gt_jax import checkpoint
from gt_jax.checkpoint_files import StrPath, prepare_parent, publish
from gt_jax.errors import Refused, refuse_all
from gt_jax.growth.leftovers import Leftovers, only_writer
from gt_jax.growth.plan import Plan
from gt_jax.growth.rules import check_noise, treatment
from gt_jax.growth.transform import Leaf, child_abstract, grow_block, match, target_config
from gt_jax.tree_paths import combine_digests, leaf_digest

MEMORY = 2 * 2**30
_MODEL = ("params/", "statistics/")
_SCRATCH = 24  # bytes an element of one block inside `grow_block`, as measured with noise
_CHUNK = 2**22  # elements looked at together for values that are not finite

Abstract = Mapping[str, jax.ShapeDtypeStruct]
Progress = Callable[[str], None]


def grow_checkpoint(source: StrPath, target: StrPath, *, plan: Plan, carry: str, noise_std: float | int = 0.0,
                    seed: int = 0, dtype: str | None = None, memory: int = MEMORY, resume: bool = False,
                    progress: Progress | None = None) -> dict[str, Any]:
    """Grow the checkpoint (or a run's newest step) `source` into the new checkpoint `target`; returns a report.

    `memory` bounds the bytes of tensors held at a time, beside the program itself. Missing parent folders are made.
    The report holds "tensors", "bytes", "kept" (leaves taken over by `resume`), "dropped", "seconds", "config" and
    "grown_from". Raises `Refused`, with nothing written, for everything that does not fit: paths, plan, values that
    are not finite, a budget below one leaf, leftovers of another growth. OSError when the disk is full: then, as
    after a kill, `target` does not exist and `resume` goes on.
    """
    say = progress or (lambda line: None)
    where, place = _paths(source, target)
    leftovers = Leftovers(place)
    leftovers.refuse_unless(resume)
    stored, source_metadata = checkpoint.describe(where)
    source_config = checkpoint.model_config(where, stored, source_metadata)
    config = target_config(source_config, plan, _known(dtype))
    check_noise(noise_std, seed)
    model = {name: leaf for name, leaf in stored.items() if name.startswith(_MODEL)}
    matched = match(model, child_abstract(source_config, plan, dtype), plan, carry)
    growth = _Growth(where, model, matched.leaves, carry, float(noise_std), seed)
    growth.refuse_small_budget(memory)
    prepare_parent(place)
    started = time.monotonic()
    with only_writer(place), _room_matters(place):
        _refuse_existing(place)  # another process may have finished it meanwhile
        grown_from = {
            "source": str(where), "step": source_metadata.get("step"), "content_hash": growth.inspect(memory, say),
            "plan": plan.to_json(), "coefficients": [entry.coefficient for entry in plan.entries],
            "k_exec": list(plan.requested), "carry": carry, "noise_std": float(noise_std), "seed": seed,
            "dtype": dtype, "versions": _versions()}
        metadata = {"config": config.to_json(), "kind": "grown", "step": 0, "grown_from": grown_from}
        leftovers.refuse_another(metadata)
        kept = len(matched.leaves)
        if not leftovers.merged.exists():
            kept = _write(growth, leftovers, metadata, memory, say)
            checkpoint.merge_groups(place)
        publish(leftovers.merged, place)
    return {"source": str(where), "target": str(place), "tensors": len(matched.leaves),
            "bytes": sum(leaf.nbytes for leaf in matched.leaves), "kept": kept,
            "dropped": [*matched.dropped, *_not_carried(stored)], "seconds": time.monotonic() - started,
            "config": config.to_json(), "grown_from": grown_from}


@contextlib.contextmanager
def _room_matters(place: Path) -> Iterator[None]:
    """Say of a full disk what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        reason = os.strerror(error.errno)
        raise OSError(error.errno, f"{reason} while writing {place}; make room, then finish with --resume") from error


def _paths(source: StrPath, target: StrPath) -> tuple[Path, Path]:
    """The source checkpoint and the target, absolute; raises `Refused` when one lies in the other."""
    place = Path(os.path.abspath(target))
    real_source, real_target = Path(os.path.realpath(source)), Path(os.path.realpath(place))
    if real_source == real_target:
        raise Refused(f"source and target are the same path, {real_source}; choose another target")
    if real_source in real_target.parents:
        raise Refused(f"target {place} lies inside the source {source}; choose a place outside of it")
    if real_target in real_source.parents:
        raise Refused(f"source {source} lies inside the target {place}; choose another target")
    _refuse_existing(place)
    return checkpoint.resolve(source), place


def _refuse_existing(place: Path) -> None:
    if os.path.lexists(place):
        raise Refused(f"target {place} exists; a checkpoint is never overwritten, choose another target")


def _known(dtype: str | None) -> str | None:
    if dtype not in (None, "float32", "bfloat16"):
        raise Refused(f"dtype {dtype!r} is not one of float32, bfloat16")
    return dtype


@dataclasses.dataclass(frozen=True)
class _Growth:
    """One source, what becomes of it, and how: everything that the values of the target depend on."""

    where: Path
    model: Abstract
    leaves: tuple[Leaf, ...]
    carry: str
    noise_std: float
    seed: int

    def refuse_small_budget(self, memory: int) -> None:
        """Raise `Refused` naming the leaves that cannot be made, or read for the check, within `memory` bytes."""
        needed = {leaf.path: self.needed([leaf]) for leaf in self.leaves}
        needed |= {name: 2 * _nbytes(leaf) for name, leaf in self.model.items() if name not in needed}
        large = [f"{path} needs {_gib(size)} ({size} bytes)" for path, size in needed.items() if size > memory]
        refuse_all(large, f"a memory budget of {_gib(memory)} ({memory} bytes) is too small; --memory must be at least "
                          f"{max(needed.values())} bytes:")

    def needed(self, leaves: Sequence[Leaf]) -> int:
        """Bytes held while sources are read (twice) or leaves are made together; writing copies nothing."""
        made = sum(leaf.nbytes for leaf in leaves)
        sources = sum(_nbytes(self.model[name]) for name in _sources(leaves))
        return max(2 * sources, sources + made + max(map(self._scratch, leaves)))

    def _scratch(self, leaf: Leaf) -> int:
        elements = leaf.nbytes // leaf.dtype.itemsize // (len(leaf.parts) if leaf.stacked else 1)
        how = treatment(leaf.rule, self.carry)
        computed = how.scaled or (how.noisy and self.noise_std > 0)
        return elements * (_SCRATCH if computed else leaf.dtype.itemsize)

    def groups(self, leaves: Sequence[Leaf], memory: int) -> Iterator[list[Leaf]]:
        """Leaves that are read, made and written together: a quarter of the budget, or one large leaf."""
        group: list[Leaf] = []
        for leaf in leaves:
            if group and self.needed([*group, leaf]) > memory // 4:
                yield group
                group = []
            group = [*group, leaf]
        if group:
            yield group

    def inspect(self, memory: int, say: Progress) -> str:
        """The content hash of the source's model; raises `Refused` naming every tensor that is not finite."""
        digests: dict[str, str] = {}
        wrong: list[str] = []
        say(f"checking {len(self.model)} source tensors, {_gib(sum(map(_nbytes, self.model.values())))}")
        for names in _batches({name: _nbytes(leaf) for name, leaf in self.model.items()}, memory // 4):
            values = self._read(names)
            wrong += [f"{name} holds {problem}" for name in names if (problem := _not_finite(values[name]))]
            digests |= {name: leaf_digest(name, values[name]) for name in names}
            del values  # before the next ones are read
        refuse_all(wrong, f"source {self.where} has values that are not finite; grow from an earlier step:")
        return combine_digests(digests)

    def tensors(self, leaves: Sequence[Leaf]) -> dict[str, np.ndarray]:
        """Target tensors by path."""
        sources = self._read(_sources(leaves))
        made = {}
        for leaf in leaves:
            value = np.empty(leaf.shape, leaf.dtype)
            for index, part in enumerate(leaf.parts):
                origin = sources[part.source]
                piece = origin if part.block is None else origin[part.block, ...]
                block = grow_block(leaf, index, piece, carry=self.carry, noise_std=self.noise_std, seed=self.seed)
                value[index if leaf.stacked else ...] = np.asarray(block)
            made[leaf.path] = value
        return made

    def _read(self, names: Collection[str]) -> dict[str, np.ndarray]:
        return checkpoint.read_leaves(self.where, {name: self.model[name] for name in names})


def _write(growth: _Growth, leftovers: Leftovers, metadata: Mapping[str, Any], memory: int, say: Progress) -> int:
    """Make and write, group by group, the leaves that are not there yet; returns how many were."""
    kept = leftovers.finished_leaves()
    work = [leaf for leaf in growth.leaves if leaf.path not in kept]
    total, started = sum(leaf.nbytes for leaf in work), time.monotonic()
    done = written = 0
    for group in growth.groups(work, memory):
        made = growth.tensors(group)
        wrong = [f"{leaf.path} would hold {problem}, {leaf.dtype} cannot hold the value"
                 for leaf in group if (problem := _not_finite(made[leaf.path]))]
        if wrong:
            leftovers.discard()
        refuse_all(wrong, "the target's values are not finite; nothing is left of this growth:")
        checkpoint.write_group(leftovers.target, made, metadata)
        del made  # before the next ones are made
        done, written = done + len(group), written + sum(leaf.nbytes for leaf in group)
        rate = written / max(time.monotonic() - started, 1e-9)
        say(f"{len(kept) + done}/{len(growth.leaves)} tensors, {_gib(written)} of {_gib(total)}, {_gib(rate)}/s, "
            f"{_gib(_resident())} resident")
    return len(kept)


def _sources(leaves: Sequence[Leaf]) -> list[str]:
    return list(dict.fromkeys(part.source for leaf in leaves for part in leaf.parts))


def _batches(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Names in order, together up to `limit` bytes, at least one at a time."""
    batch: list[str] = []
    for name, size in sizes.items():
        if batch and sum(sizes[held] for held in batch) + size > limit:
            yield batch
            batch = []
        batch = [*batch, name]
    if batch:
        yield batch


def _not_finite(value: np.ndarray) -> str | None:
    """The first NaN or infinity and where it stands, for example "nan at [1, 2, 3]"."""
    if not jax.dtypes.issubdtype(value.dtype, np.inexact):
        return None
    flat = value.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        finite = np.isfinite(flat[start : start + _CHUNK])
        if not finite.all():
            where = np.unravel_index(start + int(np.argmin(finite)), value.shape)
            return f"{value[where]} at {list(map(int, where))}"
    return None


def _nbytes(leaf: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize


def _not_carried(stored: Abstract) -> list[str]:
    """What a training checkpoint holds beside the model, by its top-level name."""
    return sorted({name.split("/")[0] for name in stored if not name.startswith(_MODEL)})


def _versions() -> dict[str, str]:
    found = {}
    for name in ("gt-jax", "jax", "jaxlib", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _resident() -> int:
    """Resident bytes now, or at most so far where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _gib(size: int | float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"
