"""Arrays written value by value: zarr3 folders of raw chunk files, which Orbax and TensorStore read as they are.

- One folder an array: `zarr.json` and one file a chunk, `c.0.3.0`. A chunk is a run of the array in C order, so a file
  holds plain bytes, and a range of values, from anywhere and in any order, is a range of one or more files.
- The last chunk along an axis may stick out; its file has the full size all the same, zeros (the fill value) included.
- Nothing here is atomic: who writes notes elsewhere what is durable, and publishes the whole by a rename.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gt_jax.checkpoints.folders import CHUNK, sync
from gt_jax.checkpoints.positioned_write import write_at

if TYPE_CHECKING:
    from gt_jax.checkpoints.checksums import Written

_DESCRIPTION = "zarr.json"

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Extent:
    """`count` values of an array from flat position `start`: where they stand in a file, in bytes."""

    file: Path
    offset: int
    start: int
    count: int


@dataclasses.dataclass(frozen=True)
class ArrayFiles:
    """One array on disk, of `shape` and `dtype`, in `folder`."""

    folder: Path
    shape: Shape
    dtype: np.dtype

    @classmethod
    def of(cls, state: Path, path: str, shape: Shape, dtype: np.dtype) -> ArrayFiles:
        """The array of tree path `path` in a checkpoint's `state` folder, where Orbax looks for it."""
        return cls(state / path.replace("/", "."), shape, dtype)

    @property
    def chunk(self) -> Shape:
        """The shape of a chunk: 1 along leading axes, a few rows of one axis, all of the rest; at most CHUNK bytes."""
        return chunk_shape(self.shape, self.dtype.itemsize, CHUNK)

    def create(self) -> None:
        """Make the folder and describe the array (durable after `sync_names`); what is there already stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({
            "zarr_format": 3, "node_type": "array", "shape": self.shape, "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.chunk}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [{"name": "bytes", "configuration": {"endian": sys.byteorder}}],
            "fill_value": False if self.dtype == np.bool_ else 0 if np.issubdtype(self.dtype, np.integer) else 0.0})
        (self.folder / _DESCRIPTION).write_text(text)

    def extents(self, start: int, count: int) -> Iterator[Extent]:
        """The file ranges of `count` values from flat position `start`, in order."""
        axis, chunk = split_axis(self.chunk), self.chunk
        group, size = math.prod(self.shape[axis:]), math.prod(chunk)
        stop = start + count
        while start < stop:
            outer, inner = divmod(start, group)
            here = inner // size
            end = min(stop, outer * group + min((here + 1) * size, group))
            index = (*map(int, np.unravel_index(outer, self.shape[:axis])), here, *[0] * (len(chunk) - axis - 1))
            name = ".".join(["c", *map(str, index[: len(chunk)])])  # a 0-d array has one file, c
            yield Extent(self.folder / name, (inner - here * size) * self.dtype.itemsize, start, end - start)
            start = end

    def write(self, start: int, values: np.ndarray, written: Written | None = None) -> None:
        """Write values from flat position `start`; they are durable after `sync`. `written` sums them up."""
        flat = values.reshape(-1)
        for extent in self.extents(start, flat.size):
            part = flat[extent.start - start :][: extent.count]
            self.write_extent(extent, part)
            if written is not None:
                written.add(extent, part)

    def write_extent(self, extent: Extent, values: np.ndarray) -> None:
        """Write the values of one of `extents`, which may lie within a file; from any thread, in any order."""
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        write_at(extent.file, extent.offset, data, self.file_bytes)

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        for file in self.folder.glob("c*"):
            sync(file)
        self.sync_names()

    def sync_names(self) -> None:
        """Wait until the description and the names of all files are on the disk."""
        sync(self.folder / _DESCRIPTION)
        sync(self.folder)

    @property
    def file_bytes(self) -> int:
        """The size of every chunk file."""
        return math.prod(self.chunk) * self.dtype.itemsize


def chunk_shape(shape: Shape, itemsize: int, limit: int) -> Shape:
    """The largest run in C order of at most `limit` bytes that cuts one axis into pieces as equal as possible."""
    for axis, size in enumerate(shape):
        row = math.prod(shape[axis + 1 :]) * itemsize
        if row <= limit:
            pieces = -(-size * row // (limit // row * row))
            return (*[1] * axis, -(-size // pieces), *shape[axis + 1 :])
    return (1,) * len(shape)


def split_axis(chunk: Shape) -> int:
    """The first axis along which a chunk has more than one index; the last one where there is none."""
    return next((axis for axis, size in enumerate(chunk) if size > 1), max(len(chunk) - 1, 0))
