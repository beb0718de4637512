"""Hyper-connections: every implementation against the definition in float64, the TPU kernels through the interpreter.

Memory that nobody wrote holds NaN there, and what lies past the end of a row too.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.hyper_connections import api, pallas_tpu, reference, xla
from pallas_kernels.hyper_connections.api import Settings, Weights
from tests.rarely import rarely

TOLERANCE = {"float32": 1e-6, "bfloat16": 5e-3}
GRADIENTS = {"float32": 1e-6, "bfloat16": 8e-3}  # of the streams: roundings of three states follow each other
OF_WEIGHTS = {"float32": 1e-6, "bfloat16": 2e-2}  # through gates: sums of what nearly cancels
ROUNDS = 4


def make_inputs(shape, dtype, kind="plain", seed=0):
    """x, the weights of two sublayers, and the gradient of X'. Of `hard` logits many are at the floor; `tied` are 0."""
    *_, n, d = shape
    keys = iter(jax.random.split(jax.random.key(seed), 6))
    m = n * (n + 2)
    strength = {"plain": (1.0, 1.0), "hard": (3.0, 8.0), "tied": (0.0, 0.0)}[kind]
    weights = [
        Weights(strength[0] * jax.random.normal(next(keys), (n, d, m)) * (d * n) ** -0.5,
                strength[1] * jax.random.normal(next(keys), (m,)))
        for _ in range(2)
    ]  # fmt: skip
    x, gradient = (jax.random.normal(next(keys), shape).astype(dtype) for _ in range(2))
    return x, weights, gradient


def two_sublayers(operation, x, weights, settings):
    """Branches that are not linear, in float32 at least."""

    def branch(u, function):
        wide = u.astype(jnp.promote_types(u.dtype, jnp.float32))
        return function(wide).astype(u.dtype)

    u, opened = operation.enter(x, weights[0], settings)
    u, opened = operation.between(opened, branch(u, lambda w: 1.3 * jnp.sin(w)), weights[1], settings)
    return operation.leave(opened, branch(u, lambda w: w + 0.7 * jnp.cos(w)), settings)


@functools.partial(jax.jit, static_argnames=("operation", "settings"))
def run(operation, settings, x, weights, gradient):
    """X' and the gradients of x and of all weights.

    Backward only after forward: XLA may run independent kernels at once, and the interpreter has one memory for all.
    """
    after, pull = jax.vjp(lambda x, weights: two_sublayers(operation, x, weights, settings), x, weights)
    return after, pull(gradient + 0 * after)


class Interpreted:
    """The kernels as a module of the operation, run by the interpreter."""

    def __init__(self, **options):
        params = pltpu.InterpretParams(uninitialized_memory="nan", **options)
        for name in ("enter", "between", "leave"):
            setattr(self, name, functools.partial(getattr(pallas_tpu, name), interpret=params))


KERNELS = Interpreted()
RACING = Interpreted(detect_races=True, dma_execution_mode="on_wait", random_seed=1)


def truth(inputs, settings):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a.astype(jnp.float32)), jnp.float64), inputs)
        return jax.tree.map(np.asarray, run(reference, settings, *wide))


def assert_close(got, wanted, dtype):
    """RMS(error) / RMS(truth); where the truth is 0, so is what was got, but for rounding."""
    named = jax.tree_util.tree_flatten_with_path(got)[0]
    for (path, one), true in zip(named, jax.tree.leaves(wanted), strict=True):
        error = np.asarray(one.astype(jnp.float32), np.float64) - true
        bound = (TOLERANCE, GRADIENTS, OF_WEIGHTS)[min(len(path), 3) - 1][dtype]
        size = max(np.sqrt(np.mean(true**2)), 1e-3)
        assert np.sqrt(np.mean(error**2)) <= bound * size, (path, np.sqrt(np.mean(error**2)) / size)


@pytest.mark.parametrize("kind", [rarely("plain"), rarely("hard"), "tied"])
def test_kernels_agree_with_the_definition_in_float32(kind):
    """Values and all gradients, Sinkhorn's too, with entries at the floor and equal ones. A row shorter than a tile."""
    settings, inputs = Settings(rounds=ROUNDS), make_inputs((1, 20, 3, 128), "float32", kind)
    got = run(KERNELS, settings, *inputs)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(got)} == {"float32"}
    assert_close(got, truth(inputs, settings), "float32")


def test_kernels_agree_with_the_definition_in_bfloat16():
    """Two rows, each with a tile that is nearly empty; no races, nothing read that nobody wrote."""
    settings, inputs = Settings(rounds=ROUNDS), make_inputs((2, 130, 2, 128), "bfloat16")
    got = run(RACING, settings, *inputs)
    jax.block_until_ready(got)
    assert got[0].dtype == got[1][0].dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(got[1][1])} == {"float32"}
    assert_close(got, truth(inputs, settings), "bfloat16")
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


