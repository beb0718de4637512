"""The documents of a corpus file, one after the other: text, JSON lines, Parquet; in memory is one piece at a time.

    *.jsonl, *.json, *.ndjson, also as .gz and .zst    field "text" of each line
    *.parquet                                          column "text", a row a document
    others                                             text files (gt_jax/text/sources.py); one is whole in memory

Other fields and columns are not read. Documents without a byte are left out. pyarrow, which comes with
tensorflow-datasets, reads Parquet and zstd.
"""

from __future__ import annotations

import gzip
import itertools
import re
import zlib
from collections.abc import Iterator
from typing import Any

from gt_jax.errors import Refused, refuse_all
from gt_jax.files import parse_json
from gt_jax.text import sources

_LINES = re.compile(r".*\.(jsonl|json|ndjson)(\.gz|\.zst)?", re.IGNORECASE | re.DOTALL)
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # by how a file begins, whatever it is called
_ROWS = 1024  # of Parquet that are read together
_SHOWN = 20


def documents_of(path: str) -> tuple[Iterator[bytes], list[str]]:
    """The documents of a file, and words about how it is read.

    Raises `Refused`, at once or on the way, for a file that cannot be read, has no document, or has lines or rows that
    are none: all of them, at most 20 shown.
    """
    if _LINES.fullmatch(path):
        return _some(path, _of_lines(path)), []
    if path.lower().endswith(".parquet"):
        return _some(path, _of_rows(path)), []
    documents, told = sources.documents_of(path)
    return iter(documents), told


def _some(path: str, documents: Iterator[bytes]) -> Iterator[bytes]:
    """The same; raises `Refused` where there is none, or the file turns out to be another."""
    count = 0
    try:
        for document in documents:
            if document:
                count += 1
                yield document
    except (OSError, EOFError, ValueError, zlib.error) as error:  # pyarrow's are OSError, ValueError
        raise Refused(f"text file {path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not count:
        raise Refused(f"text file {path!r} has no document")


def _of_lines(path: str) -> Iterator[bytes]:
    wrong: list[str] = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            yield _text(parse_json(line, once=True))
        except ValueError as error:
            wrong.append(f"{path}, line {number}: it is no object with a string \"text\": {error}")
    _refuse(wrong)


def _lines(path: str) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        start = stream.read(4)
    packed = next((kind for mark, kind in _PACKED.items() if start.startswith(mark)), None)
    if packed == "zstd":
        yield from _unpacked_lines(path, packed)
        return
    with gzip.open(path, "rb") if packed else open(path, "rb") as lines:
        yield from lines


def _unpacked_lines(path: str, packed: str) -> Iterator[bytes]:
    rest = b""
    with _pyarrow(path).input_stream(path, compression=packed) as stream:
        while piece := stream.read(1 << 20):
            *whole, rest = (rest + piece).split(b"\n")
            yield from whole
    yield rest


def _text(found: Any) -> bytes:
    if not isinstance(found, dict) or "text" not in found:
        raise ValueError("field 'text' is missing" if isinstance(found, dict) else f"it is {type(found).__name__}")
    if not isinstance(found["text"], str):
        raise ValueError(f"field 'text' is {type(found['text']).__name__}")
    document: bytes = found["text"].encode()  # raises UnicodeEncodeError, a ValueError, for half of a surrogate pair
    return document


def _of_rows(path: str) -> Iterator[bytes]:
    parquet = _pyarrow(path, "parquet")
    file = parquet.ParquetFile(path)
    columns = {field.name: field.type for field in file.schema_arrow}
    if str(columns.get("text")) not in ("string", "large_string", "string_view"):
        kind = f"column 'text' is {columns['text']}" if "text" in columns else (
            f"it has no column 'text'; its columns are {', '.join(sorted(columns))}")  # fmt: skip
        raise ValueError(f"{kind}; documents are strings in a column 'text'")
    wrong: list[str] = []
    numbers = itertools.count(1)
    for rows in file.iter_batches(batch_size=_ROWS, columns=["text"]):
        for text in rows.column(0).to_pylist():
            number = next(numbers)
            if text is None:
                wrong.append(f"{path}, row {number}: its text is null")
            else:
                yield text.encode()
    _refuse(wrong)


def _refuse(wrong: list[str]) -> None:
    left = len(wrong) - _SHOWN
    refuse_all([*wrong[:_SHOWN], *([f"and {left} more"] if left > 0 else [])], "these documents cannot be used:")


def _pyarrow(path: str, part: str = "") -> Any:
    import importlib

    try:
        return importlib.import_module(f"pyarrow.{part}" if part else "pyarrow")
    except ImportError as error:
        raise Refused(f"text file {path} needs the library pyarrow: pip install pyarrow") from error

