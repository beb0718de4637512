"""Gated sparse attention as plain XLA, block by block: memory O(t * tile), whatever the length.

* Neither a list of indices nor a [t, s] array exists. Kept for each query and head: the threshold of its selection,
  the logarithm of its softmax's denominator; all else is computed again for each block of query tile and key tile.
* Selection: the indexer's scores of one query tile, [n, tile, s], are the largest array of the forward pass.
* Forward: an online softmax over key tiles; a second pass for the KL, which needs all heads' normalised attention.
* Backward: one pass, for each key tile over the query tiles that see it.
* Blocks out of causal reach or of other documents are skipped.

Scores, softmax and sums are float32 (float64 for float64 inputs). Selection is that of the dense definition: the same
functions on the same scores. (A score may differ in its last bit from the dense path's, whose products have another
shape; it then matters only where two scores are that close, or the budget that close to a whole number.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.positions import Positions, accumulator, sees
from pallas_kernels.sparse_attention.common.selection import (
    Variance,
    chosen,
    indexer_scores,
    ordered,
)
from pallas_kernels.sparse_attention.common.strip_selection import fill_strip, select_rows
from pallas_kernels.sparse_attention.common.tiles import Keys, Queries, Selection
from pallas_kernels.sparse_attention.reference import (
    Indexer,
    Statistics,
    head_mean,
    head_weights,
    relative_entropy,
)
from pallas_kernels.tiles import add, pad, put, reach, take

QUERY_TILE, KEY_TILE = 128, 256  # the fastest of a few on a CPU; a block of 16 heads is 2 MiB
_LOWEST = 1e-30  # below it a sum counts as nothing, as in the reference


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
    query_tile: int = QUERY_TILE,
    key_tile: int = KEY_TILE,
) -> tuple[Float[Array, "b t h v"], Statistics]:
    """`reference.sparse_attention` in tiles; differentiable in reverse mode, also inside a `shard_map`.

    A `shard_map` around it needs `check_vma=False`: its loops start from zeros that vary over no axis.
    """
    t, s = q.shape[1], k.shape[1]
    tiles = min(query_tile, t), min(key_tile, s)
    plan = _Plan(k_base, k_min, k_max, sinks, score_scale, variance, head_axes, *tiles)
    queries = Queries(q, indexer.query, indexer.weight, positions.query, positions.query_segment)
    keys = Keys(k, v, indexer.key, positions.key, positions.key_segment)
    importance = indexer.importance.astype(accumulator(q))
    shared = _Shared(indexer.bias, importance, jax.lax.stop_gradient(indexer.variance_ema))
    o, statistics = _attend(plan, pad(queries, tiles[0]), pad(keys, tiles[1]), shared)
    return o[:, :t], Statistics(*(x[:, :t] for x in statistics))


class _Plan(NamedTuple):
    """What is known when compiling."""

    k_base: int
    k_min: int
    k_max: int
    sinks: int
    score_scale: float | None
    variance: Variance
    head_axes: tuple[str, ...]
    query_tile: int
    key_tile: int

    def head_sum(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """With what the other shards of the heads have."""
        return jax.lax.psum(x, self.head_axes) if self.head_axes else x


class _Shared(NamedTuple):
    """What all tokens share: `bias` [n], `importance` [h] (logits), `variance_ema` []."""

    bias: Array
    importance: Array
    variance_ema: Array

    @property
    def weights(self) -> Float[Array, " h"]:
        """sigmoid(importance)"""
        return jax.nn.sigmoid(self.importance)


class _Softmax(NamedTuple):
    """Kept of a query: `log_sum` [b,t,h] of the softmax's exponentials; `share` [b,t], 1 / the sum of Q's mass."""

    log_sum: Array
    share: Array


def _scores(plan: _Plan, queries: Queries, keys: Keys, shared: _Shared) -> Float[Array, "b n t s"]:
    """The indexer's scores of a block, for comparing with thresholds: a product never fused with what comes after.

    Forward and backward have to see the same bits, or a key at its row's threshold is in one and not in the other.
    """
    scores = indexer_scores(queries.indexer, keys.indexer, queries.weight, shared.bias, plan.score_scale)
    return jax.lax.optimization_barrier(scores)


def _chosen(
    scores: Float[Array, "b n t s"], queries: Queries, keys: Keys, selection: Selection, first: Array
) -> Bool[Array, "b h t s"]:
    """Which keys of a block are selected; `first` is the index of its first key in the row."""
    visible = sees(queries.position, queries.segment, keys.position, keys.segment)
    index = first + jnp.arange(visible.shape[-1], dtype=jnp.int32)[None, None]
    order = ordered(scores, visible, visible & (index < selection.sink_end[..., None]))
    return chosen(order, selection.threshold.swapaxes(1, 2), selection.end.swapaxes(1, 2), first)


def _logits(queries: Queries, keys: Keys) -> Float[Array, "b h t s"]:
    wide = accumulator(queries.q)
    return jnp.einsum("bthk,bshk->bhts", queries.q, keys.k, preferred_element_type=wide) * queries.q.shape[-1] ** -0.5


class _Block(NamedTuple):
    """A query tile and a key tile: `v` [b,s,h,v], `scores` [b,n,t,s], `chosen` and `logits` [b,h,t,s]."""

    v: Array
    scores: Array
    chosen: Array
    logits: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, queries: Queries, keys: Keys, shared: _Shared) -> tuple[Array, Statistics]:
    """Outputs and statistics of whole tiles."""
    return _forward(plan, queries, keys, shared)[0]


def _forward(plan: _Plan, queries: Queries, keys: Keys, shared: _Shared) -> tuple[tuple[Array, Statistics], tuple]:
    """Each query tile of each row in turn; also what the backward pass keeps."""
    b, t, h = queries.q.shape[:3]
    ranges = reach(queries, keys, plan.query_tile, plan.key_tile)
    length = jnp.max(queries.position, axis=-1) + 1
    wide = accumulator(queries.q)
    per_head, per_token = jnp.zeros((b, t, h), jnp.int32), jnp.zeros((b, t), jnp.int32)
    results = (
        jnp.zeros((b, t, h, keys.v.shape[-1]), keys.v.dtype),
        Statistics(*[per_token.astype(x) for x in (wide, wide, jnp.float32, wide)]),
        Selection(per_head, per_head, per_token),
        _Softmax(per_head.astype(wide), per_token.astype(wide)),
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
    plan: _Plan, queries: Queries, keys: Keys, shared: _Shared, row: Array, span: tuple[Array, Array], length: Array
) -> tuple[Array, Statistics, Selection, _Softmax]:
    """One query tile over the key tiles of `span`."""
    score = lambda part: _scores(plan, queries, part, shared)  # noqa: E731
    strip = fill_strip(score, queries, keys, row, span, plan.key_tile, plan.sinks)
    selection, rows = select_rows(
        strip, span, plan.key_tile, shared.weights, shared.variance_ema, jax.lax.dynamic_slice_in_dim(length, row, 1),
        k_base=plan.k_base, k_min=plan.k_min, k_max=plan.k_max, variance=plan.variance,
    )  # fmt: skip

    def block(j: Array) -> _Block:
        part = take(keys, row, j, plan.key_tile)
        scores = _scores(plan, queries, part, shared)
        kept = _chosen(scores, queries, part, selection, j * plan.key_tile)
        return _Block(part.v, scores, kept, _logits(queries, part))

    o, log_sum, entropy = _online_softmax(block, span, queries.q, keys.v)
    kl, share = _divergence(plan, block, span, shared.weights, log_sum)
    axes = plan.head_axes
    statistics = Statistics(
        kl=kl,
        entropy=head_mean(relative_entropy(entropy, rows.visible_count), axes),
        selected=head_mean(rows.budget.astype(jnp.float32), axes),
        score_variance=head_mean(rows.variance, axes),
    )
    return o, statistics, selection, _Softmax(log_sum.swapaxes(1, 2), share)


def _online_softmax(
    block: Callable[[Array], _Block],
    span: tuple[Array, Array],
    q: Float[Array, "b t h k"],
    v: Float[Array, "rows s h v"],
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h t"], Float[Array, "b h t"]]:
    """Output, log of the sum of exponentials, and entropy; all 0 for a query without keys."""

    def step(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        top, total, weighted, o = carry
        x = block(j)
        higher = jnp.maximum(top, jnp.max(jnp.where(x.chosen, x.logits, -1e30), axis=-1))
        fade = jnp.exp(top - higher)
        p = jnp.where(x.chosen, jnp.exp(x.logits - higher[..., None]), 0.0)
        read = jnp.einsum("bhts,bshv->bhtv", p.astype(x.v.dtype), x.v, preferred_element_type=o.dtype)
        total, weighted = total * fade + p.sum(-1), weighted * fade + (p * x.logits).sum(-1)
        return higher, total, weighted, o * fade[..., None] + read

    b, t, h = q.shape[:3]
    zeros = jnp.zeros((b, h, t), accumulator(q))
    start = zeros - 1e30, zeros, zeros, jnp.zeros((b, h, t, v.shape[-1]), accumulator(v))
    top, total, weighted, o = jax.lax.fori_loop(*span, step, start)
    some = jnp.where(total > 0, total, 1.0)
    log_sum = jnp.where(total > 0, top + jnp.log(some), 0.0)
    return (o / some[..., None]).swapaxes(1, 2), log_sum, log_sum - weighted / some


def _divergence(
    plan: _Plan,
    block: Callable[[Array], _Block],
    span: tuple[Array, Array],
    importance: Float[Array, " h"],
    log_sum: Float[Array, "b h t"],
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """KL(P || Q) of `reference.indexer_kl`, and sum P / sum of Q's mass, its slope in that sum."""

    def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        x = block(j)
        cross, target_sum, mass_sum = carry
        target = head_mean(_attention(x.logits, x.chosen, log_sum), plan.head_axes)
        weights = head_weights(x.chosen, importance, x.scores.shape[1])
        mass = plan.head_sum(jnp.sum(weights * x.scores, axis=1))
        ratio = jnp.log(jnp.where(target > 0, target, 1.0)) - jnp.log(jnp.maximum(mass, _LOWEST))
        return cross + jnp.sum(target * ratio, axis=-1), target_sum + target.sum(-1), mass_sum + mass.sum(-1)

    zeros = jnp.zeros_like(log_sum[:, 0])
    cross, target_sum, mass_sum = jax.lax.fori_loop(*span, step, (zeros, zeros, zeros))
    share = jnp.where(mass_sum > _LOWEST, target_sum / jnp.maximum(mass_sum, _LOWEST), 0.0)
    return cross + target_sum * jnp.log(jnp.maximum(mass_sum, _LOWEST)), share


