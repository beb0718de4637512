"""Files written whole or not at all, and the message for a full disk."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write under a temporary name beside `path`, then rename; a kill leaves the old file, or none, and PATH.tmp.

    The bytes are on the disk before they get the name, and the name is when this returns. Text is UTF-8; what is no
    character, of a file name in another encoding, is escaped.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explain_full_disk(place: Path, then: str = "finish with --resume") -> Iterator[None]:
    """Say of a full disk, in an OSError that names `place`, what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        reason = os.strerror(error.errno)
        raise OSError(error.errno, f"{reason} while writing {place}; make room, then {then}") from error
