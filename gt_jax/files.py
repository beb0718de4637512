"""Files written whole or not at all, the message for a full disk, and addresses that are no files."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from gt_jax.errors import Refused

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # pathlib makes one slash of two


def refuse_address(path: str | os.PathLike[str]) -> None:
    """Raise `Refused` for gs://bucket/run and the like, which pathlib takes for a folder gs: of the current one."""
    found = _ADDRESS.match(os.fspath(path))
    if found:
        raise Refused(f"{os.fspath(path)} is an address ({found[1]}:), and only files are read and written; mount the "
                      "bucket, or copy from and to it")


def local_path(text: str) -> Path:
    """The path that an argument names; raises what argparse makes a refusal of where that is an address."""
    try:
        refuse_address(text)
    except Refused as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write under a temporary name beside `path`, then rename; a kill leaves the old file, or none, and PATH.tmp.

    The bytes are on the disk before they get the name, and the name is when this returns.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
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
