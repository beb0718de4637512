"""Arrays of a checkpoint read slice by slice, in C order, whichever way they lie on disk.

- A slice is a run of values in C order. It covers whole chunks, so that no chunk is read twice; an array stored as one
  chunk is one slice, whatever the limit.
- `SliceReader.read` returns at once; several slices can be under way. While it is read a slice takes twice its bytes.
- Who reads a whole array asks `compare` at its end whether these are the values that were written.
- Beside gt_jax.checkpoints.checkpoint the only file that imports TensorStore; its errors become `Damaged`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from gt_jax.checkpoints.arrays import Shape, split_axis
from gt_jax.checkpoints.checksums import noted, refuse_changed_values
from gt_jax.checkpoints.folders import CHUNK, Damaged
from gt_jax.checkpoints.tree_paths import LeafDigest
from gt_jax.files import parse_json


@dataclasses.dataclass(frozen=True)
class Slice:
    """Values `start` .. `start + count` of array `name` in C order, and the index that gives them."""

    name: str
    start: int
    count: int
    index: tuple[int | slice, ...]


class SliceReader:
    """The arrays of the checkpoint `where`; `leaves` are their shapes and dtypes by path.

    Of what was read last up to `kept` bytes of chunks are held, for slices that are less than a chunk: the next one
    does not read it again.
    """

    def __init__(self, where: Path, leaves: Mapping[str, jax.ShapeDtypeStruct], kept: int = 0) -> None:
        self.where, self.leaves = where, leaves
        self.noted = noted(where)
        self._stores: dict[str, Any] = {}
        state = where / "state"
        try:
            zarr3 = parse_json((state / "_METADATA").read_text()).get("use_zarr3", False)
        except (OSError, ValueError, AttributeError) as error:
            raise Damaged(f"checkpoint {where} cannot be read: {error}") from error
        self._driver = "zarr3" if zarr3 else "zarr"
        self._base: dict[str, str] = {"driver": "file", "path": f"{state}/"}
        self._ocdbt = (state / "manifest.ocdbt").is_file()
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": kept}})

    def slices(self, name: str, limit: int = CHUNK) -> Iterator[Slice]:
        """All of an array in order: slices of at most `limit` bytes, or of the fewest rows that chunks allow."""
        leaf = self.leaves[name]
        return cut(name, tuple(leaf.shape), self._chunk(name), max(limit // leaf.dtype.itemsize, 1))

    def read(self, part: Slice) -> Callable[[], np.ndarray]:
        """Begin to read; the function returned waits for the values, flat. It raises `Damaged`."""
        try:
            future = self._store(part.name)[part.index].read(order="C")
        except (ValueError, OSError) as error:
            raise self._damaged(part.name, error) from error

        def wait() -> np.ndarray:
            try:
                return np.asarray(future.result()).reshape(-1)
            except (ValueError, OSError) as error:
                raise self._damaged(part.name, error) from error

        return wait

    def whole(self, name: str) -> np.ndarray:
        """All of an array; nothing is compared."""
        values = np.concatenate([self.read(part)() for part in self.slices(name)])
        self.close(name)
        return values.reshape(self.leaves[name].shape)

    def digest(self, name: str, limit: int = CHUNK) -> str:
        """`LeafDigest` of an array, with one slice in memory at a time; compared as `compare` does."""
        digest = self._digest(name, limit)
        self.compare(name, digest)
        return digest.hexdigest()

    def checksum(self, name: str) -> int:
        """CRC-32 of an array as it is now."""
        return self._digest(name, CHUNK).crc32

    def compare(self, name: str, digest: LeafDigest) -> None:
        """Raise `Damaged`, naming what has changed, where these are not the values whose checksum was noted."""
        refuse_changed_values(self.where, {name: digest.crc32}, self.noted)

    def _digest(self, name: str, limit: int) -> LeafDigest:
        digest = LeafDigest(name, self.leaves[name])
        for part in self.slices(name, limit):
            digest.update(self.read(part)())
        self.close(name)
        return digest

    def close(self, name: str) -> None:
        """Forget the open file of an array that is done with."""
        self._stores.pop(name, None)

    def _chunk(self, name: str) -> Shape:
        chunk = self._store(name).chunk_layout.read_chunk.shape
        return tuple(chunk) if chunk else (1,) * len(self.leaves[name].shape)

    def _store(self, name: str) -> Any:
        if name not in self._stores:
            path = name.replace("/", ".") + "/"
            kvstore: Mapping[str, Any] = {**self._base, "path": self._base["path"] + path}
            if self._ocdbt:
                kvstore = {"driver": "ocdbt", "base": self._base, "path": path}
            try:
                store = tensorstore.open({"driver": self._driver, "kvstore": kvstore}, open=True, read=True,
                                         context=self._context).result()
            except (ValueError, OSError) as error:
                raise self._damaged(name, error) from error
            leaf = self.leaves[name]
            if (tuple(store.shape), store.dtype.numpy_dtype) != (tuple(leaf.shape), leaf.dtype):
                raise self._damaged(name, f"it is {store.dtype.name}{list(store.shape)} on disk, not "
                                          f"{leaf.dtype}{list(leaf.shape)}")
            self._stores[name] = store
        return self._stores[name]

    def _damaged(self, name: str, error: object) -> Damaged:
        return Damaged(f"checkpoint {self.where} cannot be read: {name}: {error}")


def cut(name: str, shape: Shape, chunk: Shape, limit: int) -> Iterator[Slice]:
    """Slices of at most `limit` values that cover whole chunks, as large as possible.

    Along the axes before the cut a slice has one index, so chunks must have one there too: the cut can stand at any
    axis up to the first along which a chunk is longer than 1.
    """
    if not shape:
        yield Slice(name, 0, 1, ())
        return
    chunk = tuple(min(pair) for pair in zip(chunk, shape, strict=True))
    last = split_axis(chunk)
    row = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    axis = next((axis for axis in range(last + 1) if chunk[axis] * row[axis] <= limit), last)
    rows = max(limit // (chunk[axis] * row[axis]), 1) * chunk[axis]
    for outer in np.ndindex(shape[:axis]):
        first = math.prod(shape[axis:]) * int(np.ravel_multi_index(outer, shape[:axis])) if axis else 0
        for begin in range(0, shape[axis], rows):
            end = min(begin + rows, shape[axis])
            yield Slice(name, first + begin * row[axis], (end - begin) * row[axis], (*outer, slice(begin, end)))


def writing_axes(shape: Shape, itemsize: int, limit: int) -> tuple[int, ...]:
    """The leading axes to cut into single indices so that chunks of `limit` bytes are runs in C order.

    Orbax cuts the longest axis first. That is the axis the run ends on only if it stays the longest while it is cut.
    """
    for axis in range(len(shape)):
        row = math.prod(shape[axis + 1 :]) * itemsize
        if shape[axis] * row <= limit or limit // row >= max(shape[axis + 1 :], default=1):
            return tuple(range(axis))
    return tuple(range(max(len(shape) - 1, 0)))
