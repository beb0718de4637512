"""Checkpoint to checkpoint: a growth that needs little memory, runs at the disk's speed, and survives being killed.

So does a retrofit (gt_jax.growth.retrofit), which copies every tensor and adds a few: `Target` is what they differ in.

- The source is read once (gt_jax.growth.pipeline): every value is checked, hashed, grown and written in one pass; what
  differs from the source's checksums is refused. The target has checksums of its own, made while it is written.
- TARGET is there when it is whole, not before: all is made in TARGET.unfinished and renamed at the end. A journal there
  says which source tensors are finished; `resume` compares their digests with the source again and makes the rest.
- Several processes share the source tensors, each of which is one process's work; all write one folder.
- Values do not depend on the budget, on the number of processes, or on interruptions (gt_jax.growth.noise).
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import time
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.arrays import ArrayFiles
from gt_jax.checkpoints.checksums import Written, changed_bytes, checked_files, note_checksums, sums_of_arrays
from gt_jax.checkpoints.folders import Damaged, StrPath, begun, note_files, parent_made, rename
from gt_jax.checkpoints.lock import only_writer
from gt_jax.checkpoints.opened import Opened, open_checkpoint
from gt_jax.checkpoints.slices import SliceReader
from gt_jax.checkpoints.tree_paths import combine_digests
from gt_jax.configs.lineage import LINEAGE, carried
from gt_jax.configs.model import ModelConfig
from gt_jax.devices.processes import ProcessGroup
from gt_jax.errors import Failed, Refused, refuse_all
from gt_jax.files import explain_full_disk
from gt_jax.growth.journal import Journal
from gt_jax.growth.moments import moment_leaves
from gt_jax.growth.pipeline import Budget, Pipeline, Settings, feeds, throttled
from gt_jax.growth.plan import Plan
from gt_jax.growth.provenance import counts_record, refuse_other_counts, standing_record
from gt_jax.growth.repetition import Repetition
from gt_jax.growth.rules import check_noise
from gt_jax.growth.transform import Leaf, child_abstract, match, target_config
from gt_jax.growth.unfinished import RECORDS, Kind, UnfinishedGrowth, identity_of

MEMORY = 2 * 2**30
SECONDS = 1.0  # between two lines of progress

Progress = Callable[[str], None]


def grow_checkpoint(source: StrPath, target: StrPath, *, plan: Plan, carry: str = "gain", noise_std: float | int = 0.0,
                    seed: int = 0, dtype: str | None = None, memory: int = MEMORY, resume: bool = False,
                    counts: Repetition | None = None, moments: bool = True,
                    progress: Progress | None = None) -> dict[str, Any]:
    """Grow the checkpoint (or a run's newest step) `source` into the new checkpoint `target`; returns a report.

    `memory` bounds the bytes of tensors held at a time, beside the program itself. Missing parent folders are made.
    `counts` are those that the plan was made from: the target keeps where they came from, and where they say of which
    values they were measured, others are refused once all of the source is read. With `moments` the second moments of a
    training checkpoint's optimizer grow too (gt_jax.growth.moments).
    The report holds "tensors", "bytes", "moments" (bytes of those), "kept" (source tensors whose part `resume` took
    over), "dropped", "seconds",
    "config", "grown_from" and "source_checksums": whether the source had any to be compared with. Where
    `jax.distributed` runs several processes, each of them calls it, with `target` on a disk that all see. Raises
    `Refused`, with nothing left behind, for everything that does not fit: paths, plan, values that are not finite, a
    budget below what the source's chunks need, another growth that is unfinished; `Failed` where the source does not
    hold what was written. OSError when the disk is full: then, as after a kill, `target` does not exist and `resume`
    goes on.

    >>> import gt_jax, os, tempfile, jax.numpy as jnp
    >>> config, folder = gt_jax.preset("tiny").replace(layout="DG"), tempfile.mkdtemp()
    >>> variables = gt_jax.initialise(config, seed=0)
    >>> gt_jax.save(os.path.join(folder, "source"), config, variables)
    >>> counts = gt_jax.measure(config, variables, [jnp.arange(16).reshape(1, 16)])
    >>> plan = gt_jax.grow(config, variables, counts).plan
    >>> report = gt_jax.grow_checkpoint(os.path.join(folder, "source"), os.path.join(folder, "grown"), plan=plan)
    >>> report["tensors"] == len(report["dropped"]) == 0, len(gt_jax.load(report["target"]).config.depth) >= 2
    (False, True)
    """
    if not isinstance(plan, Plan):
        raise Refused(f"plan is {plan!r}; a `Plan` is needed, as `gt_jax.grow(…).plan` and `gt_jax.growth.plan` make")

    def grown(where: Path, opened: Opened) -> Target:
        return _grown(where, opened, plan, Settings(carry, float(noise_std), seed), _known(dtype), counts, moments)

    return write_target(source, target, "grown", grown, memory=memory, resume=resume, counts=counts, progress=progress)


class Target(NamedTuple):
    """What is to be written: the config; what the metadata say of how it was made; each tensor that is made of the
    source's, with those of its second moments that come along; tensors that the source does not have, by path; and
    those of the source that the target does not have."""

    config: ModelConfig
    record: dict[str, Any]
    leaves: tuple[Leaf, ...]
    moments: tuple[Leaf, ...]
    new: Mapping[str, np.ndarray]
    dropped: tuple[str, ...]
    settings: Settings


def write_target(source: StrPath, target: StrPath, kind: Kind, made: Callable[[Path, Opened], Target], *, memory: int,
                 resume: bool, counts: Repetition | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Write `made` of the checkpoint `source` into the new checkpoint `target`; returns the report of
    `grow_checkpoint`, `kind`_from in place of "grown_from"."""
    group, started = ProcessGroup(), time.monotonic()
    growth = group.agree(lambda: _Growth(source, target, kind, made, memory, resume, counts))
    with contextlib.ExitStack() as stack:
        group.agree(lambda: stack.enter_context(parent_made(growth.target)))
        with explain_full_disk(growth.target):
            stack.enter_context(only_writer(growth.target))
        growth.check_files(group, progress or (lambda line: None))
        group.on_first(growth.open)
        try:
            kept, metadata = growth.work(group, progress or (lambda line: None))
        except Damaged as error:  # no refusal: something is left
            raise Failed(f"{error}; what was made of the rest is kept in {growth.unfinished.folder}: put the source "
                         "right, then finish with --resume, or delete that folder") from error  # fmt: skip
        except KeyboardInterrupt:
            if progress is not None and (hint := begun(growth.target)):
                progress(hint.removeprefix("; "))
            raise
        group.agree(lambda: growth.describe(metadata))
        group.on_first(growth.publish)
    return {"source": str(growth.where), "target": str(growth.target), "tensors": len(growth.arrays),
            "bytes": sum(map(_nbytes, growth.arrays.values())),
            "moments": sum(leaf.nbytes for leaf in growth.made.moments), "kept": kept, "dropped": growth.dropped,
            "seconds": time.monotonic() - started, "config": metadata["config"],
            growth.record: metadata[growth.record], "source_checksums": bool(growth.reader.noted.files)}


def _grown(where: Path, opened: Opened, plan: Plan, settings: Settings, dtype: str | None, counts: Repetition | None,
           moments: bool) -> Target:
    """The child of a source by a plan."""
    config = target_config(opened.config, plan, dtype)
    check_noise(settings.noise_std, settings.seed)
    matched = match(opened.model, child_abstract(opened.config, plan, dtype), plan, settings.carry)
    carried_along = moment_leaves(opened.tensors, matched.leaves) if moments else ()
    record = {
        "source": str(where), "step": opened.metadata.get("step"), "plan": plan.to_json(),
        "coefficients": [entry.coefficient for entry in plan.entries], "k_exec": list(plan.k_exec),
        "carry": settings.carry, "noise_std": settings.noise_std, "seed": settings.seed, "dtype": dtype,
        "versions": versions(), "moments": bool(carried_along), **counts_record(counts),
        **standing_record(opened.metadata)}
    return Target(config, record, matched.leaves, carried_along, {}, matched.dropped, settings)


class _Growth:
    """One growth, checked as far as that is possible without reading values, then its steps in order."""

    def __init__(self, source: StrPath, target: StrPath, kind: Kind, made: Callable[[Path, Opened], Target],
                 memory: int, resume: bool, counts: Repetition | None = None) -> None:
        self.where, self.target = _paths(source, target)
        self.counts, self.record = counts, RECORDS[kind]
        self.unfinished = UnfinishedGrowth(self.target, kind)
        self.unfinished.refuse_unless(resume)
        opened = open_checkpoint(self.where)
        stored, self.model = opened.tensors, opened.model
        self.made = made(self.where, opened)
        self.leaves = (*self.made.leaves, *self.made.moments)
        self.dropped = [*self.made.dropped, *_not_carried(stored)]
        self.arrays = {leaf.path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in self.leaves} | {
            path: jax.ShapeDtypeStruct(value.shape, value.dtype) for path, value in self.made.new.items()}
        more = {part.source for leaf in self.made.moments for part in leaf.parts}
        self.sources = {name: leaf for name, leaf in stored.items() if name in self.model or name in more}
        self.settings, self.budget = self.made.settings, Budget(memory)
        self.reader = SliceReader(self.where, self.sources)
        self._refuse_small_budget()
        self.metadata: dict[str, Any] = {
            "config": self.made.config.to_json(), "kind": kind, "step": 0, self.record: self.made.record,
            LINEAGE: carried(opened.metadata)}
        self.identity = identity_of(self.metadata)
        self.described = False  # whether the unfinished folder is a checkpoint already

    def check_files(self, group: ProcessGroup, say: Progress) -> None:
        """Compare the files first, where of a tensor no checksum was noted that reading could compare with."""
        if not self.reader.noted.files:
            say(f"{self.where} has no checksums; its values are taken as they are")
        if self.reader.noted.lacks(self.sources):
            problem = group.agree(lambda: changed_bytes(self.where, group.share(checked_files(self.where))))
            if found := [one for one in group.gather(problem) if one is not None]:
                raise Damaged(f"checkpoint {self.where} is not usable: {found[0]}")

    def open(self) -> None:
        """On process 0, under the lock: make the unfinished folder, or take over the one that is there."""
        with explain_full_disk(self.target):
            _refuse_existing(self.target)  # another process may have finished it meanwhile
            self.unfinished.refuse_another(self.identity)
            if self.unfinished.whole() is None:
                self.unfinished.begin(self.identity)
                (self.unfinished.folder / "state").mkdir(exist_ok=True)

    def work(self, group: ProcessGroup, say: Progress) -> tuple[int, dict[str, Any]]:
        """Compare what is finished with the source, make the rest; (source tensors kept, metadata of the target)."""
        whole, finished = group.agree(lambda: (self.unfinished.whole(), self.unfinished.finished()))
        self.described = whole is not None
        kept = self.sources.keys() if whole else finished.keys()
        digests = self._compare(group, kept, finished, say)
        if whole is None:
            self._make(group, [name for name in self.sources if name not in kept], say)
            digests = group.agree(self.unfinished.finished)
        if digests.keys() != self.sources.keys():
            raise Failed(f"the journals in {self.unfinished.folder} lack source tensors; was it changed meanwhile?")
        content = combine_digests({name: digests[name] for name in self.model})
        if whole is not None and (there := whole[self.record]["content_hash"]) != content:
            self.unfinished.refuse_another_source([f"content_hash: {there} there, {content} now"])
        group.on_first(lambda: self._refuse_counts(content, bool(kept)))
        return len(kept), whole or {**self.metadata, self.record: {**self.made.record, "content_hash": content}}

    def describe(self, metadata: Mapping[str, Any]) -> None:
        """On all processes: the arrays become a checkpoint."""
        if not self.described:
            with explain_full_disk(self.target):
                checkpoint.write_metadata(self.unfinished.folder, list(self.arrays), metadata)

    def publish(self) -> None:
        """On process 0: the checkpoint gets its name."""
        with explain_full_disk(self.target):
            if not self.described:
                folder = self.unfinished.folder
                arrays = {path: ArrayFiles.of(folder / "state", path, leaf.shape, np.dtype(leaf.dtype))
                          for path, leaf in self.arrays.items()}
                written = Written(folder)
                for path, value in self.made.new.items():
                    arrays[path].create()
                    arrays[path].write(0, value, written)
                    arrays[path].sync()
                note_checksums(folder, *sums_of_arrays(folder, arrays, {**self.unfinished.pieces(),
                                                                        **written.pieces()}))
                note_files(folder)
                self.unfinished.forget_journals()
            rename(self.unfinished.folder, self.target)

    def _refuse_counts(self, content: str, resumed: bool) -> None:
        """Before anything has the target's name: only now is all of the source read, once.

        What an earlier call began with the same plan stays: the counts it had were others, and may be right.
        """
        try:
            refuse_other_counts(self.counts, content, self.where)
        except Refused as error:
            if resumed:
                raise Refused(f"{error}. What was grown is kept: --resume with the counts of this source finishes it "
                              f"where they give the same plan; else delete {self.unfinished.folder}") from error
            self.unfinished.discard()
            raise Refused(f"{error}. Nothing is left of this growth") from error

    def _compare(self, group: ProcessGroup, kept: Collection[str], finished: Mapping[str, str],
                 say: Progress) -> dict[str, str]:
        """Digests, as they are now, of the source tensors whose part is kept; raises `Refused` naming changed ones."""
        share = group.share({name: _nbytes(self.sources[name]) for name in kept})
        if share:
            say(f"comparing {len(share)} source tensors with what was grown from them, "
                f"{_gib(sum(_nbytes(self.sources[name]) for name in share))}")
        own = group.agree(lambda: {name: self.reader.digest(name, self.budget.slice) for name in share})
        digests = {name: digest for part in group.gather(own) for name, digest in part.items()}
        self.unfinished.refuse_another_source(sorted(
            f"{name} holds other values than those that were grown" for name, digest in digests.items()
            if finished.get(name, digest) != digest))
        return digests

    def _make(self, group: ProcessGroup, names: Collection[str], say: Progress) -> None:
        """This process's share of the source tensors `names`, into the unfinished folder and its journal."""
        fed, started = feeds(self.leaves), time.monotonic()
        share = group.share({name: _nbytes(self.sources[name]) + sum(
            feed.leaf.nbytes // len(feed.leaf.parts) for block in fed.get(name, {}).values() for feed in block)
            for name in names})
        total = sum(feed.leaf.nbytes // len(feed.leaf.parts)
                    for name in share for block in fed.get(name, {}).values() for feed in block)

        def line() -> str:
            rate = pipeline.written / max(time.monotonic() - started, 1e-9)
            return (f"{pipeline.finished}/{len(share)} source tensors, {_gib(pipeline.written)} of {_gib(total)}, "
                    f"{_gib(rate)}/s, {_gib(_resident())} resident")

        def run() -> list[list[str]]:
            with explain_full_disk(self.target):
                try:
                    pipeline.run(share, throttled(line, say, SECONDS))
                finally:
                    journal.close()
            say(line())
            return [pipeline.source_problems, pipeline.target_problems]

        journal = group.agree(lambda: self._journal(group.index))
        pipeline = Pipeline(self.reader, fed, self.unfinished.folder / "state", journal, self.settings, self.budget)
        found = group.gather(group.agree(run))
        source, target = ([line for part in found for line in part[which]] for which in (0, 1))
        if (source or target) and group.first:
            self.unfinished.discard()
        refuse_all(source, f"source {self.where} has values that are not finite; take an earlier step:")
        refuse_all(target, f"the target's values are not finite; nothing is left of this {self.unfinished.noun}:")

    def _journal(self, process: int) -> Journal:
        with explain_full_disk(self.target):
            return Journal(self.unfinished.folder, process, self.identity)

    def _refuse_small_budget(self) -> None:
        """Raise `Refused` naming the source tensors whose chunks are too large for the budget."""
        memory = self.budget.memory
        needed = {name: self.budget.needed(leaf.dtype.itemsize * max(
            part.count for part in self.reader.slices(name, self.budget.slice))) for name, leaf in self.sources.items()}
        large = [f"{name} needs {_gib(size)} ({size} bytes), it is stored in large chunks"
                 for name, size in needed.items() if size > memory]
        refuse_all(large, f"a memory budget of {_gib(memory)} ({memory} bytes) is too small; --memory must be at least "
                          f"{max(needed.values())} bytes:")


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


def _nbytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _not_carried(stored: Mapping[str, jax.ShapeDtypeStruct]) -> list[str]:
    """What a training checkpoint holds beside the model, by its top-level name: of the optimizer only second moments
    are carried."""
    return sorted({name.split("/")[0] for name in stored if not name.startswith(checkpoint.MODEL)})


def versions() -> dict[str, str]:
    """Of what the values may depend on, by package."""
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
