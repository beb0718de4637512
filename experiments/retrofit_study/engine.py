"""Trains a source and what is made of it, and asks each everything: one call makes one unit.

What is compared costs the same: every step is charged the passes that it computed (experiments/growth_study/flops.py).
"""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np

from experiments.growth_study.flops import training_flops
from experiments.retrofit_study.study import ON, RETROFITTED, SOURCE, Study, Wanted
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.run import TrainConfig
from gt_jax.evaluation.answer_table import answer_table
from gt_jax.growth.retrofit import retrofit
from gt_jax.models.language_model import initialise
from gt_jax.text.data import open_data
from gt_jax.training.loop import fit, make_trainer, variables_of
from gt_jax.typing import Tree

CURVE = 20


def make(wanted: Wanted) -> dict[str, Any]:
    """The unit: a row for the source, one for the retrofitted model, one for the source trained on."""
    study, seed, began = wanted.study, wanted.seed, time.monotonic()
    plain, steps = study.plain, study.source_steps
    variables, source = trained(study, seed, plain, initialise(plain, seed), study.source_train(seed), 0, steps)
    config, closed = retrofit(plain, variables, study.adaptive, seed)
    _, opened = trained(study, seed, config, closed, study.further(seed, study.steps, True), steps, study.steps)
    more = max(2, round(opened["flops"] / step_flops(study, plain, np.ones(len(plain.depth)))))
    _, on = trained(study, seed, plain, variables, study.further(seed, more, False), steps, more)
    rows = [{"task": study.setting.name, "model": model, "seed": seed, "rate": study.rate, **row}
            for model, row in ((SOURCE, source), (RETROFITTED, opened), (ON, on))]  # fmt: skip
    right = ", ".join(f"{row['model']} {100 * row['accuracy_all']:.0f}" for row in rows)
    return {"rows": rows, "line": f"% right: {right}, in {time.monotonic() - began:.0f} s"}


def trained(study: Study, seed: int, config: ModelConfig, variables: Tree, train: TrainConfig, read: int,
            steps: int) -> tuple[Tree, dict[str, Any]]:  # fmt: skip
    """`steps` steps on the batches that follow the first `read`; (variables, what the model says and what it cost)."""
    data = open_data(study.setting.data(seed))
    stream = data.train(None)
    stream.restore({**stream.state(), "batches": read})
    trainer, curve, spent = make_trainer(config, train), list[list[float]](), 0.0

    def record(step: int, metrics: dict[str, Any]) -> None:
        nonlocal spent
        spent += step_flops(study, config, np.asarray(metrics["passes_computed"], np.float64))
        if step % max(1, steps // CURVE) == 0:
            curve.append([step, spent, round(float(metrics["loss"]), 5)])

    # copies: the step donates its state, and the source is needed twice
    state = fit(trainer, trainer.new_state(jax.tree.map(np.array, variables)), stream, steps, record=record)
    made, adaptive = jax.tree.map(np.asarray, variables_of(state)), config.adaptive is not None
    held_out = data.held_out(study.setting.held_out_batches)
    table = answer_table(config, made, held_out, forced=None if adaptive else (), cuts=False).to_json()
    return made, {"layers": config.layout, "steps": steps, "flops": spent, "curve": curve, **table}


def step_flops(study: Study, config: ModelConfig, passes: np.ndarray) -> float:
    """FLOPs of a training step that computes so many passes in each layer [l]."""
    length = study.setting.length
    return training_flops(config, length, passes) * length * study.setting.rows
