"""A lock beside a target that is being written, so that two processes never write the same one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from gt_jax.errors import Refused


@contextlib.contextmanager
def only_writer(target: Path) -> Iterator[None]:
    """Hold TARGET.lock, which a killed process lets go of; raises `Refused` while another process holds it."""
    lock = target.with_name(target.name + ".lock")
    with open(lock, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise Refused(f"another process is writing {target} at this moment ({lock} is locked)") from error
            raise
        try:
            yield
        finally:
            os.unlink(lock)
