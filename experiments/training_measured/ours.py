"""Our side: the trainer that `python -m gt_jax.train` runs, on one device, its state donated from step to step."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import numpy as np

from experiments.training_measured import sizes
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.run import TrainConfig
from gt_jax.devices.sharding import mesh_for_rows
from gt_jax.models.language_model import initialise
from gt_jax.training.loop import make_trainer

STEPS = 1000  # of the schedule


def train_config() -> TrainConfig:
    """AdamW as the other side has it, at its full rate from the first step."""
    optimizer = OptimizerConfig(
        learning_rate=sizes.LEARNING_RATE, warmup=0.0, final=1.0, b1=sizes.BETAS[0], b2=sizes.BETAS[1],
        weight_decay=sizes.WEIGHT_DECAY, clip=sizes.CLIP,
    )  # fmt: skip
    return TrainConfig(steps=STEPS, optimizer=optimizer)


class Ours:
    """A model in training."""

    def __init__(self, config: ModelConfig) -> None:
        self._mesh = contextlib.ExitStack()
        self._mesh.enter_context(jax.set_mesh(mesh_for_rows(1)))
        self._trainer = make_trainer(config, train_config())
        state = self._trainer.new_state(initialise(config, 0))
        self._state = state._replace(step=state.step + STEPS // 2)  # past the forced passes: the halting heads decide
        self._metrics: dict[str, Any] = {}

    @property
    def about(self) -> dict[str, Any]:
        """Parameters, and mean passes run a layer in the last step."""
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self._state.params))
        passes = float(np.mean(self._metrics["passes_run"])) if self._metrics else None
        return {"parameters": parameters, "passes": passes, "by": f"jax {jax.__version__}"}

    def step(self, tokens: np.ndarray) -> float:
        """One step on rows [b, t + 1]; the cross-entropy before it."""
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.ones_like(tokens[:, 1:])}
        self._state, self._metrics = self._trainer.step(self._state, batch)
        jax.block_until_ready(self._state)
        return float(self._metrics["loss"])
