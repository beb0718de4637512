"""What each contender costs, by the rule of experiments/growth_study/flops.py, and how many steps that makes.

- A step of the source is charged the passes that it computed: those that are forced, then those that its gates left to
  be computed, of which every step says how many. A step of the plain model is charged one pass a layer.
- Making a child is charged too: measuring the passes, and one forward pass for each recipe that was tried.
- Beside it stand the model FLOPs of `gt_jax.models.flops`: what tokens ran, not what was computed for the batch.

    B = budget x a step of the deep model;    source: the most steps whose plan costs at most f B
    child: (B - what the source cost - making it) / a step of the deep model, rounded down
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.growth_study.flops import forward_flops, training_flops
from experiments.pays_study.setting import Setting
from gt_jax.configs.model import ModelConfig
from gt_jax.models.flops import model_flops

Passes = Sequence[float] | np.ndarray
BySteps = Passes | Sequence[Sequence[float]]


class StepCost:
    """FLOPs of a training step of a model, by the passes of each of its layers, [l] or [steps, l]."""

    def __init__(self, config: ModelConfig, length: int, batch: int) -> None:
        layers, each = len(config.depth), length * batch
        nothing = training_flops(config, length, np.zeros(layers))
        self._outside = nothing * each
        self._pass = np.array([training_flops(config, length, row) - nothing for row in np.eye(layers)]) * each
        model = model_flops(config, length)
        self._model = 3.0 * each * model.outside, 3.0 * each * np.array(model.layers)

    def computed(self, passes: BySteps) -> float:
        """Of passes that were computed, summed over steps."""
        run = np.atleast_2d(np.asarray(passes, np.float64))
        return float(len(run) * self._outside + (run @ self._pass).sum())

    def model(self, passes: BySteps) -> float:
        """Of passes that tokens ran, summed over steps."""
        run = np.atleast_2d(np.asarray(passes, np.float64))
        return float(len(run) * self._model[0] + (run @ self._model[1]).sum())


def cost_of(setting: Setting, config: ModelConfig) -> StepCost:
    """A step of one of the setting's models."""
    return StepCost(config, setting.length, setting.batch)


def deep_step(setting: Setting) -> float:
    """FLOPs of a step of the deep model."""
    return cost_of(setting, setting.deep).computed(np.ones(len(setting.deep.depth)))


def whole(setting: Setting) -> float:
    """B."""
    return setting.budget * deep_step(setting)


def planned_passes(setting: Setting, steps: int) -> np.ndarray:
    """Passes a layer of each step of a source of `steps` steps: those forced, and where they are free as planned.

    As `gt_jax.training.price.phase` has them, which in 32-bit floats may change their number a step early or late.
    """
    train = setting.source_train(steps, setting.rates[0])
    price, done = train.price, np.arange(steps) / train.steps
    most, forced = price.forced_passes, np.full(steps, float(price.forced_passes))
    if price.forced_ramp:
        forced = 1 + np.floor(np.minimum((most - 1) * done / price.forced_ramp, most - 1))
    return np.where(done < price.forced_until, forced, setting.free_passes)


def planned_cost(setting: Setting, steps: int) -> float:
    """FLOPs of a source of `steps` steps, if its gates do as planned."""
    passes = np.repeat(planned_passes(setting, steps)[:, None], len(setting.source.depth), axis=1)
    return cost_of(setting, setting.source).computed(passes)


@functools.lru_cache(maxsize=64)
def source_steps(setting: Setting, point: float) -> int:
    """The most steps of a source that are planned to cost at most `point` of B; at least 1."""
    share = point * whole(setting)
    cheapest = cost_of(setting, setting.source).computed(np.ones(len(setting.source.depth)))
    fits, too_many = 1, int(share / cheapest) + 2
    while too_many - fits > 1:
        tried = (fits + too_many) // 2
        if planned_cost(setting, tried) <= share:
            fits = tried
        else:
            too_many = tried
    return fits


def shallow_steps(setting: Setting, point: float = 1.0) -> int:
    """Steps of the source's layers, each run once, that `point` of B pays for."""
    step = cost_of(setting, setting.source.plain).computed(np.ones(len(setting.source.depth)))
    return int(point * whole(setting) / step)


class Spent(NamedTuple):
    """What led to a model: FLOPs computed, model FLOPs, tokens read."""

    flops: float = 0.0
    model_flops: float = 0.0
    tokens: int = 0


def making(setting: Setting, passes: Passes, recipes: int) -> float:
    """FLOPs of measuring the source on the tuning batches, and of one pass over them of each recipe's child, if
    several are tried."""
    seen = setting.held_out_batches * setting.batch * setting.length
    tried = recipes if recipes > 1 else 0
    return seen * (forward_flops(setting.source, setting.length, passes)
                   + tried * forward_flops(setting.deep, setting.length))  # fmt: skip


def child_steps(setting: Setting, spent: Spent) -> int:
    """Steps of the deep model that are left of B, at least 1."""
    return max(1, int((whole(setting) - spent.flops) / deep_step(setting)))


def left_steps(setting: Setting, point: float) -> int:
    """Steps of the deep model that a source whose layers ran once leaves of B."""
    step = cost_of(setting, setting.source.plain).computed(np.ones(len(setting.source.depth)))
    return child_steps(setting, Spent(step * shallow_steps(setting, point)))


def further_steps(setting: Setting, spent: Spent, passes: Passes) -> int:
    """Steps of the source that are left of B where each computes `passes`, audits among them; at least 1."""
    return max(1, int((whole(setting) - spent.flops) / cost_of(setting, setting.source).computed(passes)))


def with_audits(setting: Setting, passes: Passes) -> np.ndarray:
    """Mean passes computed in a training step, of those that were measured without audits, which compute all."""
    adaptive = setting.source.adaptive
    assert adaptive is not None
    share = 1 / setting.price(0.5).audit_every
    return (1 - share) * np.asarray(passes, np.float64) + share * adaptive.max_passes
