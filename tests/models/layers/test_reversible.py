"""The reversible stack: the gradients of plain autodiff in memory that does not grow with depth."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.devices.sharding import make_mesh, on_mesh, reshard
from gt_jax.models.layers.reversible import Pair, reconstruct, reversible_stack, start
from gt_jax.models.layers.stack import advance, coefficients
from tests.support import random_tree

STEP, WIDTH, HIDDEN, TOKENS = 0.25, 8, 12, 512
ROWS = jax.sharding.PartitionSpec("data", None, None)


def delta(slot: int):
    """A small MLP that looks at the segment ids, at a shared float tensor and at the number of its block."""

    def update(params, x, consts):
        p = params[f"layer{slot}"]
        inner = jnp.einsum("btd,df->btf", x, p["w"].astype(x.dtype), out_sharding=on_mesh(ROWS))
        inner = jnp.tanh(inner + consts["bias"].astype(x.dtype)[None, None])
        inner = inner * (consts["ids"] > 0).astype(x.dtype)[..., None]
        y = jnp.einsum("btf,fd->btd", inner, p["v"].astype(x.dtype), out_sharding=on_mesh(ROWS))
        y = y * (1 + 0.1 * params["number"]).astype(x.dtype)
        mean = jnp.mean(jnp.square(inner.astype(p["w"].dtype)))
        return y, {"loss": mean, "per_unit": jnp.mean(y.astype(p["w"].dtype), axis=(0, 1))}

    return update


DELTAS = tuple(delta(slot) for slot in range(2))


def parameters(blocks: int, slots: int, seed: int = 0, dtype="float32", scale: float = 0.3):
    shapes = {f"layer{slot}": {"w": (blocks, WIDTH, HIDDEN), "v": (blocks, HIDDEN, WIDTH)} for slot in range(slots)}
    zeros = jax.tree.map(lambda s: jnp.zeros(s, dtype), shapes, is_leaf=lambda s: isinstance(s, tuple))
    return {**random_tree(zeros, seed, scale), "number": jnp.arange(blocks, dtype=jnp.int32)}


def inputs(tokens: int = 5, rows: int = 2, dtype="float32"):
    x = jax.random.normal(jax.random.key(1), (rows, tokens, WIDTH), dtype)
    ids = jnp.ones((rows, tokens), jnp.int32).at[0, -2:].set(0)
    bias = 0.3 * jax.random.normal(jax.random.key(2), (HIDDEN,), dtype)
    return x, {"ids": ids, "bias": bias, "key": jax.random.key(7), "cache": None}


def reversible(params, x, consts):
    """Two segments one after the other: blocks of two layers, then blocks of one."""
    pair, seen = reversible_stack(DELTAS, params[0], start(x), consts, STEP, first=True)
    pair, more = reversible_stack(DELTAS[:1], params[1], pair, consts, STEP, first=False)
    return pair, seen, more


def plain(params, x, consts):
    """The recurrence as it is written: p_1 = p_0 + 0.5 hh Delta_0, then p_{l+1} = p_{l-1} + 2 hh Delta_l."""
    before, here, extras = None, x, []
    for segment, slots in zip(params, (2, 1), strict=False):
        seen = []
        for layer in range(len(segment["number"]) * slots):
            p = jax.tree.map(lambda a, block=layer // slots: a[block], segment)
            update, more = DELTAS[layer % slots](p, here, consts)
            after = here + 0.5 * STEP * update if before is None else before + 2 * STEP * update
            before, here = here, after
            seen.append(more)
        extras.append(jax.tree.map(lambda *a, slots=slots: jnp.stack(a).reshape(-1, slots, *a[0].shape), *seen))
    return Pair(before, here), *extras


def slopes(run, params, x, consts):
    """A scalar of everything that comes out, and its gradients in params, x and the float consts."""

    def scalar(params, x, bias):
        out = run(params, x, {**consts, "bias": bias})
        leaves = jax.tree.leaves(out)
        return sum(jnp.sum(jnp.sin(a + i) * (1 + i)) for i, a in enumerate(leaves)), out

    return jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True, allow_int=True)(params, x, consts["bias"])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
def test_values_and_gradients_are_those_of_plain_autodiff(dtype, tolerance):
    """In params, x and float consts; through the last pair and through extras; over a chain of two segments."""
    with jax.enable_x64(dtype == "float64"):
        params = (parameters(2, 2, 3, dtype), parameters(2, 1, 4, dtype))
        got, wanted = (jax.jit(functools.partial(slopes, run))(params, *inputs(dtype=dtype))
                       for run in (reversible, plain))  # fmt: skip
        assert got[0][1][0].current.dtype == dtype
        for a, b in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
            if a.dtype == jax.dtypes.float0:
                continue
            scale = np.abs(b).max()
            assert scale > 0
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)


def test_extras_alone_have_gradients():
    """Nothing reads the stream after the last layer: its cotangents start at zero."""
    params, (x, consts) = parameters(2, 2), inputs()
    stack = functools.partial(reversible_stack, DELTAS, step=STEP, first=True)

    def loss(extras):
        return jnp.sum(extras["loss"] * jnp.arange(1.0, 5.0).reshape(2, 2))

    got = jax.jit(jax.grad(lambda x: loss(stack(params=params, pair=start(x), consts=consts)[1])))(x)
    wanted = jax.jit(jax.grad(lambda x: loss(plain((params,), x, consts)[1])))(x)
    assert np.abs(wanted).max() > 0
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


@functools.cache
def four_layers(first: bool, dtype: str | None):
    """(down, up) a segment of two blocks of two layers."""
    static = {"step": STEP, "first": first, "dtype": dtype}
    down = jax.jit(lambda params, pair, consts: reversible_stack(DELTAS, params, pair, consts, **static)[0])
    return down, jax.jit(lambda params, pair, consts: reconstruct(DELTAS, params, pair, consts, **static))


def error_of_reconstruction(layers: int, dtype: str | None = None) -> float:
    """|p_0 found again - p_0| / |p_0| after so many layers and back."""
    x, consts = inputs(16)
    segments = [parameters(2, 2, seed) for seed in range(layers // 4)]
    pair = start(x)
    for i, params in enumerate(segments):
        pair = four_layers(i == 0, dtype)[0](params, pair, consts)
    assert np.linalg.norm(pair.current - x) > 0.3 * np.linalg.norm(x), "the stack should do something"
    for i, params in reversed(list(enumerate(segments))):
        pair = four_layers(i == 0, dtype)[1](params, pair, consts)
    return max(float(np.linalg.norm(a - x) / np.linalg.norm(x)) for a in pair)


def test_reconstruction_error_grows_slowly_with_depth():
    errors = [error_of_reconstruction(layers) for layers in (4, 8, 16, 32)]
    assert errors[0] > 0
    assert max(errors) < 1e-4
    assert errors[-1] < 100 * errors[0]  # eight times the depth; at mixing 0.5 it would be 2^28 times


def test_deltas_in_bfloat16_are_reconstructed_as_well():
    """The pair is float32: what the deltas round matters little, since they round alike on the way up."""
    assert error_of_reconstruction(32, "bfloat16") < 1e-4


@jax.jit
def midpoint_and_back(stack, params, x, consts):
    """The relative error of p_0 after the midpoint stack of any mixing and its inverse, layer by layer."""

    def down(pair, xs):
        scales, layer = xs
        return (pair[1], advance(*pair, DELTAS[0](layer, pair[1], consts)[0], scales)), None

    def up(pair, xs):
        scales, layer = xs
        here, after = pair
        moved = scales.current * here + scales.delta * DELTAS[0](layer, here, consts)[0]
        return ((after - moved) / scales.previous, here), None

    end, _ = jax.lax.scan(down, (x, x), (stack, params))
    after_first = jax.tree.map(lambda a: a[1:], (stack, params))
    (found, _), _ = jax.lax.scan(up, end, after_first, reverse=True)
    return jnp.linalg.norm(found - x) / jnp.linalg.norm(x)


def test_at_mixing_one_half_an_inverse_would_double_the_error_in_every_layer():
    def error(depth: int, mixing: float) -> float:
        x, consts = inputs(16)
        return float(midpoint_and_back(coefficients(depth, mixing, STEP), parameters(depth, 1), x, consts))

    assert error(20, 0.5) > 2**8 * error(10, 0.5)
    assert error(20, 0.5) > 1e-2
    assert error(20, 1.0) < 1e-5


def plain_scan(params, x, consts):
    """The same stack, remembered by autodiff."""

    def block(pair, p):
        for update in DELTAS:
            moved, _ = update(p, pair.current, consts)
            pair = Pair(pair.current, pair.previous + 2 * STEP * moved)
        return pair, None

    return jax.lax.scan(block, start(x), params)[0]


def chain(segments: int):
    """A stack cut in so many calls."""

    def run(params, x, consts):
        pair = start(x)
        for i in range(segments):
            cut = jax.tree.map(lambda a, i=i: jnp.split(a, segments)[i], params)
            pair, _ = reversible_stack(DELTAS, cut, pair, consts, STEP, first=i == 0)
        return pair

    return run


def temporary_bytes(run, layers: int) -> int:
    """What a step of gradients takes besides its inputs and outputs (the gradients of the parameters)."""
    params, (x, consts) = parameters(layers // 2, 2), inputs(tokens=TOKENS, rows=4)
    gradient = jax.grad(lambda p, x: jnp.sum(run(p, x, consts).current ** 2), argnums=(0, 1), allow_int=True)
    return jax.jit(gradient).lower(params, x).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_depth():
    shallow, deep = (temporary_bytes(chain(1), layers) for layers in (8, 32))
    assert deep < 1.1 * shallow
    remembered = [temporary_bytes(plain_scan, layers) for layers in (8, 32)]
    assert remembered[1] > 3 * remembered[0]
    assert deep < 0.1 * remembered[1]
    pair = 2 * 4 * TOKENS * WIDTH * 4
    assert temporary_bytes(chain(2), 32) < deep + 2 * pair, "a chain keeps the pairs at the ends of its segments"


def test_rows_on_eight_devices_give_what_one_device_gives():
    """Explicit mesh axes; parameters whole on every device, so their gradients are summed over the rows."""
    params = (parameters(2, 2, 3), parameters(2, 1, 4))
    x, consts = inputs(rows=8)
    alone = jax.jit(functools.partial(slopes, reversible))(params, x, consts)
    with jax.set_mesh(make_mesh()):
        cut = reshard(x, ROWS)
        together = {**consts, "ids": reshard(consts["ids"], jax.sharding.PartitionSpec("data", None))}
        spread = jax.jit(functools.partial(slopes, reversible))(params, cut, together)
        assert spread[1][1].sharding.spec == ROWS
    for a, b in zip(*map(jax.tree.leaves, (spread, alone)), strict=True):
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_extras_must_be_float():
    def counts(params, x, consts):
        return x, {"count": jnp.sum(consts["ids"])}

    x, consts = inputs()
    with pytest.raises(TypeError, match="extras of delta 0 hold int32; they must be float arrays"):
        reversible_stack((counts,), parameters(2, 1), start(x), consts, STEP, first=True)
