"""What every reader of a tensor file offers: names with shape and dtype first, values one at a time and mapped."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gt_jax.errors import Refused

CHUNK = 64 * 2**20  # bytes copied or compared at a time
GROUP = 256 * 2**20  # bytes of leaves that are held together; a larger leaf stands alone

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
    """The bytes of an array in C order, about `CHUNK` at a time, whatever its strides."""
    if value.ndim == 0 or value.nbytes <= CHUNK:
        yield np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        return
    rows = max(1, CHUNK * len(value) // value.nbytes)
    for start in range(0, len(value), rows):
        part = value[start : start + rows]
        if len(part) == 1 and part.nbytes > CHUNK:
            yield from pieces(part[0])
        else:
            yield np.ascontiguousarray(part).reshape(-1).view(np.uint8)


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
