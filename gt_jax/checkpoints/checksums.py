"""CRC-32 of all that a checkpoint holds, by file and by tensor: noted when it is written, compared when it is read.

- Neither TensorStore's chunks of raw bytes nor a disk say that a bit has changed.
- checksums.json: {"files": {name: of its bytes}, "tensors": {path: of its values in C order}, "crc32": of these two}.
  Who reads a tensor compares it on the way, however it lies on disk; who looks for damage compares files; who opens a
  checkpoint compares the files that say what it is.
- What is written value by value is summed as it is written. Pieces come in any order: with A and B polynomials over
  GF(2) modulo the CRC's own, crc(A B) = crc(A) x^(8 |B|) + crc(B), bytes |B|.
- A checkpoint from before they were noted by tensor has a flat object of files; an older or foreign one has none.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gt_jax.checkpoints.arrays import ArrayFiles, Extent
from gt_jax.checkpoints.folders import CHECKSUMS, CHUNK, FILES, JOURNALS, Damaged, write_durably
from gt_jax.files import parse_json

THREADS = 4  # zlib lets go of the interpreter's lock
_POLYNOMIAL = 0xEDB88320  # bits reflected: x^0 is the highest
_ONE, _X_8 = 1 << 31, 1 << 23
_VALUES = re.compile(r".*/(d/[^/]+|c?[0-9.]*)")  # files of values: of Orbax's database, and chunks of single arrays

_OWN = "crc32"

Pieces = dict[str, list[list[int]]]  # by file, from the checkpoint's folder: [offset, bytes, CRC-32]


class Noted(NamedTuple):
    """What a checkpoint says of itself; empty where it says nothing."""

    files: dict[str, int]
    tensors: dict[str, int]

    @property
    def by_file_alone(self) -> bool:
        """Whether a reader of tensors has nothing to compare with, but files can be compared before."""
        return bool(self.files) and not self.tensors

    def lacks(self, tensors: Iterable[str]) -> bool:
        """Whether of one of these tensors nothing was noted, while files can be compared before."""
        return bool(self.files) and not self.tensors.keys() >= set(tensors)


def _own(sums: Noted) -> int:
    """CRC-32 of the checksums themselves: a changed name would take a tensor out of the comparison."""
    return zlib.crc32(json.dumps(sums, sort_keys=True).encode())


def noted(path: Path) -> Noted:
    """The checksums of a checkpoint; raises `Damaged` where they cannot be read."""
    try:
        found: dict[str, Any] = parse_json((path / CHECKSUMS).read_text())
        by_tensor = isinstance(found.get("files"), dict)
        sums = Noted(dict(found["files"]), dict(found["tensors"])) if by_tensor else Noted(dict(found), {})
        wrong = by_tensor and (found.keys() - {"files", "tensors", _OWN} or found.get(_OWN, _own(sums)) != _own(sums))
        if wrong or not all(type(value) is int for value in {**sums.files, **sums.tensors}.values()):
            raise ValueError("they are not what was written")
        return sums
    except FileNotFoundError:
        return Noted({}, {})
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise Damaged(f"checkpoint {path} is not usable: its checksums cannot be read ({error})") from error


def note_checksums(unfinished: Path, tensors: Mapping[str, int], files: Mapping[str, int] | None = None) -> None:
    """Write checksums.json; before `note_files`, which lists it too. Files that are not in `files` are read."""
    known = dict(files or {})
    others = [str(file.relative_to(unfinished)) for file in sorted(unfinished.rglob("*")) if file.is_file()
              and file.name not in (CHECKSUMS, FILES) and not file.match(f"{JOURNALS}*")]
    others = [name for name in others if name not in known]
    with ThreadPoolExecutor(THREADS) as pool:
        known |= dict(zip(others, pool.map(_of_file, [unfinished / name for name in others]), strict=True))
    sums = Noted(dict(sorted(known.items())), dict(sorted(tensors.items())))
    write_durably(unfinished / CHECKSUMS, {**sums._asdict(), _OWN: _own(sums)})


def checked_files(path: Path) -> dict[str, int]:
    """The files of a complete checkpoint that have a checksum, with their sizes; raises `Damaged` where one is gone."""
    try:
        return {name: (path / name).stat().st_size for name in noted(path).files}
    except OSError as error:
        raise Damaged(f"checkpoint {path} is not usable: {error}") from error


def changed_files(path: Path, names: Collection[str] | None = None) -> list[str]:
    """Those of these files (of all) that do not hold what was written; all of their bytes are read."""
    sums = noted(path).files
    names = list(sums) if names is None else names
    with ThreadPoolExecutor(THREADS) as pool:
        found = zip(names, pool.map(_of_file, [path / name for name in names]), strict=True)
        return [name for name, value in found if value != sums[name]]


def changed_bytes(path: Path, names: Collection[str] | None = None) -> str | None:
    """What is wrong with the first of these files (of all) that does not hold what was written."""
    wrong = changed_files(path, names)
    return f"{wrong[0]} holds other bytes than were written" if wrong else None


def refuse_changed_files(path: Path, names: Collection[str] | None = None) -> None:
    """Raise `Damaged` naming those of these files (of all) that do not hold what was written, or are gone."""
    sizes = checked_files(path)
    wrong = changed_files(path, sizes if names is None else names)
    if wrong:
        raise Damaged(f"checkpoint {path} is not usable: {', '.join(wrong)} "
                      f"{'holds' if len(wrong) == 1 else 'hold'} other bytes than were written")


def usable(path: Path, say: Callable[[str], None]) -> bool:
    """Whether a checkpoint that is to be read has checksums, which is said where it has none.

    Its files are compared first where no sums of tensors are noted, which reading would compare with. Raises `Damaged`.
    """
    sums = noted(path)
    if sums.by_file_alone and (problem := changed_bytes(path)):
        raise Damaged(f"checkpoint {path} is not usable: {problem}")
    if not sums.files:
        say(f"{path} has no checksums; its values are taken as they are")
    return bool(sums.files)


def refuse_changed_description(path: Path) -> None:
    """`refuse_changed_files` for all but the values: config, lineage, shapes. No tensor's checksum covers these."""
    refuse_changed_files(path, [name for name in noted(path).files if not _VALUES.fullmatch(name)])


