"""The lambda stack and the midpoint stack against the recurrences written in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.models.layers.stack import (
    Coefficients,
    advance,
    coefficients,
    contributions,
    empty_buffer,
    enter,
    mix,
    record,
)

DEPTH = 6
SKIPS = ((0, 3), (1, 4), (1, 5), (2, 4))
SHAPES = {"one stream": (2, 5, 8), "four streams": (2, 5, 4, 8)}


def parameters(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "w": rng.normal(size=(DEPTH, 8, 8)) * 0.3,
        "residual_scale": rng.uniform(0.7, 1.3, DEPTH),
        "x0_scale": rng.normal(size=DEPTH) * 0.3,
    }


def lambda_stack(params, weights, x0, skips=SKIPS, slots: int = 2):
    """The stack as the model runs it: blocks of `slots` layers are scanned, the layer index is traced."""
    blocks = jax.tree.map(lambda a: a.reshape(-1, slots, *a.shape[1:]), params)

    def block(carry, xs):
        (x, buffer), (p, index) = carry, xs
        for slot in range(slots):
            layer = index * slots + slot
            x = enter(x, buffer, weights, layer, skips)
            x = mix(x, x0, p["residual_scale"][slot], p["x0_scale"][slot])
            x = x + jnp.tanh(x @ p["w"][slot])
            buffer = record(x, buffer, layer, skips)
        return (x, buffer), None

    start = (x0, empty_buffer(x0, skips))
    return jax.lax.scan(block, start, (blocks, jnp.arange(DEPTH // slots)))[0][0]


def lambda_loop(params, weights, x0, np=np, skips=SKIPS):
    """The same in plain Python, with a dict of the outputs of all layers."""
    x, outputs = x0, {}
    for layer in range(DEPTH):
        for weight, (source, target) in zip(weights, skips, strict=True):
            if target == layer:
                x = x + weight * outputs[source]
        x = params["residual_scale"][layer] * x + params["x0_scale"][layer] * x0
        outputs[layer] = x = x + np.tanh(x @ params["w"][layer])
    return x


def slopes(run, arrays):
    """The sum of the sines of the output, and its gradients."""
    return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(run(*a))), argnums=(0, 1, 2)))(*arrays)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_lambda_stack_equals_a_loop_with_a_dict_of_outputs(shape):
    params, rng = parameters(), np.random.default_rng(1)
    weights, x0 = rng.normal(size=len(SKIPS)), rng.normal(size=shape)
    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, (params, weights, x0))
        scanned = slopes(lambda_stack, arrays)
        looped = slopes(lambda p, w, x: lambda_loop(p, w, x, jnp), arrays)
    np.testing.assert_allclose(scanned[0], np.sin(lambda_loop(params, weights, x0)).sum(), rtol=1e-12)
    for got, wanted in zip(*map(jax.tree.leaves, (scanned, looped)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12)
        assert np.all(np.abs(wanted) > 0)


def test_layers_may_be_scanned_or_run_one_by_one():
    """`layer` a Python int gives what a traced one gives."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    buffer = {source: (source + 2.0) * x for source in (0, 1, 2)}
    weights = jnp.asarray([0.5, -1.0, 2.0, 3.0])
    entered = jax.jit(lambda layer: enter(x, buffer, weights, layer, SKIPS))
    for layer in range(DEPTH):
        traced = entered(layer)
        np.testing.assert_allclose(enter(x, buffer, weights, layer, SKIPS), traced, rtol=1e-5)
        added = sum(w * (source + 2) for w, (source, target) in zip((0.5, -1, 2, 3), SKIPS, strict=True)
                    if target == layer)  # fmt: skip
        np.testing.assert_allclose(traced, (1 + added) * x, rtol=1e-5)


def test_without_skips_there_is_nothing_to_pay():
    x, none = jnp.ones((2, 5, 8)), jnp.zeros(0)
    assert empty_buffer(x, ()) == {}
    traced = jax.make_jaxpr(lambda x, layer: (enter(x, {}, none, layer, ()), record(x, {}, layer, ())))(x, 3)
    assert not traced.eqns


