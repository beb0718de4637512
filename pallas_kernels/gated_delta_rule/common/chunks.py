"""Chunks of a sequence: cut out, put back, and the decays inside one.

With G = cumsum(g) inside a chunk of C tokens: gamma = e^G is what is left at token i of what entered the chunk,
lam = e^(G_C - G) what is left at its end of what token i wrote, pair[i, j] = e^(G_i - G_j) for i >= j what is left at
token i of what token j wrote. All three are 0 where a segment begins in between.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_MASKED = -1e30  # an exponent; -inf would make the difference of two masked ones nan
_LOWEST_DECAY = {"float32": -110.0, "float64": -1000.0}  # e to that is 0; a sum of many must stay small enough
_COARSE = 256.0


class Decays(NamedTuple):
    """How much of the state is left, for c tokens of a chunk and hv value heads."""

    gamma: Float[Array, "b hv c"]
    lam: Float[Array, "b hv c"]
    last: Float[Array, "b hv"]
    pair: Float[Array, "b hv c c"]
    visible: Float[Array, "*b c c"]  # 1 for i >= j of one segment


def pad_tokens(x: Array, chunk: int) -> Array:
    """Zeros after the last token of [b, t, ...], up to whole chunks: exact no-ops for the state."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))


def take_chunk(x: Array, index: Array, chunk: int, dtype: jnp.dtype) -> Array:
    """Chunk `index` of [b, t, h, ...] as [b, h, c, ...] of that dtype."""
    return jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk, axis=1).astype(dtype).swapaxes(1, 2)


def put_chunk(buffer: Array, index: Array, x: Array) -> Array:
    """`buffer` [b, t, h, ...] with chunk `index` replaced by x [b, h, c, ...]."""
    update = x.swapaxes(1, 2).astype(buffer.dtype)
    return jax.lax.dynamic_update_slice_in_dim(buffer, update, index * x.shape[2], axis=1)


def runs(segment_ids: Int[Array, "b t"], chunk: int) -> Int[Array, "b padded"]:
    """Count the segment starts up to each token; padding belongs to the last segment."""
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.pad(starts, [(0, 0), (1, -segment_ids.shape[1] % chunk)])
    return jnp.cumsum(starts, axis=1, dtype=jnp.int32)


def decays(g: Float[Array, "b hv c"], run: Int[Array, "b padded"] | None, index: Int[Array, ""]) -> Decays:
    """The decays inside chunk `index`; every exponent is at most 0."""
    chunk = g.shape[-1]
    visible = jnp.tril(jnp.ones((chunk, chunk), g.dtype))
    g = jnp.maximum(g, _LOWEST_DECAY[g.dtype.name])
    # Two sums, the coarse one exact: differences of large sums stay accurate in float32. Up to 512 tokens their sums
    # are below 2^24 of its steps.
    grid = _COARSE * min(1.0, 512 / chunk)
    coarse = jnp.round(g * grid) / grid
    sums = [
        jnp.einsum("bhd,cd->bhc", part, visible, precision=jax.lax.Precision.HIGHEST) for part in (coarse, g - coarse)
    ]
    into = sums[0] + sums[1]
    out = (sums[0][..., -1:] - sums[0]) + (sums[1][..., -1:] - sums[1])
    between = (sums[0][..., :, None] - sums[0][..., None, :]) + (sums[1][..., :, None] - sums[1][..., None, :])
    if run is not None:
        inside = jax.lax.dynamic_slice_in_dim(run, index * chunk, chunk, axis=1)
        before = jax.lax.dynamic_slice_in_dim(run, jnp.maximum(index * chunk - 1, 0), 1, axis=1)
        into = jnp.where((inside == before)[:, None], into, _MASKED)
        out = jnp.where((inside == inside[:, -1:])[:, None], out, _MASKED)
        visible = visible[None] * (inside[:, :, None] == inside[:, None, :])
    mask = jnp.expand_dims(visible > 0, (0, 1) if run is None else 1)
    gamma = jnp.exp(into)
    return Decays(gamma, jnp.exp(out), gamma[..., -1], jnp.exp(jnp.where(mask, between, _MASKED)), visible)
