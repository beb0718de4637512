"""Bytes into a file at a place, past the page cache where the system allows it.

- A checkpoint is written once and is larger than memory. Through the page cache every byte costs a fresh page and a
  copy by the kernel, more processor time than making the value took; O_DIRECT hands the caller's memory to the disk.
- It takes whole blocks of the file, from memory that begins at a block. What lies before and after them, and all on a
  system or a file system without it, goes through the page cache. Which way a byte went, no reader sees.
- What is written is durable after `sync`, either way.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np

BLOCK = 2**12  # bytes; a multiple of what any disk asks for
DIRECT = 2**18  # bytes; less than that waits longer for the disk than for the page cache
_STEP = 2**21  # bytes that are moved to a block's begin and written at a time
_O_DIRECT = getattr(os, "O_DIRECT", 0)  # 0 where the system has none


def write_at(file: Path, offset: int, data: memoryview, file_bytes: int) -> None:
    """Write bytes at `offset`; the file is made, with `file_bytes` zeros, where it is not there or shorter.

    Threads and processes may write parts of one file at once. Raises OSError as the system does, a full disk included.
    """
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if os.fstat(handle).st_size < file_bytes:
            os.ftruncate(handle, file_bytes)
        first = -(-offset // BLOCK) * BLOCK - offset
        last = first + (len(data) - first) // BLOCK * BLOCK
        if last - first >= DIRECT:
            last = first + _direct(file, offset + first, data[first:last])
            _buffered(handle, offset, data[:first])
            _buffered(handle, offset + last, data[last:])
        else:
            _buffered(handle, offset, data)
    finally:
        os.close(handle)


def _buffered(handle: int, offset: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written


def _direct(file: Path, offset: int, data: memoryview) -> int:
    """Write whole blocks past the page cache; how many bytes of them were, 0 where that is not possible."""
    handle = _opened(file)
    if handle is None:
        return 0
    memory = np.empty(min(len(data), _STEP) + BLOCK, np.uint8)
    memory = memory[-memory.ctypes.data % BLOCK :]
    try:
        done = 0
        while done < len(data):
            part = memory[: min(len(data) - done, _STEP)]
            part[:] = data[done : done + part.size]
            written = os.pwrite(handle, part.data, offset + done)
            if written % BLOCK:  # the next write would not begin at a block
                return done + written
            done += written
        return done
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: blocks of another size, or none at all
            raise
        return done
    finally:
        os.close(handle)


def _opened(file: Path) -> int | None:
    try:
        return os.open(file, os.O_WRONLY | _O_DIRECT | os.O_CLOEXEC) if _O_DIRECT else None
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise
