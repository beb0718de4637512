"""What an interrupted growth leaves beside its target, and what can still be made of it.

A growth of TARGET goes through these names; at a kill one of them stays, and TARGET itself does not exist:

- TARGET.partial_save: groups of finished leaves, each of them whole. A resumed growth keeps them.
- TARGET.unfinished.partial_save: the groups while they are merged. Orbax cannot go on from there, so the growth starts
  again (a merge moves small files only, it takes a moment).
- TARGET.unfinished: merged; only its name is missing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gt_jax.checkpoint_files import PARTIAL, TEMPORARY, UNFINISHED
from gt_jax.errors import Refused, refuse_all


class Leftovers:
    """The unfinished growth of one target, as it is on disk."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.groups = target.with_name(target.name + PARTIAL)
        self.merged = target.with_name(target.name + UNFINISHED)
        self.merging = target.with_name(target.name + UNFINISHED + PARTIAL)
        self._torn = [folder.with_name(folder.name + TEMPORARY) for folder in (self.groups, self.merged)]

    def names(self) -> list[str]:
        """The folders that are there."""
        return [folder.name for folder in (self.groups, self.merging, self.merged, *self._torn) if folder.exists()]

    def refuse_unless(self, resume: bool) -> None:
        """Raise `Refused` when something is there and `resume` is not set."""
        if self.names() and not resume:
            raise Refused(f"{', '.join(self.names())} in {self.target.parent}: a growth of {self.target.name} was "
                          "interrupted (or is running); complete it with --resume, or delete this first")

    def refuse_another(self, metadata: Mapping[str, Any]) -> None:
        """Raise `Refused`, naming the fields, when what is there belongs to a growth with other metadata."""
        differing: dict[str, str] = {}
        for folder in (self.merged, self.merging, *self._groups(self.merging), *self._groups(self.groups)):
            if folder.exists():
                differing |= _differing(_metadata(folder), metadata)
        refuse_all(list(differing.values()), f"{', '.join(self.names())} in {self.target.parent} belongs to another "
                   "growth; repeat that one with --resume, or delete this first. The fields that differ:")

    def finished_leaves(self) -> set[str]:
        """Paths of the leaves in complete groups; what cannot be kept is deleted."""
        for folder in (self.merging, *self._torn):
            shutil.rmtree(folder, ignore_errors=True)
        return {name for group in self._groups(self.groups) for name in _leaf_names(group)}

    def discard(self) -> None:
        """Delete all of it."""
        for folder in (self.groups, self.merging, self.merged, *self._torn):
            shutil.rmtree(folder, ignore_errors=True)

    def _groups(self, folder: Path) -> list[Path]:
        return sorted(folder.glob("*.pending_*"))


@contextlib.contextmanager
def only_writer(target: Path) -> Iterator[None]:
    """Hold TARGET.lock, which a killed process lets go of; raises `Refused` while another process holds it."""
    lock = target.with_name(target.name + ".lock")
    with open(lock, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise Refused(f"another process is growing {target} at this moment ({lock} is locked)") from error
            raise
        try:
            yield
        finally:
            os.unlink(lock)


def _metadata(folder: Path) -> Any:
    """The growth's metadata, None where a kill left no readable file of it."""
    try:
        return json.loads((folder / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _leaf_names(group: Path) -> list[str]:
    """Which leaves a group holds: Orbax lists their keys in its own metadata file."""
    tree = json.loads((group / "state" / "_METADATA").read_text())["tree_metadata"]
    return ["/".join(key["key"] for key in leaf["key_metadata"]) for leaf in tree.values()]


def _differing(found: Any, wanted: Mapping[str, Any]) -> dict[str, str]:
    """One line for every field with another value; where the source lies may change, its content may not."""
    if not isinstance(found, Mapping):
        return {}
    pairs = {name: (found.get(name), wanted[name]) for name in wanted if name != "grown_from"}
    there = found.get("grown_from") or {}
    pairs |= {name: (there.get(name), value) for name, value in wanted["grown_from"].items() if name != "source"}
    return {name: f"{name}: {_short(old)} there, {_short(new)} now" for name, (old, new) in pairs.items() if old != new}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
