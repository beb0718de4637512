"""The study of freed gates as one frozen config, and its units: which variant goes on from which seed's forced model.

A model trains with all passes forced until it has learned; then its gates decide, at the price of a pass, for about as
many steps again. All variants of a seed go on from the same weights, moments and data. So they differ by what frees the
gates alone, and not by the luck with which the task was learned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.depth_study.setting import Setting
from experiments.depth_study.study import CHAINS
from experiments.seeds_and_rates import wrong_seeds
from gt_jax.configs.json_config import Config, below

FORCED, SOFT, HARD = "forced", "soft weights", "hard weights"
VARIANTS: dict[str, dict[str, Any]] = {
    SOFT: {"weights": "soft"},
    HARD: {"weights": "hard"},
    f"{SOFT}, heads at ten times the rate": {"weights": "soft", "halting_scale": 10.0},
    f"{HARD}, heads at ten times the rate": {"weights": "hard", "halting_scale": 10.0},
    f"{SOFT}, price 0.03": {"weights": "soft", "pass_price": 0.03},
    f"{HARD}, price 0.03": {"weights": "hard", "pass_price": 0.03},
}
_LONG = CHAINS.replace(steps=2440, curriculum=0.45, opened=0.525, weights="soft")  # variants have their own
SCALES = {"minutes": _LONG.replace(steps=60, width=16, rows=8, held_out_batches=2), "small": _LONG}


@dataclasses.dataclass(frozen=True)
class FreedStudy(Config):
    """Passes are forced for the first `opened` of the setting's steps; held-out loss is looked at `evaluations` times
    evenly after that, and once `soon` steps after it."""

    setting: Setting = _LONG
    rate: float = 2e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = (SOFT, HARD)
    soon: int = 20
    evaluations: int = 6

    def problems(self) -> list[str]:
        wrong = below(self, 1, "soon", "evaluations")
        wrong += [f"variants has {name!r}; known are {', '.join(VARIANTS)}" for name in self.variants
                  if name not in VARIANTS]  # fmt: skip
        wrong += wrong_seeds(self.seeds)
        return wrong

    @property
    def forced_steps(self) -> int:
        """Steps before the gates are let go."""
        return round(self.setting.opened * self.setting.steps)

    @property
    def looked_at(self) -> tuple[int, ...]:
        """The steps at which a variant is asked, the last one among them."""
        first, last = self.forced_steps, self.setting.steps
        even = {first + round(part * (last - first) / self.evaluations) for part in range(1, self.evaluations + 1)}
        return tuple(sorted({min(first + self.soon, last)} | even))

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The one."""
        return (self.setting,)


class Wanted(NamedTuple):
    """One unit: the forced part of a seed, or what becomes of it by a variant."""

    study: FreedStudy
    seed: int
    variant: str

    @property
    def name(self) -> str:
        """Where the unit is kept."""
        return f"seed{self.seed}/{self.variant}"

    @property
    def setting(self) -> Setting:
        """The setting with what the variant changes."""
        return self.study.setting.replace(**VARIANTS.get(self.variant, {}))


def scaled(scale: str, seeds: tuple[int, ...], every: bool) -> FreedStudy:
    """The study of a scale, of `every` variant or of the two that matter."""
    return FreedStudy(setting=SCALES[scale], seeds=seeds, variants=tuple(VARIANTS) if every else (SOFT, HARD))


def last(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a row's model said at its end."""
    found: Mapping[str, Any] = row["curve"][-1]
    return found
