"""Hyper-connections by plain XLA: any device, any shape.

- Streams are mixed by multiply and add, not by a matrix product: accelerators round the inputs of products to
  bfloat16 by default, and a rounded H_res is no longer doubly stochastic.
- The root mean square divides the projection, so the normed state is never stored.
- Sinkhorn keeps two scalings of E, not the matrix of every round; its backward pass is that of the rounds, written out.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pallas_kernels.hyper_connections.reference import Coefficients, Open, Settings, Weights

Streams = Float[Array, "b t n d"]


def enter(x: Streams, weights: Weights, settings: Settings) -> tuple[Float[Array, "b t d"], Open]:
    """The input of a sublayer's branch, and the sublayer left open for its write."""
    found = coefficients(x, weights, settings)
    return read(x, found.pre), Open(x, found)


def between(
    opened: Open, y: Float[Array, "b t d"], weights: Weights, settings: Settings
) -> tuple[Float[Array, "b t d"], Open]:
    """`leave`, and the next sublayer's `enter`."""
    return enter(leave(opened, y, settings), weights, settings)


def leave(opened: Open, y: Float[Array, "b t d"], settings: Settings) -> Streams:
    """X' of the sublayer whose branch gave y."""
    return write(opened.x, opened.coefficients, y)


def coefficients(x: Streams, weights: Weights, settings: Settings) -> Coefficients:
    """H_pre, H_post and H_res of every token, in float32 at least."""
    n = x.shape[2]
    logits = _project(x, weights.phi, settings) + weights.bias[None, None]
    pre, post, res = jnp.split(logits, (n, 2 * n), axis=-1)
    mixed = sinkhorn(res.reshape(*x.shape[:2], n, n), settings.rounds, settings.floor)
    return Coefficients(jax.nn.sigmoid(pre), 2 * jax.nn.sigmoid(post), mixed)


def _project(x: Streams, phi: Float[Array, "n d m"], settings: Settings) -> Float[Array, "b t m"]:
    """RMSNorm(vec X) phi in float32."""
    whole = None if settings.batch_axes is None else P(settings.batch_axes, None, None)
    product = _einsum("btnd,ndm->btm", x, phi, out_sharding=whole)
    square = jnp.mean(jnp.square(_wide(x)), axis=(2, 3))
    return product * jax.lax.rsqrt(square + settings.epsilon)[..., None]


def read(x: Streams, pre: Float[Array, "b t n"]) -> Float[Array, "b t d"]:
    """H_pre X, the input of a sublayer: sum_n pre_n X_n in float32, in x's dtype."""
    return jnp.sum(_wide(x) * pre[..., None], axis=2).astype(x.dtype)


def write(x: Streams, found: Coefficients, y: Float[Array, "b t d"]) -> Streams:
    """H_res X + H_post (outer) y, in float32, in x's dtype."""
    return (_mix(found.res, x) + _wide(y)[:, :, None] * found.post[..., None]).astype(x.dtype)


