"""GroundThink's `D`: the recurrence against the equations, causality, segments, decoding, meshes, published counts."""

from __future__ import annotations

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.configs.model import DeltaNetConfig, SlidingConfig
from gt_jax.devices.sharding import Rules, make_mesh, put_like, with_mesh_devices
from gt_jax.errors import Refused
from gt_jax.models.layers import groundthink
from gt_jax.models.layers.groundthink import GroundThinkDeltaNet, Pairs
from gt_jax.models.layers.mixer import place_rows
from gt_jax.models.layers.primitives import WeightSpec
from gt_jax.models.layers.sliding import SlidingAttention
from tests.support import WIDTH, random_tree, segments

CONFIG = DeltaNetConfig(
    heads=2, value_heads=4, key_width=8, value_width=6, chunk_size=16, variant="groundthink", implementation="xla"
)


def mixer(dtype: str = "float32", config: DeltaNetConfig = CONFIG) -> GroundThinkDeltaNet:
    return GroundThinkDeltaNet(config, WIDTH, Rules(), WeightSpec("float32", dtype))


@functools.cache
def variables():
    x, ids = jnp.zeros((1, 4, WIDTH)), jnp.ones((1, 4), jnp.int32)
    fresh = jax.jit(lambda x, ids: mixer().init(jax.random.key(0), x, place_rows(ids)))(x, ids)
    return {"params": random_tree(fresh["params"], seed=1)}


@functools.cache
def run():
    return jax.jit(lambda v, x, ids: mixer().apply(v, x, place_rows(ids)))


@functools.cache
def gradient_of_square():
    return jax.jit(jax.grad(lambda p, x, ids: jnp.sum(run()({"params": p}, x, ids).y ** 2)))


@functools.cache
def go_on():
    return jax.jit(lambda v, x, ids, cache, start: mixer().apply(v, x, place_rows(ids, start), cache))


def inputs(tokens: int, rows: int = 1, seed: int = 2) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, tokens, WIDTH))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def oracle(p, x, segment_ids):
    """One row in numpy, token by token, from REFERENCE section 10: ([t, d], the states [t, hv, k, v])."""
    k = np.einsum("td,dhk->thk", x, p["key"]["w"])
    k = k / np.sqrt((k**2).sum(-1, keepdims=True) + 1e-6)
    v = np.einsum("td,dhv->thv", x, p["value"]["w"])
    beta = sigmoid(x @ p["beta"]["w"] + p["beta"]["b"] - 2)
    keep = sigmoid(x @ p["decay"]["w"] + p["decay"]["b"] + 2)
    group = v.shape[1] // k.shape[1]
    state = np.zeros((v.shape[1], k.shape[2], v.shape[2]))
    out, states = np.zeros_like(x), []
    for t in range(x.shape[0]):
        if t == 0 or segment_ids[t] != segment_ids[t - 1]:
            state[:] = 0
        else:
            read = np.zeros(v.shape[1:])
            for h in range(v.shape[1]):
                key = k[t - 1, h // group]
                error = v[t, h] - state[h].T @ key  # of the undecayed state
                state[h] = keep[t - 1, h] * state[h] + beta[t - 1, h] * np.outer(key, error)
                read[h] = state[h].T @ key
            out[t] = np.einsum("hv,hvd->d", read, p["output"]["w"])
        states.append(state.copy())
    return out, np.stack(states)


def test_padding_leaves_the_cache_as_it_is():
    """Also behind other padding: a pass on living tokens alone ends in the projections of several finished ones."""
    x = inputs(6)
    empty = groundthink.empty_cache(CONFIG, 1, "float32")
    short = go_on()(variables(), x[:, :3], jnp.ones((1, 3), jnp.int32), empty, jnp.zeros(1, jnp.int32)).cache
    for padding in (1, 2, 3):
        ids = jnp.asarray([[1] * 3 + [0] * padding])
        padded = go_on()(variables(), x[:, : 3 + padding], ids, empty, jnp.zeros(1, jnp.int32)).cache
        chex.assert_trees_all_close(padded, short, atol=1e-6)


def test_float64_agrees_with_the_equations_token_by_token():
    x, ids = inputs(37), segments(3, 21, 1, 12)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), variables())
        row = jnp.asarray(np.asarray(x), jnp.float64)
        exact = jax.jit(lambda v, x, cache: mixer("float64").apply(v, x, place_rows(ids), cache))
        got = exact(wide, row, groundthink.empty_cache(CONFIG, 1, "float64"))
        wanted, states = oracle(jax.tree.map(np.asarray, wide["params"]), np.asarray(row[0]), np.asarray(ids[0]))
        assert got.y.dtype == jnp.float64
        np.testing.assert_allclose(got.y[0], wanted, atol=1e-10)
        np.testing.assert_allclose(got.cache["state"][0], states[-1], atol=1e-10)


