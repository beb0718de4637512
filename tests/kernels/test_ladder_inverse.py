"""The ladder inverse against float64, on matrices that ruin power series."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_delta_rule.common.triangular_inverse import invert_unit_lower

invert = jax.jit(invert_unit_lower)


def system(size, spread, beta, seed=0):
    """tril(beta K K^T, -1) of unit keys around a common direction; spread 0 makes them identical."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(3, 1, 32)) + spread * rng.normal(size=(3, size, 32))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    return np.tril(beta * keys @ np.swapaxes(keys, -1, -2), -1).astype(np.float32)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("spread", [0.0, 0.1, 100.0])
def test_accurate_for_correlated_keys(spread, beta):
    lower = system(64, spread, beta)
    truth = np.linalg.inv(np.eye(64) + lower.astype(np.float64))
    error = np.asarray(invert(lower)) - truth
    assert np.sqrt(np.mean(error**2) / np.mean(truth**2)) < 1e-5


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 128])
def test_any_power_of_two(size):
    lower = system(size, 1.0, 1.0)
    product = np.asarray(invert(lower), np.float64) @ (np.eye(size) + lower.astype(np.float64))
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(size), product.shape), atol=1e-5)


def test_leading_axes_and_exact_triangle():
    lower = system(16, 1.0, 1.0)
    inverse = invert(jnp.stack([lower, lower])[:, :, None])
    assert inverse.shape == (2, 3, 1, 16, 16)
    np.testing.assert_array_equal(inverse, np.tril(inverse))
    np.testing.assert_array_equal(np.diagonal(inverse, axis1=-2, axis2=-1), 1)
