"""What every implementation of the gated delta rule is tested on: inputs, hard inputs, the truth, the tolerances."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gated_delta_rule import reference

RESULTS = ("o", "state", "dq", "dk", "dv", "dg", "dbeta", "dinitial")
TOLERANCE = {
    "float32": dict.fromkeys(RESULTS, 1e-5),
    "bfloat16": {name: 0.005 for name in ("o", "state")}
    | {name: 0.008 for name in ("dq", "dk", "dv", "dinitial")}
    | {name: 0.02 for name in ("dg", "dbeta")},
}


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


def cast(inputs, cotangents, dtype):
    """As arrays of the dtype that the rule takes: the state and its gradient stay float32 at least."""
    wide = jnp.promote_types(dtype, jnp.float32)
    inputs = [jnp.asarray(x, dtype) for x in inputs[:5]] + [jnp.asarray(inputs[5], wide)]
    return inputs, [jnp.asarray(cotangents[0], dtype), jnp.asarray(cotangents[1], wide)]


@jax.jit
def _scan(inputs, cotangents, segment_ids):
    scale = inputs[0].shape[-1] ** -0.5
    outputs, pull = jax.vjp(lambda *x: reference.gated_delta_rule(*x, segment_ids, scale, 64), *inputs)
    return dict(zip(RESULTS, (*outputs, *pull(tuple(cotangents))), strict=True))


def token_scan(inputs, cotangents, segment_ids=None):
    """The truth: the reference in float64, for the values that the narrow inputs really have."""
    wide = [[np.asarray(x).astype(np.float64) for x in xs] for xs in (inputs, cotangents)]
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, _scan(*wide, segment_ids))


def relative_error(value, truth):
    error = np.sqrt(np.mean((np.asarray(value, np.float64) - truth) ** 2))
    return error / max(np.sqrt(np.mean(truth**2)), np.finfo(np.float64).tiny)


def assert_close(results, truth, tolerance):
    assert all(np.isfinite(np.asarray(x, np.float64)).all() for x in results.values())
    errors = {name: relative_error(results[name], truth[name]) for name in RESULTS}
    assert all(errors[name] <= tolerance[name] for name in RESULTS), errors


def hard_inputs(case, shape):
    """Inputs on which chunked forms break, all of one shape: one compilation serves them all."""
    inputs, cotangents = make_inputs(shape, seed=3)
    q, k, v, g, beta, state = inputs
    token = np.arange(shape[1])
    for part in case.split(", "):
        name, _, number = part.partition(" = ")
        if part == "identical keys":
            k = np.broadcast_to(k[:, :1], k.shape)
        elif part == "correlated keys":
            k = normalised(k[:, :1] + 0.1 * k)
        elif part == "zero rows":
            q, k, v, g, beta = (np.where(token.reshape(1, -1, *[1] * (x.ndim - 2)) % 3 == 1, 0, x)
                                for x in (q, k, v, g, beta))  # fmt: skip
        elif part == "beta zero rows":
            beta = np.where(token[None, :, None] % 5 < 2, 0, beta)
        elif part == "abrupt g":
            g = np.where(token[None, :, None] % 7 == 3, -30.0, 0.01 * g)
        elif name == "beta":
            beta = np.full(beta.shape, float(number))
        elif name == "g":
            g = np.full(g.shape, float(number))
    return [q, k, v, g, beta, state], cotangents


HARD_CASES = (
    "identical keys, beta = 1, g = 0", "identical keys, beta = 2, g = 0", "correlated keys, beta = 1, g = -1e-4",
    "correlated keys, beta = 2, g = -1e-4", "beta = 2, g = 0", "correlated keys, abrupt g", "g = -5", "g = -30",
    "beta = 1, g = -1000", "zero rows", "beta zero rows", "beta = 0",
)  # fmt: skip
