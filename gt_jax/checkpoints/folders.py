"""A checkpoint as files: whether it is complete, what an unfinished one is called, which step of a run is the newest.

Nothing here reads values, so that a look at a folder costs a few small files.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gt_jax.configs.tokenizer_file import NAMES
from gt_jax.errors import Refused, say_once
from gt_jax.files import checkpoint_around, parse_json, refuse_address, sync

UNFINISHED = ".unfinished"  # a save that is under way, or was killed
JOURNALS = "journal.*.jsonl"  # what a growth has finished so far, in the unfinished folder
CONVERTING = ".converting"  # a conversion into our format that is under way, or was killed
KEPT = ".kept"  # what somebody had put into a step that is gone
TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax's name for what it writes at this moment
CHUNK = 2**24  # bytes of a stored chunk and of a slice read: below what malloc maps anew each time, yet few files
FILES = "files.json"
RUN_FILES = ("config.json", "metrics.jsonl")  # a folder with both is a run, whose steps lie in it by their numbers
CHECKSUMS = "checksums.json"
_NEEDED = ("orbax.checkpoint", "_CHECKPOINT_METADATA", "state/_METADATA")
_ORBAX = ("orbax.checkpoint", "_CHECKPOINT_METADATA", "state")  # one of them: it is or was a checkpoint
_DATABASE = "state/manifest.ocdbt"  # where arrays lie together in one database; else each has a folder of its own

StrPath = str | os.PathLike[str]


class Damaged(Refused):
    """A checkpoint that is incomplete or cannot be read; another one may do."""


def resolve(path: StrPath, warn: Callable[[str], None] | None = None) -> Path:
    """The checkpoint at `path`, or the newest complete step of the run directory there.

    `warn`, or standard error, hears of newer steps that are damaged. Raises `Refused` (`Damaged` when a checkpoint was
    begun) with what was found instead of a checkpoint.
    """
    refuse_address(path)
    place = Path(os.path.abspath(path))
    if not place.exists():
        raise Refused(f"checkpoint {place} does not exist{begun(place)}")
    if not place.is_dir():
        raise Refused(f"{place} is a file; a checkpoint is a folder")
    if place.name.endswith((UNFINISHED, TEMPORARY)):
        raise Damaged(f"{place} is a save that was interrupted, not a checkpoint")
    if holds_part(place):
        problem = damage(place)
        if problem:
            raise Damaged(f"checkpoint {place} is not usable: {problem}")
        return place
    steps = step_folders(place)
    if not steps:
        state = "is an empty folder" if not any(place.iterdir()) else "holds neither a checkpoint nor steps of a run"
        raise Refused(f"{place} {state}; give a checkpoint or a run directory")
    problems: list[str] = []
    for step in sorted(steps, reverse=True):
        problem = damage(steps[step])
        if problem is None:
            for line in problems:
                (warn or say_once)(f"{line}; step {step} is used")
            return steps[step]
        problems.append(f"step {step} in {place} is not usable: {problem}")
    raise Damaged("\n".join(["no step of this run is complete:", *problems]))


def batches_before(run: Path) -> int:
    """How many batches of its data lie before the first step of a run, since it starts from another; 0 where no step of
    the run says so, as before its first is saved."""
    for step, folder in step_folders(run).items() if run.is_dir() else ():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # half a step, or one of an earlier version
            own = parse_json((folder / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
            return int(own["data"]["batches"]) - step
    return 0


def holds_part(folder: Path) -> bool:
    """Whether a folder is a checkpoint or what is left of one."""
    return any((folder / part).exists() for part in _ORBAX)


def begun(place: Path) -> str:
    """What was begun under the name of something that is not there, as words after a message; "" where nothing was."""
    unfinished = place.with_name(place.name + UNFINISHED)
    if unfinished.is_dir() and any(unfinished.glob(JOURNALS)):
        return f"; {unfinished} is an unfinished growth, --resume completes it"
    left = sorted(place.parent.glob(glob.escape(unfinished.name) + "*"))
    return f"; {left[0]} was interrupted, the command that wrote it begins it anew" if left else ""


def publish(unfinished: Path, target: Path) -> None:
    """Wait for the disk, note every file's size beside the files, then rename: from here on the checkpoint exists."""
    note_files(unfinished)
    rename(unfinished, target)


def rename(unfinished: Path, target: Path) -> None:
    """Give a whole checkpoint its name, for good."""
    os.rename(unfinished, target)
    sync(target.parent)


def note_files(unfinished: Path) -> None:
    """Write files.json once all is on the disk: from here on `damage` finds nothing wrong."""
    sync_all(unfinished)
    files = {str(file.relative_to(unfinished)): file.stat().st_size
             for file in sorted(unfinished.rglob("*"))
             if file.is_file() and file.name != FILES and not file.match(f"{JOURNALS}*")}
    write_durably(unfinished / FILES, files)
    sync(unfinished)


def write_durably(file: Path, content: Any) -> None:
    """Write JSON and wait until it is on the disk (its name is not before the folder is synced)."""
    with open(file, "w") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())


