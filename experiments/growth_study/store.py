"""The work directory of this study: a folder a seed, one JSON file a finished unit (experiments/units.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.growth_study.study import StudyConfig
from experiments.units import Units, slug


class Store:
    """Finished units by seed and name."""

    def __init__(self, root: Path, study: StudyConfig, content: str) -> None:
        self._units = Units(root, study, content)

    def path(self, seed: int, name: str, suffix: str = ".json") -> Path:
        """Where a unit is kept."""
        return self._units.path(f"seed{seed}/{slug(name)}", suffix)

    def unit(self, seed: int, name: str, make: Callable[[], Mapping[str, Any]]) -> tuple[dict[str, Any], bool]:
        """The finished unit and whether it was found; else it is made, and written before it is returned."""
        return self._units.unit(f"seed{seed}/{slug(name)}", make)
