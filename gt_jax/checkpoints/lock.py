"""A lock beside a target that is being written, so that two jobs never write the same one.

- The file is `.NAME.gt_jax-lock` and says that it is a lock of ours; one of that name that says something else is
  refused and left as it is. The last that holds it unlinks it. A killed process lets go of it; the file may stay.
- All processes of a job hold it, shared (flock), so it is taken as long as one of them lives. Process 0 takes it alone
  first and writes the job's name, and who it is for whoever is refused. To hold it alone and then shared is not one
  step: another job may come between. So a job has the lock when the file still has its name once it is held shared;
  from then on nobody can write another.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from gt_jax.devices.processes import ProcessGroup
from gt_jax.errors import Refused
from gt_jax.files import explain_full_disk

_MARK = b"gt_jax lock of job "
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_BYTES = len(_MARK) + len(uuid.uuid4().hex)  # a lock of ours has so many, or none where a kill came first …
_HOLDER = 512  # … and at most so many that say who holds it


def lock_file(target: Path) -> Path:
    """Where the lock of `target` lies."""
    return target.with_name(f".{target.name}.gt_jax-lock")


def is_held(target: Path) -> bool:
    """Whether a job, of another process or of this one, holds the lock of `target` at this moment."""
    try:
        file = os.open(lock_file(target), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # there is none, or nothing of ours
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(file)
    return False


@contextlib.contextmanager
def only_writer(target: Path) -> Iterator[None]:
    """Hold the lock of `target`; on several processes all of them call it, and hold it.

    Raises `Refused` while another job holds it, where a file that is not ours has its name, and where no lock is
    possible.
    """
    group, path = ProcessGroup(), lock_file(target)
    held: list[int] = []
    try:
        with explain_full_disk(target, "do it again"):
            group.agree(lambda: held.append(_take(path, target)) if group.first else None)
        job = group.gather(_content(held[0]).decode() if group.first else None)[0]
        group.agree(lambda: None if group.first else held.append(_join(path, target, job.encode())))
        yield
    finally:
        for file in held:
            _let_go(file, path)


def _take(path: Path, target: Path) -> int:
    """The lock's descriptor, held shared, with a new job's name in the file."""
    content = _MARK + uuid.uuid4().hex.encode()
    while True:
        file = _open(path)
        try:
            _flock(file, fcntl.LOCK_EX, path, target)
            os.ftruncate(file, 0)  # the name of a holder that is dead
            if not _is(file, path):  # whoever held it has unlinked it since it was opened
                os.close(file)
                continue
            os.pwrite(file, content + f", {_this_process()}\n".encode()[:_HOLDER], 0)
            _flock(file, fcntl.LOCK_SH, path, target)
            if _content(file) != content:
                raise _busy(path, target)
            return file
        except BaseException:
            with contextlib.suppress(OSError):  # on a full disk there is a file, and nothing in it
                _let_go(file, path)
            raise


def _join(path: Path, target: Path, content: bytes) -> int:
    """The lock's descriptor, held shared beside process 0, which has written `content`."""
    file = _open(path)
    try:
        _flock(file, fcntl.LOCK_SH, path, target)
        if _content(file) != content:
            raise _busy(path, target)
    except BaseException:
        os.close(file)
        raise
    return file


def _let_go(file: int, path: Path) -> None:
    """Unlink the file if nobody else holds it, and close it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is(file, path):
            os.unlink(path)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
    finally:
        os.close(file)


def _open(path: Path) -> int:
    """A descriptor of the file, which is made where there is none; raises `Refused` where it is not ours."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _foreign(path) from error
        if error.errno in (errno.EACCES, errno.EPERM) and not os.path.lexists(path):
            raise Refused(f"{path.parent} is not writable; choose another place, or make it so") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise Refused(f"the lock {path} cannot be opened ({error.strerror}): it is another user's. Where no job of "
                          "theirs is writing, delete it, or have them do so") from error
        if error.errno == errno.EROFS:
            raise Refused(f"{path.parent} lies on a disk that can only be read; choose another place") from error
        if error.errno == errno.ENAMETOOLONG:
            raise Refused(f"the name of {path} is too long for its disk; choose a shorter target") from error
        raise
    try:
        size = os.fstat(file).st_size
        ours = size == 0 or (_BYTES <= size <= _BYTES + _HOLDER and _content(file).startswith(_MARK))
        if not (stat.S_ISREG(os.fstat(file).st_mode) and ours):
            raise _foreign(path)
    except BaseException:
        os.close(file)
        raise
    return file


def _flock(file: int, how: int, path: Path, target: Path) -> None:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise _busy(path, target) from error
        if error.errno in _NO_LOCKS:
            raise Refused(f"the disk of {path.parent} gives no locks ({error.strerror}), and without one two jobs may "
                          f"write {target}; choose another place, or mount the disk with flock") from error
        raise


def _content(file: int) -> bytes:
    return os.pread(file, _BYTES, 0)


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _holder(path: Path) -> str:
    """Who holds the lock, as far as its file says."""
    try:
        with open(path, "rb") as file:
            said = file.read(_BYTES + _HOLDER)[_BYTES:].decode(errors="replace").strip(", \n")
    except OSError:  # it has let go meanwhile
        said = ""
    return "".join(char for char in said if char.isprintable()) or "it has not said who it is"


def _is(file: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except FileNotFoundError:
        return False


def _busy(path: Path, target: Path) -> Refused:
    return Refused(f"another process is writing {target} at this moment ({_holder(path)}; {path} is locked); wait for "
                   "its end, or stop it")


def _foreign(path: Path) -> Refused:
    return Refused(f"{path} is not a lock of gt_jax, which needs that name; move it away")
