"""A batch in parts has the loss and the gradient of the whole batch, on one device and on a mesh."""

import functools

import jax
import numpy as np
import pytest

from gt_jax.configs.run import RunConfig, TrainConfig
from gt_jax.devices.sharding import make_mesh, place_like
from gt_jax.errors import Refused
from gt_jax.models.language_model import abstract, initialise
from gt_jax.training.loop import make_trainer
from tests.support import small_model

ROWS, TOKENS = 8, 12
CONFIG = small_model("D", adaptive=False)  # a G layer moves its running variance from part to part


@functools.cache
def start():
    return jax.tree.map(np.asarray, initialise(CONFIG, seed=3))


def batch():
    """Rows with very different numbers of targets."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 256, (ROWS, TOKENS)).astype(np.int32)
    targets = np.where(random.random((ROWS, TOKENS)) < np.linspace(0.05, 1, ROWS)[:, None], tokens, -1)
    return {"tokens": tokens, "targets": targets.astype(np.int32), "segment_ids": np.ones((ROWS, TOKENS), np.int32)}


def after_one_step(accumulate, config=CONFIG):
    trainer = make_trainer(config, TrainConfig(steps=10, accumulate=accumulate))
    variables = place_like(start(), abstract(config))
    state, metrics = trainer.step(trainer.new_state(variables), batch())
    return jax.device_get((state.params, metrics))


@functools.cache
def whole():
    return after_one_step(1)


def assert_same_step(found, wanted):
    for name in ("loss", "total_loss", "gradient_norm"):
        np.testing.assert_allclose(found[1][name], wanted[1][name], rtol=2e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), found[0], wanted[0])
    assert max(jax.tree.leaves(moved)) < 2e-5, moved  # of a step of 3e-3 at most


@pytest.mark.parametrize("parts", [4])
def test_parts_give_the_step_of_the_whole_batch(parts):
    assert_same_step(after_one_step(parts), whole())


@pytest.mark.slow
def test_on_a_mesh_too():
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        assert_same_step(after_one_step(2), whole())


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(Refused, match=r"data.batch_size is 8; train.accumulate 3 does not divide it"):
        RunConfig(model=CONFIG, train=TrainConfig(accumulate=3))
