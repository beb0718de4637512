"""Two models token by token: the figures are their equations, the verdicts say what is open, no logits are kept."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.devices.sharding import Rules, mesh_for_rows
from gt_jax.evaluation import pieces, predictions
from gt_jax.evaluation.comparison import routing
from gt_jax.evaluation.confidence_intervals import Interval
from gt_jax.evaluation.predictions import agreement, make_predictions, relative_entropy
from gt_jax.models.language_model import abstract
from tests.support import small_model


@pytest.fixture(scope="module", autouse=True)
def mesh():
    """The command's own."""
    with jax.set_mesh(mesh_for_rows(1)):
        yield


def test_agreement_and_routing_are_their_equations():
    random = np.random.default_rng(2)
    logits = random.standard_normal((3, 1, 4, 6)).astype(np.float32)
    targets = np.asarray([[2, -1, 5, 0]], np.int32)
    by_token = jax.jit(agreement)(*logits, targets)
    assert all(one.shape == (1, 4) and one[0, 1] == 0 for one in by_token)
    found = jax.tree.map(jnp.sum, by_token)
    wide, at = logits.astype(np.float64), targets[0] >= 0
    log_p = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    losses = [-log_p[i, 0, at, targets[0, at]].sum() for i in range(3)]
    np.testing.assert_allclose(found[:3], losses, rtol=1e-5)
    assert found.kl == pytest.approx((np.exp(log_p[0]) * (log_p[0] - log_p[2])).sum(-1)[0, at].sum(), rel=1e-5)
    centred = wide - wide.mean(-1, keepdims=True)
    cosines = (centred[0] * centred[2]).sum(-1) / np.sqrt((centred[0] ** 2).sum(-1) * (centred[2] ** 2).sum(-1))
    assert found.cosine == pytest.approx(cosines[0, at].sum(), rel=1e-5) and found.tokens == 3
    without = jax.jit(agreement)(logits[0], None, logits[2], targets)
    assert without.source_fixed_loss is None
    np.testing.assert_array_equal(without.target_loss, by_token.target_loss)
    np.testing.assert_allclose(jax.jit(relative_entropy)(logits[0], logits[0]), 0, atol=1e-6)
    even = jax.jit(routing, static_argnums=(1, 2))(jnp.zeros((1, 1, 4, 6)), 3, 2, jnp.asarray([[1.0, 1.0, 0.0, 0.0]]))
    assert even.entropy[0] == pytest.approx(2) and even.null_rate[0] == 0  # ties go to the smaller slot


def test_verdicts_say_what_the_interval_leaves_open():
    said = [predictions.verdict(Interval(0.02, *limits), "place") for limits in
            ((0.01, 0.02), (0.01, 0.05), (0.0, 0.5), (0.05, 0.5), (0.2, 0.3), (None, None))]  # fmt: skip
    assert said[:5] == ["good", "good or usable", "good or usable or poor", "usable or poor", "poor"]
    assert "too few places to tell" in said[5]
    assert predictions.verdict(Interval(math.nan, None, None), "place") == "no verdict: the figure is nan"


def test_the_cosine_is_called_by_its_interval_and_a_loss_that_is_not_finite_by_nothing():
    """Two documents of ten disagree: a mean of 0.9951 is above what is good, its interval is not."""
    sums = np.ones((len(predictions.Agreement._fields), 10))
    cosine = predictions.Agreement._fields.index("cosine")
    sums[cosine] = np.where(np.arange(10) < 8, 0.9985, 0.9815)
    found = predictions.summary(sums, "document")
    assert found["cosine"] == pytest.approx(0.9951) and found["cosine_verdict"] == "below or good"
    sums[cosine] = 0.999
    assert predictions.summary(sums, "document")["cosine_verdict"] == "good"
    for name in ("source_loss", "target_loss"):
        broken = sums.copy()
        broken[predictions.Agreement._fields.index(name), 3] = np.nan
        assert predictions.summary(broken, "document")["verdict"] == "no verdict: the figure is nan"


def test_no_logits_of_a_whole_batch_are_held():
    """By the compiler's own count: temporary bytes stay below one float32 array of logits, of which there were 3."""
    source, target = (small_model("D", False, vocab=32768) for _ in range(2))
    shapes = abstract(source)
    batch = {name: jax.ShapeDtypeStruct((2, 256), jnp.int32) for name in ("tokens", "targets", "segment_ids")}
    make_predictions.cache_clear()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pieces, "LOGITS", 2 * 16 * 32768)
        used = make_predictions(source, target, Rules()).lower(shapes, shapes, batch).compile().memory_analysis()
    make_predictions.cache_clear()
    assert used.temp_size_in_bytes < 4 * 2 * 256 * 32768
    assert used.output_size_in_bytes < 7 * 4 * 2 * 256 + 1024  # and what a batch leaves behind is 28 bytes a token
