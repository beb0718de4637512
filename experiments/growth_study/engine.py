"""Training and evaluation for all contenders: one compiled program a model, whatever its learning rate or its length.

Learning rate and number of steps are in the optimizer's state, not in the program: the schedule of `gt_jax` (linear
warm-up, cosine to a tenth) multiplies the update of an AdamW that runs at rate 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.growth_study.study import Batch, StudyConfig, Watched
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.price import PriceConfig
from gt_jax.devices.sharding import Rules, put_like
from gt_jax.models.language_model import LanguageModel, abstract, fixed_passes
from gt_jax.models.layers.adaptive_depth import PassControl
from gt_jax.training.budget import BudgetState
from gt_jax.training.loop import Trainer, fit, variables_of
from gt_jax.training.optimizer import make_optimizer
from gt_jax.training.price import PriceState
from gt_jax.training.state import TrainState, new_state
from gt_jax.training.step import make_evaluation, make_step
from gt_jax.typing import Tree

WARMUP, FINAL = 0.1, 0.1
NO_LOSS = 1e9


class Paced(NamedTuple):
    """`inner` with its schedule: update `step` of `steps`, peak learning rate `peak`."""

    inner: Any
    step: jax.Array
    steps: jax.Array
    peak: jax.Array


def pace(step: jax.Array, steps: jax.Array) -> jax.Array:
    """The learning rate over its peak: up over the first tenth (at least one step), then cosine down to a tenth."""
    warm = jnp.maximum(1.0, jnp.round(WARMUP * steps))
    done = jnp.clip((step - warm) / jnp.maximum(1.0, steps - warm), 0.0, 1.0)
    fall = FINAL + (1 - FINAL) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    rise = (1.0 + (warm - 1.0) * step / warm) / warm
    return jnp.where(step < warm, rise, fall)


def paced(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` (made at rate 1), its update multiplied by peak * pace."""

    def init(params: Tree) -> Paced:
        zero = jnp.zeros((), jnp.float32)
        return Paced(inner.init(params), zero, zero + 1, zero)

    def update(grads: Tree, state: Paced, params: Tree = None) -> tuple[Tree, Paced]:
        updates, moments = inner.update(grads, state.inner, params)
        rate = state.peak * pace(state.step, state.steps)
        moved = jax.tree.map(lambda u: (rate * u).astype(u.dtype), updates)
        return moved, state._replace(inner=moments, step=state.step + 1)

    return optax.GradientTransformation(init, update)


class Losses(NamedTuple):
    """Summed cross-entropy and count by batch, and the passes computed in each layer (each for a whole batch)."""

    sums: list[float]
    counts: list[float]
    passes: list[float]

    @property
    def mean(self) -> float:
        """Nats a byte."""
        return sum(self.sums) / max(sum(self.counts), 1.0)


class Run(NamedTuple):
    """What a training gave: `curve` is the training loss by step, `losses` the held-out ones by step."""

    variables: Tree
    curve: list[float]
    losses: dict[int, Losses]
    seconds: float
    batches: str
    price: PriceState | BudgetState


