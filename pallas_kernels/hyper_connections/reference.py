"""Hyper-connections as they are defined, a token at a time: the definition that every other implementation is held to.

z = vec X / rms(vec X);  a = z phi + bias, n for the read, n for the write, n^2 row by row for the mix;
H_pre = sigmoid(a_pre), H_post = 2 sigmoid(a_post), H_res = Sinkhorn(mat a_res);
u = sum_j H_pre[j] X_j;  X'_i = sum_j H_res[i, j] X_j + H_post[i] F(u).       Source: arXiv 2512.24880.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Weights(NamedTuple):
    """What projects a token's streams to its numbers; the norm's scale and the gates alpha are factors of phi."""

    phi: Float[Array, "n d m"]
    bias: Float[Array, " m"]


class Settings(NamedTuple):
    """Sinkhorn's rounds and floor, the norm's epsilon, the mesh axes that cut the batch, and an implementation's name.

    `batch_axes` is None without a mesh.
    """

    rounds: int = 20
    floor: float = 1e-6
    epsilon: float = 1e-6
    batch_axes: tuple[str, ...] | None = None
    implementation: str | None = None


class Coefficients(NamedTuple):
    """What a sublayer reads (`pre`), writes (`post`) and keeps (`res`, doubly stochastic); float32."""

    pre: Float[Array, "*c n"]
    post: Float[Array, "*c n"]
    res: Float[Array, "*c n n"]


class Open(NamedTuple):
    """A sublayer between its read and its write."""

    x: Float[Array, "b t n d"]
    coefficients: Coefficients


def enter(
    x: Float[Array, "b t n d"], weights: Weights, settings: Settings
) -> tuple[Float[Array, "b t d"], Open]:
    """The input of a sublayer's branch, and the sublayer left open for its write."""
    found = _each_token(lambda token: coefficients(token, weights, settings), x)
    return _each_token(_read, x, found.pre), Open(x, found)


def between(
    opened: Open, y: Float[Array, "b t d"], weights: Weights, settings: Settings
) -> tuple[Float[Array, "b t d"], Open]:
    """`leave`, and the next sublayer's `enter`."""
    return enter(leave(opened, y, settings), weights, settings)


def leave(opened: Open, y: Float[Array, "b t d"], settings: Settings) -> Float[Array, "b t n d"]:
    """X' of the sublayer whose branch gave y."""
    return _each_token(_write, opened.x, opened.coefficients, y)


def coefficients(x: Float[Array, "n d"], weights: Weights, settings: Settings) -> Coefficients:
    """Of one token."""
    n, wide = x.shape[0], x.astype(jnp.promote_types(x.dtype, jnp.float32))
    z = wide / jnp.sqrt(jnp.mean(jnp.square(wide)) + settings.epsilon)
    a = jnp.einsum("nd,ndm->m", z, weights.phi, precision=jax.lax.Precision.HIGHEST) + weights.bias
    res = sinkhorn(a[2 * n :].reshape(n, n), settings.rounds, settings.floor)
    return Coefficients(jax.nn.sigmoid(a[:n]), 2 * jax.nn.sigmoid(a[n : 2 * n]), res)


def sinkhorn(logits: Float[Array, "n n"], rounds: int, floor: float) -> Float[Array, "n n"]:
    """max(exp(logits - row max), floor), then `rounds` times rows / their sums, columns / their sums."""
    h = jnp.maximum(jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True)), floor)
    for _ in range(rounds):
        h = h / jnp.sum(h, axis=1, keepdims=True)
        h = h / jnp.sum(h, axis=0, keepdims=True)
    return h


def _each_token(function: Callable[..., Any], *arguments: Any) -> Any:
    return jax.vmap(jax.vmap(function))(*arguments)


def _read(x: Float[Array, "n d"], pre: Float[Array, " n"]) -> Float[Array, " d"]:
    return jnp.sum(pre[:, None] * x, axis=0).astype(x.dtype)


def _write(x: Float[Array, "n d"], found: Coefficients, y: Float[Array, " d"]) -> Float[Array, "n d"]:
    mixed = jnp.sum(found.res[:, :, None] * x[None], axis=1) + found.post[:, None] * y[None]
    return mixed.astype(x.dtype)
