"""How arrays lie in global memory for the Hopper kernels.

Tokens keep their places, [p, b, t, h, w]: length and widths padded to whole tiles, in bfloat16, the low parts of
float32 tokens behind the high ones. Gates and sums of log decays are float32 by head, [b, hv, ., t]. States are
transposed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.gated_delta_rule.common.chunks import pad_tokens
from pallas_kernels.gated_delta_rule.gpu.plan import C

_LOWEST_DECAY = -110.0  # e^-110 is 0 in float32
_MASKED = -1e30
_COARSE = 256.0


def lay_tokens(x: Float[Array, "b t h w"], width: int, parts: int) -> Float[Array, "p b padded h width"]:
    """Whole chunks of whole tiles, in bfloat16 parts."""
    x = pad_tokens(x, C)
    x = jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[3])])
    high = x.astype(jnp.bfloat16)
    if parts == 1:
        return high[None]
    x = x.astype(jnp.float32)
    return jnp.stack([high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)])


def take_tokens(x: Float[Array, "b padded h width"], like: Array) -> Array:
    """Back to the shape and dtype of `like` [b, t, h, w]."""
    return x[:, : like.shape[1], :, : like.shape[3]].astype(like.dtype)


def gather(x: Float[Array, "b padded hv width"], like: Array) -> Float[Array, "b padded h width"]:
    """Sums over the value heads of each head of `like`."""
    heads = like.shape[2]
    if x.shape[2] == heads:
        return x
    return x.reshape(*x.shape[:2], heads, -1, x.shape[3]).sum(3, dtype=jnp.float32)


def lay_state(x: Float[Array, "b hv k v"], key_width: int, value_width: int) -> Float[Array, "b hv vp kp"]:
    """A transposed state in whole tiles."""
    x = x.astype(jnp.float32).swapaxes(2, 3)
    return jnp.pad(x, [(0, 0), (0, 0), (0, value_width - x.shape[2]), (0, key_width - x.shape[3])])


def take_state(x: Float[Array, "b hv vp kp"], like: Array) -> Array:
    """Back to the shape of `like` [b, hv, k, v]."""
    return x.swapaxes(2, 3)[:, :, : like.shape[2], : like.shape[3]]


class Gates(NamedTuple):
    """What is left of what: gamma, lam and beta of each token; sums of log decays, coarse and, if two, fine."""

    gates: Float[Array, "b hv 3 t"]
    sums: Float[Array, "b hv s t"]


def lay_gates(
    g: Float[Array, "b t hv"], beta: Float[Array, "b t hv"], run: Int[Array, "b padded"] | None, exact: bool
) -> Gates:
    """Decays inside the chunks, 0 across a segment boundary; coarse sums are exact, so differences stay accurate."""
    g, beta = (_by_chunk(x) for x in (g, beta))
    g = jnp.maximum(g, _LOWEST_DECAY)
    coarse = jnp.round(g * _COARSE) / _COARSE
    sums = [jnp.cumsum(x, axis=3) for x in (coarse, g - coarse)]
    into = sums[0] + sums[1]
    out = (sums[0][..., -1:] - sums[0]) + (sums[1][..., -1:] - sums[1])
    if run is not None:
        inside = run.reshape(run.shape[0], 1, -1, C)
        before = jnp.concatenate([jnp.zeros_like(inside[:, :, :1, :1]), inside[:, :, :-1, -1:]], axis=2)
        into = jnp.where(inside == before, into, _MASKED)
        out = jnp.where(inside == inside[..., -1:], out, _MASKED)
    sums = sums if exact else [sums[0] + sums[1]]
    return Gates(_stack([jnp.exp(into), jnp.exp(out), beta]), _stack(sums))


def take_gates(
    sums: Float[Array, "l b hv 5 t"],
    gates: Float[Array, "b hv 3 t"],
    run: Int[Array, "b t"] | None,
    length: int,
) -> tuple[Float[Array, "b length hv"], Float[Array, "b length hv"]]:
    """dg and dbeta out of the sums of `gradients`.

    Token m's decay acts on what its segment reads at i >= m, and on what tokens i < m leave to the next chunk.
    """
    reading, of_keys, leaving, d_beta, kept = (x.reshape(*x.shape[:2], -1, C) for x in jnp.moveaxis(sums.sum(0), 2, 0))
    seen = jnp.tril(jnp.ones((C, C), jnp.float32))
    if run is not None:
        inside = run.reshape(run.shape[0], 1, -1, C)
        seen = jnp.where(inside[..., :, None] == inside[..., None, :], seen[None, None, None], 0.0)
    earlier = jnp.tril(seen, -1).swapaxes(-1, -2)
    d_g = _through(reading + of_keys, seen) + _through(leaving, earlier)
    last = gates[:, :, 0].reshape(kept.shape)[..., -1]
    d_g = d_g + (last * kept.sum(-1))[..., None]
    return _by_token(d_g, length), _by_token(d_beta, length)


def _through(x: Float[Array, "b hv n c"], pairs: Float[Array, "*all c c"]) -> Float[Array, "b hv n c"]:
    if pairs.ndim == 2:
        return jnp.matmul(x, pairs, precision=jax.lax.Precision.HIGHEST)
    return jnp.matmul(x[..., None, :], pairs, precision=jax.lax.Precision.HIGHEST)[..., 0, :]


def _by_token(x: Float[Array, "b hv n c"], length: int) -> Float[Array, "b length hv"]:
    return x.reshape(*x.shape[:2], -1).swapaxes(1, 2)[:, :length]


def _by_chunk(x: Float[Array, "b t hv"]) -> Float[Array, "b hv n c"]:
    x = pad_tokens(x.astype(jnp.float32), C).swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1, C)


def _stack(xs: list[Array]) -> Array:
    return jnp.stack([x.reshape(*x.shape[:2], -1) for x in xs], axis=2)
