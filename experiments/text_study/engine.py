"""Trains one model on text and asks what its passes are good for: one call makes one unit."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.growth_study.flops import training_flops
from experiments.text_study.study import TextGates, Wanted
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.run import TrainConfig
from gt_jax.devices.sharding import Rules
from gt_jax.evaluation.measurement import pass_counts
from gt_jax.models.language_model import fixed_passes, initialise
from gt_jax.text.data import open_data
from gt_jax.training.loop import Diverged, Trainer, fit, variables_of
from gt_jax.training.optimizer import make_optimizer
from gt_jax.training.state import new_state
from gt_jax.training.step import evaluate, make_evaluation, make_step
from gt_jax.typing import Tree

NO_LOSS = 1e9
WARM = 10  # steps before which nothing is timed: the first ones compile
MEANS = ("mean_weight", "passes_run", "passes_computed")


def make(wanted: Wanted) -> dict[str, Any]:
    """The row: held-out loss as the gates choose and with every layer run once, depth, FLOPs, processor time a step."""
    study, config = wanted.study, wanted.study.model(wanted.model)
    data = open_data(study.data(wanted.seed))
    trainer = program(config, study.train(wanted.model, wanted.steps))
    state = trainer.new_state(initialise(config, wanted.seed))
    state = state._replace(optimizer=state.optimizer._replace(peak=jnp.float32(wanted.rate)))
    spent, began, start = [], time.monotonic(), time.process_time()

    def record(step: int, metrics: dict[str, Any]) -> None:
        nonlocal start
        spent.append(step_flops(study, config, np.asarray(metrics["passes_computed"], np.float64)))
        if step == WARM:
            start = time.process_time()

    row = {"task": "text", "model": wanted.model, "seed": wanted.seed, "rate": wanted.rate, "steps": wanted.steps,
           "layers": config.layout}  # fmt: skip
    try:
        state = fit(trainer, state, data.train(None), wanted.steps, record=record)
    except Diverged as error:
        return row | {"diverged": str(error), "nats": NO_LOSS, "tuning_nats": NO_LOSS, "line": str(error)}
    jax.block_until_ready(state.step)
    took = (time.process_time() - start) / max(1, wanted.steps - WARM)
    variables, held_out = variables_of(state), data.held_out(study.held_out_batches)
    once = fixed_passes(1)
    row |= {"flops": float(np.sum(spent)), "processor_seconds_a_step": round(took, 4),
            "seconds": round(time.monotonic() - began, 1),
            "nats": evaluate(trainer.evaluation, variables, held_out),
            "tuning_nats": evaluate(trainer.evaluation, variables, data.tuning(study.held_out_batches))}  # fmt: skip
    if config.adaptive is not None:
        counts = pass_counts(trainer.evaluation, variables, held_out, config)
        layers = [counts[f"layer{layer}"] for layer in range(len(config.depth))]
        row |= {name: float(np.mean([layer[name] for layer in layers])) for name in MEANS}
        row |= {"nats_once": evaluate(trainer.evaluation, variables, held_out, once),
                "by_layer": [{name: layer[name] for name in ("type", *MEANS, "k_exec")} for layer in layers]}
    said = f"{row['nats']:.4f} nats" + (f", {row['passes_run']:.2f} passes" if "passes_run" in row else "")
    return row | {"line": f"{said} in {row['seconds']:.0f} s"}


class AtPeak(NamedTuple):
    """An optimizer made at rate 1, and the rate by which its updates are multiplied."""

    inner: Any
    peak: jax.Array


def at_peak(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` (made at rate 1) at a rate that stands in its state: models of all rates are one program."""

    def init(params: Tree) -> AtPeak:
        return AtPeak(inner.init(params), jnp.ones((), jnp.float32))

    def update(grads: Tree, state: AtPeak, params: Tree = None) -> tuple[Tree, AtPeak]:
        updates, moments = inner.update(grads, state.inner, params)
        return jax.tree.map(lambda u: (state.peak * u).astype(u.dtype), updates), state._replace(inner=moments)

    return optax.GradientTransformation(init, update)


@functools.lru_cache(maxsize=8)
def program(config: ModelConfig, train: TrainConfig) -> Trainer:
    """Step, evaluation and new state, compiled once for all seeds and rates."""
    optimizer = at_peak(make_optimizer(train.optimizer.replace(learning_rate=1.0), train.steps))
    step = make_step(config, train.price, optimizer, train.steps, Rules())
    evaluation = make_evaluation(config, Rules())
    return Trainer(step, evaluation, lambda variables: new_state(variables, optimizer, train.price))


def step_flops(study: TextGates, config: ModelConfig, passes: Sequence[float] | np.ndarray) -> float:
    """FLOPs of a training step that computes so many passes in each layer [l] (experiments/growth_study/flops.py)."""
    adaptive = config.adaptive is not None  # the one whose cost decides is of rule "ouro", which reads pass 1
    return training_flops(config, study.tokens, passes, reads_first=adaptive) * study.tokens * study.rows
