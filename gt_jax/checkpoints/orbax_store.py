"""Orbax, and what it takes to live with it: how arrays are stored, silence, and errors that say what happened.

The only file that imports Orbax. Its logging stays silent; its errors become `Damaged` where a checkpoint is read and
`OSError` where a disk is full.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from gt_jax.checkpoints.folders import CHUNK, Damaged, remove
from gt_jax.checkpoints.slices import writing_axes
from gt_jax.checkpoints.tree_paths import flatten, nest

_BROKEN = (ValueError, KeyError, TypeError, OSError)  # what Orbax and TensorStore raise on a broken file
_MOMENT = 0.2  # seconds
_QUIET, _TRIES = 4, 100
_FILES = 256  # open at once, with room: what a small checkpoint takes is fewer

T = TypeVar("T")


def save(folder: Path, leaves: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Write arrays by path, and a JSON object, into the new `folder`; call it inside `write`."""
    ocp.save(folder, nest(leaves), custom_metadata=dict(metadata))


def save_async(folder: Path, leaves: Mapping[str, Any], metadata: Mapping[str, Any]) -> Any:
    """`save` that writes on beside the caller; the `result()` of what it returns waits for the end."""
    with _quiet(), _context():
        return ocp.save_async(folder, nest(leaves), custom_metadata=dict(metadata))


def _context(database: bool = True) -> ocp.Context:
    """Raw bytes (weights do not compress), no second copy in memory, and leaves that were not asked for stay unread.

    `database`: all arrays in one database, else each in a folder of its own.
    """
    context = ocp.Context()
    context.array.saving.use_ocdbt = database
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = _chunks
    context.memory.deepcopy_host_arrays = False
    context.pytree.loading.partial_load = True
    context.asynchronous.create_directories_asynchronously = False  # else a failure is a wait of five minutes
    return context


def _chunks(key: Any, value: Any) -> Any:
    """A large array is stored in chunks that are runs of values in C order: a growth reads it in slices."""
    shape, itemsize = tuple(value.shape), np.dtype(value.dtype).itemsize
    if math.prod(shape) * itemsize <= CHUNK:
        return None
    axes = writing_axes(shape, itemsize, CHUNK)
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=CHUNK, shard_axes=axes or None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs every save, and prints whole stacks for an error that it raises anyway."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    hook = sys.unraisablehook

    hopeless = _files_allowed() < _FILES  # an event loop that cannot be made fails in every method, each with a stack

    def unless_closed(unraisable: Any) -> None:
        if not hopeless and "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    sys.unraisablehook = unless_closed
    if hopeless:
        warnings.simplefilter("ignore", RuntimeWarning)  # of coroutines that nobody awaits then
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """The Ctrl-Cs that come meanwhile: Orbax may swallow one, and find nothing then where a whole checkpoint lies.

    Where somebody else listens for them, as a run does, or off the main thread, none is noted.
    """
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        signal.default_int_handler(number, frame)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield heard
        return
    signal.signal(signal.SIGINT, hear)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _with_orbax(work: Callable[[], T], failed: Callable[[Exception], Exception],
                database: bool = True) -> T:
    """`work()` in Orbax's context; what it raises for a broken file or disk is raised as `failed` says it.

    A Ctrl-C that comes meanwhile is raised as that, whatever became of it within. After an error, other reads and
    writes of the same call find their event loop closed, and futures and coroutines go unheard; Python prints each of
    them when the error is forgotten. So that happens here, where it is quiet.
    """
    with _quiet(), _context(database), _interrupts() as heard:
        try:
            result = work()
            if not heard:
                return result
            failure: BaseException = KeyboardInterrupt()
        except _BROKEN as error:
            failure = KeyboardInterrupt() if heard else failed(error)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            time.sleep(_MOMENT)
            gc.collect()
    raise failure


def write(target: Path, unfinished: Path, work: Callable[[], None], database: bool = True) -> None:
    """Run `work`; what fails leaves nothing `unfinished`, and is an OSError if the operating system said so.

    `database`: whether what it saves lies in one database, else each array in a folder of its own.
    """

    def failed(error: Exception) -> Exception:
        number = _system_error(error)
        return error if number is None else OSError(number, "")

    try:
        _with_orbax(work, failed, database)
    except Exception as error:  # whatever it is: raised again, once nothing is left of it
        with contextlib.suppress(OSError):  # of too many open files, for one; what is left is said
            _remove_for_good(unfinished)
        if not isinstance(error, OSError) or error.errno is None:
            raise
        left = " and ".join(str(path) for path in (target, unfinished) if path.exists())
        left = f"{left} is left" if left else "nothing is left there"
        raise OSError(error.errno, f"{_reason(error.errno)} while writing {target}; {left}") from None


def _system_error(error: Exception) -> int | None:
    """The operating system's number of what an error of Orbax or TensorStore comes from, if they say so."""
    code = re.search(r"os_error_code='?(\d+)", str(error))
    return int(code[1]) if code else getattr(error, "errno", None)


def _reason(number: int) -> str:
    if number != errno.EMFILE:
        return os.strerror(number)
    return f"too many open files (this process may have {_files_allowed()}; ulimit -n {_FILES} raises that)"


def _files_allowed() -> int:
    """How many files this process may have open at once."""
    try:
        import resource
    except ImportError:  # on Windows
        return sys.maxsize
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if allowed == resource.RLIM_INFINITY else allowed


def _remove_for_good(unfinished: Path) -> None:
    """Remove what other writes of a call that failed may still make anew, until none has done so for a moment."""
    quiet = 0
    for _ in range(_TRIES):
        quiet = 0 if remove(unfinished) else quiet + 1
        if quiet == _QUIET:
            return
        time.sleep(_MOMENT / _QUIET)


def metadata(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What stands for each array by path, with its shape and dtype, and the JSON object; raises `Damaged`."""

    def look() -> tuple[dict[str, Any], dict[str, Any]]:
        found = ocp.metadata(path)
        if found.metadata is None:  # Orbax logs why, and goes on
            if _files_allowed() < _FILES:
                raise OSError(errno.EMFILE, "")
            raise ValueError("the values are not where its metadata says")
        return flatten(found.metadata), dict(found.custom_metadata or {})

    return _look(path, look)


def read(path: Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by path, restored as `abstract` (`on_host`, `on_device`) says; nothing is compared. Raises `Damaged`."""
    return _look(path, lambda: flatten(ocp.load(path, nest(abstract)))) if abstract else {}


def _look(path: Path, work: Callable[[], T]) -> T:
    def failed(error: Exception) -> Exception:
        if _system_error(error) == errno.EMFILE:  # the checkpoint may be sound
            return OSError(errno.EMFILE, f"{_reason(errno.EMFILE)} while reading {path}")
        return Damaged(f"checkpoint {path} cannot be read: {error}")

    return _with_orbax(work, failed)


def on_host(leaf: Any) -> np.ndarray:
    """Orbax restores where a numpy array stands as numpy; this one takes no memory."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def on_device(leaf: Any) -> Any:
    """What restores an array as `leaf` says: its sharding, a device of this process where it has none, or numpy."""
    if isinstance(leaf, np.ndarray):
        return on_host(leaf)
    sharding = getattr(leaf, "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if sharding is None or (mesh is not None and mesh.empty):
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
