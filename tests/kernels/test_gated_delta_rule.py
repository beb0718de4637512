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

IMPLEMENTATIONS = ("reference", "xla")
HARD_SHAPE = (2, 150, 2, 2, 16, 16)
RESULTS = ("o", "state", "dq", "dk", "dv", "dg", "dbeta", "dinitial")
TOLERANCE = {
    "float32": dict.fromkeys(RESULTS, 1e-5),
    "bfloat16": {name: 0.005 for name in ("o", "state")}
    | {name: 0.008 for name in ("dq", "dk", "dv", "dinitial")}
    | {name: 0.02 for name in ("dg", "dbeta")},
}

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_chunked = pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "reference"])


def normalised(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make_inputs(shape, seed=0):
    """Float64 (q, k, v, g, beta, initial_state) and the two incoming gradients, as numpy arrays."""
    b, t, h, hv, k, v = shape
    rng = np.random.default_rng(seed)
    q, key = (normalised(rng.normal(size=(b, t, h, k))) for _ in range(2))
    value = rng.normal(size=(b, t, hv, v))
    g = -rng.exponential(size=(b, t, hv)) * rng.choice([0.01, 0.3], size=(b, t, hv))
    beta = rng.uniform(0, 1, size=(b, t, hv))
    state = rng.normal(size=(b, hv, k, v))
    return [q, key, value, g, beta, state], [rng.normal(size=value.shape), rng.normal(size=state.shape)]


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


def cast(inputs, cotangents, dtype):
    """As arrays of the dtype that the rule takes: the state and its gradient stay float32 at least."""
    wide = jnp.promote_types(dtype, jnp.float32)
    inputs = [jnp.asarray(x, dtype) for x in inputs[:5]] + [jnp.asarray(inputs[5], wide)]
    return inputs, [jnp.asarray(cotangents[0], dtype), jnp.asarray(cotangents[1], wide)]


def token_scan(inputs, cotangents, segment_ids=None):
    """The truth: the reference in float64, for the values that the narrow inputs really have."""
    wide = [[np.asarray(x).astype(np.float64) for x in xs] for xs in (inputs, cotangents)]
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, run(*wide, segment_ids, implementation="reference"))


def relative_error(value, truth):
    error = np.sqrt(np.mean((np.asarray(value, np.float64) - truth) ** 2))
    return error / max(np.sqrt(np.mean(truth**2)), np.finfo(np.float64).tiny)


def assert_close(results, truth, tolerance):
    errors = {name: relative_error(results[name], truth[name]) for name in RESULTS}
    assert all(errors[name] <= tolerance[name] for name in RESULTS), errors


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((1, 256, 1, 1, 128, 128), "float32"),
        ((2, 75, 4, 4, 64, 64), "float32"),
        ((2, 75, 4, 4, 64, 64), "bfloat16"),
        ((1, 500, 3, 3, 60, 60), "float32"),
        ((1, 130, 2, 2, 100, 100), "bfloat16"),
        ((1, 256, 2, 4, 64, 64), "float32"),
        ((1, 192, 1, 4, 64, 128), "float32"),
        ((1, 192, 1, 4, 64, 128), "bfloat16"),
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


@pytest.mark.parametrize("length", [1, 63, 64, 65])
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


def hard_inputs(case):
    """Inputs on which chunked forms break, all of one shape: one compilation serves them all."""
    inputs, cotangents = make_inputs(HARD_SHAPE, seed=3)
    q, k, v, g, beta, state = inputs
    for part in case.split(", "):
        name, _, number = part.partition(" = ")
        if part == "identical keys":
            k = np.broadcast_to(k[:, :1], k.shape)
        elif part == "correlated keys":
            k = normalised(k[:, :1] + 0.1 * k)
        elif part == "zero rows":
            q, k, v, g, beta = (np.where(np.arange(150).reshape(1, -1, *[1] * (x.ndim - 2)) % 3 == 1, 0, x)
                                for x in (q, k, v, g, beta))  # fmt: skip
        elif part == "beta zero rows":
            beta = np.where(np.arange(150)[:, None] % 5 < 2, 0, beta)
        elif part == "abrupt g":
            g = np.where(np.arange(150)[:, None] % 7 == 3, -30.0, 0.01 * g)
        elif name == "beta":
            beta = np.full(beta.shape, float(number))
        elif name == "g":
            g = np.full(g.shape, float(number))
    return [q, k, v, g, beta, state], cotangents


@pytest.mark.parametrize(
    "case",
    ["identical keys, beta = 1, g = 0", "identical keys, beta = 2, g = 0", "correlated keys, beta = 1, g = -1e-4",
     "correlated keys, beta = 2, g = -1e-4", "beta = 2, g = 0", "correlated keys, abrupt g", "g = -5", "g = -30",
     "beta = 1, g = -1000", "zero rows", "beta zero rows", "beta = 0"],
)  # fmt: skip
@every_implementation
def test_hard_inputs(case, implementation):
    inputs, cotangents = cast(*hard_inputs(case), "float32")
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
