"""The compute price of a run: the depth it aims at, and when it acts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from gt_jax.configs.json_config import Config

Rule = Literal["budget", "ouro"]
TargetOf = Literal["mean_weight", "passes_run"]


@dataclasses.dataclass(frozen=True)
class PriceConfig(Config):
    """What a pass costs, or the depth aimed at; the phases are fractions of the run (gt_jax/training/price.py).

    `rule` "budget": a pass costs `value` nats a token and layer; with a `target` the price moves, up and down within
    `lowest` .. `highest`, until the mean over layers of `target_of` is there. `mean_weight` is the sum of a token's
    weights, `passes_run` the passes that it runs. Every `audit_every`-th step no token is finished.
    "ouro" (origin): the price only ever makes depth dear, less a coupon for what passes gain, and every
    `audit_every`-th step forces passes. `forced_passes` 0 draws their number for every step anew.
    """

    rule: Rule = "budget"
    target: float | None = 1.30
    target_of: TargetOf = "mean_weight"
    value: float = 0.0
    rate: float = 1.0
    lowest: float = -5e-2
    highest: float = 5e-2
    coupon: float = 2.0
    forced_until: float = 0.30
    price_from: float = 0.35
    clipped_until: float = 0.40
    p_max: float = 0.95
    forced_passes: int = 2
    audit_every: int = 20
    settled_after: float = 0.005

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PriceConfig:
        """As every config; an object that names no rule was stored when the rule was "ouro"."""
        return super().from_json({"rule": "ouro", **data})

    def problems(self) -> list[str]:
        wrong = []
        if self.target_of not in get_args(TargetOf):
            wrong.append(f"target_of is {self.target_of!r}; it must be one of {', '.join(get_args(TargetOf))}")
        if self.rule not in get_args(Rule):
            wrong.append(f"rule is {self.rule!r}; it must be one of {', '.join(get_args(Rule))}")
        if self.target is None and self.rule == "ouro":
            wrong.append("target is None; rule 'ouro' aims at a depth, for example 1.3")
        if self.target is not None and self.target < 1:
            wrong.append(f"target is {self.target}; a layer runs at least once, so it must be at least 1")
        if self.lowest > self.highest or (self.rule == "ouro" and self.lowest <= 0):
            least = "0 < " if self.rule == "ouro" else ""
            wrong.append(f"{least}lowest {self.lowest} <= highest {self.highest} does not hold")
        if self.forced_passes < 0:
            wrong.append(f"forced_passes is {self.forced_passes}; it must be 1 or more, or 0 to draw a number each step")
        if not 0 <= self.forced_until <= self.price_from <= self.clipped_until <= 1:
            wrong.append(
                f"0 <= forced_until {self.forced_until} <= price_from {self.price_from} <= "
                f"clipped_until {self.clipped_until} <= 1 does not hold"
            )
        if self.audit_every < 2:
            wrong.append(f"audit_every is {self.audit_every}; it must be at least 2")
        return wrong
