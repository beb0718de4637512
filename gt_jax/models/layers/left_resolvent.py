"""The diagonal of left-connected resolvents: a Moebius recurrence along the row, in pairs of real numbers.

H is tridiagonal, h_t on its diagonal and o_t beside it, H_t its block of the tokens up to t. Then

    g_t = [(H_t - z)^-1]_tt = 1 / (h_t - z - o_t^2 g_{t-1})

by Schur's complement, so g_t knows no later token. With z = i eta the imaginary part of every g is positive, that of
every denominator is at most -eta, and |g| <= 1 / eta whatever h and o are.

- g = p / q turns the step into the matrix [[0, 1], [-o^2, h - z]] on (p, q). Rows are cut into chunks: the product of
  each chunk's matrices, an associative scan over the chunks, then the recurrence itself within each chunk, all chunks
  at once: 2 sqrt(t) short steps and the work of the sequential recurrence twice. Products are divided by their largest
  part; as g is a ratio, no logarithm of the scale is needed.
- Every token's g is the result of a step of the recurrence itself, from an imaginary part that is not negative:
  the bound holds by construction, up to the rounding of one division.
- The derivative is not taken through the products, where it is a difference of nearly equal numbers, but is the
  recurrence dg_t = g_t^2 (o_t^2 dg_{t-1} - dh_t + g_{t-1} d(o_t^2)), another associative scan. So dg_t / dh_s is
  -(o_{s+1} ... o_t g_s ... g_t)^2.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Pair(NamedTuple):
    """A complex number as two real ones: TPUs have no complex units, and complex64 keeps CPUs from vectorising."""

    re: Array
    im: Array


class Moebius(NamedTuple):
    """g -> (a g + b) / (c g + d), known up to a factor."""

    a: Pair
    b: Pair
    c: Pair
    d: Pair


def times(x: Pair, y: Pair) -> Pair:
    """x y."""
    return Pair(x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re)


def plus(x: Pair, y: Pair) -> Pair:
    """x + y."""
    return Pair(x.re + y.re, x.im + y.im)


def scaled_by(x: Pair, strength: Array) -> Pair:
    """x times real numbers."""
    return Pair(strength * x.re, strength * x.im)


def inverse(x: Pair) -> Pair:
    """1 / x."""
    size = x.re * x.re + x.im * x.im
    return Pair(x.re / size, -x.im / size)


def left_resolvent(
    diagonal: Float[Array, "b t h"],
    broadening: Float[Array, " h"],
    coupling: Float[Array, "b t h"],
    before: tuple[Float[Array, "b h"], Float[Array, "b h"]],
    real: Bool[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t h"], Float[Array, "b t h"]]:
    """(Re g, Im g) of g_t = 1 / (diagonal_t - i broadening - coupling_t g_{t-1}), with g_{-1} `before`.

    `coupling` is the square of the off-diagonal, 0 where a token does not see the one before it. `broadening` is
    positive. Where `real` is False g stays as it is. At least float32; differentiable any number of times, both ways.
    """
    imaginary = jnp.broadcast_to(-broadening[None, None], diagonal.shape)
    real = jnp.ones(diagonal.shape[:2], bool) if real is None else real
    return tuple(_resolvent(Pair(diagonal, imaginary), coupling, Pair(*before), real))  # type: ignore[return-value]


@jax.custom_jvp
def _resolvent(h: Pair, coupling: Array, before: Pair, real: Array) -> Pair:
    """`left_resolvent` with the whole denominator, [b, t, h], but for its last term in `h`."""
    tokens = coupling.shape[1]
    if tokens == 1:
        now = _step(_at(h, 0), coupling[:, 0], before, real[:, 0, None])
        return Pair(now.re[:, None], now.im[:, None])
    size = 2 ** math.ceil(math.log2(tokens) / 2)
    cut = [_chunks(x, size, fill) for x, fill in ((h.re, 1.0), (h.im, 0.0), (coupling, 0.0), (real[..., None], False))]
    given = Pair(cut[0], cut[1]), cut[2], cut[3]
    start = _chunk_starts(*given, before)

    def step(g: Pair, token: tuple[Pair, Array, Array]) -> tuple[Pair, Pair]:
        now = _step(*token[:2], g, token[2])
        return now, now

    g = jax.lax.scan(step, start, given)[1]
    return Pair(*(_joined(part, tokens) for part in g))


@_resolvent.defjvp
def _resolvent_tangent(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Pair, Pair]:
    (h, coupling, before, real), (dh, dcoupling, dbefore, _) = primals, tangents
    g = _resolvent(h, coupling, before, real)
    last = Pair(*(jnp.concatenate([b[:, None], part[:, :-1]], axis=1) for b, part in zip(before, g, strict=True)))
    square, here = times(g, g), real[..., None]
    moved = times(square, plus(scaled_by(last, dcoupling), Pair(-dh.re, -dh.im)))
    keep = scaled_by(square, coupling)
    keep = Pair(jnp.where(here, keep.re, 1.0), jnp.where(here, keep.im, 0.0))
    moved = Pair(*(jnp.where(here, part, 0.0) for part in moved))
    carried = times(_at(keep, 0), dbefore)
    moved = Pair(*(part.at[:, 0].add(first) for part, first in zip(moved, carried, strict=True)))

    def after(early: tuple[Pair, Pair], late: tuple[Pair, Pair]) -> tuple[Pair, Pair]:
        return times(late[0], early[0]), plus(times(late[0], early[1]), late[1])

    return g, jax.lax.associative_scan(after, (keep, moved), axis=1)[1]


def _step(h: Pair, coupling: Array, g: Pair, real: Array) -> Pair:
    """One token on. What a chunk starts from may have lost its sign to rounding: an imaginary part below 0 is 0."""
    im = jnp.maximum(g.im, 0.0)
    now = inverse(Pair(h.re - coupling * g.re, h.im - coupling * im))
    return Pair(jnp.where(real, now.re, g.re), jnp.where(real, now.im, im))


def _chunk_starts(h: Pair, coupling: Array, real: Array, before: Pair) -> Pair:
    """g of the token before each chunk, [n, b, h]; the arguments are [size, n, b, h]."""
    shape, dtype = coupling.shape[1:], coupling.dtype
    one, zero = (Pair(jnp.full(shape, n, dtype), jnp.zeros(shape, dtype)) for n in (1.0, 0.0))

    def step(done: Moebius, token: tuple[Pair, Array, Array]) -> tuple[Moebius, None]:
        h, coupling, real = token
        low = [plus(times(h, y), scaled_by(x, -coupling)) for x, y in ((done.a, done.c), (done.b, done.d))]
        moved = _normalised(Moebius(done.c, done.d, *low))
        return jax.tree.map(lambda new, old: jnp.where(real, new, old), moved, done), None

    product = jax.lax.scan(step, Moebius(one, zero, zero, one), (h, coupling, real))[0]
    whole = jax.lax.associative_scan(lambda early, late: _normalised(_after(early, late)), product)
    first = Pair(before.re[None], before.im[None])
    top, bottom = plus(times(whole.a, first), whole.b), plus(times(whole.c, first), whole.d)
    ends = times(top, inverse(bottom))
    return Pair(*(jnp.concatenate([b, end[:-1]]) for b, end in zip(first, ends, strict=True)))


def _after(early: Moebius, late: Moebius) -> Moebius:
    """The matrix of `late`, times that of `early`."""
    return Moebius(*(plus(times(x, early_x), times(y, early_y)) for x, y in ((late.a, late.b), (late.c, late.d))
                     for early_x, early_y in ((early.a, early.c), (early.b, early.d))))  # fmt: skip


def _normalised(matrix: Moebius) -> Moebius:
    """Divided by its largest part."""
    largest = jnp.stack([jnp.maximum(jnp.abs(x.re), jnp.abs(x.im)) for x in matrix]).max(axis=0)
    return Moebius(*(scaled_by(x, 1.0 / largest) for x in matrix))


def _at(x: Pair, token: int) -> Pair:
    return Pair(x.re[:, token], x.im[:, token])


def _chunks(x: Array, size: int, fill: float | bool) -> Array:
    """[b, t, h] -> [size, n, b, h], filled up at the end."""
    chunks = -(-x.shape[1] // size)
    padded = jnp.pad(x, ((0, 0), (0, chunks * size - x.shape[1]), (0, 0)), constant_values=fill)
    return padded.reshape(x.shape[0], chunks, size, x.shape[2]).transpose(2, 1, 0, 3)


def _joined(x: Array, tokens: int) -> Array:
    """The inverse of `_chunks`."""
    return x.transpose(2, 1, 0, 3).reshape(x.shape[2], -1, x.shape[3])[:, :tokens]
