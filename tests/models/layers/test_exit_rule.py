"""Depth-wise ACT, the rule: weights and halting by Graves, ponder and its gradient, the head, the presets."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs.model import ExitConfig
from gt_jax.models.layers.early_exit import (
    EXIT_PRESETS,
    ExitHead,
    alive,
    alive_share,
    even_bias,
    layers_used,
    observe,
    ponder,
    start,
)
from tests.models.layers.test_early_exit import IDS, RULES, THRESHOLD, WIDTH, inputs
from tests.support import segments


def states(x_of_layers, p_of_layers, threshold=THRESHOLD, ids=IDS):
    """`observe` over given streams and probabilities."""
    state = start(x_of_layers[0], ids)
    for layer, (x, p) in enumerate(zip(x_of_layers, p_of_layers, strict=True)):
        state = observe(state._replace(x=x), p, threshold, jnp.asarray(layer == len(p_of_layers) - 1))
    return state


def test_weights_sum_to_one_and_the_last_layer_takes_the_rest():
    ids = segments(6)
    p = jnp.asarray([[[0.29, 0.9, 0.95, 1e-6, 0.5, 0.2]]] + [[[0.29, 0.3, 0.01, 1e-6, 0.5, 0.2]]] * 3)
    x = jnp.broadcast_to(jnp.eye(4)[:, None, None], (4, 1, 6, 4))  # the output of layer l counts in component l
    state = states(x, p, ids=ids)
    wanted = [[0.29, 0.29, 0.29, 0.13], [1, 0, 0, 0], [1, 0, 0, 0], [1e-6, 1e-6, 1e-6, 1 - 3e-6], [0.5, 0.5, 0, 0]]
    np.testing.assert_allclose(state.output[0, :5], wanted, atol=1e-6)
    np.testing.assert_allclose(state.output.sum(-1), 1.0, atol=2e-7)
    np.testing.assert_array_equal(state.halted, 1.0)
    np.testing.assert_array_equal(state.layers[0], [4, 1, 1, 4, 2, 4])
    np.testing.assert_allclose(state.remainder[0], [0.13, 1, 1, 1 - 3e-6, 0.5, 0.4], atol=1e-6)


def test_a_token_halts_exactly_where_the_sum_reaches_the_threshold():
    ids = segments(3)
    p = jnp.asarray([[0.5, 0.5, 0.5]]), jnp.asarray([[0.25, 0.25 - 2**-20, 0.5]])
    state = start(jnp.zeros((1, 3, 2)), ids)
    for chance in p:
        state = observe(state, chance, 0.75, False)
    np.testing.assert_array_equal(alive(state)[0], [False, True, False])


def test_ponder_is_layers_and_remainder_against_a_loop():
    with jax.enable_x64():
        p = np.random.default_rng(0).uniform(0, 0.6, (6, *IDS.shape))
        wanted, n = 0.0, 0
        for row, token in np.argwhere(np.asarray(IDS) > 0):
            halted = 0.0
            for layer in range(6):
                if halted + p[layer, row, token] >= THRESHOLD or layer == 5:
                    wanted, n = wanted + layer + 1 + 1 - halted, n + 1
                    break
                halted += p[layer, row, token]
        x = jnp.zeros((6, *IDS.shape, 2), jnp.float64)
        real = (IDS > 0).astype(jnp.float64)
        state = states(x, jnp.asarray(p))
        np.testing.assert_allclose(float(ponder(state, real)), wanted / n, rtol=1e-12)
        assert float(layers_used(state, real)) < float(ponder(state, real)) < float(layers_used(state, real)) + 1


def test_the_gradient_of_ponder_raises_the_early_probabilities_and_agrees_with_differences():
    with jax.enable_x64():
        rng = np.random.default_rng(1)
        p = jnp.asarray(rng.uniform(0.05, 0.45, (5, *IDS.shape)))
        x = jnp.asarray(rng.normal(size=(5, *IDS.shape, 3)))
        real = (IDS > 0).astype(jnp.float64)

        def price(p):
            return ponder(states(x, p), real)

        def both(p):
            state = states(x, p)
            return price(p) + jnp.sum(jnp.sin(state.output))

        gradient = np.asarray(jax.jit(jax.grad(price))(p))
        used = np.asarray(states(x, p).layers)
        before = (np.arange(5)[:, None, None] < used - 1) & (np.asarray(real) > 0)
        np.testing.assert_allclose(gradient, np.where(before, -1 / real.sum(), 0.0), atol=1e-15)
        cheaper = p - 2.0 * gradient  # a step downhill: fewer layers as well, though N has no gradient
        assert layers_used(states(x, cheaper), real) < layers_used(states(x, p), real)
        gradient, step, both = np.asarray(jax.jit(jax.grad(both))(p)), 1e-6, jax.jit(both)
        for index in rng.integers(0, [5, *IDS.shape], (12, 3)):
            nudge = jnp.zeros_like(p).at[tuple(index)].set(step)
            slope = (both(p + nudge) - both(p - nudge)) / (2 * step)
            np.testing.assert_allclose(gradient[tuple(index)], float(slope), atol=1e-7)


def test_padding_is_never_alive_and_in_no_statistic():
    x, ids, _ = inputs()
    state, real = start(x, ids), (ids > 0).astype(jnp.float32)
    np.testing.assert_array_equal(alive(state), ids > 0)
    assert float(alive_share(state, real)) == 1
    state = observe(state, jnp.full(ids.shape, 0.95), THRESHOLD, False)
    np.testing.assert_array_equal(state.layers, real)
    np.testing.assert_array_equal(state.output[2, 9:], x[2, 9:])


def test_head_reads_the_mean_of_the_streams_in_float32():
    head = ExitHead(WIDTH, RULES)
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, WIDTH))
    params = head.init(jax.random.key(1), x)["params"]
    assert {path: leaf.shape for path, leaf in flatten(params).items()} == {
        "hidden/w": (8, 4), "hidden/b": (4,), "output/w": (4, 1), "output/b": (1,),
    }  # fmt: skip
    p = head.apply({"params": params}, x)
    np.testing.assert_allclose(p, head.apply({"params": params}, x.mean(2)), atol=1e-6)
    assert head.apply({"params": params}, x.astype(jnp.bfloat16)).dtype == jnp.float32
    np.testing.assert_allclose(jax.nn.sigmoid(even_bias(20)), 1 / 20, atol=1e-6)


def test_presets_are_those_of_the_study():
    pairs = {name: (config.threshold, config.ponder) for name, config in EXIT_PRESETS.items()}
    assert pairs == {"accuracy": (0.99, 0.001), "balanced": (0.95, 0.01), "speed": (0.80, 0.1)}
    assert EXIT_PRESETS["accuracy"] == ExitConfig()
