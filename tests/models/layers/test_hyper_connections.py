"""Hyper-connections: the equations, doubly stochastic mixing, exact gradients, the same on every mesh."""

from __future__ import annotations

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.configs.model import HyperConfig
from gt_jax.devices.sharding import Rules, make_mesh, put_like, reshard, with_mesh_devices
from gt_jax.models.layers.hyper_connections import HyperConnection, from_streams, to_streams
from gt_jax.models.layers.primitives import WeightSpec
from pallas_kernels.hyper_connections.api import Coefficients
from pallas_kernels.hyper_connections.xla import read, sinkhorn, write
from tests.support import assert_rounded_alike, random_tree

WIDTH, EPSILON = 16, 1e-6
SINKHORN = jax.jit(sinkhorn, static_argnums=(1, 2))


def connection(streams: int = 4, dtype: str = "float32") -> HyperConnection:
    return HyperConnection(HyperConfig(streams=streams), WIDTH, Rules(), WeightSpec("float32", dtype), EPSILON)


def state(streams: int = 4, rows: int = 2, seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, 6, streams, WIDTH))


@functools.cache
def variables(streams: int = 4):
    x = state(streams)
    return jax.jit(lambda key: {"params": random_tree(connection(streams).init(key, x)["params"], 2)})(
        jax.random.key(0))


@functools.cache
def coefficients(streams: int = 4, dtype: str = "float32"):
    return jax.jit(connection(streams, dtype).apply)


def sublayer(v, x: jax.Array, module: HyperConnection) -> jax.Array:
    """X' with F(y) = y^2 - y, something that is not linear."""
    y, opened = module.apply(v, x, method="enter")
    return module.apply(v, opened, y * y - y, method="leave")


def naive_sinkhorn(logits: np.ndarray, rounds: int, floor: float) -> np.ndarray:
    m = np.maximum(np.exp(logits - logits.max(-1, keepdims=True)), floor)
    for _ in range(rounds):
        m = m / m.sum(-1, keepdims=True)
        m = m / m.sum(-2, keepdims=True)
    return m


def oracle(p, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """(pre, post, res, X') of one token's state x [n, d], from the equations."""
    n = x.shape[0]
    flat = x.reshape(-1)
    z = flat / np.sqrt((flat**2).mean() + EPSILON) * p["norm"]["scale"]
    logits = {k: p[k]["alpha"] * (z @ p[k]["w"].reshape(z.size, -1)) for k in ("pre", "post", "res")}
    pre = 1 / (1 + np.exp(-logits["pre"] - p["pre"]["b"]))
    post = 2 / (1 + np.exp(-logits["post"] - p["post"]["b"]))
    res = naive_sinkhorn(logits["res"].reshape(n, n) + p["res"]["b"], 20, 1e-6)
    y = pre @ x
    return pre, post, res, res @ x + np.outer(post, y**2 - y)


def test_twenty_rounds_are_doubly_stochastic():
    logits = jax.random.normal(jax.random.key(3), (3, 5, 4, 4))
    mixed = SINKHORN(logits, 20, 1e-6)
    assert mixed.dtype == jnp.float32 and float(mixed.min()) > 0
    np.testing.assert_allclose(mixed.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(mixed.sum(-2), 1, atol=1e-5)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_sinkhorn_is_the_divisions_also_at_the_floor(size):
    with jax.enable_x64(True):
        logits = np.random.default_rng(4).normal(size=(7, size, size)) * 12  # many entries fall to the floor
        assert (logits - logits.max(-1, keepdims=True) < np.log(1e-6)).mean() > 0.2
        for rounds in (1, 20):
            got = SINKHORN(logits, rounds, 1e-6)
            np.testing.assert_allclose(got, naive_sinkhorn(logits, rounds, 1e-6), atol=1e-12)


def test_the_gradient_is_that_of_the_divisions():
    def divided(logits, rounds):
        def one(m, _):
            m = m / m.sum(-1, keepdims=True)
            return m / m.sum(-2, keepdims=True), None

        positive = jnp.maximum(jnp.exp(logits - logits.max(-1, keepdims=True)), 1e-6)
        return jax.lax.scan(one, positive, None, length=rounds)[0]

    with jax.enable_x64(True):
        logits, weight = np.random.default_rng(5).normal(size=(2, 6, 4, 4))
        for rounds in (1, 20):
            mine = jax.jit(jax.grad(lambda x, r=rounds: jnp.sum(sinkhorn(x, r, 1e-6) * weight)))
            naive = jax.jit(jax.grad(lambda x, r=rounds: jnp.sum(divided(x, r) * weight)))
            for scale in (1.0, 12.0):  # at 12 many entries are at the floor, and 20 rounds are far from the limit
                wanted = naive(logits * scale)
                assert float(jnp.abs(wanted).max()) > 1e-3
                np.testing.assert_allclose(mine(logits * scale), wanted, atol=1e-11)


def test_the_backward_pass_remembers_no_round():
    """Kept between the passes: the logits' own size a few times, not once a round."""
    logits = state().reshape(4, -1, 4, 4)
    _, backward = jax.vjp(lambda x: sinkhorn(x, 20, 1e-6), logits)
    assert sum(leaf.size for leaf in jax.tree.leaves(backward)) < 6 * logits.size


@pytest.mark.parametrize("streams", [1, 4])
def test_float64_agrees_with_the_equations(streams):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), variables(streams))
        x = jnp.asarray(np.asarray(state(streams)), jnp.float64)
        module = connection(streams, "float64")
        got = jax.jit(lambda v, x: (*module.apply(v, x), sublayer(v, x, module)))(wide, x)
        params = jax.tree.map(np.asarray, wide["params"])
        wanted = [oracle(params, token) for token in np.asarray(x).reshape(-1, streams, WIDTH)]
        for one, other in zip(got, zip(*wanted, strict=True), strict=True):
            assert one.dtype == jnp.float64
            np.testing.assert_allclose(one.reshape(np.shape(other)), other, atol=1e-10)