@pytest.mark.exhaustive
@pytest.mark.parametrize("streams", [1, 4, 5, 8])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_any_number_of_streams(streams, dtype):
    settings, inputs = Settings(rounds=20), make_inputs((3, 140, streams, 384), dtype)
    assert_close(run(KERNELS, settings, *inputs), truth(inputs, settings), dtype)


@pytest.mark.exhaustive  # tests/models/layers/test_hyper_connections.py holds it to the equations in float64
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_xla_agrees_with_the_definition(dtype):
    settings, inputs = Settings(rounds=ROUNDS), make_inputs((2, 9, 4, 12), dtype)
    assert_close(run(xla, settings, *inputs), truth(inputs, settings), dtype)


def test_kernels_mix_doubly_stochastically_and_a_branch_of_zero_keeps_the_mean():
    settings = Settings(rounds=40)
    x, weights, _ = make_inputs((1, 20, 3, 128), "float32")

    @jax.jit
    def mixed(x):
        u, opened = KERNELS.enter(x, weights[0], settings)
        return opened.record, KERNELS.leave(opened, jnp.zeros_like(u), settings)

    record, after = mixed(x)
    res = np.asarray(record)[0, 6:15, :20].reshape(3, 3, 20)
    assert res.min() > 0 and np.ptp(res) > 0.3
    np.testing.assert_allclose(res.sum(0), 1, atol=1e-6)
    np.testing.assert_allclose(res.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(after.mean(2), x.mean(2), atol=1e-5)
    assert float(jnp.abs(after - x).max()) > 0.1
    np.testing.assert_allclose(res.transpose(2, 0, 1), xla.coefficients(x, weights[0], settings).res[0], atol=1e-6)


def on_a_tpu():
    device = jax.sharding.AbstractDevice("TPU v5", 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def kernels_in(shape):
    """Of a read traced for whatever it is traced for."""
    *_, n, d = shape
    x, m = jax.ShapeDtypeStruct(shape, "bfloat16"), n * (n + 2)
    weights = Weights(jax.ShapeDtypeStruct((n, d, m), jnp.float32), jax.ShapeDtypeStruct((m,), jnp.float32))
    return str(jax.make_jaxpr(lambda *x: api.enter(*x, Settings())[0])(x, weights)).count("pallas_call[")


def test_chosen_for_a_tpu_where_rows_and_width_are_the_kernels():
    """By XLA where tiles would be empty, lanes too, or VMEM too small."""
    assert kernels_in((1, 256, 2, 128)) == 0
    with on_a_tpu():
        assert kernels_in((1, 256, 2, 128)) == 1
        for shape in ((8, 1, 2, 128), (1, 256, 2, 64), (1, 256, 8, 65536)):
            assert kernels_in(shape) == 0


def test_what_does_not_fit_is_said():
    x, weights, _ = make_inputs((1, 4, 2, 64), "float32")
    bad = Weights(weights[0].phi[:, :, 1:], weights[0].bias.astype(jnp.bfloat16))
    settings = Settings(rounds=0, floor=2.0, implementation="pallas_tpu")
    with pytest.raises(ValueError) as caught:
        api.enter(x, bad, settings)
    for part in (
        "'pallas_tpu' needs a TPU, this is for cpu", "rounds is 0; it must be at least 1", "floor is 2.0",
        "weights.phi must be (2, 64, 8), got (2, 64, 7)", "weights.bias must be float32 or float64",
    ):  # fmt: skip
        assert part in str(caught.value)
    interpreted = Settings(implementation="pallas_tpu_interpreted")
    with pytest.raises(ValueError, match=r"width 64 must be a multiple of 128 lanes"):
        api.enter(x, weights[0], interpreted)
    with pytest.raises(ValueError, match=r"has 9 streams; there must be 1 to 8"):
        api.enter(jnp.zeros((1, 4, 9, 64)), weights[0], Settings())
    with pytest.raises(ValueError, match=r"x must be float32, bfloat16 or float64, got float16"):
        api.enter(x.astype(jnp.float16), weights[0], Settings())
    with pytest.raises(ValueError, match=r"takes \d+ MiB of VMEM with its gradients, at most 48 fit; fewer streams"):
        pallas_tpu.enter(jnp.zeros((1, 1, 8, 32768)), weights[0], Settings())
    u, opened = api.enter(x, weights[0], Settings())
    with pytest.raises(ValueError, match=r"y must be \[b, t, d\] = \(1, 4, 64\) in float32, got \(1, 4, 64\) in bf"):
        api.leave(opened, u.astype(jnp.bfloat16), Settings())
    with pytest.raises(ValueError, match=r"'cuda' is not available, there are reference, xla"):
        api.enter(x, weights[0], Settings(implementation="cuda"))
