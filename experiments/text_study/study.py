"""The study of gates on text as one frozen config: a small text model, its prices of depth, and the plain model.

All read the same text at the same batches. A plain model is trained for as many steps as the adaptive ones, and where
that does not decide for as many as cost what the adaptive one of the presets did, whose rule is `DEFAULT`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from experiments.depth_study.setting import TUNING
from experiments.seeds_and_rates import wrong_rates, wrong_seeds
from gt_jax.configs.data import DataConfig
from gt_jax.configs.json_config import Config, below
from gt_jax.configs.model import AdaptiveConfig, DeltaNetConfig, GSAConfig, ModelConfig
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.presets import tiny
from gt_jax.configs.price import PriceConfig, budget
from gt_jax.configs.run import TrainConfig
from gt_jax.errors import Refused

PLAIN, EQUAL = "plain", "plain, as many FLOPs"
DEFAULT, TARGET, PRICED = "ouro, features", "budget, state, a target", "budget, state, a price"
ADAPTIVE = (DEFAULT, TARGET, PRICED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextGates(Config):
    """Sizes, steps, rates and seeds; `text` are files, none for the Python library's sources.

    `adaptive` are those of `ADAPTIVE` that are trained, `DEFAULT` among them. `target` are the passes a layer that a
    token is held at, `pass_price` what a pass costs in nats. Each model is trained at each of `rates` with the first
    seed; the best on the tuning part goes on with the others.
    """

    layout: str = "DDDG"
    width: int = 64
    rows: int = 8
    tokens: int = 96
    steps: int = 300
    target: float = 1.5
    pass_price: float = 0.002
    held_out_batches: int = 12
    rates: tuple[float, ...] = (2e-3, 4e-3)
    adaptive: tuple[str, ...] = ADAPTIVE
    seeds: tuple[int, ...] = (0, 1, 2)
    text: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        wrong = below(self, 1, "rows", "held_out_batches") + below(self, 2, "steps", "tokens")
        if not {DEFAULT} <= set(self.adaptive) <= set(ADAPTIVE):
            wrong.append(f"adaptive is {list(self.adaptive)}; {DEFAULT!r} and others of {list(ADAPTIVE)} are needed")
        if self.width < 8 or self.width % 8:
            wrong.append(f"width is {self.width}; it must be a multiple of 8")
        wrong += wrong_seeds(self.seeds)
        wrong += wrong_rates(self.rates)
        return wrong

    @property
    def models(self) -> tuple[str, ...]:
        """All that are compared."""
        return PLAIN, EQUAL, *self.adaptive

    def data(self, seed: int) -> DataConfig:
        """The text, in batches of a seed."""
        return DataConfig(text=self.text, sequence_length=self.tokens, batch_size=self.rows, seed=seed, tuning=TUNING)

    def model(self, model: str) -> ModelConfig:
        """`tiny` at this size: with the gates that it has, with those that see the state, or plain."""
        head = self.width // 4
        adaptive = AdaptiveConfig() if model == DEFAULT else AdaptiveConfig(initial_bias=0.0).seeing_state
        config = tiny().replace(
            layout=self.layout, width=self.width, mlp_width=2 * self.width, remat="none", adaptive=adaptive,
            deltanet=DeltaNetConfig(heads=4, value_heads=4, key_width=head, value_width=head, chunk_size=32),
            gsa=GSAConfig(heads=4, head_width=head, indexer_heads=2, indexer_width=16, k_base=64, k_min=16, k_max=128),
        )  # fmt: skip
        return config if model in ADAPTIVE else config.plain

    def train(self, model: str, steps: int) -> TrainConfig:
        """As `gt_jax.train` has it but for the rate: heads under `budget` learn ten times as fast as other scalars."""
        scale, price = 10.0, PriceConfig()
        if model == TARGET:
            price = budget(self.target, target_of="passes_run")
        elif model == PRICED:
            price = budget(None, value=self.pass_price)
        else:
            scale = 1.0
        return TrainConfig(steps=steps, price=price, optimizer=OptimizerConfig(halting_scale=scale))


class Wanted(NamedTuple):
    """One unit: a model trained with a seed at a rate for so many steps."""

    study: TextGates
    model: str
    seed: int
    rate: float
    steps: int

    @property
    def name(self) -> str:
        """Where the unit is kept."""
        return f"seed{self.seed}/{self.model} at {self.rate:g}"


SCALES: dict[str, TextGates] = {
    "minutes": TextGates(width=16, rows=2, tokens=32, steps=40, held_out_batches=2, rates=(4e-3,)),
    "small": TextGates(rates=(4e-3,), adaptive=(DEFAULT, TARGET)),
    "accelerator": TextGates(layout="DDDG*2", width=256, rows=64, tokens=256, steps=8000),
}


def scaled(scale: str, seeds: tuple[int, ...], text: tuple[str, ...]) -> TextGates:
    """The study of a scale; raises `Refused` for one that is not known."""
    if scale not in SCALES:
        raise Refused(f"--scale {scale} is not known; the scales are {', '.join(SCALES)}")
    return SCALES[scale].replace(seeds=seeds, text=text)
