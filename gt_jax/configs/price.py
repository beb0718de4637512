"""The compute price of a run: the depth it aims at, and when it acts."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from gt_jax.configs.json_config import Config

Rule = Literal["budget", "ouro"]
TargetOf = Literal["mean_weight", "passes_run"]


@dataclasses.dataclass(frozen=True)
class PriceConfig(Config):
    """What a pass costs, or the depth aimed at; the phases are fractions of the run (gt_jax/training/price.py), above 1
    where a run is shorter than what an earlier one left of them: then they go on in the next.

    `target` is what the mean over layers of `target_of` is held at: `mean_weight`, the sum of a token's weights, or
    `passes_run`, the passes that it runs (under halting "batch" those that it enters above the threshold). `rule`
    "ouro" (origin): the price makes depth dear, less a coupon for what passes gain; every `audit_every`-th step
    forces passes. "budget": the price, in nats a pass, token and layer, goes up and down within `lowest` ..
    `highest` until depth is at the target, or stays at `value` where there is none (null); every `audit_every`-th
    step no token is finished. `forced_passes` 0 draws their number for each step anew, a function of the step
    alone, from 1 to all there are; over the first `forced_ramp` of the run their number, or the highest that is
    drawn, rises evenly from 1, as a curriculum's difficulty does. While passes are forced the last bias of every
    halting head rises evenly, by `gates_opened` in all: so open closed gates (gt_jax.retrofit).
    `budget(...)` has the fields that suit this rule.
    """

    rule: Rule = "ouro"
    target: float | None = 1.30
    target_of: TargetOf = "mean_weight"
    value: float = 0.0
    rate: float = 1.0
    lowest: float = 1e-4
    highest: float = 5e-2
    coupon: float = 2.0
    forced_until: float = 0.30
    price_from: float = 0.35
    clipped_until: float = 0.40
    p_max: float = 0.95
    forced_passes: int = 2
    forced_ramp: float = 0.0
    gates_opened: float = 0.0
    audit_every: int = 20
    settled_after: float = 0.005

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
            wrong.append(f"forced_passes is {self.forced_passes}; it must be at least 0, which draws their number")
        if not 0 <= self.forced_ramp <= self.forced_until:
            wrong.append(f"0 <= forced_ramp {self.forced_ramp} <= forced_until {self.forced_until} does not hold")
        if self.gates_opened and not self.forced_until:
            wrong.append(f"gates_opened is {self.gates_opened} and forced_until 0; gates open while passes are forced")
        if not 0 <= self.forced_until <= self.price_from <= self.clipped_until:
            wrong.append(
                f"0 <= forced_until {self.forced_until} <= price_from {self.price_from} <= "
                f"clipped_until {self.clipped_until} does not hold"
            )
        if self.audit_every < 2:
            wrong.append(f"audit_every is {self.audit_every}; it must be at least 2")
        return wrong

    def after(self, done: int, of: int, steps: int) -> PriceConfig:
        """The price of `steps` steps that follow step `done` of a run of `of` steps: what is over does not come again.

        Phases last as many steps as were left of them, and lambda moves as much in a step. A ramp that had begun is
        over: all passes are forced from there on. Gates go on opening by what was left of it.
        """
        opening = self.forced_until * of
        left = {name: max(0.0, getattr(self, name) * of - done) / steps
                for name in ("forced_until", "price_from", "clipped_until")}
        left["forced_ramp"] = 0.0 if done else self.forced_ramp * of / steps
        left["gates_opened"] = self.gates_opened * max(0.0, opening - done) / opening if opening else 0.0
        return self.replace(**left, rate=self.rate * steps / of, settled_after=self.settled_after * of / steps)


def fits_rule(rule: str, target: float | None, cost: float | None) -> list[str]:
    """What is wrong with a target and a fixed cost of a pass, one line each."""
    wrong = []
    if cost is not None and rule != "budget":
        wrong.append(f"a pass price of {cost} needs price rule 'budget'; the rule is {rule!r}, which has its own price")
    if cost is not None and target is not None:
        wrong.append(f"target {target} and a pass price of {cost} are both given; one of them decides the depth")
    return wrong


def budget(target: float | None, **fields: object) -> PriceConfig:
    """A price of rule "budget": both signs, gates free from the first step on, audits at every tenth.

    >>> budget(2.0, target_of="passes_run").rule
    'budget'
    """
    free = {"forced_until": 0.0, "price_from": 0.0, "clipped_until": 0.0, "audit_every": 10, "forced_passes": 0}
    bounds = {"lowest": -100.0, "highest": 100.0}
    return PriceConfig(rule="budget", target=target, **{**free, **bounds, **fields})  # type: ignore[arg-type]


OPEN = 2.0  # the logit of a gate that has opened: 0.88


def opening(closed: float, passes: int, rule: Rule, target: float | None, **fields: object) -> PriceConfig:
    """The price of a retrofitted model of so many `passes`, whose gates start at the logit `closed` (gt_jax.retrofit).

    All passes are forced over the first 70 % of the run, at full strength from the first step: there the training loss
    jumps. The gates open meanwhile, so that little changes when they choose, and the price moves, from there on.
    Drawing the number of passes for each step, over 40 %, taught no pass but the first (experiments.retrofit).

    >>> opening(-3.0, 4, "budget", 1.5, target_of="passes_run").gates_opened
    5.0
    """
    until = {name: 0.7 for name in ("forced_until", "price_from", "clipped_until")}
    schedule = {"forced_passes": passes, "gates_opened": OPEN - closed, **until, **fields}
    if rule == "budget":
        return budget(target, **schedule)
    return PriceConfig(rule=rule, target=target, **schedule)  # type: ignore[arg-type]
