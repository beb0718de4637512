"""Trains one model of the study and asks it everything: one call makes one unit."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.depth_study.study import ADAPTIVE, Wanted
from gt_jax.configs.model import ModelConfig
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
    setting = wanted.setting
    data = open_data(setting.data(wanted.seed))
    trainer = _trainer(wanted.config, setting, wanted.seed, wanted.rate)
    state = trainer.new_state(initialise(wanted.config, wanted.seed))
    curve: list[list[float]] = []
    began = time.monotonic()

    def record(step: int, metrics: dict[str, Any]) -> None:
        if step % max(1, setting.steps // CURVE) == 0:
            curve.append([step, round(float(metrics["loss"]), 5)])

    state = fit(trainer, state, data.train(None), setting.steps, record=record)
    jax.block_until_ready(state.step)
    seconds = time.monotonic() - began
    variables = variables_of(state)
    adaptive = wanted.model == ADAPTIVE
    held_out = data.held_out(setting.held_out_batches)
    table = answer_table(wanted.config, variables, held_out, forced=None if adaptive else (), cuts=adaptive).to_json()
    tuning = answer_table(wanted.config, variables, data.tuning(setting.held_out_batches), forced=(), cuts=False)
    row = {
        "task": setting.name, "model": wanted.model, "layers": wanted.config.layout, "seed": wanted.seed,
        "rate": wanted.rate, "steps": setting.steps, "seconds": round(seconds, 1), **table,
        "tuning_nats": tuning.nats.value, "curve": curve,
        "microseconds_a_token": round(microseconds_a_token(wanted.config, variables, held_out[0]), 3),
    }  # fmt: skip
    said = " ".join(f"{100 * value:.0f}" for value in table["accuracy"].values())
    return {**row, "line": f"{said} % right in {seconds:.0f} s"}


@functools.lru_cache(maxsize=4)
def _trainer(config: ModelConfig, setting: Any, seed: int, rate: float) -> Any:
    return make_trainer(config, setting.train(seed, rate))


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
