"""The safetensors format: a JSON header of names, dtypes, shapes and byte ranges, then the bytes.

Written here and not taken from the package of that name, which has to hold every tensor of a file in memory to write
it. The format is small: u64 length of the header, the header, the tensors without gaps. It has no checksums; files of
ours have CRC-32 by tensor in the header's `__metadata__`, and whoever reads a tensor compares it; and one of the header
itself, for names, config and lineage, compared by whoever opens the file.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from gt_jax.configs.lineage import is_lineage
from gt_jax.files import parse_json
from gt_jax.interop.tensor_files import Info, TensorFile, Unreadable, checksum, pieces

DTYPES = {name: np.dtype(dtype) for name, dtype in {
    "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64, "BOOL": np.bool_,
    "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64, "U8": np.uint8, "U16": np.uint16,
    "U32": np.uint32, "U64": np.uint64,
}.items()}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_CONFIG, _STEP, _SUMS = "gt_jax.config", "gt_jax.step", "gt_jax.crc32"  # what our own files say of the model
_LINEAGE, _OWN = "gt_jax.lineage", "gt_jax.header_crc32"
_OWN_STORED = re.compile(rb'(?<="gt_jax\.header_crc32": ").{8}(?=")')  # as we write it; with zeros there it is computed
_LENGTH = struct.Struct("<Q")
_MOST = 100_000_000  # bytes of a header, as in the reference implementation


class SafetensorsFile(TensorFile):
    """One .safetensors file, open for reading; raises `Unreadable` when header and file do not agree."""

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        header, self._start = _header(path, size)
        about = header.pop("__metadata__", None) or {}
        self._ranges: dict[str, tuple[int, int]] = {}
        self.tensors: dict[str, Info] = {}
        for name, entry in header.items():
            self.tensors[name], self._ranges[name] = _entry(path, name, entry)
        _refuse_gaps(path, sorted(self._ranges.values()), size - self._start)
        self.step, self.config, self.lineage, self._sums = _about(path, about)
        self.has_checksums = bool(self._sums)

    def read(self, name: str) -> np.ndarray:
        """One tensor, read-only, mapped from the file; raises `Unreadable` where it differs from its checksum."""
        value = self._mapped(name)
        if not self._is_as_written(name, value):
            raise Unreadable(f"{self.path} is damaged: {name} has other values than were written")
        return value

    def damaged(self) -> list[str]:
        """The tensors that differ from their checksums; all are read."""
        return [name for name in self.tensors if not self._is_as_written(name, self._mapped(name))]

    def _is_as_written(self, name: str, value: np.ndarray) -> bool:
        noted = self._sums.get(name)
        return noted is None or noted == f"{checksum(value):08x}"

    def _mapped(self, name: str) -> np.ndarray:
        shape, dtype = self.tensors[name]
        begin = self._start + self._ranges[name][0]
        count = math.prod(shape)
        if count == 0:
            return np.empty(shape, dtype)
        if begin % dtype.itemsize:  # allowed, but no array may lie like that
            return np.fromfile(self.path, dtype, count, offset=begin).reshape(shape)
        return np.asarray(np.memmap(self.path, dtype, "r", begin, (count,))).reshape(shape)


class Writer:
    """Writes a .safetensors file whose tensors come in any order, one at a time: `with Writer(...) as w: w.put(...)`.

    Leaving the block without an error demands that every tensor came; the bytes are then on disk. A piece is written by
    a thread while its caller makes the next, since either takes a core: it must stay as it is until then. An error of
    that is raised with the next piece, or at the end.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Info], config: Mapping[str, Any] | None = None,
                 step: int | None = None, lineage: Sequence[Mapping[str, Any]] | None = None) -> None:
        order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # so every tensor is aligned
        about = {_CONFIG: json.dumps(config)} if config is not None else {}
        about |= {_STEP: str(step)} if step is not None else {}
        about |= {_LINEAGE: json.dumps(lineage)} if lineage is not None else {}
        self._about: dict[str, str] = {"format": "pt", **about}
        header: dict[str, Any] = {"__metadata__": self._about}
        self._header, self._crcs = header, dict.fromkeys(order, 0)
        self._left: dict[str, tuple[int, Info]] = {}
        end = 0
        for name in order:
            info = tensors[name]
            begin, end = end, end + math.prod(info.shape) * info.dtype.itemsize
            self._left[name] = begin, info
            header[name] = {"dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
        text = self._text()
        self._start, self.nbytes = len(text), end
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self._thread, self._under_way = ThreadPoolExecutor(1, "safetensors"), Future[None]()
        self._under_way.set_result(None)
        self._write_all(0, np.frombuffer(text, np.uint8))

    def put(self, name: str, value: np.ndarray) -> None:
        """Write one tensor; its strides may be any."""
        info = self._left[name][1]
        if (value.shape, value.dtype) != info:
            raise ValueError(f"{name} is {Info(value.shape, value.dtype)}; the header says {info}")
        self.put_parts(name, [value])

    def put_parts(self, name: str, parts: Iterable[np.ndarray]) -> None:
        """Write one tensor whose values come in parts, in C order; one part is held at a time."""
        begin, info = self._left.pop(name)
        place = self._start + begin
        for piece in itertools.chain.from_iterable(map(pieces, parts)):
            self._under_way.result()
            self._under_way = self._thread.submit(self._add, name, place, piece)
            place += piece.nbytes
        if place - self._start - begin != math.prod(info.shape) * info.dtype.itemsize:
            raise ValueError(f"{name} came as {place - self._start - begin} bytes; the header says {info}")

    def _add(self, name: str, place: int, piece: np.ndarray) -> None:
        self._write_all(place, piece)
        self._crcs[name] = zlib.crc32(piece.data, self._crcs[name])

    def _text(self) -> bytes:
        """Length and header; as long at the end, with the checksums, as at the start, with zeros for them."""
        sums = {name: f"{crc:08x}" for name, crc in self._crcs.items()}
        self._about |= {_SUMS: json.dumps(sums), _OWN: f"{0:08x}"}
        text = json.dumps(self._header).encode()
        text += b" " * (-len(text) % 8)
        return _LENGTH.pack(len(text)) + _OWN_STORED.sub(f"{zlib.crc32(text):08x}".encode(), text)

    def _write_all(self, place: int, data: np.ndarray) -> None:
        view = memoryview(data.data)
        while view:
            written = os.pwrite(self._file.fileno(), view, place)
            view, place = view[written:], place + written

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        with self._file, self._thread:
            if kind is None:
                self._under_way.result()
                if self._left:
                    raise ValueError(f"not written: {', '.join(self._left)}")
                self._write_all(0, np.frombuffer(self._text(), np.uint8))
                os.fsync(self._file.fileno())


def _header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header's JSON object and where the tensors begin."""
    with open(path, "rb") as stream:
        start = stream.read(_LENGTH.size)
        if len(start) < _LENGTH.size:
            raise Unreadable(f"{path} has {size} bytes, too few for a safetensors header; it is truncated")
        (length,) = _LENGTH.unpack(start)
        if length > _MOST:
            raise Unreadable(f"{path} is not a safetensors file (its header would have {length} bytes)")
        text = stream.read(length)
    if len(text) < length:
        raise Unreadable(f"{path} is truncated: its header has {length} bytes, the file {size}")
    try:
        header = parse_json(text, once=True)
    except ValueError as error:
        raise Unreadable(f"{path} is not a safetensors file: its header is no JSON object ({error})") from error
    if not isinstance(header, dict):
        raise Unreadable(f"{path} is not a safetensors file: its header is no JSON object")
    own = _OWN_STORED.search(text)
    if own is not None and own[0] != f"{zlib.crc32(_OWN_STORED.sub(b'0' * 8, text)):08x}".encode():
        raise Unreadable(f"{path} is damaged: its header (names, config, lineage) is not what was written")
    return header, _LENGTH.size + length


def _entry(path: Path, name: str, entry: Any) -> tuple[Info, tuple[int, int]]:
    """Shape, dtype and byte range of one tensor."""
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            raise ValueError("sizes and offsets must be whole numbers of at least 0")
    except (TypeError, KeyError, ValueError) as error:
        raise Unreadable(f"{path}: the header's entry of {name} does not parse ({error})") from error
    if not isinstance(code, str) or code not in DTYPES:
        raise Unreadable(f"{path}: {name} has dtype {code}; known are {', '.join(DTYPES)}")
    info = Info(shape, DTYPES[code])
    needed = math.prod(shape) * info.dtype.itemsize
    if end - begin != needed:
        raise Unreadable(f"{path}: {name} is {info}, {needed} bytes; the header gives it {end - begin}")
    return info, (begin, end)


def _refuse_gaps(path: Path, ranges: list[tuple[int, int]], size: int) -> None:
    """Raise `Unreadable` unless the byte ranges follow each other and fill the file."""
    place = 0
    for begin, end in ranges:
        if begin != place:
            raise Unreadable(f"{path}: the header's byte ranges overlap or leave a gap at byte {place}")
        place = end
    if place > size:
        raise Unreadable(f"{path} is truncated: its header needs {place} bytes of tensors, the file has {size}")
    if place < size:
        raise Unreadable(f"{path} has {size - place} bytes after its last tensor; it is not a safetensors file")


def is_ours(path: Path) -> bool:
    """Whether a file, perhaps half written, is one of `Writer`: its header says so. An empty file is nobody's work."""
    with open(path, "rb") as stream:
        start = stream.read(_LENGTH.size + 2**16)
    return not start or re.match(rb'\{"__metadata__": \{"format": "pt".*"gt_jax\.', start[_LENGTH.size :]) is not None


def _about(path: Path, about: Any) -> tuple[int | None, Any, list[dict[str, Any]] | None, dict[str, str]]:
    """(step, config, lineage, checksums) that a file of ours carries; None, or none, for what it does not say."""
    try:
        step = int(about[_STEP]) if _STEP in about else None
        lineage = parse_json(about.get(_LINEAGE, "null"))
        if lineage is not None and not is_lineage(lineage):
            raise ValueError(f"{_LINEAGE} is no list of steps")
        return step, parse_json(about.get(_CONFIG, "null")), lineage, dict(parse_json(about.get(_SUMS, "{}")))
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise Unreadable(f"{path}: its __metadata__ does not parse ({error})") from error
