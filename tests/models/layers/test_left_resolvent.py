"""The left resolvent against inverse matrices; its bound, its derivative by hand, and both in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from gt_jax.models.layers.left_resolvent import left_resolvent

FROM = np.zeros((2, 1, 2))
ETA = np.array([1.0, 0.05])


def rows(tokens, seed=0):
    """Diagonal and squared couplings of one row and two heads; token 5 sees nothing of the tokens before it."""
    random = np.random.default_rng(seed)
    coupling = random.uniform(0.2, 1.0, (1, tokens, 2)) ** 2
    coupling[:, 5:6] = 0
    return random.uniform(-5, 1, (1, tokens, 2)), coupling


def run(diagonal, eta, coupling, before=FROM, dtype=jnp.float64, real=None):
    """Complex numpy [b, t, h]."""
    tensors = [jnp.asarray(x, dtype) for x in (diagonal, eta, coupling)]
    re, im = jax.jit(left_resolvent)(*tensors, tuple(jnp.asarray(x, dtype) for x in before), real)
    assert re.dtype == im.dtype == dtype
    return np.asarray(re) + 1j * np.asarray(im)


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65])
def test_it_is_the_last_diagonal_element_of_the_inverse(tokens):
    diagonal, coupling = rows(tokens)
    with jax.enable_x64(True):
        got = run(diagonal, ETA, coupling)
    for head in range(2):
        beside = np.sqrt(coupling[0, 1:, head])
        matrix = np.diag(diagonal[0, :, head] - 1j * ETA[head]) + np.diag(beside, 1) + np.diag(beside, -1)
        wanted = [np.linalg.inv(matrix[: t + 1, : t + 1])[t, t] for t in range(tokens)]
        np.testing.assert_allclose(got[0, :, head], wanted, atol=1e-10)


def test_it_goes_on_from_where_it_was_and_stays_where_nothing_is():
    diagonal, coupling = rows(70)
    with jax.enable_x64(True):
        whole = run(diagonal, ETA, coupling)
        state = whole[:, 32]
        rest = run(diagonal[:, 33:], ETA, coupling[:, 33:], (state.real, state.imag))
        real = np.arange(70) % 3 > 0
        thinned = run(diagonal, ETA, coupling, real=jnp.asarray(real[None]))
        alone = run(diagonal[:, real], ETA, coupling[:, real])
    np.testing.assert_allclose(rest, whole[:, 33:], atol=1e-10)
    np.testing.assert_allclose(thinned[:, real], alone, atol=1e-10)
    np.testing.assert_allclose(thinned[:, 3::3], thinned[:, 2:-1:3], atol=1e-10)


def test_the_derivative_is_minus_the_squared_product():
    tokens, (diagonal, coupling) = 40, rows(40)

    def total(diagonal):
        return left_resolvent(diagonal, jnp.asarray(ETA), jnp.asarray(coupling), tuple(jnp.asarray(FROM)))[:2]

    with jax.enable_x64(True):
        re, im = (np.asarray(part)[0, :, :, 0] for part in jax.jit(jax.jacrev(total))(jnp.asarray(diagonal)))
        g = run(diagonal, ETA, coupling)[0]
    got = np.einsum("thsh->hts", re + 1j * im)
    beside, wanted = np.sqrt(coupling[0]), np.zeros_like(got)
    for head, t in np.ndindex(2, tokens):
        for s in range(t + 1):
            wanted[head, t, s] = -((np.prod(g[s : t + 1, head]) * np.prod(beside[s + 1 : t + 1, head])) ** 2)
    np.testing.assert_allclose(got, wanted, atol=1e-10)


def test_every_argument_has_its_derivatives():
    diagonal, coupling = rows(9)
    state = np.random.default_rng(1).uniform(0.1, 1.0, (2, 1, 2))
    real = jnp.asarray([[True, True, False, True, True, True, True, False, True]])

    def both(diagonal, eta, coupling, re, im):
        return left_resolvent(diagonal, eta, coupling, (re, im), real)

    with jax.enable_x64(True):
        arguments = [jnp.asarray(x) for x in (diagonal, ETA, coupling + 0.1, *state)]
        check_grads(jax.jit(both), arguments, order=2, modes=("rev",), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [1e-6, 1e-3, 1.0])
def test_no_element_is_above_one_over_eta(eta):
    """In float32, also on resonance: constant potentials within the band, and a chain of zeros."""
    random, tokens = np.random.default_rng(2), 1000
    diagonal = random.uniform(-5, 1, (1, tokens, 8))
    diagonal[..., 4:] = [0.0, -1.0, -2.0, 0.5]
    coupling = np.ones((1, tokens, 8))
    coupling[..., 1] = 0.0
    coupling[..., 2:4] = random.uniform(0, 1, (1, tokens, 2))
    g = run(diagonal, np.full(8, eta), coupling, np.zeros((2, 1, 8)), jnp.float32)
    assert np.all(np.isfinite(g)) and np.all(g.imag >= 0)
    bound = np.abs(g).max() * np.float64(np.float32(eta))
    assert bound <= 1 + 4 * np.finfo(np.float32).eps
    assert bound > 0.9  # zeros are on resonance at every other token


def test_float32_keeps_small_derivatives():
    """They fall by orders of magnitude along the row; a difference of products would end in their rounding."""
    diagonal, coupling = rows(300, seed=3)
    coupling[:, 5] = 1.0

    def at_start(dtype):
        given = jnp.asarray([1.0, 0.3], dtype), jnp.asarray(coupling, dtype), tuple(jnp.asarray(FROM, dtype))
        last = jax.jit(jax.grad(lambda x: left_resolvent(x, *given)[0][0, 30].sum()))
        return np.asarray(last(jnp.asarray(diagonal, dtype)))[0]

    low = at_start(jnp.float32)
    with jax.enable_x64(True):
        exact = at_start(jnp.float64)
    assert np.all(exact[31:] == 0) and np.all(low[31:] == 0)
    assert np.abs(exact[0]).max() < 1e-10
    assert np.abs(low[:31] - exact[:31]).max() < 1e-4 * np.abs(exact).max()
    sizes = np.abs(low[:8]) / np.abs(exact[:8])
    assert np.all((sizes > 0.9) & (sizes < 1.1))
