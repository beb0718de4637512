"""Causal attention on a TPU by the splash attention kernels that come with JAX: whole rows, no window.

They mask by the index in the row. Queries and keys of the same tokens stand in the same order there, so that is causal
whatever gaps the positions have; a window, which counts positions, is not theirs to know.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float

from pallas_kernels.positions import Positions

LANES = 128
TILE = 512  # of queries and of keys, where the row has as many


def unsupported(q: Array, window: int | None, same_tokens: bool) -> list[str]:
    """What the kernels do not do, a line each."""
    problems = []
    if not same_tokens:
        problems.append("the splash kernels take keys of the queries' own tokens; these come from a cache")
    if window is not None:
        problems.append(f"the splash kernels know no window of positions, window is {window}")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        problems.append(f"the splash kernels take float32 and bfloat16, not {q.dtype}")
    if q.shape[-1] % LANES and LANES % q.shape[-1]:
        problems.append(f"the splash kernels take heads as wide as a part or a multiple of {LANES}, not {q.shape[-1]}")
    return problems


def causal_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t n k"],
    v: Float[Array, "b t n k"],
    positions: Positions,
    window: int | None,
    *,
    interpret: bool = False,
) -> Float[Array, "b t h k"]:
    """`reference.causal_attention` of keys of the queries' own tokens; memory O(t)."""
    t, heads, width = q.shape[1:]
    tile = min(TILE, -(-t // LANES) * LANES)
    past = -t % tile
    attend = _kernel(t + past, heads, tile, interpret)
    scaled = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)
    q, k, v = (jnp.pad(x.swapaxes(1, 2), [(0, 0), (0, 0), (0, past), (0, 0)]) for x in (scaled, k, v))
    segments = jnp.pad(positions.query_segment, [(0, 0), (0, past)], constant_values=-1)
    o = jax.vmap(lambda q, k, v, ids: attend(q, k, v, segment_ids=splash.SegmentIds(ids, ids)))(q, k, v, segments)
    seen = (positions.query_segment != -1)[..., None, None]  # a key of segment -1 is visible to nobody
    return jnp.where(seen, o.swapaxes(1, 2)[:, :t], 0.0).astype(q.dtype)


def _kernel(tokens: int, heads: int, tile: int, interpret: bool) -> Callable[..., Array]:
    mask = splash.MultiHeadMask([splash.CausalMask((tokens, tokens))] * heads)
    sizes = splash.BlockSizes(
        block_q=tile, block_kv=tile, block_kv_compute=tile, block_q_dkv=tile, block_kv_dkv=tile,
        block_kv_dkv_compute=tile, block_q_dq=tile, block_kv_dq=tile,
    )  # fmt: skip
    return splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
