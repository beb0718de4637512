"""The study of retrofits as one frozen config: a plain source on its plateau, and what is made of it at equal FLOPs.

    source          the plain layer, run once, for `source_steps` steps, its rate not yet falling
    retrofitted     the same with halting heads, `steps` steps more: gates opened by their schedule, then a price a pass
    trained on      the source itself, for as many steps as cost what the retrofitted one's did

Both go on at the source's rate, which falls over their last fifth, with fresh moments.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from experiments.depth_study.setting import Setting
from experiments.depth_study.study import SCALES as DEPTH_SCALES
from experiments.seeds_and_rates import wrong_seeds
from gt_jax.configs.json_config import Config, below
from gt_jax.configs.model import AdaptiveConfig, ModelConfig
from gt_jax.configs.price import opening
from gt_jax.configs.run import TrainConfig
from gt_jax.configs.standing import gone_on
from gt_jax.errors import Refused
from gt_jax.growth.retrofit import closed

SOURCE, RETROFITTED, ON = "source", "retrofitted", "trained on"
MODELS = (SOURCE, RETROFITTED, ON)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(Config):
    """A task of the study of depth, with its size, price of a pass and curriculum; steps, rate and seeds."""

    setting: Setting
    source_steps: int = 1000
    steps: int = 1200
    rate: float = 2e-3
    seeds: tuple[int, ...] = (0, 1, 2)

    def problems(self) -> list[str]:
        wrong = below(self, 2, "source_steps", "steps")
        wrong += wrong_seeds(self.seeds)
        return wrong

    @property
    def plain(self) -> ModelConfig:
        """The source: every layer once."""
        return self.setting.plain(1)

    @property
    def adaptive(self) -> AdaptiveConfig:
        """What it is given: gates that see the state, all passes at full strength, closed at first."""
        adaptive = self.setting.adaptive().adaptive
        assert adaptive is not None
        return closed(adaptive)

    def source_train(self, seed: int) -> TrainConfig:
        """A training whose plateau is as long as the source's: it stops before the rate falls."""
        train = self.setting.train(seed, self.rate)
        total = self.source_steps + 1
        while train.optimizer.boundaries(total)[1] < self.source_steps:
            total += 1
        return train.replace(steps=total)

    def further(self, seed: int, steps: int, opens: bool) -> TrainConfig:
        """`steps` steps that follow the source's, as `train --start` has them; with the retrofit's price if it
        `opens` gates."""
        train = gone_on(self.source_train(seed), self.source_steps, steps).replace(seed=seed)
        if not opens:
            return train
        adaptive, value = self.adaptive, self.setting.pass_price
        price = opening(adaptive.initial_bias, len(adaptive.alpha), "budget", None, value=value)
        return train.replace(price=price)


class Wanted(NamedTuple):
    """One unit: a source, and what is made of it, at a seed."""

    study: Study
    seed: int

    @property
    def name(self) -> str:
        """Where the unit is kept."""
        return f"{self.study.setting.name}/seed{self.seed}"


_SMALL = {scale: settings[1] for scale, settings in DEPTH_SCALES.items()}
SCALES: dict[str, Study] = {
    "minutes": Study(setting=_SMALL["minutes"].replace(steps=40), source_steps=40, steps=60),
    "small": Study(setting=_SMALL["small"].replace(steps=1000)),
}


def scaled(scale: str, seeds: tuple[int, ...]) -> Study:
    """The study of a scale; raises `Refused` for one that is not known."""
    if scale not in SCALES:
        raise Refused(f"--scale {scale} is not known; the scales are {', '.join(SCALES)}")
    return SCALES[scale].replace(seeds=seeds)
