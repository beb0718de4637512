"""Gated sparse attention over a dense mask: the definition that memory-lean implementations are tested against.

Memory O(t * s) a head. Gradients: attention to q, k, v; the KL loss to the indexer; none through the selection.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.positions import Positions, accumulator, sees
from pallas_kernels.sparse_attention.common.selection import (
    Variance,
    all_visible,
    budget,
    indexer_scores,
    row_variance,
    select,
    visible_variance,
)


class Indexer(NamedTuple):
    """The indexer: `query` [b,t,n,i], `key` [b,s,n,i], `weight` [b,t,n] in (0,1), `bias` [n], `importance` [h].

    `variance_ema` [] is the running mean of the score variance; `importance` are logits, one an attention head.
    """

    query: Array
    key: Array
    weight: Array
    bias: Array
    importance: Array
    variance_ema: Array


class Statistics(NamedTuple):
    """Per query [b,t], float32: KL(attention || indexer), entropy over log of the keys, selected keys, variance."""

    kl: Array
    entropy: Array
    selected: Array
    score_variance: Array


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
) -> tuple[Float[Array, "b t h v"], Statistics]:
    """o = softmax(q.k / sqrt(k) over the selected keys) v, selection per head by the indexer's scores.

    `score_scale` is that of the indexer's logits (None: i^-0.5). The variance that sets the budget is over the visible
    keys, or with `variance` "row" over the row up to the last query, other entries counted as 0.
    Inside a `shard_map` that splits the heads, `head_axes` names its axes, so that sums over heads are whole.
    A query that sees no key gets zeros.
    """
    heads = q.shape[2]
    visible = sees(*positions)
    rank = jnp.cumsum(visible, axis=-1, dtype=jnp.int32)  # 1 for the first visible key of the query's document
    visible_count = rank[..., -1]
    scores = indexer_scores(indexer.query, indexer.key, indexer.weight, indexer.bias, score_scale)
    group = heads // scores.shape[1]
    importance = jax.nn.sigmoid(indexer.importance.astype(accumulator(q)))
    frozen_scores = jax.lax.stop_gradient(scores)
    if variance == "row":
        spread = row_variance(frozen_scores, visible, jnp.max(positions.query, axis=-1) + 1)
    else:
        spread = visible_variance(frozen_scores, visible)
    head_variance = jnp.repeat(spread, group, axis=1) * jax.lax.stop_gradient(importance**2)[None, :, None]
    count = budget(head_variance, indexer.variance_ema, visible_count, k_base=k_base, k_min=k_min, k_max=k_max)
    if k.shape[1] <= k_min:  # no budget is below what there is
        chosen = all_visible(visible, heads)
    else:
        chosen = select(scores, visible, visible & (rank <= sinks), count)
    logits = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=accumulator(q)) * q.shape[-1] ** -0.5
    attention = jnp.where(chosen, jax.nn.softmax(jnp.where(chosen, logits, -1e30), axis=-1), 0.0)
    o = jnp.einsum("bhts,bshv->bthv", attention.astype(v.dtype), v, preferred_element_type=accumulator(v))
    frozen = jax.lax.stop_gradient(attention)
    entropy = -jnp.sum(jnp.where(frozen > 0, frozen * jnp.log(jnp.maximum(frozen, 1e-30)), 0.0), axis=-1)
    statistics = Statistics(
        kl=indexer_kl(frozen, scores, importance, chosen, head_axes),
        entropy=head_mean(relative_entropy(entropy, visible_count), head_axes),
        selected=head_mean(jnp.sum(chosen, axis=-1, dtype=jnp.float32), head_axes),
        score_variance=head_mean(head_variance, head_axes),
    )
    return o.astype(v.dtype), statistics


def indexer_kl(
    attention: Float[Array, "b h t s"],
    scores: Float[Array, "b n t s"],
    importance: Float[Array, " h"],
    chosen: Bool[Array, "b h t s"],
    head_axes: tuple[str, ...] = (),
) -> Float[Array, "b t"]:
    """KL(P || Q): P the attention summed over heads, Q the indexer's scores likewise, both on the selected keys.

    P = mean_h a_h;  Q = sum_h [chosen_h] importance_h score_h, normalised to sum 1 over the keys. Gradient only to Q:
    selection passes none, so this loss is all the indexer learns from (as in DeepSeek-V3.2's sparse attention).
    """
    mass = jnp.sum(head_weights(chosen, importance, scores.shape[1]) * scores, axis=1)
    if head_axes:
        mass = jax.lax.psum(mass, head_axes)
    target = head_mean(attention, head_axes)
    held = target > 0
    log_q = jnp.log(jnp.maximum(mass, 1e-30)) - jnp.log(jnp.maximum(mass.sum(axis=-1, keepdims=True), 1e-30))
    log_p = jnp.log(jnp.where(held, target, 1.0))
    return jnp.sum(jnp.where(held, target * (log_p - log_q), 0.0), axis=-1)


def head_weights(
    chosen: Bool[Array, "b h t s"], importance: Float[Array, " h"], indexer_heads: int
) -> Float[Array, "b n t s"]:
    """Importance of the attention heads that selected the key, summed over the heads of each indexer head."""
    b, _, t, s = chosen.shape
    weights = chosen.astype(importance.dtype) * importance[None, :, None, None]
    return weights.reshape(b, indexer_heads, -1, t, s).sum(axis=2)


def head_mean(x: Float[Array, "b h *rest"], head_axes: tuple[str, ...]) -> Float[Array, " b *rest"]:
    """Mean over all heads, those of the other shards included."""
    mean = jnp.mean(x, axis=1)
    return jax.lax.pmean(mean, head_axes) if head_axes else mean


def relative_entropy(entropy: Float[Array, "b h t"], visible_count: Int[Array, "b t"]) -> Float[Array, "b h t"]:
    """Entropy over log of the visible keys; 0 where only one is visible."""
    return entropy / jnp.log(jnp.maximum(visible_count, 2).astype(jnp.float32))[:, None]