def test_scales_act_in_float32_on_a_bfloat16_stream():
    x = jax.random.normal(jax.random.key(0), (2, 5, 8), jnp.bfloat16)
    x0 = jax.random.normal(jax.random.key(1), (2, 5, 8), jnp.bfloat16)
    got = mix(x, x0, jnp.asarray(1.1), jnp.asarray(0.3))
    wanted = 1.1 * np.asarray(x, np.float64) + 0.3 * np.asarray(x0, np.float64)
    assert got.dtype == jnp.bfloat16
    assert np.mean(np.asarray(got, np.float64) == wanted.astype(jnp.bfloat16).astype(np.float64)) > 0.98
    buffer = record(x0, empty_buffer(x, ((0, 1),)), 0, ((0, 1),))
    assert enter(x, buffer, jnp.asarray([0.3]), 1, ((0, 1),)).dtype == jnp.bfloat16


@pytest.mark.parametrize("skips", [(), SKIPS, (*SKIPS, (2, DEPTH), (5, DEPTH))], ids=["plain", "skips", "to the end"])
def test_contributions_are_the_slope_of_the_output_in_each_update(skips):
    """Measured by moving one update at a time in a stack of constant updates."""
    rng = np.random.default_rng(2)
    scales, x0_scales = parameters()["residual_scale"], parameters()["x0_scale"]
    weights, updates = rng.normal(size=len(skips)), rng.normal(size=DEPTH)

    def output(updates):
        x, outputs = 1.0, {}
        for layer in range(DEPTH):
            x += sum(w * outputs[i] for w, (i, j) in zip(weights, skips, strict=True) if j == layer)
            outputs[layer] = x = scales[layer] * x + x0_scales[layer] + updates[layer]
        return x + sum(w * outputs[i] for w, (i, j) in zip(weights, skips, strict=True) if j == DEPTH)

    slopes = [output(updates + one) - output(updates) for one in np.eye(DEPTH)]
    report = contributions(scales, weights, skips)
    assert isinstance(report, np.ndarray)
    np.testing.assert_allclose(report, slopes, rtol=1e-9, atol=1e-12)
    traced = jax.jit(lambda a, w: contributions(a, w, skips))(jnp.asarray(scales, jnp.float32), jnp.asarray(weights))
    np.testing.assert_allclose(traced, slopes, rtol=1e-4)
    if not skips:
        np.testing.assert_allclose(contributions(scales), [np.prod(scales[i + 1 :]) for i in range(DEPTH)])


def test_contributions_of_one_layer():
    np.testing.assert_array_equal(contributions(np.asarray([0.4])), [1.0])


@pytest.mark.parametrize("mixing", [0.5, 0.3, 1.0])
def test_midpoint_equals_the_recurrence(mixing):
    """p_1 = p_0 + 0.5 hh Delta_0; p_{l+1} = a p_{l-1} + (1-a) p_l + 2 hh Delta_l, over scanned layers."""
    w, p0, step = parameters()["w"], np.random.default_rng(3).normal(size=(2, 5, 8)), 0.2
    previous, current = p0, p0 + 0.5 * step * np.tanh(p0 @ w[0])
    for layer in range(1, DEPTH):
        update = np.tanh(current @ w[layer])
        previous, current = current, mixing * previous + (1 - mixing) * current + 2 * step * update

    def layer(carry, xs):
        before, here = carry
        scales, w = xs
        return (here, advance(before, here, jnp.tanh(here @ w), scales)), None

    stack = coefficients(DEPTH, mixing, step)
    start = jnp.asarray(p0, jnp.float32)
    (before, here), _ = jax.jit(lambda x, w: jax.lax.scan(layer, (x, x), (stack, w)))(start, jnp.asarray(w, np.float32))
    np.testing.assert_allclose(here, current, atol=3e-6)
    np.testing.assert_allclose(before, previous, atol=3e-6)


def test_midpoint_coefficients():
    stack = coefficients(3, 0.5, 0.25)
    assert isinstance(stack, Coefficients)
    assert all(column.dtype == np.float32 for column in stack)
    np.testing.assert_array_equal(np.stack(stack, 1), [[0, 1, 0.125], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]])
    x = jnp.full((1, 2, 3), 2.0, jnp.bfloat16)
    assert advance(x, x, x, Coefficients(*(column[1] for column in stack))).dtype == jnp.bfloat16