def refuse_changed_values(path: Path, found: Mapping[str, int], sums: Noted) -> None:
    """Raise `Damaged` naming every tensor whose values are not those that were noted, and the damaged files.

    `found` are the CRC-32 of the values as they were read. Tensors of which nothing was noted pass.
    """
    wrong = [name for name, value in found.items() if sums.tensors.get(name, value) != value]
    if not wrong:
        return
    files = changed_files(path)
    where = f"; damaged: {', '.join(files)}" if files else (
        "; its files hold what was written, so it was read wrongly: try again, and test memory and disk")
    raise Damaged(f"checkpoint {path} is not usable: {', '.join(wrong)} "
                  f"{'has' if len(wrong) == 1 else 'have'} other values than were written{where}")


class Written:
    """CRC-32 of what was written into the folder `root`, by file and place; from any thread, in any order."""

    def __init__(self, root: Path) -> None:
        self._root, self._lock = root, threading.Lock()
        self._pieces: Pieces = {}

    def add(self, extent: Extent, values: np.ndarray) -> None:
        """These values were written there."""
        piece = [extent.offset, values.nbytes, of_values(values)]
        with self._lock:
            self._pieces.setdefault(str(extent.file.relative_to(self._root)), []).append(piece)

    def pieces(self) -> Pieces:
        """All so far, neighbours joined."""
        with self._lock:
            return {file: joined(found) for file, found in self._pieces.items()}


def joined(pieces: Iterable[list[int]]) -> list[list[int]]:
    """Pieces of one file in order, those that follow each other as one; of two at one place the later one counts."""
    made: list[list[int]] = []
    for offset, size, value in sorted({piece[0]: piece for piece in pieces}.values()):
        if made and made[-1][0] + made[-1][1] == offset:
            made[-1] = [made[-1][0], made[-1][1] + size, combined(made[-1][2], value, size)]
        else:
            made.append([offset, size, value])
    return made


def sums_of_arrays(
    root: Path, arrays: Mapping[str, ArrayFiles], pieces: Mapping[str, Collection[list[int]]]
) -> tuple[dict[str, int], dict[str, int]]:
    """(by tensor, by file) of arrays that lie in `root`, from the pieces; a file that they do not cover is read."""
    tensors, files = {}, {}
    for path, array in arrays.items():
        tensors[path] = 0
        for extent in array.extents(0, math.prod(array.shape)):
            name, size = str(extent.file.relative_to(root)), extent.count * array.dtype.itemsize
            whole = joined(pieces.get(name, ()))
            value = whole[0][2] if [piece[:2] for piece in whole] == [[0, size]] else _of_file(extent.file, size)
            tensors[path] = combined(tensors[path], value, size)
            files[name] = zlib.crc32(bytes(array.file_bytes - size), value)  # a chunk that sticks out ends in zeros
    return tensors, files


def of_values(values: np.ndarray) -> int:
    """CRC-32 of an array's bytes in C order."""
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def combined(first: int, second: int, size: int) -> int:
    """CRC-32 of two runs of bytes from that of each; the second one has `size` bytes."""
    return _product(_shift(size), first) ^ second


@functools.lru_cache(4096)
def _shift(size: int) -> int:
    """x^(8 size) modulo the polynomial."""
    power, square = _ONE, _X_8
    while size:
        if size & 1:
            power = _product(square, power)
        square, size = _product(square, square), size >> 1
    return power


def _product(a: int, b: int) -> int:
    """a b modulo the polynomial."""
    made, bit = 0, _ONE
    while bit:
        if a & bit:
            made ^= b
        bit, b = bit >> 1, b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return made


def _of_file(file: Path, size: int | None = None) -> int:
    """CRC-32 of a file, or of its first `size` bytes."""
    value, left = 0, os.stat(file).st_size if size is None else size
    with open(file, "rb", buffering=0) as stream:
        while left and (block := stream.read(min(CHUNK, left))):
            value, left = zlib.crc32(block, value), left - len(block)
    return value
