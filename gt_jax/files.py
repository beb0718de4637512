"""Files written whole or not at all, JSON read for what it is, a full disk's message, addresses that are no files."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gt_jax.errors import Refused

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # pathlib makes one slash of two


def refuse_address(path: str | os.PathLike[str]) -> None:
    """Raise `Refused` for gs://bucket/run and the like, which pathlib takes for a folder gs: of the current one."""
    found = _ADDRESS.match(os.fspath(path))
    if found:
        raise Refused(f"{os.fspath(path)} is an address ({found[1]}:), and only files are read and written; mount the "
                      "bucket, or copy from and to it")


def local_name(text: str) -> str:
    """The words of an argument that may name a file; raises what argparse makes a refusal of for an address."""
    try:
        refuse_address(text)
    except Refused as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def local_path(text: str) -> Path:
    """The path that an argument names, as `local_name`."""
    return Path(local_name(text))


def addresses(**fields: str | Sequence[str] | None) -> list[str]:
    """One line for each field of a config that names an address where a file or a folder is meant."""
    found = []
    for name, value in fields.items():
        for path in (value,) if isinstance(value, str) else value or ():
            try:
                refuse_address(path)
            except Refused as error:
                found.append(f"{name}: {error}")
    return found


def unfinished_name(path: Path) -> Path:
    """What a small file is called until it is whole: a name that no user gives to a file of theirs."""
    return path.with_name(f".{path.name}.gt_jax-tmp")


def checkpoint_around(target: Path) -> Path | None:
    """The checkpoint that a target would lie in, where only what was saved belongs; None where it lies in none."""
    folders = Path(os.path.abspath(target)).parents
    return next((folder for folder in folders if (folder / "_CHECKPOINT_METADATA").exists()), None)


def wrong_place(path: Path) -> str | None:
    """Why a command cannot write a file at `path`, in words after that name; None where it can."""
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)):
        return f"{path.parent} is not a folder that can be written to"
    around = checkpoint_around(path)
    if around is not None:
        return f"it would lie in the checkpoint {around}, which goes when it is old; name another place"
    return None


def behind_link(path: Path) -> Path:
    """The place that a link names, at the end of all links; any other path as it is."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def write_atomically(path: Path, content: str | bytes, replace: bool = True) -> None:
    """Write under `unfinished_name`, then rename: what fails leaves the old file, or none; a kill leaves that name too.

    The bytes are on the disk before they get the name, and the name is when this returns. A file that is replaced keeps
    its mode, and a link to it stays one; without `replace` none is, also one that has come since somebody looked. Text
    is UTF-8; what is no character, of a file name in another encoding, is escaped. Raises OSError, that of a full disk
    with the file's name, and FileExistsError.
    """
    path = behind_link(path) if replace else path
    unfinished = unfinished_name(path)
    try:
        with explain_full_disk(path, "do it again"):
            with open(unfinished, "wb") as file:
                file.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
            if replace:
                if path.exists():
                    os.chmod(unfinished, stat.S_IMODE(path.stat().st_mode))
                os.replace(unfinished, path)
            else:
                name_anew(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
    sync(path.parent)


def name_anew(unfinished: Path, path: Path) -> None:
    """Call a file `path`, which nothing is called; raises FileExistsError."""
    try:
        os.link(unfinished, path)
    except OSError:  # something is; or the file system has no second names, and a moment lies between look and rename
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "it has come meanwhile, and is left as it is", str(path)) from None
        os.replace(unfinished, path)
        return
    unfinished.unlink()


def refuse_once(path: str | os.PathLike[str]) -> None:
    """Raise ValueError for a pipe or a device: what is hashed, and read anew on resume, cannot come from there."""
    if not (stat.S_ISREG(mode := os.stat(path).st_mode) or stat.S_ISDIR(mode)):
        raise ValueError("it is a pipe or a device, and text is read more than once; save it to a file")


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
        remedy = "raise the limit of a file's size (ulimit -f)" if error.errno == errno.EFBIG else "make room"
        raise OSError(error.errno, f"{reason} while writing {place}; {remedy}, then {then}") from error


_START = 512
_STARTS = (  # how a file begins, lower-case, that came in place of the one that was meant
    (b"version https://git-lfs.github.com/spec/", "a git-lfs pointer, not the file; fetch that with `git lfs pull`"),
    (b"/annex/objects/", "a git-annex pointer, not the file; fetch that with `git annex get`"),
    (b"<!doctype html", "an HTML page saved in its place, perhaps of a login or an error; download it anew"),
    (b"<html", "an HTML page saved in its place, perhaps of a login or an error; download it anew"),
    (b"<?xml", "an XML message saved in its place, perhaps an error of the server; download it anew"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"gguf", "a GGUF file, of llama.cpp; the weights it was made from are needed"),
    (b"\x89hdf", "an HDF5 file"),
)


def other_kind(path: Path) -> str | None:
    """What a file is, in words, where its first bytes show that it is not the one that was meant; else None."""
    with open(path, "rb") as stream:
        return other_content(stream.read(_START))


def other_content(content: bytes) -> str | None:
    """`other_kind` of what was read already."""
    if not content:
        return "empty, that is, truncated to nothing: a copy or a download that did not finish"
    plain = content[:_START].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((kind for begin, kind in _STARTS if plain.startswith(begin)), None)


def read_json(path: Path, finite: bool = True, once: bool = False) -> Any:
    """The JSON value in a file; raises OSError, and ValueError for what is no JSON.

    NaN and infinities are none; without `finite` they are read, by a reader that names the key that has one. With
    `once` an object that has a name twice is an error; else its last value counts.
    """
    content = path.read_bytes()  # once: it may be a pipe
    kind = other_content(content)
    if kind is not None:
        raise ValueError(f"it is {kind}")
    return parse_json(content.decode("utf-8-sig"), finite, once)


def parse_json(text: str | bytes, finite: bool = False, once: bool = False) -> Any:
    """The JSON value of a text, as `read_json`; raises ValueError, and nothing else, for what is no JSON."""
    return json_of(text, parse_constant=_no_number if finite else None,
                   object_pairs_hook=object_of_different_names if once else None)  # fmt: skip


def json_of(text: str | bytes, **hooks: Any) -> Any:
    """`json.loads` with its hooks; raises ValueError, in words of ours, for what is nested or long beyond reason."""
    try:
        return json.loads(text, **hooks)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError(f"it has a number of more than {sys.get_int_max_str_digits()} digits") from None
        raise


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number, and one that a float can hold, sums of many such ones too."""
    # The comparison, unlike math.isfinite, also takes an integer that no float can hold; bool is a kind of int.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def object_of_different_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different; raises ValueError for what a later one would silently replace."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return made


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON number; give a finite one, or null where a field takes that")
