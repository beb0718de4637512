"""`S` over GroundThink's `D`: against the equations, causality (and that the published leak would be seen), drop."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.configs.model import SlidingConfig
from gt_jax.devices.sharding import Rules, make_mesh, put_like, with_mesh_devices
from gt_jax.errors import Refused
from gt_jax.models.layers import groundthink, sliding
from gt_jax.models.layers.groundthink import GroundThinkDeltaNet
from gt_jax.models.layers.mixer import place_rows
from gt_jax.models.layers.primitives import WeightSpec
from gt_jax.models.layers.sliding import SlidingAttention
from tests.models.layers.test_groundthink import CONFIG, inputs, sigmoid
from tests.models.layers.test_groundthink import oracle as deltanet_oracle
from tests.rarely import rarely
from tests.support import WIDTH, assert_rounded_alike, random_tree, segments

SLIDING = SlidingConfig(heads=4, head_width=8, window=5)


class Two(nn.Module):
    """A D layer and the S layer after it, on the residual stream."""

    config: SlidingConfig = SLIDING
    dtype: str = "float32"

    def setup(self):
        weights = WeightSpec("float32", self.dtype)
        self.d = GroundThinkDeltaNet(CONFIG, WIDTH, Rules(), weights)
        self.s = SlidingAttention(self.config, WIDTH, Rules(), weights)

    def __call__(self, x, place, cache=None):
        """(what S adds, the caches of both)."""
        cache = {"d": None, "s": None} if cache is None else cache
        written = self.d(x, place, cache["d"])
        read = self.s(x + written.y, place, cache["s"], written.link)
        return read.y, {"d": written.cache, "s": read.cache}

    def leaking(self, x, place):
        """S as published: every position reads the state of the end of the row."""
        written = self.d(x, place)
        pairs = written.link.pairs
        query = groundthink.project_keys(x + written.y, written.link.key_weight, Rules(), WeightSpec())
        _, last = groundthink.read_pairs(pairs.key, pairs, Rules())
        return jnp.einsum("bhkv,bthk->bthv", last, jnp.repeat(query, 2, axis=2))

    def honest(self, x, place):
        """The same read at each position."""
        written = self.d(x, place)
        query = groundthink.project_keys(x + written.y, written.link.key_weight, Rules(), WeightSpec())
        return groundthink.read_pairs(query, written.link.pairs, Rules())[0]


def empty_caches(rows: int, dtype: str = "float32"):
    return {"d": groundthink.empty_cache(CONFIG, rows, dtype), "s": sliding.empty_cache(SLIDING, rows, dtype)}


@functools.cache
def variables():
    fresh = jax.jit(lambda x, ids: Two().init(jax.random.key(0), x, place_rows(ids)))(inputs(4), segments(4))
    return {"params": random_tree(fresh["params"], seed=1)}


@functools.cache
def run():
    return jax.jit(lambda v, x, ids: Two().apply(v, x, place_rows(ids))[0])


@functools.cache
def trained():
    return jax.jit(lambda v, x, ids, key: Two().apply(v, x, place_rows(ids, key=key))[0])


@functools.cache
def go_on():
    return jax.jit(lambda v, x, ids, cache, start: Two().apply(v, x, place_rows(ids, start), cache))


def oracle(p, x, segment_ids, strength):
    """One row in numpy from REFERENCE section 10: what S adds to x + D(x)."""
    written, states = deltanet_oracle(p["d"], x, segment_ids)
    x, s, window = x + written, p["s"], SLIDING.window
    q, k, v = (np.einsum("td,dhk->thk", x, s[name]["w"]) for name in ("query", "key", "value"))
    asked = np.einsum("td,dhk->thk", x, p["d"]["key"]["w"])
    gate = sigmoid(x @ s["state_gate"]["w"] + s["state_gate"]["b"] + 1).mean(-1)
    group, out = states.shape[1] // asked.shape[1], np.zeros_like(x)
    for t in range(x.shape[0]):
        seen = [i for i in range(max(0, t - window + 1), t + 1) if segment_ids[i] == segment_ids[t]]
        for h in range(q.shape[1]):
            attention = np.exp(k[seen, h] @ q[t, h] * q.shape[2] ** -0.5)
            out[t] += strength * (attention / attention.sum() @ v[seen, h]) @ s["output"]["w"][h]
        for h in range(states.shape[1]):
            out[t] += gate[t] * (states[t, h].T @ asked[t, h // group]) @ s["state_output"]["w"][h]
    return out


@pytest.mark.parametrize("training", [False, True])
def test_float64_agrees_with_the_equations_token_by_token(training):
    x, ids = inputs(24), segments(3, 13, 8)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), variables())
        row = jnp.asarray(np.asarray(x), jnp.float64)
        place = place_rows(ids, key=jax.random.key(0) if training else None)
        exact = Two(SLIDING.replace(drop=0.0), "float64")
        got, _ = jax.jit(exact.apply)(wide, row, place)
        strength = 1.0 if training else np.float32(0.3)
        wanted = oracle(jax.tree.map(np.asarray, wide["params"]), np.asarray(row[0]), np.asarray(ids[0]), strength)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got[0], wanted, atol=1e-10)


@functools.cache
def gradient_of_token(method: str):
    def one(x, v, ids, token):
        output = Two().apply(v, x, place_rows(ids), method=method)
        return (output[0] if method == "__call__" else output)[0, token].sum()

    return jax.jit(jax.value_and_grad(one))


def reach(method: str, tokens: int, token: int) -> tuple[float, np.ndarray]:
    """(sum of output `token`, [t]: how strongly it depends on each input)."""
    value, gradient = gradient_of_token(method)(inputs(tokens), variables(), segments(tokens), token)
    return float(value), np.abs(np.asarray(gradient))[0].sum(-1)


@pytest.mark.parametrize("token", [0, 15, 16, 38])
def test_no_output_depends_on_a_later_input(token):
    _, size = reach("__call__", 40, token)
    assert np.all(size[token + 1 :] == 0)
    assert size[token] > 0
    if token == 38:
        assert size[: token - SLIDING.window].max() > 0  # the state is read beyond the window


def test_reading_the_end_of_the_row_would_not_pass_that_test():
    leaking, honest = (reach(method, 24, 9)[1] for method in ("leaking", "honest"))
    assert leaking[10:].min() > 0 and np.all(honest[10:] == 0)
    last = [reach(method, 24, 23)[0] for method in ("leaking", "honest")]
    np.testing.assert_allclose(*last, rtol=1e-4)  # at the end of the row the two are one


@pytest.mark.parametrize("sizes", [(1, 16, 16), (16, 1, 16)])
def test_prefix_then_rest_with_cache_equals_the_whole(sizes):
    x, ids = inputs(33, rows=2), jnp.concatenate([segments(12, 21), segments(33)])
    whole = run()(variables(), x, ids)
    parts, start, caches = [], 0, empty_caches(2)
    for size in sizes:
        ends = slice(start, start + size)
        y, caches = go_on()(variables(), x[:, ends], ids[:, ends], caches, jnp.full((2,), start, jnp.int32))
        parts.append(y)
        start += size
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)
    assert jax.tree.map(jnp.shape, caches) == jax.tree.map(jnp.shape, empty_caches(2))


def test_packed_documents_are_apart():
    lengths = (1, 2, 17)
    x, ids = inputs(sum(lengths)), segments(*lengths)
    packed, start = run()(variables(), x, ids), 0
    for n in lengths:
        alone = run()(variables(), x[:, start : start + n], segments(n))
        np.testing.assert_allclose(packed[:, start : start + n], alone, atol=1e-5)
        start += n


def test_rows_of_a_batch_are_independent():
    x, ids = inputs(20, rows=3), jnp.concatenate([segments(20), segments(4, 16), segments(20)])
    together = run()(variables(), x, ids)
    changed = run()(variables(), x.at[1].set(7.0), ids)
    assert np.array_equal(together[0], changed[0]) and np.array_equal(together[2], changed[2])


@pytest.mark.parametrize("tokens", [4, 6])
def test_lengths_beside_the_window_agree_with_a_longer_row(tokens):
    x = inputs(20)
    whole = run()(variables(), x, segments(20))
    part = run()(variables(), x[:, :tokens], segments(tokens))
    np.testing.assert_allclose(part, whole[:, :tokens], atol=1e-5)


@pytest.mark.parametrize("window", [1, 3, 64])
def test_the_window_ends_where_it_says(window):
    tokens = 11
    q, k, v = (jax.random.normal(jax.random.key(i), (1, tokens, 1, 4)) for i in range(3))
    place, before = place_rows(segments(tokens)), [(0, 0), (window - 1, 0)]
    ids, at = place.segment_ids, place.positions
    padded = [jnp.pad(x, [*before, (0, 0), (0, 0)]) for x in (k, v)]
    key_place = jnp.pad(ids, before, constant_values=-1), jnp.pad(at, before)
    got = jax.jit(sliding.window_attention, static_argnums=5)(q, *padded, (ids, at), key_place, window)
    for t in range(tokens):
        seen = slice(max(0, t - window + 1), t + 1)
        attention = np.exp(np.asarray(k[0, seen, 0] @ q[0, t, 0]) / 2)
        np.testing.assert_allclose(got[0, t, 0], attention / attention.sum() @ v[0, seen, 0], atol=1e-5)


def test_the_window_is_taken_from_whole_rows_at_the_stated_rate():
    rows = 400
    x, ids = jnp.tile(inputs(6), (rows, 1, 1)), jnp.tile(segments(6), (rows, 1))
    evaluated = run()(variables(), x[:1], ids[:1])[0]
    got = trained()(variables(), x, ids, jax.random.key(5))
    dropped = np.asarray(jnp.abs(got - got.min(axis=0, keepdims=True)).sum((1, 2)))
    kinds = {round(float(size), 2): row for row, size in enumerate(dropped)}
    assert len(kinds) == 2  # a row has its window or has none of it
    one, other = (got[row] for row in kinds.values())
    counts = [int(np.sum(np.isclose(dropped, size, atol=0.02))) for size in kinds]
    rare, common = (one, other) if counts[0] < counts[1] else (other, one)
    assert sum(counts) == rows and 0.24 < min(counts) / rows < 0.36
    np.testing.assert_allclose(common + 0.3 * (rare - common), evaluated, atol=1e-4)  # evaluation is the mean of both


def test_every_call_without_a_key_is_the_same_and_keys_differ():
    x, ids = inputs(6, rows=32), jnp.tile(segments(6), (32, 1))
    first, second = (trained()(variables(), x, ids, jax.random.key(seed)) for seed in (0, 1))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, trained()(variables(), x, ids, jax.random.key(0)))


def test_the_shared_key_projection_learns_from_both_layers():
    x, ids = inputs(12), segments(12)
    s = SlidingAttention(SLIDING, WIDTH, Rules(), WeightSpec())
    d = GroundThinkDeltaNet(CONFIG, WIDTH, Rules(), WeightSpec())

    @jax.jit
    def gradients(weight, params):
        def loss(weight, params):
            link = d.apply({"params": params["d"]}, x, place_rows(ids)).link._replace(key_weight=weight)
            return jnp.sum(s.apply({"params": params["s"]}, x, place_rows(ids), None, link).y ** 2)

        return jax.grad(loss, argnums=(0, 1))(weight, params)

    params = variables()["params"]
    of_query, rest = gradients(params["d"]["key"]["w"], params)
    assert np.any(of_query) and np.any(rest["d"]["key"]["w"])  # what asks, and what is written
    assert np.any(rest["s"]["state_gate"]["w"]) and not np.any(rest["s"]["state_query"])  # published, read by nothing


def test_a_state_is_needed():
    with pytest.raises(Refused, match="groundthink"):
        SlidingAttention(SLIDING, WIDTH, Rules(), WeightSpec()).init(
            jax.random.key(0), inputs(2), place_rows(segments(2))
        )


def test_bfloat16_stays_near_float32():
    x, ids = inputs(24), segments(24)
    exact = run()(variables(), x, ids)
    low, _ = jax.jit(Two(dtype="bfloat16").apply)(variables(), x.astype(jnp.bfloat16), place_rows(ids))
    assert low.dtype == jnp.bfloat16
    assert jnp.sqrt(jnp.mean((low.astype(jnp.float32) - exact) ** 2) / jnp.mean(exact**2)) < 0.03


def four_rows():
    return inputs(18, rows=4), jnp.tile(segments(7, 11), (4, 1))


def loss_and_gradient(params, x, ids):
    """Of training and of evaluation, in the parameters."""

    def loss(params):
        trained = Two().apply({"params": params}, x, place_rows(ids, key=jax.random.key(3)))[0]
        start = jnp.zeros((4,), jnp.int32)
        evaluated = Two().apply({"params": params}, x, place_rows(ids, start), empty_caches(4))[0]
        return jnp.sum(jnp.sin(trained)) + jnp.sum(jnp.cos(evaluated))

    return jax.value_and_grad(loss)(params)


@functools.cache
def on_one_device():
    return jax.device_get(jax.jit(loss_and_gradient)(variables()["params"], *four_rows()))


@pytest.mark.parametrize("axes", [
    {"data": 2, "fsdp": 2, "tensor": 2}, rarely({"data": 4, "tensor": 2}),
])
def test_every_mesh_gives_the_same_values_and_gradients(axes):
    x, ids = four_rows()
    with jax.set_mesh(make_mesh(**axes)):
        shapes = jax.eval_shape(Two().init, jax.random.key(0), x, place_rows(ids))["params"]
        placed = put_like(variables()["params"], jax.tree.map(with_mesh_devices, shapes))
        rows = jax.sharding.reshard(x, Rules().spec("batch", None, None))
        got = jax.device_get(jax.jit(loss_and_gradient)(placed, rows, ids))
    # two layers of projection, state and output, there and back; sums over the 72 tokens, or over a width of 32
    assert_rounded_alike(got, on_one_device(), terms=72, chain=2 * 2 * 3)