def test_no_output_depends_on_a_later_input():
    x, ids, v = inputs(40), segments(40), variables()
    reach = jax.jit(jax.grad(lambda x, token: run()(v, x, ids).y[0, token].sum()))
    for token in (1, 15, 16, 17, 38):
        size = np.abs(np.asarray(reach(x, token)))[0].sum(-1)
        assert np.all(size[token + 1 :] == 0)
        assert size[token] > 0 and size[token - 1] > 0  # its value, and the key of the token before


@pytest.mark.parametrize("sizes", [(1, 16, 16), (16, 1, 16)])
def test_prefix_then_rest_with_cache_equals_the_whole(sizes):
    x, ids = inputs(33, rows=2), jnp.concatenate([segments(12, 21), segments(33)])
    whole = run()(variables(), x, ids).y
    parts, start, cache = [], 0, groundthink.empty_cache(CONFIG, 2, "float32")
    for size in sizes:  # row 0's documents meet in the middle of a part
        ends = slice(start, start + size)
        output = go_on()(variables(), x[:, ends], ids[:, ends], cache, jnp.full((2,), start, jnp.int32))
        parts.append(output.y)
        cache, start = output.cache, start + size
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, groundthink.empty_cache(CONFIG, 2, "float32"))


def test_packed_documents_are_apart():
    lengths = (1, 2, 17)
    x, ids = inputs(sum(lengths)), segments(*lengths)
    packed, start = run()(variables(), x, ids).y, 0
    for n in lengths:
        alone = run()(variables(), x[:, start : start + n], segments(n)).y
        np.testing.assert_allclose(packed[:, start : start + n], alone, atol=1e-5)
        assert np.all(packed[:, start] == 0)  # nothing was written before the first token
        start += n


@pytest.mark.slow
def test_a_thousand_tokens():
    x = inputs(1000)
    whole = run()(variables(), x, segments(1000)).y
    np.testing.assert_allclose(run()(variables(), x[:, :65], segments(65)).y, whole[:, :65], atol=1e-5)


def test_bfloat16_stays_near_float32():
    x, ids = inputs(20), segments(20)
    exact = run()(variables(), x, ids).y
    low = jax.jit(lambda v, x: mixer("bfloat16").apply(v, x, place_rows(ids)).y)(variables(), x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    assert jnp.sqrt(jnp.mean((low.astype(jnp.float32) - exact) ** 2) / jnp.mean(exact**2)) < 0.02


def test_a_key_gives_back_the_value_that_came_after_it():
    tokens, width = 6, 8
    key = jnp.eye(width)[None, :tokens, None]  # of the token before each, orthonormal
    value = jax.random.normal(jax.random.key(3), (1, tokens, 1, width))
    ones = jnp.ones((1, tokens, 1))
    pairs = Pairs(key, value, 0 * ones, ones, jnp.zeros((1, 1, width, width)), segments(tokens))
    ask = jax.jit(lambda query: groundthink.read_pairs(jnp.broadcast_to(query, key.shape), pairs, Rules())[0])
    for asked in range(tokens):
        read = ask(key[:, asked : asked + 1])
        np.testing.assert_allclose(read[0, :asked], 0, atol=1e-6)
        np.testing.assert_allclose(read[0, asked:, 0], np.tile(value[0, asked], (tokens - asked, 1)), atol=1e-6)


@pytest.mark.parametrize("keep", [-200.0, -20.0, 20.0])
def test_extreme_gates_stay_exact_and_differentiable(keep):
    """beta / a must not overflow where the state is forgotten at once."""
    params = jax.tree.map(lambda a: a, variables()["params"])
    params["decay"]["b"] = jnp.full_like(params["decay"]["b"], keep)
    x, ids = inputs(20), segments(20)
    wanted, _ = oracle(jax.tree.map(lambda a: np.asarray(a, np.float64), params), np.asarray(x[0]), np.asarray(ids[0]))
    np.testing.assert_allclose(run()({"params": params}, x, ids).y[0], wanted, atol=2e-5)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient_of_square()(params, x, ids)))


