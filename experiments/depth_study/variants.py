"""The recipe that makes depth used, with one thing changed at a time: what each choice gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.depth_study.setting import Setting
from experiments.depth_study.study import JUMPS
from gt_jax.configs.json_config import Config
from gt_jax.configs.model import AdaptiveConfig, EmbeddingConfig, ModelConfig
from gt_jax.configs.price import PriceConfig
from gt_jax.configs.run import TrainConfig

RECIPE = "the recipe"


@dataclasses.dataclass(frozen=True)
class Change:
    """What a variant changes: fields of the model, of its adaptive depth, of the price, of the optimizer."""

    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adaptive: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    price: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rule: str = "budget"


FREE = {"forced_until": 0.0, "price_from": 0.0, "clipped_until": 0.0, "forced_ramp": 0.0}
VARIANTS: dict[str, Change] = {
    RECIPE: Change(),
    "embeddings of deviation 0.125, not of unit size": Change(model={"embedding": EmbeddingConfig()}),
    "four passes forced from the start, no ramp": Change(price={"forced_ramp": 0.0}),
    "forced counts drawn for each step": Change(price={"forced_ramp": 0.0, "forced_passes": 0}),
    "gates free from the start": Change(price=FREE),
    "price 0": Change(price={"value": 0.0}),
    "price 0.005": Change(price={"value": 0.005}),
    "price 0.05": Change(price={"value": 0.05}),
    "strengths 1, 0.7, 0.5, 0.35": Change(adaptive={"alpha": (1.0, 0.7, 0.5, 0.35)}),
    "gates start at bias 0": Change(adaptive={"initial_bias": 0.0}),
    "gates start at bias -1": Change(adaptive={"initial_bias": -1.0}),
    "gates see features, not the state": Change(adaptive={"state_width": 0, "by_pass": False}),
    "gates learn at the rate of other scalars": Change(optimizer={"halting_scale": 1.0}),
    "rule ouro, target 2.5": Change(rule="ouro", optimizer={"halting_scale": 1.0}),
    "the origin's gates and rule": Change(
        adaptive=dataclasses.asdict(AdaptiveConfig()), rule="ouro", optimizer={"halting_scale": 1.0}
    ),
}


KEY = (
    RECIPE, "embeddings of deviation 0.125, not of unit size", "four passes forced from the start, no ramp",
    "gates free from the start", "strengths 1, 0.7, 0.5, 0.35", "gates start at bias -1",
    "gates see features, not the state", "rule ouro, target 2.5",
)  # fmt: skip
"""Those that decide most; the others are shades of them."""


@dataclasses.dataclass(frozen=True)
class GatesStudy(Config):
    """One setting, its rate, the variants and the seeds."""

    setting: Setting = JUMPS
    rate: float = 2e-3
    seeds: tuple[int, ...] = (0, 1)
    variants: tuple[str, ...] = KEY


class Wanted(NamedTuple):
    """One unit: a variant at a seed."""

    setting: Setting
    variant: str
    seed: int
    rate: float

    @property
    def name(self) -> str:
        """Where the unit is kept."""
        return f"seed{self.seed}/{self.variant}"

    def model(self) -> ModelConfig:
        """The recipe's model with what the variant changes."""
        change, model = VARIANTS[self.variant], self.setting.adaptive()
        assert model.adaptive is not None
        return model.replace(**change.model, adaptive=model.adaptive.replace(**change.adaptive))

    def train(self) -> TrainConfig:
        """The recipe's training with what the variant changes."""
        change, train = VARIANTS[self.variant], self.setting.train(self.seed, self.rate)
        price = train.price
        if change.rule == "ouro":
            price = PriceConfig(target=2.5, target_of="passes_run")
        else:
            price = price.replace(**change.price)
        return train.replace(price=price, optimizer=train.optimizer.replace(**change.optimizer))
