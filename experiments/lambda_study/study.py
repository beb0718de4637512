"""The study of residual lambdas as one frozen config, and the variants of the stack that are compared.

Before layer l:  x <- a_l x + b_l x0 + the skips that end there. Plain is a = 1, b = 0 and no skip, nothing learned.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from experiments.seeds_and_rates import wrong_rates, wrong_seeds
from experiments.several_seeds import Scales
from gt_jax.configs.attention import AttentionConfig
from gt_jax.configs.data import BYTES
from gt_jax.configs.json_config import Config, below
from gt_jax.configs.model import EmbeddingConfig, ModelConfig, StackConfig
from gt_jax.errors import Refused

PLAIN, LONGER = "plain", "plain, longer"
LAMBDAS, FROM_ONE, FREE, X0 = "a = 1.1 and b", "a = 1 and b", "a = 1.1 and b at one rate", "b alone"
SKIP, U_SKIPS, BACKOUT = "skip 4 to 7", "U-skips", "backout"
VARIANTS = (PLAIN, LAMBDAS, FROM_ONE, FREE, X0, SKIP, U_SKIPS, BACKOUT)
A, B = "residual_scale", "x0_scale"
OWN_RATE = 100.0
"""The optimizer moves a at 1/100 of the rate of b; times this, at the same."""


class Variant(NamedTuple):
    """A stack, and factors of its scalars' updates."""

    stack: StackConfig
    scales: Scales


@dataclasses.dataclass(frozen=True, kw_only=True)
class LambdaStudy(Config):
    """Variants of one model on the same batches; each has the better of `rates` at the first seed, by the tuning part.

    `longer`: plain models are also trained for so many times the steps, to be read at the time that a variant takes.
    """

    text: tuple[str, ...] = ()
    tokenizer: str = BYTES
    seeds: tuple[int, ...] = tuple(range(8))
    layers: int = 12
    width: int = 32
    heads: int = 2
    length: int = 64
    rows: int = 8
    steps: int = 400
    longer: float = 1.25
    rates: tuple[float, ...] = (8e-3, 1.6e-2, 3.2e-2)
    rounds: int = 9
    held_out_batches: int = 48

    def problems(self) -> list[str]:
        wrong = below(self, 1, "heads", "length", "rows", "rounds", "held_out_batches") + below(self, 2, "steps")
        wrong += below(self, 9, "layers")
        if self.heads >= 1 and self.width % (2 * self.heads):
            wrong.append(f"width is {self.width}; it must be a multiple of 2 * heads {2 * self.heads}")
        if self.longer <= 1:
            wrong.append(f"longer is {self.longer}; it must be above 1")
        wrong += wrong_rates(self.rates)
        wrong += wrong_seeds(self.seeds)
        return wrong

    def variant(self, name: str) -> Variant:
        """The variant of a name of `VARIANTS`."""
        n = self.layers

        def skips(*pairs: tuple[int, int]) -> Variant:
            return Variant(StackConfig("lambda", 1.0, pairs), ((A, 0.0), (B, 0.0)))

        return {
            PLAIN: Variant(StackConfig(), ()), LONGER: Variant(StackConfig(), ()),
            LAMBDAS: Variant(StackConfig("lambda", 1.1), ()), FROM_ONE: Variant(StackConfig("lambda", 1.0), ()),
            FREE: Variant(StackConfig("lambda", 1.1), ((A, OWN_RATE),)),
            X0: Variant(StackConfig("lambda", 1.0), ((A, 0.0),)),
            SKIP: skips((4, 7)), U_SKIPS: skips(*((layer, n - 1 - layer) for layer in range(n // 2 - 1))),
            BACKOUT: skips((2 * n // 3 - 1, n)),
        }[name]  # fmt: skip

    def model(self, name: str, vocab: int) -> ModelConfig:
        """The model of a variant: attention to all earlier tokens and an MLP, as the stack was published with."""
        each = self.width // self.heads
        return ModelConfig(
            layout=f"A*{self.layers}", width=self.width, vocab=vocab, mlp_width=2 * self.width,
            attention=AttentionConfig(self.heads, self.heads, each, qk_norm="head"), init_std=self.width**-0.5,
            embedding=EmbeddingConfig("table", normed=True), stack=self.variant(name).stack,
        )  # fmt: skip

    def steps_of(self, name: str) -> int:
        """Training steps of a variant."""
        return round(self.longer * self.steps) if name == LONGER else self.steps


class Wanted(NamedTuple):
    """One unit: a variant, seed i at rate i; no seeds: the times of all variants."""

    study: LambdaStudy
    variant: str
    seeds: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """Where the unit is kept."""
        if not self.seeds:
            return self.variant
        lanes = zip(self.seeds, self.rates, strict=True)
        return f"{self.variant}/" + " ".join(f"{seed}@{rate:g}" for seed, rate in lanes)


TIMES = "times"
SCALES = {
    "minutes": LambdaStudy(width=8, rows=2, length=32, steps=5, rounds=2, held_out_batches=2),
    "small": LambdaStudy(),
    "accelerator": LambdaStudy(width=256, heads=4, rows=64, length=256, steps=4000, rates=(1e-3, 2e-3),
                               seeds=tuple(range(10)), held_out_batches=128),
}  # fmt: skip


def scaled(scale: str, seeds: tuple[int, ...], text: tuple[str, ...], tokenizer: str) -> LambdaStudy:
    """The study of a scale; raises `Refused` for one that is not known."""
    if scale not in SCALES:
        raise Refused(f"--scale {scale} is not known; the scales are {', '.join(SCALES)}")
    return SCALES[scale].replace(seeds=seeds, text=text, tokenizer=tokenizer)
