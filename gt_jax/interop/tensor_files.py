"""What every reader of a tensor file offers: names with shape and dtype first, values one at a time and mapped."""

from __future__ import annotations

import abc
import mmap
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gt_jax.errors import Refused

CHUNK = 64 * 2**20  # bytes copied or compared at a time
GROUP = 256 * 2**20  # bytes of leaves that are held together; a larger leaf stands alone
_BLOCK = 64  # rows of a turned matrix that are copied at a time: that many lines of the cache are written in turn

T = TypeVar("T")


class Info(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class Unreadable(Refused):
    """A file that is damaged, or that is not what its name says."""


class TensorFile(abc.ABC):
    """A file of named tensors. `step`, `config` (a JSON object) and `lineage` (a list) are what it says of it.

    `has_checksums`: whether `read` compares what it reads with them. `notes` are lines for a reader on what was found.
    """

    path: Path
    tensors: dict[str, Info]
    step: int | None
    config: Any
    lineage: list[dict[str, Any]] | None
    has_checksums = False
    notes: Sequence[str] = ()

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """One tensor, read-only, mapped from the file; its pages go when the array goes."""


def pieces(value: np.ndarray) -> Iterator[np.ndarray]:
    """The bytes of an array in C order, about `CHUNK` at a time, whatever its strides; of a mapped one as many are
    held."""
    if value.ndim == 0 or value.nbytes <= CHUNK:
        yield in_order(value).reshape(-1).view(np.uint8)
        let_go(value)
        return
    rows = max(1, CHUNK * len(value) // value.nbytes)
    for start in range(0, len(value), rows):
        part = value[start : start + rows]
        if len(part) == 1 and part.nbytes > CHUNK:
            yield from pieces(part[0])
        else:
            yield in_order(part).reshape(-1).view(np.uint8)
            let_go(value)


def in_order(value: np.ndarray) -> np.ndarray:
    """An array in C order, itself where it is so. A turned one is copied block by block, three times as fast as row by
    row; of a mapped one about `CHUNK` bytes are held."""
    turned = value.ndim > 1 and value.strides[0] == value.itemsize < min(value.strides[1:])
    if not turned or value.itemsize > 8:
        return np.ascontiguousarray(value)
    matrix = value.view(f"u{value.itemsize}").reshape(len(value), -1)  # numpy has no fast copy of bfloat16
    made = np.empty(matrix.shape, matrix.dtype)
    held = 0
    for start in range(0, matrix.shape[1], _BLOCK):
        made[:, start : start + _BLOCK] = matrix[:, start : start + _BLOCK]
        held += _BLOCK * max(matrix.strides[1], mmap.PAGESIZE)
        if held >= CHUNK:
            let_go(value)
            held = 0
    return made.view(value.dtype).reshape(value.shape)


def let_go(value: np.ndarray) -> None:
    """Give back the memory of an array mapped for reading; what is used again is read again. Others stay."""
    base: Any = value
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and not value.flags.writeable and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def checksum(value: np.ndarray) -> int:
    """CRC-32 of an array's bytes in C order; of a mapped one a part at a time is held."""
    found = 0
    for piece in pieces(value):
        found = zlib.crc32(piece.data, found)
    return found


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one shape and dtype hold the same bits."""
    return all(np.array_equal(x, y) for x, y in zip(pieces(a), pieces(b), strict=True))


def groups(items: Iterable[T], size: Callable[[T], int], limit: int = GROUP) -> Iterator[list[T]]:
    """Items in order, together up to `limit` bytes, at least one at a time."""
    group: list[T] = []
    held = 0
    for item in items:
        if group and held + size(item) > limit:
            yield group
            group, held = [], 0
        group.append(item)
        held += size(item)
    if group:
        yield group
