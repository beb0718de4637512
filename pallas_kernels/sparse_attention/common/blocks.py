"""What one block of queries and keys computes, forward and backward, whoever loops over the blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.positions import accumulator, sees
from pallas_kernels.sparse_attention.common.selection import (
    Variance,
    chosen,
    indexer_scores,
    ordered,
)
from pallas_kernels.sparse_attention.common.strip_selection import RowStatistics
from pallas_kernels.sparse_attention.common.tiles import Keys, Queries, Selection
from pallas_kernels.sparse_attention.reference import Statistics, head_mean, head_weights, relative_entropy

_LOWEST = 1e-30  # below it a sum counts as nothing, as in the reference


class Plan(NamedTuple):
    """What is known when compiling; with `together` a strip of queries of all rows meets all keys at once."""

    k_base: int
    k_min: int
    k_max: int
    sinks: int
    score_scale: float | None
    variance: Variance
    head_axes: tuple[str, ...]
    query_tile: int
    key_tile: int
    together: bool = False

    def head_sum(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """With what the other shards of the heads have."""
        return jax.lax.psum(x, self.head_axes) if self.head_axes else x


class Shared(NamedTuple):
    """What all tokens share: `bias` [n], `importance` [h] (logits), `variance_ema` []."""

    bias: Array
    importance: Array
    variance_ema: Array

    @property
    def weights(self) -> Float[Array, " h"]:
        """sigmoid(importance)"""
        return jax.nn.sigmoid(self.importance)


class Softmax(NamedTuple):
    """Kept of a query: `log_sum` [b,t,h] of the softmax's exponentials; `share` [b,t], 1 / the sum of Q's mass."""

    log_sum: Array
    share: Array


def block_scores(plan: Plan, queries: Queries, keys: Keys, shared: Shared) -> Float[Array, "b n t s"]:
    """The indexer's scores of a block, for comparing with thresholds: a product never fused with what comes after.

    Forward and backward have to see the same bits, or a key at its row's threshold is in one and not in the other.
    """
    scores = indexer_scores(queries.indexer, keys.indexer, queries.weight, shared.bias, plan.score_scale)
    return jax.lax.optimization_barrier(scores)


def block_chosen(
    scores: Float[Array, "b n t s"], queries: Queries, keys: Keys, selection: Selection, first: Array
) -> Bool[Array, "b h t s"]:
    """Which keys of a block are selected; `first` is the index of its first key in the row."""
    visible = sees(queries.position, queries.segment, keys.position, keys.segment)
    index = first + jnp.arange(visible.shape[-1], dtype=jnp.int32)[None, None]
    order = ordered(scores, visible, visible & (index < selection.sink_end[..., None]))
    return chosen(order, selection.threshold.swapaxes(1, 2), selection.end.swapaxes(1, 2), first)


def block_logits(queries: Queries, keys: Keys) -> Float[Array, "b h t s"]:
    """q . k / sqrt(k)"""
    wide = accumulator(queries.q)
    return jnp.einsum("bthk,bshk->bhts", queries.q, keys.k, preferred_element_type=wide) * queries.q.shape[-1] ** -0.5


class Block(NamedTuple):
    """A query tile and a key tile: `v` [b,s,h,v], `scores` [b,n,t,s], `chosen` and `logits` [b,h,t,s]."""

    v: Array
    scores: Array
    chosen: Array
    logits: Array


def online_softmax(
    block: Callable[[Array], Block],
    span: tuple[Array | int, Array | int],
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


def divergence(
    plan: Plan,
    block: Callable[[Array], Block],
    span: tuple[Array | int, Array | int],
    importance: Float[Array, " h"],
    log_sum: Float[Array, "b h t"],
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """KL(P || Q) of `reference.indexer_kl`, and sum P / sum of Q's mass, its slope in that sum."""

    def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        x = block(j)
        cross, target_sum, mass_sum = carry
        target = head_mean(attention_of(x.logits, x.chosen, log_sum), plan.head_axes)
        weights = head_weights(x.chosen, importance, x.scores.shape[1])
        mass = plan.head_sum(jnp.sum(weights * x.scores, axis=1))
        ratio = jnp.log(jnp.where(target > 0, target, 1.0)) - jnp.log(jnp.maximum(mass, _LOWEST))
        return cross + jnp.sum(target * ratio, axis=-1), target_sum + target.sum(-1), mass_sum + mass.sum(-1)

    zeros = jnp.zeros_like(log_sum[:, 0])
    cross, target_sum, mass_sum = jax.lax.fori_loop(*span, step, (zeros, zeros, zeros))
    share = jnp.where(mass_sum > _LOWEST, target_sum / jnp.maximum(mass_sum, _LOWEST), 0.0)
    return cross + target_sum * jnp.log(jnp.maximum(mass_sum, _LOWEST)), share


def attention_of(
    logits: Float[Array, "b h t s"], kept: Bool[Array, "b h t s"], log_sum: Float[Array, "b h t"]
) -> Float[Array, "b h t s"]:
    """The softmax over all keys, of those of a block; never above 1, whatever the rounding."""
    return jnp.where(kept, jnp.exp(jnp.minimum(logits - log_sum[..., None], 0.0)), 0.0)


def statistics_of(
    plan: Plan, kl: Float[Array, "b t"], entropy: Float[Array, "b h t"], rows: RowStatistics
) -> Statistics:
    """What a tile of queries has to say."""
    axes = plan.head_axes
    return Statistics(
        kl=kl,
        entropy=head_mean(relative_entropy(entropy, rows.visible_count), axes),
        selected=head_mean(rows.budget.astype(jnp.float32), axes),
        score_variance=head_mean(rows.variance, axes),
    )


class Incoming(NamedTuple):
    """Gradients of the output [b,t,h,v] and the KL [b,t], and the output itself."""

    o: Array
    output: Array
    kl: Array


def block_gradients(
    plan: Plan,
    queries: Queries,
    selection: Selection,
    softmax: Softmax,
    incoming: Incoming,
    keys: Keys,
    shared: Shared,
    first: Array,
) -> tuple[tuple[Array, ...], tuple[Array, ...], tuple[Array, ...]]:
    """What one block adds to the gradients of (q, indexer query, weight), (k, v, indexer key), (bias, importance)."""
    wide = accumulator(queries.q)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    kept = block_chosen(block_scores(plan, queries, keys, shared), queries, keys, selection, first)
    attention = attention_of(block_logits(queries, keys), kept, softmax.log_sum.swapaxes(1, 2))
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
