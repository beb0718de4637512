"""What the bytes of a text file are: UTF-8, what can be read as it for certain, or no text.

- A file that says by its first bytes what it is is read as that (gzip, UTF-16 and UTF-32 with their marks, UTF-8 with
  one), or refused by name.
- Bytes of no known kind are read as they lie, and that is said: a model of bytes takes any.
"""

from __future__ import annotations

import codecs
import gzip
import zlib

_PACKED = (  # what files begin with that are no text, and what they are
    (b"BZh", "bzip2"), (b"\xfd7zXZ\x00", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"PK\x03\x04", "a zip archive"),
    (b"PAR1", "Parquet (of which `gt_jax prepare --tokenizer` reads column text)"),
    (b"%PDF-", "a PDF"), (b"\x7fELF", "a program"), (b"\x89HDF", "HDF5"), (b"\x89PNG", "a PNG"),
    (b"ARROW1", "Arrow"), (b"SQLite format 3\x00", "an SQLite database"),
    (b"version https://git-lfs", "a git-lfs pointer to a file that was not fetched (git lfs pull)"),
)  # fmt: skip
_MARKS = (  # the longer first: a mark of UTF-32 begins with one of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"), (codecs.BOM_UTF8, "utf-8-sig"),
)  # fmt: skip


def plain(content: bytes) -> tuple[bytes, list[str]]:
    """(the text as UTF-8 without a mark, what it was read as); raises ValueError that says what is no text."""
    if content.startswith(b"\x1f\x8b"):
        try:
            unpacked = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"it begins as gzip and cannot be unpacked: {error}") from error
        text, read = plain(unpacked)
        return text, ["gzip", *read]
    for start, kind in _PACKED:
        if content.startswith(start):
            raise ValueError(f"it is {kind}, not text; give the text that is in it")
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            name = "UTF-8 with a mark" if encoding == "utf-8-sig" else encoding.upper()
            try:
                return content.decode(encoding).encode(), [name]
            except UnicodeDecodeError as error:
                raise ValueError(f"it has the mark of {name} and is not that (byte {error.start})") from error
    if _is_wide(content):
        raise ValueError("it is UTF-16 without a mark, by its NUL bytes; convert it, for example with iconv")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return content, [f"bytes as they lie, for it is not UTF-8 (byte {error.start})"]
    return content, []


def _is_wide(content: bytes) -> bool:
    """Whether every second byte of the beginning is NUL and the others are not, as in Latin letters of UTF-16."""
    first, second = (content[start:400:2] for start in (0, 1))
    counts = sorted(one.count(b"\0") / max(len(one), 1) for one in (first, second))
    return counts[0] < 0.05 and counts[1] > 0.5