def _wide(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """At least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _einsum(equation: str, *operands: Array, out_sharding: P | None = None) -> Array:
    """Factors and sums in float32 at least, on every kind of device."""
    wide = [_wide(operand) for operand in operands]
    return jnp.einsum(
        equation, *wide, out_sharding=out_sharding, precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.result_type(*wide),
    )  # fmt: skip


@jax.custom_vjp
def _mix(matrix: Float[Array, "b t n n"], x: Streams) -> Streams:
    """sum_j matrix_ij x_j, float32; its backward pass, written out, is one more `_mix` and one reduction over d."""
    wide = _wide(x)
    return _total(matrix[:, :, :, j, None] * wide[:, :, j, None] for j in range(x.shape[2]))


def _mix_forward(matrix: Array, x: Array) -> tuple[Array, tuple[Array, Array]]:
    return _mix(matrix, x), (matrix, x)


def _mix_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    matrix, x = saved
    outer = _einsum("btid,btjd->btij", gradient, x)
    return outer, _mix(jnp.swapaxes(matrix, -1, -2), gradient).astype(x.dtype)


_mix.defvjp(_mix_forward, _mix_backward)


def sinkhorn(logits: Float[Array, "*c n n"], rounds: int, floor: float) -> Float[Array, "*c n n"]:
    """Towards doubly stochastic: max(exp(logits - row max), floor), then `rounds` times rows/=sum, columns/=sum.

    Columns sum to 1 after any number of rounds, rows in the limit (arXiv 2512.24880, eq. 9).
    """
    wide = jnp.moveaxis(_wide(logits), (-2, -1), (0, 1))  # tokens last: they fill the vector lanes, n x n would not
    positive = jnp.maximum(jnp.exp(wide - jnp.max(wide, axis=1, keepdims=True)), floor)
    return jnp.moveaxis(_balance(positive, rounds), (0, 1), (-2, -1))


def _total(terms: Iterable[Array]) -> Array:
    """A sum of few arrays, spelled out: XLA fuses it with what surrounds it, unlike a reduction over a tiny axis."""
    return functools.reduce(operator.add, terms)


def _rows(e: Array, v: Array) -> Array:
    """E v for e [n, n, …], v [n, …]."""
    return _total(e[:, j] * v[j][None] for j in range(e.shape[0]))


def _columns(e: Array, u: Array) -> Array:
    """E^T u."""
    return _total(e[i] * u[i][None] for i in range(e.shape[0]))


def _scalings(e: Array, rounds: int) -> tuple[Array, tuple[Array, Array]]:
    """The last v, and of every round the v before it and its u: u = 1/(E v), v = 1/(E^T u), from v = 1."""

    def one_round(v: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        u = 1 / _rows(e, v)
        return 1 / _columns(e, u), (v, u)

    ones = 0 * e[0] + 1  # not ones_like: keeps the sharding of e
    return jax.lax.scan(one_round, ones, None, length=rounds)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _balance(e: Array, rounds: int) -> Array:
    """u_i E_ij v_j: what `rounds` divisions of rows and columns make of E [n, n, …] > 0, with 2n divisions a round."""
    v, (_, u) = _scalings(e, rounds)
    return e * u[-1][:, None] * v[None]


def _balance_forward(e: Array, rounds: int) -> tuple[Array, Array]:
    return _balance(e, rounds), e


class _Backward(NamedTuple):
    """The gradient of E so far, and ds and dr of the round that is next to enter it."""

    de: Array
    ds: Array
    dr: Array


def _balance_backward(rounds: int, e: Array, gradient: Array) -> tuple[Array]:
    """The derivative of the rounds themselves, not of their limit; their scalings are computed again, not kept.

    Backwards through v = 1/s, s = E^T u and u = 1/r, r = E v', v' of the round before:  ds = -v^2 dv,
    dr = -u^2 (du + E ds),  dE += u ds^T + dr v'^T,  dv' = E^T dr;  du = 0 but for the last u, which the result reads.
    """
    last, (befores, us) = _scalings(e, rounds)

    def one_round(carry: _Backward, saved: tuple[Array, Array, Array]) -> tuple[_Backward, None]:
        de, ds, dr = carry
        u, before, u_before = saved
        de += u[:, None] * ds[None] + dr[:, None] * before[None]
        ds = -_columns(e, dr) * before * before
        return _Backward(de, ds, -_rows(e, ds) * u_before * u_before), None

    u, weighted = us[-1], gradient * e
    ds = -_columns(weighted, u) * last * last
    dr = -(_rows(weighted, last) + _rows(e, ds)) * u * u
    start = _Backward(gradient * u[:, None] * last[None], ds, dr)
    earlier = jnp.concatenate([us[:1], us[:-1]])  # the first round has none before it: what it computes is not read
    end, _ = jax.lax.scan(one_round, start, (us, befores, earlier), reverse=True)
    return (end.de,)


_balance.defvjp(_balance_forward, _balance_backward)
