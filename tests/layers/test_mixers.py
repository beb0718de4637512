"""What every mixer must pass: causal by gradient, prefix, segments apart, rows apart, odd lengths, float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.layers import deltanet, gsa
from gt_jax.layers.primitives import WeightSpec
from gt_jax.sharding import Rules
from tests.layers import oracle
from tests.support import DELTANET, GSA, WIDTH, random_tree, segments

KINDS = ("D", "G")


def mixer(kind: str, dtype: str = "float32"):
    weights = WeightSpec("float32", dtype)
    if kind == "D":
        return deltanet.GatedDeltaNet(DELTANET, WIDTH, Rules(), weights)
    return gsa.GatedSparseAttention(GSA, WIDTH, Rules(), weights)


@functools.cache
def variables(kind: str):
    x, ids = jnp.zeros((1, 4, WIDTH)), jnp.zeros((1, 4), jnp.int32)
    fresh = dict(mixer(kind).init(jax.random.key(0), x, ids))
    moved = {"params": random_tree(fresh["params"], seed=1)}
    if kind == "G":
        moved["statistics"] = {"variance_ema": jnp.asarray(0.004, jnp.float32)}
    return moved


@functools.cache
def run(kind: str):
    return jax.jit(lambda v, x, ids: mixer(kind).apply(v, x, ids).y)


def inputs(tokens: int, rows: int = 1, seed: int = 2) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, tokens, WIDTH))


@pytest.mark.parametrize("kind", KINDS)
def test_no_output_depends_on_a_later_input(kind):
    x, ids, v = inputs(40), segments(40), variables(kind)
    reach = jax.jit(jax.grad(lambda x, token: run(kind)(v, x, ids)[0, token].sum()))
    for token in (0, 15, 16, 38):
        size = np.abs(np.asarray(reach(x, token)))[0].sum(-1)
        assert np.all(size[token + 1 :] == 0)
        assert size[token] > 0
    assert size[:20].max() > 0  # and the past is read, or the test would say nothing


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_then_rest_with_cache_equals_the_whole(kind):
    tokens = 33
    x, ids = inputs(tokens, rows=2), jnp.concatenate([segments(12, 21), segments(33)])
    whole = run(kind)(variables(kind), x, ids)
    if kind == "D":
        go_on = jax.jit(lambda x, ids, cache, start: mixer(kind).apply(variables(kind), x, ids, cache))
        cache = deltanet.empty_cache(DELTANET, 2, "float32")
    else:
        go_on = jax.jit(lambda x, ids, cache, start: mixer(kind).apply(variables(kind), x, ids, cache, start))
        cache = gsa.empty_cache(GSA, 2, tokens, "float32")
    parts, start = [], 0
    for size in (1, 16, 1, 15):  # crosses the boundary of row 0's documents in the middle of a part
        ends = slice(start, start + size)
        output = go_on(x[:, ends], ids[:, ends], cache, jnp.full((2,), start, jnp.int32))
        parts.append(output.y)
        cache, start = output.cache, start + size
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_apart(kind):
    lengths = (1, 7, 16, 9)
    x, ids = inputs(sum(lengths)), segments(*lengths)
    packed = run(kind)(variables(kind), x, ids)
    start = 0
    for n in lengths:
        alone = run(kind)(variables(kind), x[:, start : start + n], segments(n))
        np.testing.assert_allclose(packed[:, start : start + n], alone, atol=1e-5)
        start += n


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_are_independent(kind):
    x, ids = inputs(20, rows=3), jnp.concatenate([segments(20), segments(4, 16), segments(20)])
    together = run(kind)(variables(kind), x, ids)
    changed = run(kind)(variables(kind), x.at[1].set(7.0), ids)
    assert np.array_equal(together[0], changed[0]) and np.array_equal(together[2], changed[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 2, 15, 17])
def test_lengths_beside_the_chunk_agree_with_a_longer_row(kind, tokens):
    x = inputs(20)
    whole = run(kind)(variables(kind), x, segments(20))
    part = run(kind)(variables(kind), x[:, :tokens], segments(tokens))
    np.testing.assert_allclose(part, whole[:, :tokens], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_tokens(kind):
    x = inputs(1000)
    whole = run(kind)(variables(kind), x, segments(1000))
    part = run(kind)(variables(kind), x[:, :65], segments(65))
    np.testing.assert_allclose(part, whole[:, :65], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_agrees_with_the_equations_token_by_token(kind):
    x, ids = inputs(24), segments(3, 13, 8)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), variables(kind))
        row = jnp.asarray(np.asarray(x), jnp.float64)
        got = mixer(kind, "float64").apply(wide, row, ids).y
        params = jax.tree.map(np.asarray, wide["params"])
        if kind == "D":
            wanted = oracle.deltanet(params, np.asarray(row[0]), np.asarray(ids[0]))
        else:
            wanted, _ = oracle.gsa(params, GSA, np.asarray(row[0]), np.asarray(ids[0]), 0.004)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got[0], wanted, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_stays_near_float32(kind):
    x, ids = inputs(24), segments(24)
    exact = run(kind)(variables(kind), x, ids)
    low = mixer(kind, "bfloat16").apply(variables(kind), x.astype(jnp.bfloat16), ids).y
    assert low.dtype == jnp.bfloat16
    error = jnp.sqrt(jnp.mean(jnp.square(low.astype(jnp.float32) - exact)) / jnp.mean(jnp.square(exact)))
    assert error < (0.02 if kind == "D" else 0.2)  # a G layer may select another key where scores are close
