"""Studies in units: a work directory of finished ones, so that a killed study goes on, and workers that make them.

- WORK/study.json holds the config and a hash of the text; another config is refused with the fields that differ.
- A unit is one JSON object, written whole under its name: the same command finds it and makes only what is missing.
- WORK/seconds.json holds the wall time of all calls so far, as it was when the last unit was kept.
- Workers are processes of their own, each held to one core, so that two neither share threads nor wait for each other.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gt_jax.checkpoints.folders import prepare_parent
from gt_jax.configs.json_config import Config, read_object
from gt_jax.configs.run import differences
from gt_jax.errors import Refused, refuse_all
from gt_jax.files import unfinished_name, write_atomically
from gt_jax.monitoring.metrics import json_values

Unit = Mapping[str, Any]
PLACES = ("text", "tokenizer")
"""The fields of a config that name files: what they hold, a hash says."""


class Units:
    """The finished units of one study under `root`. `content` is a hash of what it reads.

    Files of the fields `places` may lie elsewhere than in the run before, as long as `content` is the same. Raises
    `Refused` for a directory of another study, or of something else.
    """

    def __init__(self, root: Path, study: Config, content: str, places: Sequence[str] = PLACES) -> None:
        self.root = root
        self._began, self._before = time.monotonic(), 0.0
        file = root / "study.json"
        if file.exists():
            check_same(file, study, content, places)
            if self._spent.exists():
                self._before = float(read_object(self._spent, "wall time of the study")["seconds"])
            return
        if root.exists() and (not root.is_dir() or any(path != unfinished_name(file) for path in root.iterdir())):
            raise Refused(f"--work {root} exists and is not this study's; give an empty or a new directory")
        prepare_parent(file)
        write_atomically(file, json.dumps({"config": study.to_json(), "content": content}, indent=1) + "\n")

    @property
    def _spent(self) -> Path:
        return self.root / "seconds.json"

    @property
    def seconds(self) -> float:
        """Wall time of this call and of those before it, which a killed one lacks since its last unit."""
        return self._before + time.monotonic() - self._began

    def path(self, name: str, suffix: str = ".json") -> Path:
        """Where a unit is kept; `seed0/dense at 0.003` lies in a folder of its seed."""
        *folders, last = map(slug, name.split("/"))
        return self.root.joinpath(*folders, last + suffix)

    def found(self, name: str) -> dict[str, Any] | None:
        """A finished unit, or None."""
        file = self.path(name)
        return read_object(file, "finished unit") if file.exists() else None

    def keep(self, name: str, made: Unit) -> dict[str, Any]:
        """Write a unit, whole; returns it as it will be found."""
        file = self.path(name)
        prepare_parent(file)
        write_atomically(file, json.dumps(json_values(made), allow_nan=False) + "\n")
        write_atomically(self._spent, json.dumps({"seconds": round(self.seconds, 1)}) + "\n")
        return read_object(file, "finished unit")

    def unit(self, name: str, make: Callable[[], Unit]) -> tuple[dict[str, Any], bool]:
        """The finished unit and whether it was found; else it is made, and written before it is returned."""
        there = self.found(name)
        return (self.keep(name, make()), False) if there is None else (there, True)


def slug(name: str) -> str:
    """A name as a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def check_same(file: Path, study: Config, content: str, places: Sequence[str] = PLACES) -> None:
    """Raise `Refused` with the differing fields where `file` holds another study's "config" or "content"."""
    there = read_object(file, "the study in")
    same = there.get("content") == content
    try:
        wrong = differences(type(study).from_json(there.get("config", {})), study)
    except Refused as error:
        wrong = [f"its config does not read: {error}"]
    if not wrong and not same:
        wrong = [f"the text's content: {there.get('content')!r} and {content!r}"]
    if same:
        wrong = [line for line in wrong if not line.startswith(tuple(f"{name}:" for name in places))]
    refuse_all(wrong, f"{file} is of another study (there and here); give another directory, or the same words:")
