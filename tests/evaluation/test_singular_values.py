"""The largest singular value of a layer's Jacobian: numpy's, and what is said of how near it came is true."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.configs.model import AdaptiveConfig, HyperConfig, MoEConfig
from gt_jax.devices.sharding import Rules, mesh_for_rows, put_like, reshard
from gt_jax.evaluation.singular_values import (
    error_factor,
    largest_singular_value,
    layer_config,
    layer_variables,
    make_singular_value,
)
from gt_jax.models.language_model import abstract
from gt_jax.models.layers.mixer import place_rows
from gt_jax.models.layers.residual import Layer
from tests.rarely import rarely
from tests.support import perturbed, small_model

SOURCE = small_model("DG", moe=MoEConfig(experts=4, expert_width=16)).replace(
    adaptive=AdaptiveConfig(alpha=(1.0, 0.7)))  # fmt: skip
ROWS, LENGTH, ITERATIONS = 2, 8, 12
SEGMENT_IDS = np.array([[1] * LENGTH, [1] * (LENGTH - 3) + [0] * 3], np.int32)


@pytest.fixture(scope="module", autouse=True)
def mesh():
    """The command's own."""
    with jax.set_mesh(mesh_for_rows(1)):
        yield


def test_jacobians_are_of_implementations_that_can_be_differentiated_twice():
    tiled = SOURCE.replace(gsa=SOURCE.gsa.replace(implementation="xla"))
    assert layer_config(tiled) == layer_config(SOURCE) and layer_config(SOURCE).gsa.implementation == "reference"


STREAMS = SOURCE.replace(hyper=HyperConfig(streams=2), moe=None)


@pytest.mark.parametrize(("kind", "config"), [("D", SOURCE), rarely("G", STREAMS)])
def test_the_singular_value_is_that_of_the_dense_jacobian(kind, config):
    """Experts, streams, padding: against numpy's singular values of the whole matrix, within what is claimed."""
    own = layer_variables(config, put_like(perturbed(config), abstract(config)), "DG".index(kind))
    shape = (ROWS, LENGTH, 32) if config.hyper is None else (ROWS, LENGTH, 2, 32)
    x = reshard(2 * jax.random.normal(jax.random.key(1), shape), Rules().spec("batch", *[None] * (len(shape) - 1)))
    segment_ids, size = jnp.asarray(SEGMENT_IDS), x[0].size
    module = Layer(kind, layer_config(config), Rules(), parent=None)

    @jax.jit
    def rows_of_the_jacobian(x, own):
        def moved(x):
            return x + 0.7 * module.apply(own, x, place_rows(segment_ids), method=Layer.delta)[0]

        pull = jax.vjp(moved, x)[1]
        basis = jnp.eye(size).reshape(size, 1, *x.shape[1:])
        return jax.lax.map(lambda u: pull(u + 0 * x)[0], basis)  # rows of text know nothing of each other

    dense = np.asarray(rows_of_the_jacobian(x, own), np.float64).reshape(size, ROWS, size)
    stretch = make_singular_value(kind, layer_config(config), Rules(), ITERATIONS, 0)
    found = stretch(own, x, jnp.float32(0.7), segment_ids, None)
    for row in range(ROWS):
        real = np.repeat(SEGMENT_IDS[row] > 0, x[0, 0].size)
        matrix = dense[:, row][real][:, real]
        assert_true_of(np.linalg.svd(matrix, compute_uv=False), found, row)
        assert found.value[row] > 0.97 * np.linalg.svd(matrix, compute_uv=False)[0]


def assert_true_of(singular_values, found, row):
    """All that is said of the largest singular value of a row, with room for float32's rounding."""
    value, largest = float(found.value[row]), singular_values[0]
    assert value <= largest * (1 + 1e-5) and largest <= value * float(found.factor[row]) * (1 + 1e-5)
    assert np.abs(singular_values - value).min() <= float(found.distance[row]) + 1e-5 * largest


largest = jax.jit(largest_singular_value, static_argnums=(0, 3, 4))


def with_spectrum(values):
    """x -> x Q diag(values) R of random orthogonal Q and R, for one row of len(values) / 4 tokens of width 4."""
    random, size = np.random.default_rng(len(values)), len(values)
    q, r = (np.linalg.qr(random.standard_normal((size, size)))[0] for _ in range(2))
    matrix = jnp.asarray(q * values @ r, jnp.float32)
    return lambda x: (x.reshape(1, size) @ matrix).reshape(x.shape)


@pytest.mark.parametrize("iterations", [5, rarely(20)])
@pytest.mark.parametrize(("name", "values"), [
    ("all near one", 1 + 1e-3 * np.linspace(0, 1, 400)[::-1]),
    rarely("one above many", np.concatenate([[1.3], np.linspace(1.2, 1.0, 399)])),
    ("a heavy tail", 1 + 0.5 * np.linspace(0, 1, 400)[::-1] ** 8),
    rarely("rank three", np.concatenate([[3.0, 2.0, 1.0], np.zeros(397)])),
])  # fmt: skip
def test_what_is_said_of_a_singular_value_is_true_of_hard_spectra(name, values, iterations):
    """In 20 of 20 starts, where 99 % are promised; power iteration was off by 65 % of sigma - 1 and said 0.9 %."""
    function, x, real = with_spectrum(values), jnp.ones((1, 100, 4)), jnp.ones((1, 100))
    for seed in range(5):
        found = largest(function, x, real, iterations, seed)
        assert found.factor[0] == np.float32(error_factor(400, iterations))
        assert_true_of(values, found, 0)
    assert error_factor(400, 20) < 1.04 < error_factor(400, 6) and error_factor(400, 2) == math.inf
    if name == "one above many" and iterations == 20:  # closer to 1.3 than power iteration comes
        v = np.asarray(jax.random.normal(jax.random.key(4), x.shape), np.float64)
        for _ in range(20):
            u = np.asarray(function(jnp.asarray(v, jnp.float32)))
            v = np.asarray(jax.vjp(function, x)[1](jnp.asarray(u))[0])
            v = v / np.linalg.norm(v)
        assert np.linalg.norm(function(jnp.asarray(v, jnp.float32))) < float(found.value[0])


def test_singular_values_of_a_known_matrix_leave_padding_out():
    random = np.random.default_rng(0)
    matrix = random.standard_normal((2, 12, 12)).astype(np.float32)
    real = jnp.asarray([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])

    def function(x):
        return jnp.einsum("rij,rj->ri", matrix, x.reshape(2, 12)).reshape(x.shape)

    found = largest(function, jnp.ones((2, 3, 4)), real, 14, 0)  # more iterations than dimensions do no harm
    spectra = [np.linalg.svd(matrix[0])[1], np.linalg.svd(matrix[1, :8, :8])[1]]
    np.testing.assert_allclose(found.value, [spectrum[0] for spectrum in spectra], rtol=1e-4)
    few = largest(function, jnp.ones((2, 3, 4)), real, 3, 0)
    assert np.all(few.value <= found.value * (1 + 1e-5)) and np.all(few.distance > found.distance)
    nothing = largest(lambda x: 0 * x, jnp.ones((1, 3, 4)), real[:1], 2, 0)
    assert nothing.value[0] == 0 and nothing.distance[0] == 0