def sync_all(folder: Path) -> None:
    """Wait until every file below a folder, and every name, is on the disk: what Orbax writes itself is not yet."""
    for place, folders, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(place) / name)
        for name in folders:
            sync(Path(place) / name)
    sync(folder)


def refuse_temporary_name(target: Path) -> None:
    """Raise `Refused` for a name that says "not finished": nobody opens it, and the next command may clear it."""
    ending = next((one for one in (UNFINISHED, CONVERTING, TEMPORARY) if target.name.endswith(one)), None)
    if ending is not None:
        raise Refused(f"{target} ends in {ending}, which is how what is not finished is named; choose another name")


def refuse_inside(target: Path) -> None:
    """Raise `Refused` for a target inside a checkpoint, which goes when it is too old."""
    folder = checkpoint_around(target)
    if folder is not None:
        raise Refused(f"{target} would lie in the checkpoint {folder}, which goes when it is old; name another place")


def refuse_step_of_run(target: Path) -> None:
    """Raise `Refused` for a target that would be taken for a step of the run that it lies in, the newest perhaps."""
    if is_step_name(target.name) and all((target.parent / name).is_file() for name in RUN_FILES):
        raise Refused(f"{target} would be taken for a step of the run {target.parent}; name another place")


def prepare_parent(target: Path, of_run: bool = False) -> list[Path]:
    """Make the folder `target` will lie in, and return the folders that were made, the innermost first; raises
    `Refused` when that is not possible or it is not writable.

    And for a `target` that is named as what is not finished, would lie in a checkpoint, or, where it is not `of_run`, a
    run's own save, would be one of its steps.
    """
    refuse_address(target)
    refuse_temporary_name(target)
    refuse_inside(target)
    if not of_run:
        refuse_step_of_run(target)
    new = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Refused(f"{target.parent} cannot be made ({error.strerror}); choose a folder that is writable") from error
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise Refused(f"{target.parent} is not writable; choose another place for {target.name}")
    for folder in new:
        sync(folder.parent)
    return new


@contextlib.contextmanager
def parent_made(target: Path) -> Iterator[None]:
    """`prepare_parent`; where what is done inside raises, the empty ones of the folders that it made are gone again."""
    new = prepare_parent(target)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # something lies there by now
            for folder in new:
                folder.rmdir()
        raise


def damage(path: Path) -> str | None:
    """Why a folder is not a complete checkpoint of ours, as far as its small files tell."""
    missing = [name for name in _NEEDED if not (path / name).is_file()]
    if missing:
        return f"half a checkpoint, without {', '.join(missing)}"
    try:
        metadata = parse_json((path / "_CHECKPOINT_METADATA").read_text())
        database = dict(parse_json((path / "state/_METADATA").read_text())).get("use_ocdbt", True)
    except (OSError, ValueError, TypeError) as error:
        return f"its metadata cannot be read ({error})"
    if database and not (path / _DATABASE).is_file():
        return f"half a checkpoint, without {_DATABASE}"
    own = metadata.get("custom_metadata") if isinstance(metadata, dict) else None
    if not isinstance(own, dict) or "config" not in own:
        return "it has no gt_jax metadata (no model config); it was written by another program"
    return _changed_files(path)


def _changed_files(path: Path) -> str | None:
    """Which files are not as they were when the checkpoint was complete."""
    try:
        files = dict(parse_json((path / FILES).read_text()))
    except (OSError, ValueError, TypeError) as error:
        return f"its list of files cannot be read ({error})"
    for name, size in files.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            return f"{name} " + ("is missing" if found is None else f"has {found} bytes instead of {size}")
    return None


def step_folders(root: Path) -> dict[int, Path]:
    """The steps of a run, complete or not: the folders that are named so but those that hold somebody's own alone."""
    return {int(entry.name): entry for entry in root.iterdir() if is_step_name(entry.name) and _is_step(entry)}


def is_step_name(name: str) -> bool:
    """Whether a run saves a step under this name: 320, not 0320 or other digits, which somebody's copy may have."""
    return name.isdecimal() and name == str(int(name))


def _is_step(entry: Path) -> bool:
    try:
        return entry.is_dir() and ({*os.listdir(entry)} <= {FILES, CHECKSUMS, *NAMES} or holds_part(entry))
    except OSError:  # whoever reads the step says so
        return True


def remove(unfinished: Path) -> bool:
    """Delete what a save left under its temporary names; returns whether there was anything."""
    names = (unfinished, unfinished.with_name(unfinished.name + TEMPORARY))
    found = [folder for folder in names if folder.exists()]
    for folder in found:
        shutil.rmtree(folder, ignore_errors=True)
    return bool(found)


def set_aside(source: Path, ending: str = ".damaged") -> Path:
    """Rename a damaged checkpoint to SOURCE.damaged, or .damaged2 and so on where that is taken; returns the name."""
    names = (source.with_name(f"{source.name}{ending}{number}") for number in itertools.chain([""], itertools.count(2)))
    target = next(name for name in names if not os.path.lexists(name))
    os.rename(source, target)
    return target
