"""Training with the TPU's kernels, interpreted, goes where training with the XLA path goes."""

import functools

import jax
import numpy as np
import pytest

from gt_jax.configs.model import DeltaNetConfig, ModelConfig
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.run import TrainConfig
from gt_jax.models.language_model import initialise
from gt_jax.training.loop import make_trainer

STEPS, ROWS, TOKENS, LETTERS = 60, 2, 80, 16


@functools.cache
def material():
    """Rows of a walk over letters that mostly takes the usual next step; the middle of every second row starts anew."""
    random = np.random.default_rng(0)
    usual = random.permutation(LETTERS)
    rows = np.zeros((STEPS, ROWS, TOKENS + 1), np.int32)
    rows[..., 0] = random.integers(LETTERS, size=(STEPS, ROWS))
    surprises, others = random.random(rows.shape) < 0.1, random.integers(LETTERS, size=rows.shape)
    for t in range(1, TOKENS + 1):
        rows[..., t] = np.where(surprises[..., t], others[..., t], usual[rows[..., t - 1]])
    segments = np.ones((ROWS, TOKENS), np.int32)
    segments[::2, TOKENS // 2 :] = 2
    return rows, segments


def losses(implementation):
    deltanet = DeltaNetConfig(
        heads=1, value_heads=2, key_width=16, value_width=16, chunk_size=64, implementation=implementation
    )
    model = ModelConfig(layout="D", width=32, vocab=264, mlp_width=32, deltanet=deltanet, init_std=0.08, remat="none")
    train = TrainConfig(steps=STEPS, optimizer=OptimizerConfig(learning_rate=1e-2))
    trainer = make_trainer(model, train)
    state = trainer.new_state(initialise(model, seed=1))
    rows, segments = material()
    found = []
    for row in rows:
        batch = {"tokens": row[:, :-1], "targets": row[:, 1:], "segment_ids": segments}
        state, metrics = trainer.step(state, batch)
        found.append(metrics["loss"])
    return np.array(jax.device_get(found))


@pytest.mark.slow
def test_60_steps_with_the_interpreted_kernels_follow_the_xla_path():
    ours, wanted = losses("pallas_tpu_interpreted"), losses("xla")
    assert wanted[-1] < 0.5 * wanted[0]
    assert not np.array_equal(ours, wanted)  # two programs
    np.testing.assert_allclose(ours, wanted, atol=1e-3, rtol=0)
