"""Strips of queries of all rows, each against all keys at once: few large kernels, as a GPU wants them.

- A strip holds some arrays [b, h, strip, s] of float32, each of `STRIP_BYTES` at most; what is kept between the passes
  is that of the tiles: thresholds and softmax sums.
- Nothing is skipped, neither what lies in a query's future nor another document: twice the products of the tiles, in a
  hundredth of the launches. No loop's length and nothing that the host would wait for depends on a value, but whether
  scores are tied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.positions import accumulator, sees
from pallas_kernels.sparse_attention.common.blocks import (
    Block,
    Incoming,
    Plan,
    Shared,
    Softmax,
    block_gradients,
    block_logits,
    block_scores,
    divergence,
    online_softmax,
    statistics_of,
)
from pallas_kernels.sparse_attention.common.selection import (
    budget,
    chosen,
    entries,
    ordered,
    thresholds,
    variance_of,
)
from pallas_kernels.sparse_attention.common.strip_selection import RowStatistics
from pallas_kernels.sparse_attention.common.tiles import Keys, Queries, Selection
from pallas_kernels.sparse_attention.reference import Statistics

STRIP_BYTES = 256 << 20
DIGIT = 3  # bits of a threshold that one kernel finds: seven counts of the same scores


def queries_at_once(q: Array, keys: int) -> int:
    """How many queries of each row make a strip: a power of two, or all."""
    b, t, h = q.shape[:3]
    fitting = max(STRIP_BYTES // (4 * b * h * keys), 1)
    return t if fitting >= t else 1 << (fitting.bit_length() - 1)


def forward(plan: Plan, queries: Queries, keys: Keys, shared: Shared) -> tuple[tuple[Array, Statistics], tuple]:
    """Outputs and statistics, and what the backward pass keeps."""
    length = jnp.max(queries.position, axis=-1) + 1
    each = lambda nothing, part: (nothing, _strip(plan, part, keys, shared, length))  # noqa: E731
    o, statistics, selection, softmax = _over_strips(plan, each, (), queries)[1]
    return (o, statistics), (queries, keys, shared, o, selection, softmax)


def backward(
    plan: Plan, of_query: tuple[Queries, Selection, Softmax, Incoming], keys: Keys, shared: Shared
) -> tuple[tuple[Array, ...], tuple[Array, ...], tuple[Array, ...]]:
    """Gradients of (q, indexer query, weight), (k, v, indexer key), (bias, importance); sums of strips in float32."""

    def step(
        sums: tuple, part: tuple[Queries, Selection, Softmax, Incoming]
    ) -> tuple[tuple, tuple[Array, ...]]:
        queries, selection, softmax, incoming = part
        d_queries, *more = block_gradients(
            plan, queries, selection, softmax, incoming, keys, shared, jnp.int32(0)
        )
        return jax.tree.map(jnp.add, sums, tuple(more)), d_queries

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, accumulator(x)), (tuple(keys[:3]), tuple(shared[:2])))
    (d_keys, d_shared), d_queries = _over_strips(plan, step, start, of_query)
    return d_queries, d_keys, d_shared


def _over_strips(plan: Plan, step: Callable[..., tuple[Any, Any]], carry: Any, rows: Any) -> tuple[Any, Any]:
    """`step(carry, strip)` of each strip of arrays [b, t, …] in turn: the last carry, results joined along t."""
    length = jax.tree.leaves(rows)[0].shape[1]
    if length == plan.query_tile:
        return step(carry, rows)

    def one(carry: Any, start: Array) -> tuple[Any, Any]:
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, plan.query_tile, axis=1)  # noqa: E731
        return step(carry, jax.tree.map(cut, rows))

    carry, parts = jax.lax.scan(one, carry, jnp.arange(0, length, plan.query_tile, dtype=jnp.int32))
    return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], length, *x.shape[3:]), parts)


def _strip(
    plan: Plan, queries: Queries, keys: Keys, shared: Shared, length: Array
) -> tuple[Array, Statistics, Selection, Softmax]:
    """One strip; `length` [b] of the rows up to their last query."""
    scores = block_scores(plan, queries, keys, shared)
    kept, selection, rows = _select(plan, scores, queries, keys, shared, length)
    whole = Block(keys.v, scores, kept, block_logits(queries, keys))
    o, log_sum, entropy = online_softmax(lambda _: whole, (0, 1), queries.q, keys.v)
    kl, share = divergence(plan, lambda _: whole, (0, 1), shared.weights, log_sum)
    statistics = statistics_of(plan, kl, entropy, rows)
    return o.astype(keys.v.dtype), statistics, selection, Softmax(log_sum.swapaxes(1, 2), share)


def _select(
    plan: Plan, scores: Array, queries: Queries, keys: Keys, shared: Shared, length: Array
) -> tuple[Array, Selection, RowStatistics]:
    """Which keys are selected [b,h,t,s], by what, and how many: as in the dense definition."""
    (b, n, t, s), h = scores.shape, shared.importance.size
    visible = sees(queries.position, queries.segment, keys.position, keys.segment)
    seen, index = entries(visible), jnp.arange(s, dtype=jnp.int32)[None, None, None, None]
    sink_end = entries(jnp.cumsum(visible, axis=-1, dtype=jnp.int32) <= plan.sinks)
    order = ordered(scores, visible, visible & (index[0, 0] < sink_end[..., None]))
    size = length[:, None] if plan.variance == "row" else jnp.maximum(seen, 1)
    spread = variance_of(lambda f: jnp.sum(jnp.where(order > 0, f(scores), 0.0), axis=-1), seen, size)
    of_head = jnp.repeat(spread, h // n, axis=1) * (shared.weights**2)[None, :, None]
    count = budget(of_head, shared.variance_ema, seen, k_base=plan.k_base, k_min=plan.k_min, k_max=plan.k_max)
    counted = lambda holds: entries(holds(order[:, :, None], index))  # noqa: E731
    found = thresholds(counted, count.reshape(b, n, h // n, t), s, DIGIT)
    threshold, end = (x.reshape(b, h, t) for x in found)
    selection = Selection(threshold.swapaxes(1, 2), end.swapaxes(1, 2), sink_end)
    return chosen(order, threshold, end), selection, RowStatistics(seen, count, of_head)
