"""Compiled programs on disk: what took a command seconds to compile is there when it starts again.

JAX keeps them, in `~/.cache/gt_jax/programs/PROCESSOR` or under `$XDG_CACHE_HOME`. Commands use it; `import gt_jax`
does not. Who names a folder, in JAX_COMPILATION_CACHE_DIR say, has decided already and is left alone.

- What is in the folder is run as it is. So it is made for its owner alone, and not used where others may write.
- JAX writes an entry in place. One that a killed process or a full disk left short would be refused, with a warning,
  and never replaced: so what was written since the last start is read once, and removed where it is not whole.
- Above `MOST` bytes the oldest go.
- Programs for a processor may use all that it can, and a home may be that of several machines: each kind has a folder.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import platform
import stat
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

from gt_jax.errors import say

DIRECTORY = "JAX_COMPILATION_CACHE_DIR"
MOST = 4 << 30  # bytes
_CHECKED = "checked"  # its time is that of the last look at what is whole
_ZSTD = b"\x28\xb5\x2f\xfd"


def add_cache_flag(p: argparse._ActionsContainer) -> None:
    """--no-compilation-cache"""
    p.add_argument("--no-compilation-cache", action="store_true", help="compile all programs anew, and keep none for "
                   "the next start (default: in ~/.cache/gt_jax)")  # fmt: skip


def keep_programs(arguments: argparse.Namespace) -> None:
    """Let JAX keep compiled programs and take those that are there, unless the flag is given.

    Processes that this one starts do so too. Where the folder cannot be used, one line says why, and work goes on.
    """
    if arguments.no_compilation_cache:
        _set("jax_enable_compilation_cache", "false", False)
        return
    if _is_decided():
        return
    try:
        folder = programs_folder()
        _open(folder)
        _tidy(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        say(f"compiled programs are not kept: {error} (--no-compilation-cache, or another folder in {DIRECTORY})")
        return
    _set("jax_compilation_cache_dir", str(folder), str(folder))


def _is_decided() -> bool:
    """Whether someone has chosen a folder, or none: by a variable, or of a JAX that is imported."""
    jax = sys.modules.get("jax")
    return DIRECTORY in os.environ or "JAX_ENABLE_COMPILATION_CACHE" in os.environ or (
        jax is not None and jax.config.jax_compilation_cache_dir is not None)  # fmt: skip


def _set(option: str, text: str, value: object) -> None:
    """An option of JAX, by the variable that it and processes to come read at their start; of one that is running."""
    os.environ[option.upper()] = text
    if (jax := sys.modules.get("jax")) is not None:
        jax.config.update(option, value)


def programs_folder() -> Path:
    """Where programs of this machine's kind of processor lie; raises RuntimeError where there is no home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"  # the specification ignores relative ones
    return base / "gt_jax" / "programs" / f"{platform.machine() or 'unknown'}-{zlib.crc32(_processor()):08x}"


def _processor() -> bytes:
    """What this machine's processor can do, as far as the system says."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_bytes().splitlines():
            if line.lower().startswith((b"flags", b"features")):
                return line
    return platform.processor().encode()


def _open(folder: Path) -> None:
    """Make the folder; raises OSError where it cannot be written, or belongs to others, or others may write there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        found = folder.stat()
        if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{folder} belongs to another user, or others may write there")
    (folder / _CHECKED).open("a").close()  # not `touch`, which would set the time of a look that was none


def _tidy(folder: Path) -> None:
    """Remove what is not whole of what was written since the last start, then the oldest above `MOST` bytes."""
    stamp = folder / _CHECKED
    before = stamp.stat().st_mtime
    entries = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # of two commands that start at once, the other removed it
            found = path.stat()
            if found.st_mtime >= before - 1 and not _is_whole(path.read_bytes()):
                path.unlink()
            else:
                entries.append((found.st_mtime, found.st_size, path))
    held = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if held <= MOST:
            break
        path.unlink(missing_ok=True)
        held -= size
    os.utime(stamp)


def _is_whole(data: bytes) -> bool:
    """Whether a compressed entry decompresses; true of what this process has no library for."""
    expand = _expander() if data.startswith(_ZSTD) else zlib.decompress
    if expand is None:
        return True
    try:
        expand(data)
    except Exception:  # noqa: BLE001 - each library has an error of its own
        return False
    return True


def _expander() -> Callable[[bytes], bytes] | None:
    """Of what JAX compresses with where Python has it, from 3.14 on, or where it is installed."""
    for module, name in (("compression.zstd", "decompress"), ("zstandard", "decompress")):
        with contextlib.suppress(ImportError, AttributeError):
            found: Callable[[bytes], bytes] = getattr(importlib.import_module(module), name)
            return found
    return None
