"""Manifold-constrained hyper-connections (mHC, arXiv 2512.24880): n residual streams, mixed by a matrix a sublayer.

z = RMSNorm(vec X);  H_pre = sigmoid(a_pre z phi_pre + b_pre);  H_post = 2 sigmoid(a_post z phi_post + b_post);
H_res = Sinkhorn(a_res mat(z phi_res) + b_res);  X' = H_res X + H_post (outer) F(H_pre X).

- Here n is the number of streams: the state X is [b, t, n, d].
- H_res is doubly stochastic, so a sublayer that returns 0 keeps the mean over streams, and nothing else.
- The scale of the norm is folded into phi and its root mean square divides the product, so z is never stored.
- Streams are mixed by multiply and add, not by a matrix product: accelerators round the inputs of products to
  bfloat16 by default, and a rounded H_res is no longer doubly stochastic.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gt_jax.configs.model import HyperConfig
from gt_jax.devices.sharding import Rules, on_mesh, reshard
from gt_jax.models.layers.primitives import WeightSpec, float32_einsum, widen
from gt_jax.typing import Activations

Streams = Float[Array, "b t n d"]


class Coefficients(NamedTuple):
    """What a sublayer reads (`pre`), writes (`post`) and keeps (`res`, doubly stochastic); float32."""

    pre: Float[Array, "b t n"]
    post: Float[Array, "b t n"]
    res: Float[Array, "b t n n"]


def to_streams(x: Activations, n: int) -> Streams:
    """The state before the first layer: stream 0 is x, the others are 0."""
    return jnp.pad(x[:, :, None], ((0, 0), (0, 0), (0, n - 1), (0, 0)))


def from_streams(x: Streams) -> Activations:
    """The mean over streams, computed in float32, in x's dtype."""
    return jnp.mean(widen(x), axis=2).astype(x.dtype)


def read(x: Streams, pre: Float[Array, "b t n"]) -> Activations:
    """H_pre X, the input of a sublayer: sum_n pre_n X_n in float32, in x's dtype."""
    return jnp.sum(widen(x) * pre[..., None], axis=2).astype(x.dtype)


def write(x: Streams, coefficients: Coefficients, y: Activations) -> Streams:
    """H_res X + H_post (outer) y, in float32, in x's dtype."""
    _, post, res = coefficients
    return (_mix(res, x) + widen(y)[:, :, None] * post[..., None]).astype(x.dtype)


@jax.custom_vjp
def _mix(matrix: Float[Array, "b t n n"], x: Streams) -> Streams:
    """sum_j matrix_ij x_j, float32; its backward pass, written out, is one more `_mix` and one reduction over d."""
    wide = widen(x)
    return _total(matrix[:, :, :, j, None] * wide[:, :, j, None] for j in range(x.shape[2]))


def _mix_forward(matrix: Array, x: Array) -> tuple[Array, tuple[Array, Array]]:
    return _mix(matrix, x), (matrix, x)


def _mix_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    matrix, x = saved
    outer = float32_einsum("btid,btjd->btij", gradient, x)
    return outer, _mix(jnp.swapaxes(matrix, -1, -2), gradient).astype(x.dtype)


_mix.defvjp(_mix_forward, _mix_backward)


def sinkhorn(logits: Float[Array, "*c n n"], rounds: int, floor: float) -> Float[Array, "*c n n"]:
    """Towards doubly stochastic: max(exp(logits - row max), floor), then `rounds` times rows/=sum, columns/=sum.

    Columns sum to 1 after any number of rounds, rows in the limit (arXiv 2512.24880, eq. 9).
    """
    wide = jnp.moveaxis(widen(logits), (-2, -1), (0, 1))  # tokens last: they fill the vector lanes, n x n would not
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


class HyperConnection(nn.Module):
    """The coefficients of one sublayer from the state before it."""

    config: HyperConfig
    width: int
    rules: Rules
    weights: WeightSpec
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Streams) -> Coefficients:
        n, d = self.config.streams, self.width
        scale = Scale(n * d, self.rules, name="norm")().reshape(n, d, 1)
        shapes = {"pre": (n,), "post": (n,), "res": (n, n)}
        parts = [Projection(self.config, d, shape, self.rules, self.weights, name=name)()
                 for name, shape in shapes.items()]  # fmt: skip
        phi = widen(jnp.concatenate([w for w, _, _ in parts], axis=-1)) * scale
        pre, post, res = (alpha * logits.reshape(*x.shape[:2], *b.shape) + b[None, None] for logits, (_, b, alpha)
                          in zip(self._split(self._project(x, phi)), parts, strict=True))  # fmt: skip
        balanced = sinkhorn(res, self.config.sinkhorn_rounds, self.config.sinkhorn_floor)
        return Coefficients(jax.nn.sigmoid(pre), 2 * jax.nn.sigmoid(post), balanced)

    def _project(self, x: Streams, phi: Float[Array, "n d m"]) -> Float[Array, "b t m"]:
        """RMSNorm(vec X) phi in float32, phi with the norm's scale in it."""
        product = float32_einsum("btnd,ndm->btm", x, phi, out_sharding=on_mesh(self.rules.spec("batch", None, None)))
        square = jnp.mean(jnp.square(widen(x)), axis=(2, 3))
        return product * jax.lax.rsqrt(square + self.epsilon)[..., None]

    def _split(self, logits: Float[Array, "b t m"]) -> list[Array]:
        n = self.config.streams
        return jnp.split(logits, (n, 2 * n), axis=-1)


class Scale(nn.Module):
    """The learned float32 scale of an RMSNorm, 1 at init; applying it is left to the caller."""

    width: int
    rules: Rules

    @nn.compact
    def __call__(self) -> Float[Array, " d"]:
        return self.param("scale", nn.initializers.ones, (self.width,), jnp.float32, on_mesh(self.rules.spec(None)))


class Projection(nn.Module):
    """The weights of one coefficient: phi [n, d, m], gathered, in the parameter dtype; b and alpha in float32."""

    config: HyperConfig
    width: int
    shape: tuple[int, ...]
    rules: Rules
    weights: WeightSpec

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "n d m"], Float[Array, "..."], Float[Array, ""]]:
        size = functools.reduce(operator.mul, self.shape)
        shape, axes = (self.config.streams, self.width, size), (None, "embed", None)
        w = self.param("w", self.weights.init, shape, jnp.dtype(self.weights.param), on_mesh(self.rules.spec(*axes)))
        whole = on_mesh(self.rules.spec(*[None] * len(self.shape)))
        b = self.param("b", nn.initializers.zeros, self.shape, jnp.float32, whole)
        start = nn.initializers.constant(self.config.initial_scale)
        alpha = self.param("alpha", start, (), jnp.float32, on_mesh(self.rules.spec()))
        return reshard(w, self.rules.gathered(*axes)), b, alpha
