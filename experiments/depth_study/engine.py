"""Trains one model on a task and asks it everything: one call makes one unit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.depth_study.study import Wanted
from gt_jax.configs.data import DataConfig
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.run import TrainConfig
from gt_jax.devices.sharding import Rules
from gt_jax.evaluation.answer_table import answer_table
from gt_jax.models.language_model import free_passes, initialise
from gt_jax.text.data import Batch, open_data
from gt_jax.training.loop import fit, make_trainer, variables_of
from gt_jax.training.step import make_evaluation
from gt_jax.typing import Tree

CURVE = 20
ROUNDS = 7


def make(wanted: Wanted) -> dict[str, Any]:
    """Train it; what it is, its answer table, `tuning_nats`, `curve` [[step, loss]], seconds, microseconds a token."""
    setting, seed = wanted.setting, wanted.seed
    row = answered(wanted.config, setting.train(seed, wanted.rate), setting.data(seed), setting.held_out_batches)
    return {"task": setting.name, "model": wanted.model, "seed": seed, "rate": wanted.rate, **row}


def answered(config: ModelConfig, train: TrainConfig, source: DataConfig, batches: int) -> dict[str, Any]:
    """Train a model on tasks, and ask it: all of its answers, those with passes forced and with layers cut."""
    data = open_data(source)
    trainer = make_trainer(config, train)
    state = trainer.new_state(initialise(config, train.seed))
    curve: list[list[float]] = []
    began = time.monotonic()

    def record(step: int, metrics: dict[str, Any]) -> None:
        if step % max(1, train.steps // CURVE) == 0:
            curve.append([step, round(float(metrics["loss"]), 5)])

    state = fit(trainer, state, data.train(None), train.steps, record=record)
    jax.block_until_ready(state.step)
    seconds = time.monotonic() - began
    variables, adaptive = variables_of(state), config.adaptive is not None
    held_out = data.held_out(batches)
    table = answer_table(config, variables, held_out, forced=None if adaptive else (), cuts=adaptive).to_json()
    tuning = answer_table(config, variables, data.tuning(batches), forced=(), cuts=False)
    said = " ".join(f"{100 * value:.0f}" for value in table["accuracy"].values())
    return {
        "layers": config.layout, "steps": train.steps, "seconds": round(seconds, 1), **table,
        "tuning_nats": tuning.nats.value, "curve": curve,
        "microseconds_a_token": round(microseconds_a_token(config, variables, held_out[0]), 3),
        "line": f"{said} % right in {seconds:.0f} s",
    }  # fmt: skip


def microseconds_a_token(config: ModelConfig, variables: Tree, batch: Batch) -> float:
    """Wall time of an evaluation of a batch over its tokens, the median of a few, in microseconds."""
    evaluate = make_evaluation(config, Rules())
    jax.block_until_ready(evaluate(variables, batch, free_passes()))
    times: Sequence[float] = [_timed(evaluate, variables, batch) for _ in range(ROUNDS)]
    return 1e6 * statistics.median(times) / int(np.size(batch["tokens"]))


def _timed(evaluate: Any, variables: Tree, batch: Batch) -> float:
    began = time.monotonic()
    jax.block_until_ready(evaluate(variables, batch, free_passes()))
    return time.monotonic() - began