def test_parameters_have_the_contract_s_shapes_and_starts():
    params = jax.tree.map(np.asarray, jax.jit(connection().init)(jax.random.key(0), state())["params"])
    shapes = {name: {k: leaf.shape for k, leaf in part.items()} for name, part in params.items()}
    assert shapes == {
        "norm": {"scale": (64,)}, "pre": {"w": (4, 16, 4), "b": (4,), "alpha": ()},
        "post": {"w": (4, 16, 4), "b": (4,), "alpha": ()}, "res": {"w": (4, 16, 16), "b": (4, 4), "alpha": ()},
    }  # fmt: skip
    assert all(params[k]["alpha"] == np.float32(0.1) and not params[k]["b"].any() for k in ("pre", "post", "res"))
    assert abs(params["res"]["w"].std() - 0.02) < 2e-3


def test_one_stream_keeps_all_of_it():
    x = state(1)
    got = coefficients(1)(variables(1), x)
    np.testing.assert_array_equal(got.res, 1)
    y = x[:, :, 0] * 2
    plain = Coefficients(jnp.ones_like(got.pre), jnp.ones_like(got.post), got.res)
    np.testing.assert_allclose(read(x, plain.pre), x[:, :, 0])
    np.testing.assert_allclose(write(x, plain, y)[:, :, 0], x[:, :, 0] + y, atol=1e-6)


def test_a_branch_of_zero_keeps_the_mean_over_streams_and_no_stream():
    x = state()
    mixed = jax.jit(write)(x, coefficients()(variables(), x), jnp.zeros_like(x[:, :, 0]))
    np.testing.assert_allclose(from_streams(mixed), from_streams(x), atol=1e-6)
    assert float(jnp.abs(mixed - x).max()) > 0.1


def test_streams_begin_with_x_and_end_with_their_mean():
    x = state()[:, :, 0]
    for n in (1, 4):
        streams = to_streams(x, n)
        assert streams.shape == (2, 6, n, WIDTH)
        np.testing.assert_array_equal(streams[:, :, 0], x)
        assert not streams[:, :, 1:].any()
        np.testing.assert_array_equal(from_streams(streams), x / n)


def test_bfloat16_state_has_float32_coefficients():
    """The state keeps its dtype; the coefficients are those of a float32 model, whatever the compute dtype."""
    x = state().astype(jnp.bfloat16)
    low = coefficients(dtype="bfloat16")(variables(), x)
    exact = coefficients()(variables(), x.astype(jnp.float32))
    assert {leaf.dtype.name for leaf in low} == {"float32"}
    np.testing.assert_allclose(low.res.sum(-2), 1, atol=1e-6)
    chex.assert_trees_all_close(low, exact, atol=1e-6)
    y = read(x, low.pre)
    assert y.dtype == write(x, low, y).dtype == from_streams(x).dtype == jnp.bfloat16


def test_every_mesh_gives_the_same_values_and_gradients():
    x = state(rows=8)

    def loss(v, x):
        x = reshard(x, Rules().spec("batch", None, None, None))
        return jnp.sum(jnp.square(sublayer(v, to_streams(from_streams(x), 4) + x, connection())))

    step = jax.value_and_grad(loss, (0, 1))
    wanted = jax.device_get(jax.jit(step)(variables(), x))
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        shapes = jax.tree.map(with_mesh_devices, jax.eval_shape(
            lambda: connection().init(jax.random.key(0), reshard(x, Rules().spec("batch", None, None, None)))))
        got = jax.jit(step)(put_like(variables(), shapes), x)
        assert got[1][0]["params"]["res"]["w"].sharding.spec == Rules().spec(None, "embed", None)
    chex.assert_trees_all_close(jax.device_get(got), wanted, atol=1e-4, rtol=1e-4)


def test_the_kernels_give_the_same_on_a_mesh_and_computed_again():
    """Interpreted, each device its own rows, the gradients of the weights summed over them, as without either."""
    shape, run = (8, 5, 2, 128), {}
    x = jax.random.normal(jax.random.key(3), shape)
    for name in ("xla", "pallas_tpu_interpreted"):
        config = HyperConfig(streams=2, sinkhorn_rounds=2, implementation=name)
        run[name] = HyperConnection(config, 128, Rules(), WeightSpec(), EPSILON)
    weights = random_tree(jax.jit(run["xla"].init)(jax.random.key(0), x)["params"], 2)

    def loss(module, v, x):
        x = reshard(x, Rules().spec("batch", None, None, None))
        y, opened = module.apply(v, x, method="enter")
        y, opened = module.apply(v, opened, y * y, method="between")
        return jnp.sum(jnp.square(module.apply(v, opened, y - y * y, method="leave")))

    wanted = jax.jit(jax.grad(functools.partial(loss, run["xla"]), (0, 1)))({"params": weights}, x)
    again = jax.checkpoint(functools.partial(loss, run["pallas_tpu_interpreted"]))
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        got = jax.jit(jax.grad(again, (0, 1)))({"params": weights}, x)
    assert_rounded_alike(jax.device_get(got), jax.device_get(wanted), terms=math.prod(shape), chain=8)
