"""Is a checkpoint what was written? Every byte is compared; all damaged files are named, and the tensors in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.checksums import changed_files, noted
from gt_jax.checkpoints.folders import CHECKSUMS, FILES, Damaged, holds_part, step_folders
from gt_jax.checkpoints.slices import SliceReader
from gt_jax.errors import Refused
from gt_jax.files import parse_json


class Checked(NamedTuple):
    """How many files of how many bytes were compared, and what is `damaged`: {"file", "tensors"} of each file."""

    checked: int
    bytes: int
    damaged: list[dict[str, Any]]


def check(path: Path) -> Checked:
    """Compare a checkpoint, or every step of a run, with its checksums.

    Raises `Refused` where there is neither, or where none were noted: they are older, or of another program.
    """
    if not path.is_dir():
        raise Refused(f"checkpoint {path} does not exist; --check takes a checkpoint, a run, or a file of convert")
    if holds_part(path) or (path / CHECKSUMS).exists():
        return _check(path)
    steps = step_folders(path)
    if not steps:
        raise Refused(f"{path} holds neither a checkpoint nor steps of a run; give a checkpoint or a run directory")
    found = [_check(steps[step]) for step in sorted(steps)]
    return Checked(sum(one.checked for one in found), sum(one.bytes for one in found),
                   [line for one in found for line in one.damaged])


def _check(place: Path) -> Checked:
    listed = _listed(place)
    try:
        sums = noted(place).files
    except Damaged:
        return Checked(0, 0, [{"file": str(place / CHECKSUMS), "tensors": []}])
    if not sums and CHECKSUMS not in listed:
        raise Refused(f"checkpoint {place} has no checksums (it is older than they are, or another program wrote it), "
                      "so nothing says whether a bit has changed; what is grown or converted from it has some")
    here = {name: (place / name).stat().st_size for name in {*sums, *listed} if (place / name).is_file()}
    wrong = {name for name in {*sums, *listed} if name not in here}
    wrong |= set(changed_files(place, [name for name in sums if name in here]))
    if any(listed.get(name, size) != size for name, size in here.items() if name not in wrong):
        wrong.add(FILES)  # the file holds what was written, so it is the list that is wrong
    tensors = _tensors(place, wrong)
    return Checked(len(here), sum(here.values()),
                   [{"file": str(place / name), "tensors": tensors.get(name, [])} for name in sorted(wrong)])


def _listed(place: Path) -> dict[str, int]:
    """The sizes that were noted; of a list that cannot be read one that the list itself does not have."""
    try:
        return dict(parse_json((place / FILES).read_text()))
    except (OSError, ValueError, TypeError):
        return {FILES: -1}


def _tensors(place: Path, wrong: set[str]) -> Mapping[str, list[str]]:
    """By damaged file the tensors that lie in it: those of a folder of its own, else all that read differently."""
    found = {name: [name.split("/")[1].replace(".", "/")] for name in wrong if name.startswith("state/params.")
             or name.startswith("state/statistics.")}
    others = [name for name in wrong - set(found) if name.startswith("state/")]
    if others and noted(place).tensors:
        changed = _changed_tensors(place)
        found |= {name: changed for name in others}
    return found


def _changed_tensors(place: Path) -> list[str]:
    """The tensors of the model whose values cannot be read, or are not those that were written."""
    sums = noted(place).tensors
    try:
        leaves, _ = checkpoint.described(place)
        reader = SliceReader(place, leaves)
    except Refused:  # what says where the values lie is damaged
        return []
    changed = []
    for name, value in sums.items():
        try:
            same = reader.checksum(name) == value
        except Damaged:
            same = False
        if not same:
            changed.append(name)
    return changed
