"""The work directory: one JSON file a finished unit, each written whole, so that a killed study goes on.

WORK/study.json holds the config and a hash of the text; another config is refused with the fields that differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.growth_study.study import StudyConfig
from gt_jax.checkpoints.checkpoint import prepare_parent
from gt_jax.configs.json_config import read_object
from gt_jax.configs.run import differences
from gt_jax.errors import Refused, refuse_all
from gt_jax.files import write_atomically


class Store:
    """Finished units by seed and name; `report` hears of every unit that is done or was found done."""

    def __init__(self, root: Path, study: StudyConfig, content: str) -> None:
        self.root = root
        file = root / "study.json"
        mine = {"config": study.to_json(), "content": content}
        if file.exists():
            check_same(file, mine, study)
            return
        if root.exists() and (not root.is_dir() or any(path.name != "study.json.tmp" for path in root.iterdir())):
            raise Refused(f"--work {root} exists and is not this study's; give an empty or a new directory")
        prepare_parent(file)
        write_atomically(file, json.dumps(mine, indent=1) + "\n")

    def path(self, seed: int, name: str, suffix: str = ".json") -> Path:
        """Where a unit is kept."""
        return self.root / f"seed{seed}" / (slug(name) + suffix)

    def unit(self, seed: int, name: str, make: Callable[[], Mapping[str, Any]]) -> tuple[dict[str, Any], bool]:
        """The finished unit and whether it was found; else it is made, and written before it is returned."""
        file = self.path(seed, name)
        if file.exists():
            return read_object(file, "finished unit"), True
        made = dict(make())
        prepare_parent(file)
        write_atomically(file, json.dumps(made) + "\n")
        return json.loads(json.dumps(made)), False


def slug(name: str) -> str:
    """A name as a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def check_same(file: Path, mine: Mapping[str, Any], study: StudyConfig) -> None:
    """Raise `Refused` with the differing fields where `file` holds another study's "config" or text."""
    there = read_object(file, "the study in")
    try:
        wrong = differences(StudyConfig.from_json(there.get("config", {})), study)
    except Refused as error:
        wrong = [f"its config does not read: {error}"]
    if not wrong and there.get("content") != mine["content"]:
        wrong = [f"the text's content: {there.get('content')!r} and {mine['content']!r}"]
    refuse_all([line for line in wrong if not line.startswith("text:")] if there.get("content") == mine["content"]
               else wrong, f"{file} is of another study (there and here); give another directory, or the same words:")
