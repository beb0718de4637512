"""Memory stream: the equation, only within a document, never a gradient from one chunk into the last."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.devices.sharding import Rules, make_mesh, reshard
from gt_jax.models.layers.memory_stream import Memory, MemoryStream, carry_memory, no_memory
from tests.support import random_tree, segments

WIDTH, TOKENS, STREAM = 16, 6, 2
MODULE = MemoryStream(WIDTH, -2.5, Rules())
IDS = jnp.concatenate([segments(4, 2), segments(6), jnp.asarray([[3, 3, 3, 0, 0, 0]], jnp.int32)])


def inputs(rows: int = 3) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(state, embedding, memory) with nothing special about them."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((rows, TOKENS, 4, WIDTH), (rows, TOKENS, WIDTH), (rows, WIDTH))
    x, embedded, value = (jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))
    return x, embedded, value * 3 + 1


@functools.cache
def fresh():
    x, embedded, _ = inputs()
    return jax.jit(lambda key: MODULE.init(key, x, embedded, IDS, None, STREAM))(jax.random.key(0))


apply = jax.jit(MODULE.apply, static_argnums=5)


@pytest.fixture(scope="module")
def variables():
    start = fresh()["params"]
    return jax.jit(lambda: {"params": random_tree(start, seed=1)})()


def test_agrees_with_the_equation(variables):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), variables)
        x, embedded, value = (np.asarray(a, np.float64) for a in inputs())
        memory = Memory(jnp.asarray(value), jnp.asarray([1, 1, 3], jnp.int32))
        got = apply(wide, x, embedded, IDS, memory, STREAM)
    p = jax.tree.map(np.asarray, wide["params"])
    centred = value - value.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
    gate = 1 / (1 + np.exp(-(embedded @ p["gate"]["w"] + p["gate"]["b"])))
    wanted = x.copy()
    for row, open_tokens in enumerate((4, 6, 3)):
        for token in range(open_tokens):
            wanted[row, token, STREAM] += np.log1p(np.exp(p["strength"])) * gate[row, token] * normed[row]
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, wanted, atol=1e-10)


def test_only_the_document_of_the_memory_hears_it(variables):
    x, embedded, value = inputs()
    memory = Memory(value, jnp.asarray([2, 7, 0], jnp.int32))  # the second document; one that is over; no memory
    changed = np.asarray(apply(variables, x, embedded, IDS, memory, STREAM) != x)
    assert changed[0, 4:, STREAM].all() and not changed[0, :4].any()
    assert not changed[1:].any()
    assert not np.delete(changed, STREAM, axis=2).any()


def test_nothing_flows_without_memory(variables):
    x, embedded, _ = inputs()
    for memory in (None, no_memory(3, WIDTH, "float32")):
        np.testing.assert_array_equal(apply(variables, x, embedded, IDS, memory, STREAM), x)


def test_a_state_without_streams_is_its_own(variables):
    x, embedded, value = inputs()
    memory = Memory(value, jnp.ones(3, jnp.int32))
    plain = apply(variables, x[:, :, 0], embedded, IDS, memory, 0)
    streamed = apply(variables, x, embedded, IDS, memory, 0)[:, :, 0]
    np.testing.assert_allclose(plain, streamed, rtol=1e-6, atol=1e-6)  # two programs
    np.testing.assert_array_equal(carry_memory(x[:, :, 0], IDS, 0).value, x[:, -1, 0])


def test_the_last_token_is_carried_and_no_gradient_with_it(variables):
    x, embedded, value = inputs()
    memory = carry_memory(x, IDS, STREAM)
    np.testing.assert_array_equal(memory.value, x[:, -1, STREAM])
    np.testing.assert_array_equal(memory.segment, [2, 1, 0])

    def loss(x, value, embedded, params):
        before = carry_memory(x, IDS, STREAM)._replace(segment=jnp.ones(3, jnp.int32))
        both = before._replace(value=before.value + value)
        zero = jnp.zeros_like(x)
        return jnp.sum(MODULE.apply({"params": params}, zero, embedded, IDS, both, STREAM) ** 2)

    gradient = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(x, value, embedded, variables["params"])
    assert not gradient[0].any() and not gradient[1].any()
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient[2:]))


def test_starts_weak_and_with_the_contract_s_shapes():
    params = fresh()["params"]
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype.name), params)
    vector, scalar = ((WIDTH,), "float32"), ((), "float32")
    assert shapes == {"strength": scalar, "norm": {"scale": vector, "bias": vector}, "gate": {"w": vector, "b": scalar}}
    assert float(params["strength"]) == -2.5


def test_a_mesh_gives_the_same(variables):
    rows = jnp.concatenate([IDS] * 3)[:8]
    x, embedded, value = inputs(rows=8)

    def step(params, x, embedded, value):
        x, embedded, ids = (reshard(a, Rules().spec("batch", *[None] * (a.ndim - 1))) for a in (x, embedded, rows))
        memory = Memory(value, jnp.ones(8, jnp.int32))
        y = MODULE.apply({"params": params}, x, embedded, ids, memory, STREAM)
        return jnp.sum(y**2), carry_memory(y, ids, STREAM)

    graded = jax.value_and_grad(step, has_aux=True)
    wanted = jax.device_get(jax.jit(graded)(variables["params"], x, embedded, value))
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        got = jax.device_get(jax.jit(graded)(variables["params"], x, embedded, value))
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-5)
