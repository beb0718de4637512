"""The compute price of a run: the depth it aims at, and when it acts."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from gt_jax.configs.json_config import Config

TargetOf = Literal["mean_weight", "passes_run"]


@dataclasses.dataclass(frozen=True)
class PriceConfig(Config):
    """Target depth, bounds of lambda, and the phases as fractions of the run.

    `target_of` says what the mean over layers of is held at `target`: `mean_weight`, the sum of a token's weights, or
    `passes_run`, the passes that it runs.
    """

    target: float = 1.30
    target_of: TargetOf = "mean_weight"
    rate: float = 1.0
    lowest: float = 1e-4
    highest: float = 5e-2
    coupon: float = 2.0
    forced_until: float = 0.30
    price_from: float = 0.35
    clipped_until: float = 0.40
    p_max: float = 0.95
    forced_passes: int = 2
    audit_every: int = 20
    settled_after: float = 0.005

    def problems(self) -> list[str]:
        wrong = []
        if self.target_of not in get_args(TargetOf):
            wrong.append(f"target_of is {self.target_of!r}; it must be one of {', '.join(get_args(TargetOf))}")
        if self.target < 1:
            wrong.append(f"target is {self.target}; a layer runs at least once, so it must be at least 1")
        if not 0 < self.lowest <= self.highest:
            wrong.append(f"0 < lowest {self.lowest} <= highest {self.highest} does not hold")
        if not 0 <= self.forced_until <= self.price_from <= self.clipped_until <= 1:
            wrong.append(
                f"0 <= forced_until {self.forced_until} <= price_from {self.price_from} <= "
                f"clipped_until {self.clipped_until} <= 1 does not hold"
            )
        if self.audit_every < 2:
            wrong.append(f"audit_every is {self.audit_every}; it must be at least 2")
        return wrong

    def after(self, done: int, of: int, steps: int) -> PriceConfig:
        """The price of `steps` steps that follow step `done` of a run of `of` steps: what is over does not come again.

        Phases last as many steps as were left of them, and lambda moves as much in a step.
        """
        left = {name: min(1.0, max(0.0, getattr(self, name) * of - done) / steps)
                for name in ("forced_until", "price_from", "clipped_until")}
        return self.replace(**left, rate=self.rate * steps / of, settled_after=self.settled_after * of / steps)
