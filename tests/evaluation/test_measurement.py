"""Pass counts over batches: what is a mean over tokens, and what over batches."""

from typing import NamedTuple

import numpy as np
import pytest

from gt_jax.evaluation.measurement import pass_counts
from gt_jax.models.layers.adaptive_depth import PassStatistics
from tests.support import small_model


class _Batch(NamedTuple):
    tokens: float
    alive: float


def test_a_batch_of_padding_weighs_by_its_tokens():
    """The last of all held-out batches may hold one row in a hundred; it is one batch still to the device."""
    def evaluation(variables, batch):
        values = {name: np.ones((1, 4), np.float32) for name in PassStatistics._fields}
        values["alive"] = np.float32([[1.0, batch.alive, 0.0, 0.0]])
        values["survival"] = values["alive"] / 2
        values["computed"] = np.float32([[1.0, float(batch.alive > 0), 0.0, 0.0]])
        return np.float32(2 * batch.tokens), np.float32(batch.tokens), PassStatistics(**values)

    found = pass_counts(evaluation, None, [_Batch(99, 0.0), _Batch(1, 1.0)], small_model("D"))
    layer = found["layer0"]
    assert layer["passes_run"] == pytest.approx(1.01) and layer["mean_weight"] == pytest.approx(0.505)
    assert layer["k_exec"] == 1, "one token in a hundred, not one in two, runs a second pass"
    assert layer["passes_computed"] == pytest.approx(1.5)
    assert (found["_meta"]["tokens"], found["_meta"]["loss"]) == (100, pytest.approx(2.0))
    assert pass_counts(evaluation, None, [_Batch(0, 1.0)], small_model("D"))["layer0"]["passes_run"] == 2