def test_gradients_are_those_of_the_token_by_token_rule():
    x, ids = inputs(20), segments(5, 15)

    def loss(params, implementation):
        module = mixer(config=CONFIG.replace(implementation=implementation))
        return jnp.sum(jnp.sin(module.apply({"params": params}, x, place_rows(ids)).y))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    chunked, scanned = (gradient(variables()["params"], name) for name in ("xla", "reference"))
    chex.assert_trees_all_close(chunked, scanned, atol=1e-4, rtol=1e-4)
    assert all(not np.any(chunked[name]) for name in ("cue_query", "cue_query_bias"))  # published, read by nothing


def test_gates_start_where_the_study_starts_them():
    zeros = jax.tree.map(jnp.zeros_like, variables())  # as the biases are at init
    output = run()(zeros, inputs(20), segments(20))
    np.testing.assert_allclose(output.link.pairs.log_keep[:, 1:], np.log(sigmoid(2.0)), rtol=1e-5)
    np.testing.assert_allclose(output.write_gate, sigmoid(-2.0), rtol=1e-5)


def test_settings_of_the_gated_variant_are_refused():
    with pytest.raises(Refused, match=r"(?s)beta_max is 2.0.*skip is True"):
        CONFIG.replace(beta_max=2.0, skip=True)


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}])
def test_every_mesh_gives_the_same_values_and_gradients(axes):
    x, ids = inputs(18, rows=4), jnp.tile(segments(7, 11), (4, 1))

    def loss(params, x, ids):
        y = mixer().apply({"params": params}, x, place_rows(ids), groundthink.empty_cache(CONFIG, 4, "float32")).y
        return jnp.sum(jnp.sin(y))

    step = jax.value_and_grad(loss)
    wanted = jax.device_get(jax.jit(step)(variables()["params"], x, ids))
    with jax.set_mesh(make_mesh(**axes)):
        shapes = jax.eval_shape(mixer().init, jax.random.key(0), x, place_rows(ids))["params"]
        placed = put_like(variables()["params"], jax.tree.map(with_mesh_devices, shapes))
        rows = jax.sharding.reshard(x, Rules().spec("batch", None, None))
        got = jax.device_get(jax.jit(step)(placed, rows, ids))
    chex.assert_trees_all_close(got, wanted, atol=2e-5, rtol=2e-4)


PUBLISHED = [  # in our letters; layout, vocabulary, width, heads, key and value width, parameters
    ("D", 50257, 128, 2, 64, 6_638_788),
    ("DD", 50257, 256, 4, 64, 14_378_896),
    ("DDDD", 50257, 512, 8, 64, 37_697_344),
    ("DDDDDS", 50257, 256, 4, 64, 17_583_212),
    ("DSDS", 32000, 128, 4, 32, 4_993_368),
]


def _size(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("layout", "vocab", "width", "heads", "head_width", "count"), PUBLISHED)
def test_the_mixers_make_up_the_published_counts(layout, vocab, width, heads, head_width, count):
    weights = WeightSpec()
    config = DeltaNetConfig(heads, heads, head_width, head_width, variant="groundthink")
    d = GroundThinkDeltaNet(config, width, Rules(), weights)
    s = SlidingAttention(SlidingConfig(heads, width // heads), width, Rules(), weights)

    def init(key):
        x, place = jnp.zeros((1, 2, width)), place_rows(segments(2))
        mixed, first = d.init_with_output(key, x, place)
        return {"D": first["params"], "S": s.init(key, x, place, None, mixed.link)["params"]}

    mixers = jax.eval_shape(init, jax.random.key(0))
    hidden = 64 * math.ceil(int(width * 8 / 3) / 64)
    layers = sum(_size(mixers[kind]) + 2 * width + 3 * width * hidden for kind in layout)
    assert vocab * width + 2 * width + layers == count  # tied table, norm of the embedding, final norm
