"""The selection of keys: exact counts, sinks, ties, budget; the indexer learns from its KL loss alone."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gt_jax.devices.sharding import Rules
from gt_jax.models.layers.gsa import GatedSparseAttention
from gt_jax.models.layers.mixer import place_rows
from gt_jax.models.layers.primitives import WeightSpec
from pallas_kernels.sparse_attention.api import Indexer, Positions, sparse_attention
from pallas_kernels.sparse_attention.common import selection
from pallas_kernels.sparse_attention.common.selection import (
    budget,
    indexer_scores,
    row_variance,
    select,
    visible_variance,
)
from tests.support import GSA, WIDTH, drawn, segments

TOKENS = 12
_select = jax.jit(select)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.25, 0.5, 0.75, 1.0]), min_size=TOKENS, max_size=TOKENS),
    st.integers(1, TOKENS),
    st.integers(0, 4),
)
def test_selection_equals_a_stable_sort(scores, count, sinks):
    visible = np.arange(TOKENS) <= TOKENS - 2  # the last key is in the future
    sink = np.arange(TOKENS) < sinks
    count = min(count, visible.sum())
    got = _select(
        jnp.asarray(scores, jnp.float32)[None, None, None],
        jnp.asarray(visible)[None, None],
        jnp.asarray(visible & sink)[None, None],
        jnp.full((1, 2, 1), count, jnp.int32),
    )
    order = sorted(np.flatnonzero(visible), key=lambda s: (not sink[s], 0.0 if sink[s] else -scores[s], s))
    for head in range(2):
        assert set(np.flatnonzero(np.asarray(got)[0, head, 0])) == set(order[:count])


def test_where_every_budget_holds_all_keys_nothing_is_compared_and_nothing_changes(monkeypatch):
    """A row no longer than `k_min`: the values of a budget large by its variance, and no threshold is sought."""
    ks = jax.random.split(jax.random.key(0), 6)
    q, k, v, iq, ik = (jax.random.normal(key, (2, TOKENS, 4, 8)) for key in ks[:5])
    indexer = Indexer(iq, ik, jax.random.uniform(ks[5], (2, TOKENS, 4)), *jnp.zeros((2, 4)), jnp.zeros(()))
    at, ids = place_rows(segments(7, 5).repeat(2, 0)).positions, segments(7, 5).repeat(2, 0)

    def attend(k_min):
        run = functools.partial(sparse_attention, k_base=1000, k_min=k_min, k_max=TOKENS, implementation="reference")
        return jax.jit(lambda *a: run(*a, indexer, Positions(at, ids, at, ids)))(q, k, v)

    wanted = attend(TOKENS - 1)
    monkeypatch.setattr(selection, "thresholds", None)
    jax.tree.map(np.testing.assert_array_equal, attend(TOKENS), wanted)
    np.testing.assert_array_equal(wanted[1].selected, [[*range(1, 8), *range(1, 6)]] * 2)


def test_budget_follows_the_variance_and_never_leaves_its_bounds():
    variance = jnp.asarray([[[0.0, 0.5, 1.0, 2.0, 100.0, 1.0]]])
    seen = jnp.asarray([[50, 50, 50, 50, 50, 3]])
    got = budget(variance, jnp.ones(()), seen, k_base=8, k_min=2, k_max=20)
    assert got.tolist() == [[[2, 4, 8, 16, 20, 3]]]
    assert budget(variance, jnp.zeros(()), seen, k_base=8, k_min=2, k_max=20).tolist() == [[[8] * 5 + [3]]]
    # a factor outside the bounds, as checkpoints of the origin have it
    assert budget(variance, jnp.ones(()), seen, k_base=40, k_min=4, k_max=12).tolist() == [[[4, 12, 12, 12, 12, 3]]]
    assert budget(variance, jnp.zeros(()), seen, k_base=40, k_min=4, k_max=12).tolist() == [[[12] * 5 + [3]]]


def test_variance_sees_only_visible_keys():
    scores = jax.random.uniform(jax.random.key(0), (1, 1, 1, 6))
    visible = jnp.arange(6)[None, None] < 4
    np.testing.assert_allclose(visible_variance(scores, visible)[0, 0, 0], np.var(scores[0, 0, 0, :4]), rtol=1e-6)


def test_row_variance_counts_every_other_entry_of_the_row_as_zero():
    scores = jax.random.uniform(jax.random.key(0), (2, 1, 1, 6))
    visible = jnp.broadcast_to((jnp.arange(6) < 4) & (jnp.arange(6) > 0), (2, 1, 6))
    seen = np.where(visible[:, None], scores, 0.0)[:, 0, 0]
    got = row_variance(scores, visible, jnp.asarray([6, 9]))[:, 0, 0]  # the second row is longer than its cache shows
    np.testing.assert_allclose(got, [np.var(seen[0]), np.var(np.append(seen[1], [0.0] * 3))], rtol=1e-5)
    everything = jnp.ones((2, 1, 6), bool)
    np.testing.assert_allclose(
        row_variance(scores, everything, jnp.asarray([6, 6])), visible_variance(scores, everything), rtol=1e-5
    )


def test_the_scale_of_the_scores():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 3, 1, 4))
    of = lambda scale: indexer_scores(query, key, jnp.ones((1, 3, 1)), jnp.zeros(1), scale)  # noqa: E731
    np.testing.assert_allclose(of(1.0)[0, 0], jax.nn.sigmoid(query[0, :, 0] @ key[0, :, 0].T), rtol=1e-5)
    np.testing.assert_array_equal(of(None), of(0.5))


def test_all_keys_selected_is_full_attention():
    keys = jax.random.split(jax.random.key(1), 6)
    q, k, v = (jax.random.normal(key, (2, TOKENS, 4, 8)) for key in keys[:3])
    index = [jax.random.normal(key, (2, TOKENS, 2, 4)) for key in keys[3:5]]
    weight = jax.nn.sigmoid(jax.random.normal(keys[5], (2, TOKENS, 2)))
    indexer = Indexer(*index, weight, jnp.zeros(2), jnp.zeros(4), jnp.zeros(()))
    rows = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32)[None], (2, TOKENS))
    ids = jnp.zeros_like(rows)
    positions = Positions(rows, ids, rows, ids)
    attend = jax.jit(functools.partial(sparse_attention, k_base=TOKENS, k_min=TOKENS, k_max=TOKENS))
    o, seen = attend(q, k, v, indexer, positions)
    np.testing.assert_allclose(o, jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=1e-6)
    np.testing.assert_array_equal(seen.selected, rows + 1)
    assert np.all(np.asarray(seen.kl) >= -1e-6)


def test_an_unknown_implementation_is_named():
    x = jnp.zeros((1, 2, 2, 4))
    rows = jnp.zeros((1, 2), jnp.int32)
    indexer = Indexer(x, x, jnp.zeros((1, 2, 2)), jnp.zeros(2), jnp.zeros(2), jnp.zeros(()))
    with pytest.raises(ValueError, match=r"'pallas_gpu' is not one of reference"):
        sparse_attention(
            x, x, x, indexer, Positions(rows, rows, rows, rows), k_base=1, k_min=1, k_max=1, implementation="pallas_gpu"
        )


def _layer():
    layer = GatedSparseAttention(GSA, WIDTH, Rules(), WeightSpec())
    x = jax.random.normal(jax.random.key(2), (2, 32, WIDTH))
    ids = jnp.concatenate([segments(32), segments(20, 12)])
    shapes = jax.eval_shape(layer.init, jax.random.key(3), x, place_rows(ids))
    return layer, drawn(shapes["params"], 0.3, seed=4), {"variance_ema": jnp.zeros(())}, x, place_rows(ids)


def test_the_indexer_learns_from_its_loss_alone():
    layer, params, statistics, x, place = _layer()

    def output(params):
        return layer.apply({"params": params, "statistics": statistics}, x, place)

    indexer = ("indexer_query", "indexer_key", "indexer_weight", "indexer_bias", "head_importance")
    from_value = jax.jit(jax.grad(lambda p: jnp.sum(output(p).y ** 2)))(params)
    from_loss = jax.jit(jax.value_and_grad(lambda p: output(p).auxiliary_loss))
    before, loss_gradient = from_loss(params)
    size = lambda tree: sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(tree))  # noqa: E731
    for name in indexer:
        assert size(from_value[name]) == 0, name
        assert size(loss_gradient[name]) > 0, name
    for name in set(params) - set(indexer):
        assert size(loss_gradient[name]) == 0, name
        assert size(from_value[name]) > 0, name

    optimizer = optax.adam(1e-2)
    state, trained, update = optimizer.init(params), params, jax.jit(optimizer.update)
    for _ in range(40):
        updates, state = update(from_loss(trained)[1], state)
        trained = optax.apply_updates(trained, updates)
    assert from_loss(trained)[0] < 0.8 * before
