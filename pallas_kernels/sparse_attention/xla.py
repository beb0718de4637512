"""Gated sparse attention as plain XLA, block by block: memory O(t * tile), whatever the length.

* Neither a list of indices nor a [t, s] array exists. Kept for each query and head: the threshold of its selection,
  the logarithm of its softmax's denominator; all else is computed again for each block of query tile and key tile.
* Selection: the indexer's scores of one query tile, [n, tile, s], are the largest array of the forward pass.
* Forward: an online softmax over key tiles; a second pass for the KL, which needs all heads' normalised attention.
* Backward: one pass, for each key tile over the query tiles that see it.
* Blocks out of causal reach or of other documents are skipped.
* For a GPU, which would launch thousands of small kernels so, whole strips instead: `common.strips`.

Scores, softmax and sums are float32 (float64 for float64 inputs). Selection is that of the dense definition: the same
functions on the same scores. (A score may differ in its last bit from the dense path's, whose products have another
shape; it then matters only where two scores are that close, or the budget that close to a whole number.)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.platform import target_device
from pallas_kernels.positions import Positions, accumulator
from pallas_kernels.sparse_attention.common import strips
from pallas_kernels.sparse_attention.common.blocks import (
    Block,
    Incoming,
    Plan,
    Shared,
    Softmax,
    block_chosen,
    block_gradients,
    block_logits,
    block_scores,
    divergence,
    online_softmax,
    statistics_of,
)
from pallas_kernels.sparse_attention.common.selection import Variance
from pallas_kernels.sparse_attention.common.strip_selection import fill_strip, select_rows
from pallas_kernels.sparse_attention.common.tiles import Keys, Queries, Selection
from pallas_kernels.sparse_attention.reference import Indexer, Statistics
from pallas_kernels.tiles import add, pad, put, reach, take

QUERY_TILE, KEY_TILE = 128, 256  # the fastest of a few on a CPU; a block of 16 heads is 2 MiB


def sparse_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s h k"],
    v: Float[Array, "b s h v"],
    indexer: Indexer,
    positions: Positions,
    *,
    k_base: int,
    k_min: int,
    k_max: int,
    sinks: int,
    score_scale: float | None = None,
    variance: Variance = "visible",
    head_axes: tuple[str, ...] = (),
    query_tile: int | None = None,
    key_tile: int = KEY_TILE,
    together: bool | None = None,
) -> tuple[Float[Array, "b t h v"], Statistics]:
    """`reference.sparse_attention` in tiles; differentiable in reverse mode, also inside a `shard_map`.

    A `shard_map` around it needs `check_vma=False`: its loops start from zeros that vary over no axis. With `together`,
    which None takes for a GPU, `query_tile` queries of all rows meet all keys at once (None: as memory allows).
    """
    t, s = q.shape[1], k.shape[1]
    together = target_device()[0] == "gpu" if together is None else together
    if query_tile is None:
        query_tile = strips.queries_at_once(q, s) if together else QUERY_TILE
    tiles = min(query_tile, t), s if together else min(key_tile, s)
    plan = Plan(k_base, k_min, k_max, sinks, score_scale, variance, head_axes, *tiles, together)
    queries = Queries(q, indexer.query, indexer.weight, positions.query, positions.query_segment)
    keys = Keys(k, v, indexer.key, positions.key, positions.key_segment)
    importance = indexer.importance.astype(accumulator(q))
    shared = Shared(indexer.bias, importance, jax.lax.stop_gradient(indexer.variance_ema))
    o, statistics = _attend(plan, pad(queries, tiles[0]), pad(keys, tiles[1]), shared)
    return o[:, :t], Statistics(*(x[:, :t] for x in statistics))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, queries: Queries, keys: Keys, shared: Shared) -> tuple[Array, Statistics]:
    """Outputs and statistics of whole tiles."""
    return _forward(plan, queries, keys, shared)[0]


def _forward(plan: Plan, queries: Queries, keys: Keys, shared: Shared) -> tuple[tuple[Array, Statistics], tuple]:
    """Each query tile of each row in turn; also what the backward pass keeps."""
    if plan.together:
        return strips.forward(plan, queries, keys, shared)
    b, t, h = queries.q.shape[:3]
    ranges = reach(queries, keys, plan.query_tile, plan.key_tile)
    length = jnp.max(queries.position, axis=-1) + 1
    wide = accumulator(queries.q)
    per_head, per_token = jnp.zeros((b, t, h), jnp.int32), jnp.zeros((b, t), jnp.int32)
    results = (
        jnp.zeros((b, t, h, keys.v.shape[-1]), keys.v.dtype),
        Statistics(*[per_token.astype(x) for x in (wide, wide, jnp.float32, wide)]),
        Selection(per_head, per_head, per_token),
        Softmax(per_head.astype(wide), per_token.astype(wide)),
    )

    def step(i: Array, results: tuple) -> tuple:
        row, tile = jnp.divmod(i, t // plan.query_tile)
        span = ranges.first_key[row, tile], ranges.end_key[row, tile]
        part = take(queries, row, tile, plan.query_tile)
        return put(results, _forward_tile(plan, part, keys, shared, row, span, length), row, tile)

    tiles = jnp.int32(b * (t // plan.query_tile))
    o, statistics, selection, softmax = jax.lax.fori_loop(jnp.int32(0), tiles, step, results)
    return (o, statistics), (queries, keys, shared, o, selection, softmax)


def _forward_tile(
    plan: Plan, queries: Queries, keys: Keys, shared: Shared, row: Array, span: tuple[Array, Array], length: Array
) -> tuple[Array, Statistics, Selection, Softmax]:
    """One query tile over the key tiles of `span`."""
    score = lambda part: block_scores(plan, queries, part, shared)  # noqa: E731
    strip = fill_strip(score, queries, keys, row, span, plan.key_tile, plan.sinks)
    selection, rows = select_rows(
        strip, span, plan.key_tile, shared.weights, shared.variance_ema, jax.lax.dynamic_slice_in_dim(length, row, 1),
        k_base=plan.k_base, k_min=plan.k_min, k_max=plan.k_max, variance=plan.variance,
    )  # fmt: skip

    def block(j: Array) -> Block:
        part = take(keys, row, j, plan.key_tile)
        scores = block_scores(plan, queries, part, shared)
        kept = block_chosen(scores, queries, part, selection, j * plan.key_tile)
        return Block(part.v, scores, kept, block_logits(queries, part))

    o, log_sum, entropy = online_softmax(block, span, queries.q, keys.v)
    kl, share = divergence(plan, block, span, shared.weights, log_sum)
    statistics = statistics_of(plan, kl, entropy, rows)
    return o, statistics, selection, Softmax(log_sum.swapaxes(1, 2), share)


def _backward(plan: Plan, kept: tuple, cotangents: tuple[Array, Statistics]) -> tuple[Queries, Keys, Shared]:
    """Each key tile of each row in turn, over the query tiles that see it."""
    queries, keys, shared, o, selection, softmax = kept
    d_o, d_kl = cotangents[0], cotangents[1].kl
    if plan.head_axes:  # every shard's KL came from the sum over shards: what their gradients are to it, they share
        (d_kl,) = jax.linear_transpose(plan.head_sum, d_kl)(d_kl)
    of_query = queries, selection, softmax, Incoming(d_o, o, d_kl)
    if plan.together:
        return _gradients(queries, keys, shared, *strips.backward(plan, of_query, keys, shared))
    ranges = reach(queries, keys, plan.query_tile, plan.key_tile)
    zeros = lambda x: jnp.zeros(x.shape, accumulator(x))  # noqa: E731 - gradients are summed in float32
    d_queries = tuple(zeros(x) for x in queries[:3])
    d_keys = tuple(jnp.zeros_like(x) for x in keys[:3])
    d_shared = zeros(shared.bias), zeros(shared.importance)

    def step(i: Array, results: tuple) -> tuple:
        d_queries, d_keys, d_shared = results
        row, tile = jnp.divmod(i, keys.k.shape[1] // plan.key_tile)
        part = take(keys, row, tile, plan.key_tile)

        def inner(j: Array, carry: tuple) -> tuple:
            d_queries, d_part, d_shared = carry
            tiles = take(of_query, row, j, plan.query_tile)
            more = block_gradients(plan, *tiles, part, shared, tile * plan.key_tile)
            return add(d_queries, more[0], row, j), *jax.tree.map(jnp.add, (d_part, d_shared), more[1:])

        start = d_queries, tuple(zeros(x) for x in part[:3]), d_shared
        span = ranges.first_query[row, tile], ranges.end_query[row, tile]
        d_queries, d_part, d_shared = jax.lax.fori_loop(*span, inner, start)
        return d_queries, put(d_keys, d_part, row, tile), d_shared

    tiles = jnp.int32(keys.k.shape[0] * (keys.k.shape[1] // plan.key_tile))
    d_queries, d_keys, d_shared = jax.lax.fori_loop(jnp.int32(0), tiles, step, (d_queries, d_keys, d_shared))
    return _gradients(queries, keys, shared, d_queries, d_keys, d_shared)


def _gradients(
    queries: Queries, keys: Keys, shared: Shared, d_queries: tuple, d_keys: tuple, d_shared: tuple
) -> tuple[Queries, Keys, Shared]:
    """Sums of gradients in the types of what they are of."""
    d_q, d_query, d_weight = (d.astype(x.dtype) for d, x in zip(d_queries, queries[:3], strict=True))
    d_k, d_v, d_key = (d.astype(x.dtype) for d, x in zip(d_keys, keys[:3], strict=True))
    d_bias, d_importance = (d.astype(x.dtype) for d, x in zip(d_shared, shared[:2], strict=True))
    none: Any = None  # of integers, and of the running mean
    return (
        Queries(d_q, d_query, d_weight, none, none),
        Keys(d_k, d_v, d_key, none, none),
        Shared(d_bias, d_importance, none),
    )


_attend.defvjp(_forward, _backward)