class Engine:
    """Programs by model and price; `rules` are the plain ones, everything runs on one device."""

    def __init__(self, study: StudyConfig) -> None:
        self._study, self._rules = study, Rules()
        self._programs: dict[tuple[ModelConfig, PriceConfig], Trainer] = {}
        self._evaluations: dict[ModelConfig, Callable[..., Any]] = {}
        self._fresh: dict[ModelConfig, Callable[[jax.Array], Tree]] = {}

    def evaluation(self, config: ModelConfig) -> Callable[..., Any]:
        """evaluation(variables, batch, control=None); free and fixed passes are one program, [l] passes each."""
        if config not in self._evaluations:
            compiled = make_evaluation(config, self._rules)
            free = fixed_passes(jnp.zeros((len(config.depth),), jnp.int32))

            def evaluation(variables: Tree, batch: Batch, control: PassControl | None = None) -> Any:
                return compiled(variables, batch, control or free)

            self._evaluations[config] = evaluation
        return self._evaluations[config]

    def fresh(self, config: ModelConfig, seed: int) -> Tree:
        """What `gt_jax.models.language_model.initialise` draws, compiled once for all seeds."""
        if config not in self._fresh:
            network, rows = LanguageModel(config, self._rules), jnp.zeros((1, 2), jnp.int32)
            self._fresh[config] = jax.jit(lambda key: dict(network.init(key, rows)))
        return self._fresh[config](jax.random.key(seed))

    def program(self, config: ModelConfig, price: PriceConfig | None = None) -> Trainer:
        """Step, evaluation and new state of a model, compiled once in this process."""
        key = (config, price or PriceConfig())
        if key not in self._programs:
            constant = OptimizerConfig(learning_rate=1.0, schedule="wsd", warmup=0.0, final=1.0)
            optimizer = paced(make_optimizer(constant, 1))
            step = make_step(config, key[1], optimizer, self._study.source_steps, self._rules)
            self._programs[key] = Trainer(
                step, self.evaluation(config), lambda variables: new_state(variables, optimizer, key[1])
            )
        return self._programs[key]

    def losses(self, config: ModelConfig, variables: Tree, batches: Sequence[Batch],
               control: PassControl | None = None) -> Losses:
        """Held-out losses by batch; `control` None leaves the passes to the halting heads."""
        evaluation = self.evaluation(config)
        seen = [jax.device_get(evaluation(variables, batch, control)) for batch in batches]
        passes = np.mean([np.sum(statistics.computed, axis=-1) for _, _, statistics in seen], axis=0)
        # a model that overflows has a loss too, a figure that JSON can hold and that sorts last
        sums = np.nan_to_num([float(total) for total, _, _ in seen], nan=NO_LOSS, posinf=NO_LOSS)
        return Losses(sums.tolist(), [float(n) for _, n, _ in seen], passes.tolist())

    def train(self, config: ModelConfig, variables: Tree, batches: Any, steps: int, rate: float, *,
              points: Sequence[int], held_out: Sequence[Batch], price: PriceConfig | None = None,
              at_price: PriceState | None = None, say: Callable[[str], None] = lambda line: None) -> Run:
        """Train with a fresh optimizer; held-out losses at `points` (0 is before the first step).

        `seconds` are of the training steps alone: no evaluation, and the first step, which compiles, at the mean of the
        others.
        """
        program = self.program(config, price)
        state: TrainState = program.new_state(put_like(variables, abstract(config, self._rules)))
        optimizer = state.optimizer._replace(steps=jnp.float32(steps), peak=jnp.float32(rate))
        state = state._replace(optimizer=optimizer, price=at_price or state.price)
        watched, curve, losses = Watched(batches), [], {}
        evaluated: list[tuple[float, float]] = []
        if 0 in points:
            losses[0] = self.losses(config, variables_of(state), held_out)

        def after(step: int, state: TrainState, last: bool) -> None:
            jax.block_until_ready(state.step)
            before = time.monotonic()
            losses[step] = self.losses(config, variables_of(state), held_out)
            evaluated.append((before, time.monotonic()))
            say(f"step {step}/{steps}: held-out loss {losses[step].mean:.4f}")

        def record(step: int, metrics: dict[str, Any]) -> None:
            curve.append(float(metrics["loss"]))

        due = set(points)
        state = fit(program, state, watched, steps, record=record, due=lambda step: step in due, after=after)
        jax.block_until_ready(state.step)
        seconds = _seconds(watched.asked, time.monotonic(), evaluated)
        return Run(variables_of(state), curve, losses, seconds, watched.digest, state.price)


def _seconds(asked: Sequence[float], end: float, evaluated: Sequence[tuple[float, float]]) -> float:
    """Seconds of all steps from those after the first: step 1 is done when the loop asks for its third batch."""
    if len(asked) < 3:
        return end - asked[0] - sum(stop - start for start, stop in evaluated)
    apart = sum(stop - start for start, stop in evaluated if start >= asked[2])
    return (end - asked[2] - apart) * len(asked) / (len(asked) - 1)
