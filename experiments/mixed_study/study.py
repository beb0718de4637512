"""The study of a mix of text and look-ups as one frozen config, and its models.

Some of the rows are text, the others instances of a task whose answers take 1, 2, … look-ups. Nothing tells a model
what is what. Every model sees the same rows; one of a single layer, run once, is also trained for as many FLOPs as the
adaptive one took.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from experiments.depth_study.setting import Setting
from experiments.depth_study.study import JUMPS
from experiments.seeds_and_rates import wrong_rates, wrong_seeds
from gt_jax.configs.data import DataConfig, Weight
from gt_jax.configs.json_config import Config
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.run import TrainConfig
from gt_jax.errors import Refused

ONCE, ADAPTIVE, LONGER = "one layer, once", "one layer, adaptive", "one layer, once, as many FLOPs"
_MIXED = JUMPS.replace(weights="hard", steps=2400, held_out_batches=64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedStudy(Config):
    """`share` of the rows are `text`, files, none for the Python library's sources; the others `of.task`.

    Plain models have 1 and each of `depths` layers. Each model is trained at each of `rates` with the first `tuned_at`
    seeds; that of the least mean loss on the tuning part goes on with the others. `shown` rows of held-out text,
    and half as many of the task, are kept with their passes.
    """

    of: Setting = _MIXED
    share: float = 1 / 3
    depths: tuple[int, ...] = (4,)
    rates: tuple[float, ...] = (2e-3,)
    seeds: tuple[int, ...] = (0, 1, 2)
    tuned_at: int = 2
    shown: int = 6
    text: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        wrong = [] if 0 < self.share < 1 else [f"share is {self.share}; it must lie between 0 and 1"]
        wrong += wrong_seeds(self.seeds)
        wrong += wrong_rates(self.rates)
        if min(self.depths, default=2) < 2:
            wrong.append(f"depths are {list(self.depths)}; 2 or more layers each, one is there anyway")
        return wrong

    @property
    def layers(self) -> dict[str, int]:
        """The models that train for `of.steps`, and how many layers each has."""
        return {ONCE: 1, ADAPTIVE: 1, **{f"{depth} layers": depth for depth in self.depths}}

    def data(self, seed: int) -> DataConfig:
        """The mix; the task's difficulty rises over the first part of the run."""
        shares = (Weight("text", self.share), Weight(self.of.name, 1 - self.share))
        return self.of.data(seed).replace(text=self.text, mix=shares)


class Wanted(NamedTuple):
    """One unit: a model trained with a seed at a rate for so many steps."""

    study: MixedStudy
    model: str
    seed: int
    rate: float
    steps: int

    @property
    def name(self) -> str:
        """Where the unit is kept."""
        return f"seed{self.seed}/{self.model} at {self.rate:g}"

    @property
    def config(self) -> ModelConfig:
        """The model."""
        return self.study.of.adaptive() if self.model == ADAPTIVE else self.study.of.plain(
            self.study.layers.get(self.model, 1))  # fmt: skip

    @property
    def train(self) -> TrainConfig:
        """Its training."""
        return self.study.of.replace(steps=self.steps).train(self.seed, self.rate)

    @property
    def data(self) -> DataConfig:
        """Its rows: those of every other model, and more of them where it trains for longer."""
        return self.study.data(self.seed)


SCALES = {
    "minutes": MixedStudy(of=_MIXED.replace(steps=60, width=16, rows=9, held_out_batches=4), depths=(2,)),
    "small": MixedStudy(),
}


def scaled(scale: str, seeds: tuple[int, ...], text: tuple[str, ...]) -> MixedStudy:
    """The study of a scale; raises `Refused` for one that is not known."""
    if scale not in SCALES:
        raise Refused(f"--scale {scale} is not known; the scales are {', '.join(SCALES)}")
    return SCALES[scale].replace(seeds=seeds, text=text)
