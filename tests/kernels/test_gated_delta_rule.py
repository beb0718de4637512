"""Every implementation of the gated delta rule against the token scan in float64: values and all gradients.

An implementation joins by its name in `IMPLEMENTATIONS`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_delta_rule.api import gated_delta_rule
from pallas_kernels.gated_delta_rule.common.chunks import decays
from tests.kernels.delta_rule_cases import (
    HARD_CASES,
    RESULTS,
    TOLERANCE,
    assert_close,
    cast,
    hard_inputs,
    make_inputs,
    token_scan,
)
from tests.rarely import rarely

IMPLEMENTATIONS = ("reference", "xla")
HARD_SHAPE = (2, 150, 2, 2, 16, 16)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_chunked = pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "reference"])


@functools.partial(jax.jit, static_argnames=("implementation", "chunk_size"))
def run(inputs, cotangents, segment_ids=None, implementation="xla", chunk_size=64):
    """Output, final state and the gradients of all six arguments."""

    def rule(q, k, v, g, beta, initial_state):
        return gated_delta_rule(
            q, k, v, g, beta, initial_state=initial_state, segment_ids=segment_ids, return_state=True,
            implementation=implementation, chunk_size=chunk_size,
        )  # fmt: skip

    outputs, pull = jax.vjp(rule, *inputs)
    return dict(zip(RESULTS, (*outputs, *pull(tuple(cotangents))), strict=True))


@pytest.mark.parametrize(
    "shape, dtype",
    [
        rarely((1, 256, 1, 1, 128, 128), "float32"),
        ((2, 75, 4, 4, 64, 64), "float32"),
        rarely((2, 75, 4, 4, 64, 64), "bfloat16"),
        ((1, 500, 3, 3, 60, 60), "float32"),
        ((1, 130, 2, 2, 100, 100), "bfloat16"),
        rarely((1, 256, 2, 4, 64, 64), "float32"),
        ((1, 192, 1, 4, 64, 128), "float32"),
        rarely((1, 192, 1, 4, 64, 128), "bfloat16"),
    ],
    ids=str,
)
@every_chunked
def test_agrees_with_token_scan(shape, dtype, implementation):
    inputs, cotangents = cast(*make_inputs(shape), dtype)
    results = run(inputs, cotangents, implementation=implementation)
    assert results["o"].dtype == dtype
    assert results["state"].dtype == jnp.float32
    assert_close(results, token_scan(inputs, cotangents), TOLERANCE[dtype])


@pytest.mark.parametrize("length", [1, rarely(63), 64, 65])
@every_chunked
def test_any_length(length, implementation):
    inputs, cotangents = cast(*make_inputs((1, length, 1, 2, 8, 8)), "float32")
    results = run(inputs, cotangents, implementation=implementation)
    assert_close(results, token_scan(inputs, cotangents), TOLERANCE["float32"])


@pytest.mark.parametrize("chunk_size", [1, 16, 128])
def test_any_chunk_size(chunk_size):
    inputs, cotangents = cast(*make_inputs(HARD_SHAPE), "float32")
    results = run(inputs, cotangents, chunk_size=chunk_size)
    assert_close(results, token_scan(inputs, cotangents), TOLERANCE["float32"])


@every_chunked
def test_gates_may_be_wider_than_the_rest(implementation):
    inputs, cotangents = cast(*make_inputs(HARD_SHAPE), "bfloat16")
    inputs[3:5] = [x.astype(jnp.float32) for x in inputs[3:5]]
    results = run(inputs, cotangents, implementation=implementation)
    assert results["dg"].dtype == results["dbeta"].dtype == jnp.float32
    assert results["dq"].dtype == jnp.bfloat16
    assert_close(results, token_scan(inputs, cotangents), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("case", HARD_CASES)
@every_implementation
def test_hard_inputs(case, implementation):
    inputs, cotangents = cast(*hard_inputs(case, HARD_SHAPE), "float32")
    results = run(inputs, cotangents, implementation=implementation)
    assert all(bool(jnp.isfinite(x).all()) for x in results.values())
    # Parallel keys and beta 2: |A| |I + L| is 250 in a chunk, and float32 rounds each k_i . k_j the same way.
    tolerance = 5e-5 if "keys, beta = 2" in case else 1e-5
    assert_close(results, token_scan(inputs, cotangents), dict.fromkeys(RESULTS, tolerance))


def test_xla_keeps_float64():
    with jax.enable_x64(True):
        inputs, cotangents = make_inputs(HARD_SHAPE)
        results = jax.tree.map(np.asarray, run(inputs, cotangents))
    assert_close(results, token_scan(inputs, cotangents), dict.fromkeys(RESULTS, 1e-12))


def segments(*lengths):
    """Ids of packed segments; an id of a segment of no tokens is skipped."""
    return np.repeat(np.arange(len(lengths)), lengths)


SEGMENTS = jnp.asarray(np.stack([segments(1, 1, 62, 1, 0, 0, 60, 25), segments(64, 30, 1, 55)]), jnp.int32)


@every_implementation
def test_segments_agree_with_token_scan(implementation):
    inputs, cotangents = cast(*make_inputs(HARD_SHAPE), "float32")
    results = run(inputs, cotangents, SEGMENTS, implementation=implementation)
    assert_close(results, token_scan(inputs, cotangents, SEGMENTS), TOLERANCE["float32"])


def by_hand(q, k, v, g, beta, state):
    """One row of one value head a key head, token by token in numpy: (o [t, h, v], final state [h, k, v])."""
    q, k, v, g, beta, state = (np.asarray(x, np.float64) for x in (q, k, v, g, beta, state))
    o = np.empty(v.shape)
    for t in range(len(q)):
        state = np.exp(g[t])[:, None, None] * state
        error = beta[t][:, None] * (v[t] - np.einsum("hk,hkv->hv", k[t], state))
        state = state + k[t][:, :, None] * error[:, None, :]
        o[t] = np.einsum("hk,hkv->hv", q[t], state)
    return o * q.shape[-1] ** -0.5, state


@every_chunked
def test_segments_are_isolated(implementation):
    """Each is what it is alone: the first with the initial state, the last leaves its state."""
    inputs, cotangents = cast(*make_inputs(HARD_SHAPE), "float32")
    packed = run(inputs, cotangents, SEGMENTS, implementation=implementation)
    for row, starts in enumerate([[0, 1, 2, 64, 65, 125, 150], [0, 64, 94, 95, 150]]):
        state = inputs[5][row]
        for start, stop in itertools.pairwise(starts):
            o, state = by_hand(*(x[row, start:stop] for x in inputs[:5]), state)
            np.testing.assert_allclose(packed["o"][row, start:stop], o, atol=2e-6)
            last, state = state, np.zeros_like(state)
        np.testing.assert_allclose(packed["state"][row], last, atol=2e-6)


@every_implementation
def test_equal_ids_that_do_not_touch_are_two_segments(implementation):
    inputs, cotangents = cast(*make_inputs(HARD_SHAPE), "float32")
    there_and_back = jnp.broadcast_to(jnp.asarray(np.repeat([4, 1, 4], 50), jnp.int32), (2, 150))
    onwards = jnp.broadcast_to(jnp.asarray(np.repeat([0, 1, 2], 50), jnp.int32), (2, 150))
    results = [run(inputs, cotangents, ids, implementation=implementation) for ids in (there_and_back, onwards)]
    for name in RESULTS:
        np.testing.assert_array_equal(results[0][name], results[1][name])


def test_decays_behind_many_emptied_states_are_exact():
    """Sums of -110 and less in a chunk: differences of two of them must not lose the decay between two tokens."""
    for chunk, emptied in ((64, 40), (128, 80), (256, 200), (1024, 900)):
        small = np.random.default_rng(0).uniform(0.001, 0.02, chunk).astype(np.float32)
        g = np.where(np.arange(chunk) < emptied, -np.inf, -small).astype(np.float32)
        found = decays(jnp.asarray(g)[None, None], None, jnp.asarray(0))
        sums = np.cumsum(-small[emptied:].astype(np.float64))
        exact = np.exp(np.tril(sums[:, None] - sums[None, :]))
        np.testing.assert_allclose(np.tril(found.pair[0, 0, emptied:, emptied:]), np.tril(exact), rtol=1e-6)
        np.testing.assert_allclose(found.lam[0, 0, emptied:], np.exp(sums[-1] - sums), rtol=1e-6)
        assert float(jnp.max(found.gamma)) == float(jnp.max(found.pair[0, 0, emptied:, : emptied - 1])) == 0.0