def _attention(
    logits: Float[Array, "b h t s"], kept: Bool[Array, "b h t s"], log_sum: Float[Array, "b h t"]
) -> Float[Array, "b h t s"]:
    """The softmax over all keys, of those of a block; never above 1, whatever the rounding."""
    return jnp.where(kept, jnp.exp(jnp.minimum(logits - log_sum[..., None], 0.0)), 0.0)


def _backward(plan: _Plan, kept: tuple, cotangents: tuple[Array, Statistics]) -> tuple[Queries, Keys, _Shared]:
    """Each key tile of each row in turn, over the query tiles that see it."""
    queries, keys, shared, o, selection, softmax = kept
    d_o, d_kl = cotangents[0], cotangents[1].kl
    if plan.head_axes:  # every shard's KL came from the sum over shards: what their gradients are to it, they share
        (d_kl,) = jax.linear_transpose(plan.head_sum, d_kl)(d_kl)
    of_query = queries, selection, softmax, _Incoming(d_o, o, d_kl)
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
            more = _block_gradients(plan, *tiles, part, shared, tile * plan.key_tile)
            return add(d_queries, more[0], row, j), *jax.tree.map(jnp.add, (d_part, d_shared), more[1:])

        start = d_queries, tuple(zeros(x) for x in part[:3]), d_shared
        span = ranges.first_query[row, tile], ranges.end_query[row, tile]
        d_queries, d_part, d_shared = jax.lax.fori_loop(*span, inner, start)
        return d_queries, put(d_keys, d_part, row, tile), d_shared

    tiles = jnp.int32(keys.k.shape[0] * (keys.k.shape[1] // plan.key_tile))
    d_queries, d_keys, d_shared = jax.lax.fori_loop(jnp.int32(0), tiles, step, (d_queries, d_keys, d_shared))
    d_q, d_query, d_weight = (d.astype(x.dtype) for d, x in zip(d_queries, queries[:3], strict=True))
    d_bias, d_importance = (d.astype(x.dtype) for d, x in zip(d_shared, shared[:2], strict=True))
    d_k, d_v, d_key = d_keys
    none: Any = None  # of integers, and of the running mean
    return (
        Queries(d_q, d_query, d_weight, none, none),
        Keys(d_k, d_v, d_key, none, none),
        _Shared(d_bias, d_importance, none),
    )


class _Incoming(NamedTuple):
    """Gradients of the output [b,t,h,v] and the KL [b,t], and the output itself."""

    o: Array
    output: Array
    kl: Array


def _block_gradients(
    plan: _Plan,
    queries: Queries,
    selection: Selection,
    softmax: _Softmax,
    incoming: _Incoming,
    keys: Keys,
    shared: _Shared,
    first: Array,
) -> tuple[tuple[Array, ...], tuple[Array, ...], tuple[Array, ...]]:
    """What one block adds to the gradients of (q, indexer query, weight), (k, v, indexer key), (bias, importance)."""
    wide = accumulator(queries.q)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    kept = _chosen(_scores(plan, queries, keys, shared), queries, keys, selection, first)
    attention = _attention(_logits(queries, keys), kept, softmax.log_sum.swapaxes(1, 2))
    d_attention = product("bthv,bshv->bhts", incoming.o, keys.v)
    # for each block anew: for all rows at once it would hold both in float32
    delta = product("bthv,bthv->bht", incoming.o, incoming.output)
    slope = attention * (d_attention - delta[..., None]) * queries.q.shape[-1] ** -0.5
    slope = slope.astype(queries.q.dtype)
    d_q, d_k = product("bhts,bshk->bthk", slope, keys.k), product("bhts,bthk->bshk", slope, queries.q)
    d_v = product("bhts,bthv->bshv", attention.astype(keys.v.dtype), incoming.o)

    def mass(query: Array, key: Array, weight: Array, bias: Array, importance: Array) -> Float[Array, "b t s"]:
        scores = indexer_scores(query, key, weight, bias, plan.score_scale)
        return jnp.sum(head_weights(kept, jax.nn.sigmoid(importance), scores.shape[1]) * scores, axis=1)

    own, pull = jax.vjp(mass, queries.indexer, keys.indexer, queries.weight, shared.bias, shared.importance)
    whole = plan.head_sum(own)
    target = head_mean(attention, plan.head_axes)
    pulled = jnp.where(whole > _LOWEST, target / jnp.maximum(whole, _LOWEST), 0.0)
    d_query, d_key, d_weight, *d_shared = pull(incoming.kl[..., None] * (softmax.share[..., None] - pulled))
    return (d_q, d_query, d_weight), (d_k, d_v, d_key), tuple(d_shared)


_attend.defvjp(_forward, _backward)
