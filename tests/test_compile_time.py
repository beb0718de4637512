"""Blocks are scanned: what the compiler is given does not grow with their number."""

from __future__ import annotations

import jax
import pytest

from gt_jax.model import abstract
from gt_jax.sharding import Rules
from gt_jax.training.config import TrainConfig
from gt_jax.training.optimizer import make_optimizer
from gt_jax.training.state import new_state
from gt_jax.training.step import make_step
from tests.support import small_model


@pytest.mark.slow
def test_the_training_step_is_the_same_program_at_2_and_at_20_blocks():
    train = TrainConfig(steps=10)
    optimizer = make_optimizer(train.optimizer, train.steps)
    sizes = []
    for blocks in (2, 20):
        config = small_model(f"DG*{blocks}")
        state = jax.eval_shape(lambda v: new_state(v, optimizer, train.price), abstract(config))
        batch = {name: jax.ShapeDtypeStruct((2, 16), "int32") for name in ("tokens", "targets", "segment_ids")}
        step = make_step(config, train.price, optimizer, train.steps, Rules())
        sizes.append(len(step.lower(state, batch).as_text().splitlines()))
    assert sizes[1] <= 1.01 * sizes[0], f"{sizes} lines of StableHLO"
