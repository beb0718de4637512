"""Figures that are means over tokens: padding, in a chunk of its own or a batch of its own, changes none of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.configs.model import MemoryConfig
from gt_jax.devices.sharding import Rules
from gt_jax.evaluation.intermediates import hidden_rows
from gt_jax.evaluation.measurement import halting_entropy, pass_counts
from gt_jax.models.language_model import LanguageModel, free_passes
from gt_jax.models.layers.pass_statistics import PassStatistics, mean_over_tokens
from gt_jax.training import accumulation
from gt_jax.training.step import make_evaluation
from tests.rarely import rarely
from tests.support import perturbed, small_model, tokens

CHUNK = 8
CONFIG = small_model("DG").replace(memory=MemoryConfig(chunk=CHUNK, stream=0))


def rows(real: int, length: int, padded: int = 0):
    """Two rows of `real` tokens, then padding; `padded` rows more have nothing else."""
    ids = np.zeros((2 + padded, length), np.int32)
    ids[:2, :real] = np.asarray(tokens(real))
    segments = np.zeros_like(ids)
    segments[:2, :real] = 1
    return {"tokens": ids, "targets": np.where(segments > 0, ids, -1), "segment_ids": segments}


@pytest.fixture(scope="module")
def variables():
    return perturbed(CONFIG)


@pytest.mark.parametrize("name", ["evaluation", rarely("hidden_rows")])
def test_a_chunk_of_padding_weighs_nothing(variables, name):
    network = LanguageModel(CONFIG, Rules())

    def statistics(batch):
        if name == "evaluation":
            return make_evaluation(CONFIG, Rules())(variables, batch)[2]
        return jax.jit(lambda ids, segments: hidden_rows(network, variables, ids, segments, free_passes())[1])(
            batch["tokens"], batch["segment_ids"])  # fmt: skip

    alone, padded = statistics(rows(CHUNK, CHUNK)), statistics(rows(CHUNK, 3 * CHUNK))
    assert float(alone.survival[:, 1].min()) > 0.1
    for field in ("survival", "alive", "s_after", "p_mean", "delta_ratio", "update_ratio", "entropy"):
        np.testing.assert_allclose(getattr(padded, field), getattr(alone, field), rtol=2e-5, atol=1e-6, err_msg=field)


def test_a_batch_that_is_nearly_all_padding_weighs_its_tokens(variables):
    evaluation = make_evaluation(CONFIG, Rules())
    full, rest = rows(CHUNK, CHUNK), rows(1, CHUNK)
    found = [pass_counts(evaluation, variables, batches, CONFIG) for batches in ([full], [rest], [full, rest])]
    first, last, both = ([one[f"layer{layer}"]["mean_weight"] for layer in range(2)] for one in found)
    np.testing.assert_allclose(both, (CHUNK * np.array(first) + np.array(last)) / (CHUNK + 1), rtol=1e-5)
    assert np.abs(np.array(first) - last).max() > 1e-3


def test_a_batch_in_parts_has_its_means(variables, monkeypatch):
    """What `measure` runs of a batch too large for one device, a part of which may be padding alone."""
    batch = rows(CHUNK, CHUNK, padded=2)
    whole = pass_counts(make_evaluation(CONFIG, Rules()), variables, [batch], CONFIG)
    monkeypatch.setattr(accumulation, "TOKENS", CHUNK)
    found = pass_counts(make_evaluation(CONFIG, Rules()), variables, [batch], CONFIG)
    assert found["_meta"]["loss"] == pytest.approx(whole["_meta"]["loss"], rel=1e-5)
    for layer in ("layer0", "layer1"):
        assert found[layer]["survival"][1] > 0.1
        for name in ("survival", "alive", "mean_weight", "passes_run"):
            np.testing.assert_allclose(found[layer][name], whole[layer][name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_what_is_of_alive_tokens_is_weighed_by_them():
    """Of 10 and 30 tokens 8 and 3 run pass 2: its gate is the mean over those 11, its survival that over all 40."""
    shape = {name: jnp.zeros((2, 1, 1)) for name in PassStatistics._fields} | {"experts": jnp.zeros((2, 1, 1, 3))}
    given = PassStatistics(**shape)._replace(
        alive=jnp.array([0.8, 0.1]).reshape(2, 1, 1), survival=jnp.array([0.5, 0.1]).reshape(2, 1, 1),
        ran=jnp.array([1.0, 0.0]).reshape(2, 1, 1),
        p_mean=jnp.array([0.9, 0.2]).reshape(2, 1, 1), computed=jnp.array([1.0, 0.0]).reshape(2, 1, 1),
        update_ratio=jnp.array([0.4, 0.2]).reshape(2, 1, 1))  # fmt: skip
    found = mean_over_tokens(given, jnp.array([10.0, 30.0]), CONFIG.adaptive)
    assert float(found.survival[0, 0]) == pytest.approx((10 * 0.5 + 30 * 0.1) / 40)
    assert float(found.p_mean[0, 0]) == pytest.approx((8 * 0.9 + 3 * 0.2) / 11)
    assert float(found.update_ratio[0, 0]) == pytest.approx((8 * 0.4 + 3 * 0.2) / 11)
    assert float(found.computed[0, 0]) == 0.5 and found.experts.shape == (1, 1, 3)
    batch = mean_over_tokens(given, jnp.array([10.0, 30.0]), CONFIG.adaptive.replace(halting="batch"))
    assert float(batch.update_ratio[0, 0]) == pytest.approx((10 * 0.4 + 30 * 0.2) / 40)
    assert float(batch.ran[0, 0]) == pytest.approx(10 / 40), "of the tokens, not of the batches as `computed`"
    shown = given._replace(entropy=given.p_mean, computed=jnp.ones((2, 1, 1)))  # layers that tokens leave see 8 and 3
    assert float(mean_over_tokens(shown, jnp.array([10.0, 30.0]), None, True).entropy[0, 0]) == pytest.approx(
        (8 * 0.9 + 3 * 0.2) / 11)  # fmt: skip
    nobody = mean_over_tokens(given, jnp.zeros(2), CONFIG.adaptive)
    assert float(nobody.survival[0, 0]) == pytest.approx(0.3)


def test_what_a_piece_did_not_see_weighs_nothing():
    """Of two pieces of 10 and 30 tokens the second did not run the pass, or sent nearly all picks to null experts."""
    shape = {name: jnp.zeros((2, 1, 1)) for name in PassStatistics._fields}
    given = PassStatistics(**{**shape, "experts": jnp.array([[0.5, 0.5], [1.0, 0.0]]).reshape(2, 1, 1, 2)})._replace(
        alive=jnp.ones((2, 1, 1)), computed=jnp.array([1.0, 0.0]).reshape(2, 1, 1),
        entropy=jnp.array([0.6, 0.0]).reshape(2, 1, 1), router_loss=jnp.array([0.4, 0.0]).reshape(2, 1, 1))  # fmt: skip
    tokens = jnp.array([10.0, 30.0])
    found = mean_over_tokens(given, tokens, CONFIG.adaptive)
    assert float(found.entropy[0, 0]) == pytest.approx(0.6)
    assert float(found.router_loss[0, 0]) == pytest.approx(0.1)  # a charge that was not made is 0
    both = given._replace(computed=jnp.ones((2, 1, 1)), null_rate=jnp.array([0.1, 0.9]).reshape(2, 1, 1))
    shares = mean_over_tokens(both, tokens, CONFIG.adaptive).experts[0, 0]
    np.testing.assert_allclose(shares, [(9 * 0.5 + 3) / 12, 9 * 0.5 / 12], rtol=1e-6)


def test_the_deviation_of_gates_is_of_all_tokens_together():
    gates = np.random.default_rng(0).uniform(size=12).astype(np.float32)
    pieces = gates[:3], gates[3:]
    shape = {name: jnp.zeros((2, 1, 1)) for name in PassStatistics._fields} | {"experts": jnp.zeros((2, 1, 1, 0))}
    given = PassStatistics(**shape)._replace(
        alive=jnp.ones((2, 1, 1)), p_mean=jnp.array([one.mean() for one in pieces]).reshape(2, 1, 1),
        p_std=jnp.array([one.std() for one in pieces]).reshape(2, 1, 1))  # fmt: skip
    found = mean_over_tokens(given, jnp.array([3.0, 9.0]), CONFIG.adaptive)
    assert float(found.p_std[0, 0]) == pytest.approx(gates.std(), rel=1e-5)


def test_the_entropy_of_passes_counts_tokens_that_run_none():
    """Gated copies leave tokens out of a layer; an adaptive layer runs its first pass for all."""
    assert halting_entropy(np.array([0.5])) == pytest.approx(1.0)
    assert halting_entropy(np.array([0.9])) == pytest.approx(0.469, abs=1e-3)  # of a coin of 0.9, in bits
    assert halting_entropy(np.array([1.0, 0.0])) == pytest.approx(0.0)
    assert halting_entropy(np.array([1.0, 0.75, 0.5, 0.25])) == pytest.approx(1.0)
