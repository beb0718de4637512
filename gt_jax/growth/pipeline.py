"""Source to target in one pass: each source tensor is read once, slice by slice, and all its children are written.

    read ahead -> finite? -> hash -> child = c * (W + N) in pieces -> finite?, write, sync

- All of it in threads of bounded executors (gt_jax.growth.bounded_work): a slice is read while the one before it is
  worked on, children are made and written behind it, so many bytes at most, each way. Nothing here needs a device.
- A source tensor is compared with its checksum at its end; of all that is written checksums are kept.
- A source tensor's tasks are a group. It is finished when its whole part of the target is on the disk: then the journal
  has a line of it.
- Values that are not finite end the writing, not the reading: all tensors that have any are named together.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gt_jax.checkpoints.arrays import ArrayFiles, Extent
from gt_jax.checkpoints.checksums import Written
from gt_jax.checkpoints.folders import CHUNK, sync
from gt_jax.checkpoints.slices import Slice, SliceReader
from gt_jax.checkpoints.tree_paths import LeafDigest
from gt_jax.growth.bounded_work import BoundedExecutor, Group
from gt_jax.growth.finite_check import first_not_finite
from gt_jax.growth.journal import Journal
from gt_jax.growth.slices_on_host import grow_slice
from gt_jax.growth.transform import Leaf

_PIECES = (2**13, 2**20)  # values that one task makes and writes: at least, at most
_READERS, _WRITERS = 2, 3  # while one waits for the disk, another makes or hands over the next bytes
_AHEAD = 2**26  # bytes under way at most, each way, however large the budget

Progress = Callable[[], None]


class Feed(NamedTuple):
    """A target tensor's block that a source block makes."""

    leaf: Leaf
    block: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """What children depend on beside their sources."""

    carry: str
    noise_std: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Budget:
    """How a memory budget is spent: half on reading (a slice under way takes twice its bytes), a quarter on writing."""

    memory: int

    @property
    def slice(self) -> int:
        """Bytes of a slice, where the source's chunks allow it."""
        return min(self.memory // 8, CHUNK)

    @property
    def reading(self) -> int:
        """Bytes of slices under way."""
        return min(self.memory // 2, _AHEAD)

    @property
    def writing(self) -> int:
        """Bytes of children that are made and not yet written."""
        return min(self.memory // 4, _AHEAD)

    @property
    def piece(self) -> int:
        """Values of the pieces that children are made in, at most."""
        return min(max(self.memory // 32, _PIECES[0]), _PIECES[1])

    def needed(self, largest: int) -> int:
        """The budget that a slice of `largest` bytes needs."""
        return 4 * largest


def feeds(leaves: Sequence[Leaf]) -> dict[str, dict[int, list[Feed]]]:
    """By source tensor and its block (0 for a tensor of the whole model): the target blocks made of it."""
    found: dict[str, dict[int, list[Feed]]] = {}
    for leaf in leaves:
        for index, part in enumerate(leaf.parts):
            found.setdefault(part.source, {}).setdefault(part.block or 0, []).append(Feed(leaf, index))
    return found


class Pipeline:
    """Carries source tensors over into the arrays under `state`. One call of `run`."""

    def __init__(self, reader: SliceReader, fed: Mapping[str, Mapping[int, list[Feed]]], state: Path,
                 journal: Journal, settings: Settings, budget: Budget) -> None:
        self._reader, self._fed, self._state, self._journal = reader, fed, state, journal
        self._options, self._budget = dataclasses.asdict(settings), budget
        self._files: dict[str, ArrayFiles] = {}
        self._lock = threading.Lock()
        self.source_problems: list[str] = []
        self._overflows: dict[str, tuple[int, Leaf, str]] = {}
        self.written = self.finished = 0

    @property
    def target_problems(self) -> list[str]:
        """Target tensors that would hold a value that is not finite, and the first place."""
        return [f"{path} would hold {value} at {_index(start, leaf.shape)}, {leaf.dtype} cannot hold the value"
                for path, (start, leaf, value) in sorted(self._overflows.items())]

    @property
    def stopped(self) -> bool:
        """Whether something is wrong, so that nothing more is written."""
        return bool(self.source_problems or self._overflows)

    def run(self, names: Sequence[str], say: Progress) -> None:
        """Read, check, hash, grow and write all of `names`; problems are in the two lists afterwards."""
        writing, reading = self._budget.writing, self._budget.reading
        with (BoundedExecutor(writing, _WRITERS) as writer, BoundedExecutor(reading, 1) as hasher,
              BoundedExecutor(reading, _READERS) as reads):
            current: _Tensor | None = None
            for part, values in read_ahead(self._reader, names, self._budget.slice, reads):
                if current is None or current.name != part.name:
                    current = self._begin(part.name, writer)
                hashed = hasher.submit(values.nbytes, functools.partial(current.digest.update, values), current.group)
                self._check(current, part, values)
                if not self.source_problems:
                    self._children(current, part, values)
                hashed.result()
                if part.start + part.count == current.size:
                    self._reader.compare(part.name, current.digest)
                    current.group.close()
                    self._reader.close(part.name)
                    say()
                del values
            writer.wait()
        say()

    def _begin(self, name: str, writer: BoundedExecutor) -> _Tensor:
        """Folders of all target tensors that are made of `name`, and what must be written to each file."""
        left: dict[Path, int] = collections.defaultdict(int)
        fed: dict[str, ArrayFiles] = {}
        for feed in (feed for block in self._fed.get(name, {}).values() for feed in block):
            leaf = feed.leaf
            files = self._files.get(leaf.path)
            if files is None:
                files = ArrayFiles.of(self._state, leaf.path, leaf.shape, leaf.dtype)
                if not self.stopped:
                    files.create()
                self._files[leaf.path] = files
            fed[leaf.path] = files
            for extent in files.extents(feed.block * _block_size(leaf), _block_size(leaf)):
                left[extent.file] += extent.count
        source = self._reader.leaves[name]
        digest, written = LeafDigest(name, source), Written(self._state.parent)
        size = int(np.prod(source.shape, dtype=np.int64))

        def done() -> None:
            if self.stopped:
                return
            for files in fed.values():
                files.sync_names()
            sync(self._state)
            self._journal.finished(name, digest.hexdigest(), written.pieces())
            with self._lock:
                self.finished += 1

        return _Tensor(name, size, digest, left, written, Group(done), writer)

    def _check(self, tensor: _Tensor, part: Slice, values: np.ndarray) -> None:
        if tensor.wrong:
            return
        place = first_not_finite(values)
        if place is not None:
            tensor.wrong = True
            where = _index(part.start + place, self._reader.leaves[part.name].shape)
            self.source_problems.append(f"{part.name} holds {values[place]} at {where}")

    def _children(self, tensor: _Tensor, part: Slice, values: np.ndarray) -> None:
        """Everything that is made of a slice, in pieces that lie in one block each."""
        fed = self._fed.get(part.name)
        if not fed:
            return
        size = _block_size(next(iter(fed.values()))[0].leaf)
        for begin, end in pieces(part.start, part.count, size, self._budget.piece):
            block, start = divmod(begin, size)
            piece = values[begin - part.start : end - part.start]
            for feed in fed.get(block, ()):
                self._child(tensor, feed, start, piece)

    def _child(self, tensor: _Tensor, feed: Feed, start: int, piece: np.ndarray) -> None:
        """Hand over the making and the writing of one piece of one child."""
        leaf = feed.leaf
        first = feed.block * _block_size(leaf) + start

        def task() -> None:
            if self.source_problems:
                return
            values = grow_slice(leaf, feed.block, piece, start, **self._options)
            if values is not piece and (place := first_not_finite(values)) is not None:
                self._overflow(leaf, first + place, str(values[place]))
            if not self.stopped:
                for extent in self._files[leaf.path].extents(first, piece.size):
                    self._write(tensor, extent, values[extent.start - first :][: extent.count], leaf)

        tensor.writer.submit(piece.nbytes + piece.size * leaf.dtype.itemsize, task, tensor.group)

    def _write(self, tensor: _Tensor, extent: Extent, values: np.ndarray, leaf: Leaf) -> None:
        self._files[leaf.path].write_extent(extent, values)
        tensor.written.add(extent, values)
        with self._lock:
            self.written += values.nbytes
            tensor.left[extent.file] -= extent.count
            whole = not tensor.left[extent.file]
        if whole:
            sync(extent.file)

    def _overflow(self, leaf: Leaf, start: int, value: str) -> None:
        with self._lock:
            known = self._overflows.get(leaf.path)
            if known is None or start < known[0]:
                self._overflows[leaf.path] = (start, leaf, value)


@dataclasses.dataclass
class _Tensor:
    """A source tensor under way: values still to be written by target file, and who is told when all are."""

    name: str
    size: int
    digest: LeafDigest
    left: dict[Path, int]
    written: Written
    group: Group
    writer: BoundedExecutor
    wrong: bool = False


def read_ahead(reader: SliceReader, names: Sequence[str], limit: int,
               reads: BoundedExecutor) -> Iterator[tuple[Slice, np.ndarray]]:
    """All slices in order with their values; the next ones are being read meanwhile, as far as they fit."""
    coming = (part for name in names for part in reader.slices(name, limit))
    under_way: collections.deque[tuple[Slice, int, Future[Any]]] = collections.deque()
    waiting = next(coming, None)
    while waiting is not None or under_way:
        while waiting is not None:
            cost = 2 * waiting.count * reader.leaves[waiting.name].dtype.itemsize
            if under_way and not reads.fits(cost):
                break
            under_way.append((waiting, cost, reads.submit(cost, reader.read(waiting), keep=True)))
            waiting = next(coming, None)
        part, cost, future = under_way.popleft()
        values = future.result()
        del future
        yield part, values
        del values
        reads.release(cost)


def pieces(start: int, count: int, block: int, size: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of pieces of at most `size` values, in one block of `block` values each, covering the range."""
    stop = start + count
    while start < stop:
        end = min(stop, (start // block + 1) * block, start + size)
        yield start, end
        start = end


def throttled(line: Callable[[], str], say: Callable[[str], None], seconds: float) -> Progress:
    """A `Progress` that says `line()` at most once in so many seconds."""
    last = time.monotonic()

    def progress() -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            say(line())

    return progress


def _block_size(leaf: Leaf) -> int:
    return int(np.prod(leaf.shape[1 if leaf.stacked else 0 :], dtype=np.int64))


def _index(position: int, shape: Sequence[int]) -> list[int]:
    return list(map(int, np.unravel_index(position, tuple(shape))))
