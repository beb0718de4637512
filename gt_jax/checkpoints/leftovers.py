"""What lies under a temporary name: whose it is, and that only its own kind clears it away.

A killed save, growth or conversion leaves its folder. The next one of its kind may clear that, nobody else may, and a
folder that somebody else gave such a name is never touched. Told by what is in it, since a kill leaves no time to sign.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from gt_jax.checkpoints.folders import (
    CHECKSUMS,
    FILES,
    JOURNALS,
    KEPT,
    TEMPORARY,
    UNFINISHED,
    damage,
    holds_part,
    is_step_name,
    set_aside,
    step_folders,
)
from gt_jax.checkpoints.lock import is_held
from gt_jax.configs.tokenizer_file import NAMES
from gt_jax.errors import Refused, refuse_all
from gt_jax.files import parse_json

SAVE, GROWTH, ARRAYS, EMPTY = "save", "growth", "arrays", "nothing"
_ORBAX = ("_CHECKPOINT_METADATA", "commit_success.txt", "orbax.checkpoint", "state")
_OURS = (FILES, CHECKSUMS, "metadata")  # the last one: what Orbax saves for the metadata alone
_DATABASE = re.compile(r"d|manifest\.ocdbt.*|ocdbt\.process_\d+|array_metadatas|_.*")
_STEP = re.compile(rf"(0|[1-9][0-9]*){re.escape(UNFINISHED)}({re.escape(TEMPORARY)})?")


def kind_of(folder: Path) -> str | None:
    """`SAVE`: an Orbax database; `GROWTH`: a journal; `ARRAYS`: a folder an array, as a growth or conversion has them;
    `EMPTY`: nothing yet. None for anything else, whose it may be."""
    if folder.is_symlink() or not folder.is_dir():
        return None
    names = set(os.listdir(folder))
    files = {name for name in names & set(NAMES) if (folder / name).is_file()}
    names -= files if names - files else set()  # a tokenizer alone may be anybody's
    journals = {name for name in names if Path(name).match(f"{JOURNALS}*")}
    if {name.removesuffix(TEMPORARY) for name in names} - journals - {*_ORBAX, *_OURS}:
        return None
    state = folder / "state"
    stored = os.listdir(state) if state.is_dir() else []
    if journals:
        return GROWTH
    if any(not _DATABASE.fullmatch(name) for name in stored):
        return ARRAYS
    return SAVE if stored or names - {"state"} else EMPTY


def delete(folder: Path) -> None:
    """Delete a folder of ours; what may be anybody's goes first, so that what a kill leaves is still told as ours."""
    for name in NAMES:
        if (folder / name).is_file():
            (folder / name).unlink()
    shutil.rmtree(folder)


def forget(step: Path, kept: Callable[[Path], None]) -> None:
    """Remove a complete step of a run; what somebody put into it stays, as STEP.kept, of which `kept` hears first.

    Of a link the link goes. A step whose temporary name is taken stays as it is. Raises OSError; where nothing was
    removed by then the step has its own name again.
    """
    if step.is_symlink():
        step.unlink()
        return
    theirs = _not_saved(step)
    place = step.with_name(f"{step.name}{UNFINISHED}")
    if theirs:
        place = set_aside(step, KEPT)  # in the way of no save, also where a kill leaves half of the step beside
        kept(place)
    elif os.path.lexists(place):  # somebody's: what a save left there is cleared before the next one begins
        return
    else:
        os.rename(step, place)  # a kill while deleting must not leave half a step
    try:
        if theirs:
            _delete_all_but(place, theirs)
        else:
            delete(place)
    except OSError:
        if damage(place) is None:
            os.rename(place, step)
        raise


def _not_saved(step: Path) -> set[str]:
    """The files and links in a complete step that no save wrote: neither they nor anything below them is listed."""
    listed = {FILES, CHECKSUMS, *parse_json((step / FILES).read_text())}
    listed |= {str(folder) for name in listed for folder in Path(name).parents}  # one of which may be a link by now
    return {name for name in _below(step) if name not in listed}


def _below(folder: Path) -> list[str]:
    """The files and links anywhere in a folder, by their paths there; no link is followed."""
    found = []
    for place, folders, files in os.walk(folder):
        names = [Path(place) / name for name in (*folders, *files)]
        found += [str(name.relative_to(folder)) for name in names if name.is_symlink() or not name.is_dir()]
    return found


def _delete_all_but(folder: Path, theirs: Collection[str]) -> None:
    for name in _below(folder):
        if name not in theirs:
            (folder / name).unlink()
    for place, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # theirs lie in it
            os.rmdir(place)


def clear(folder: Path, kinds: Collection[str], what: str) -> None:
    """Delete what is there; raises `Refused`, naming it, when it is of none of these `kinds`. `what` wants the name."""
    if not os.path.lexists(folder):
        return
    kind = kind_of(folder)
    if kind not in kinds:
        found = {GROWTH: "an unfinished growth", ARRAYS: "an unfinished growth or conversion",
                 SAVE: "a save that was interrupted"}.get(str(kind), "nothing that gt_jax has made")  # fmt: skip
        raise Refused(f"{folder} is {found}, and {what} needs that name; finish it, move it away, or delete it")
    delete(folder)


def clear_save(unfinished: Path) -> None:
    """Delete what a killed save left under its two names; raises `Refused` where that is not a save's."""
    for folder in (unfinished, unfinished.with_name(unfinished.name + TEMPORARY)):
        clear(folder, (SAVE, EMPTY), f"the save of {unfinished.name.removesuffix(UNFINISHED)}")


def clear_steps(run: Path, stays: Callable[[Path, OSError], None]) -> None:
    """Delete what killed saves left in a run, <step>.unfinished; all else stays, also what another job writes there.

    `stays` hears of what cannot be deleted, and why; it makes room for the step where it can.
    """
    for entry in run.iterdir():
        step = _STEP.fullmatch(entry.name)
        try:
            if step and kind_of(entry) in (SAVE, EMPTY) and not is_held(entry.with_name(step[1])):
                delete(entry)
        except OSError as error:
            with contextlib.suppress(OSError):
                entry = set_aside(entry)
            stays(entry, error)


def refuse_taken_names(run: Path, done: int, last: int) -> None:
    """Raise `Refused` where somebody else's files have the names of steps that a run has yet to save, all listed.

    Better before training than at a save in the middle of it.
    """
    wrong, steps = [], step_folders(run)
    for entry in sorted(run.iterdir()):
        step = _STEP.fullmatch(entry.name)
        number = step[1] if step else entry.name
        if not done and entry.name.isdecimal() and not is_step_name(entry.name) and holds_part(entry):
            wrong.append(f"{entry} is a checkpoint, and no step of this run by its name; to go on from it, name it "
                         f"{int(entry.name)}; else move it away")  # fmt: skip
        if not is_step_name(number) or not done < int(number) <= last:
            continue
        if kind_of(entry) not in (SAVE, EMPTY) if step else int(number) not in steps or entry.is_symlink():
            wrong.append(f"{entry} is no save of this run, which needs the name at step {number}; move it away")
    refuse_all(wrong, f"{run} cannot be trained on:")
