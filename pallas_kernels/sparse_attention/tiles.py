"""Tiles of queries and keys: what is loaded of them, which can see each other, and the numbers kept for each query."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.sparse_attention.selection import (
    Variance,
    budget,
    entries,
    largest,
    ordered,
    row_variance,
    sees,
    thresholds,
    visible_variance,
)

Tree = TypeVar("Tree")
_FAR = jnp.iinfo(jnp.int32).max


class Queries(NamedTuple):
    """What belongs to a query: `q` [b,t,h,k], `indexer` [b,t,n,i], `weight` [b,t,n], place and segment [b,t]."""

    q: Array
    indexer: Array
    weight: Array
    position: Array
    segment: Array


class Keys(NamedTuple):
    """What belongs to a key: `k` [b,s,h,k], `v` [b,s,h,v], `indexer` [b,s,n,i], place and segment [b,s]."""

    k: Array
    v: Array
    indexer: Array
    position: Array
    segment: Array


class Selection(NamedTuple):
    """What selects the keys of a query, as in `selection`: `threshold`, `end` [b,t,h]; `sink_end` [b,t].

    Sinks are the visible keys whose index in the row is below `sink_end`.
    """

    threshold: Array
    end: Array
    sink_end: Array


def take(tree: Tree, row: Array, index: Array | int, size: int) -> Tree:
    """Tile `index` of row `row` of every [b, t, ...] array, as [1, size, ...]."""

    def load(x: Array) -> Array:
        return jax.lax.dynamic_slice(x, _corner(x, row, index * size), (1, size, *x.shape[2:]))

    return jax.tree.map(load, tree)


def put(tree: Tree, tile: Tree, row: Array, index: Array) -> Tree:
    """Every array with the tile written, in the array's dtype."""

    def store(x: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice(x, part.astype(x.dtype), _corner(x, row, index * part.shape[1]))

    return jax.tree.map(store, tree, tile)


def add(tree: Tree, tile: Tree, row: Array, index: Array) -> Tree:
    """Every array with the tile added."""
    old = jax.tree.map(lambda x, part: take(x, row, index, part.shape[1]), tree, tile)
    return put(tree, jax.tree.map(jnp.add, old, tile), row, index)


def _corner(x: Array, row: Array, token: Array | int) -> list[Array]:
    return [jnp.int32(start) for start in (row, token, *[0] * (x.ndim - 2))]


def pad(tree: Tree, tile: int) -> Tree:
    """Every [b, t, ...] array up to whole tiles; what is added is of segment -1 where the array is a segment."""

    def filled(x: Array) -> Array:
        widths = [(0, 0), (0, -x.shape[1] % tile)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths)

    padded = jax.tree.map(filled, tree)
    segment = tree.segment  # type: ignore[attr-defined]
    return padded._replace(segment=jnp.pad(segment, [(0, 0), (0, -segment.shape[1] % tile)], constant_values=-1))


class Reach(NamedTuple):
    """Ranges of tiles that may see each other: key tiles of each query tile [b,nq], query tiles of each key tile."""

    first_key: Array
    end_key: Array
    first_query: Array
    end_query: Array


def reach(queries: Queries, keys: Keys, query_tile: int, key_tile: int) -> Reach:
    """From the extremes of the tiles, so that the ranges hold every visible pair, and few others.

    For a causal row half of the tiles, for packed documents those of the same document.
    """
    tiled = lambda x, tile: x.reshape(x.shape[0], -1, tile)  # noqa: E731 - one expression, used six times
    real_query, real_key = queries.segment != -1, keys.segment != -1
    last = jnp.max(tiled(jnp.where(real_query, queries.position, -_FAR), query_tile), axis=-1)
    earliest = jnp.min(tiled(jnp.where(real_key, keys.position, _FAR), key_tile), axis=-1)
    low_query = jnp.min(tiled(jnp.where(real_query, queries.segment, _FAR), query_tile), axis=-1)
    low_key = jnp.min(tiled(jnp.where(real_key, keys.segment, _FAR), key_tile), axis=-1)
    high_query = jnp.max(tiled(jnp.where(real_query, queries.segment, -_FAR), query_tile), axis=-1)
    high_key = jnp.max(tiled(jnp.where(real_key, keys.segment, -_FAR), key_tile), axis=-1)
    seen = (
        (earliest[:, None] <= last[..., None])
        & (low_key[:, None] <= high_query[..., None])
        & (low_query[..., None] <= high_key[:, None])
    )
    return Reach(*_range(seen), *_range(seen.swapaxes(1, 2)))


def _range(seen: Array) -> tuple[Int[Array, "b n"], Int[Array, "b n"]]:
    """First true index along the last axis and the one after the last; (0, 0) where none is true."""
    some, index = jnp.any(seen, axis=-1), jnp.arange(seen.shape[-1], dtype=jnp.int32)[None, None]
    first = jnp.min(jnp.where(seen, index, _FAR), axis=-1)
    return jnp.where(some, first, 0), jnp.max(jnp.where(seen, index + 1, 0), axis=-1)


class RowStatistics(NamedTuple):
    """Of each query of a tile: its visible keys [b,t], its budget and the variance that set it [b,h,t]."""

    visible_count: Array
    count: Array
    variance: Array


def select_rows(
    scores: Float[Array, "b n t s"],
    queries: Queries,
    keys: Keys,
    importance: Float[Array, "h"],
    variance_ema: Float[Array, ""],
    length: Int[Array, "b"],
    *,
    k_base: int,
    k_min: int,
    k_max: int,
    sinks: int,
    variance: Variance,
) -> tuple[Selection, RowStatistics]:
    """The selection of a tile of queries from their scores of all keys of the row; what is not visible may be 0."""
    visible = sees(queries.position, queries.segment, keys.position, keys.segment)
    index = jnp.arange(visible.shape[-1], dtype=jnp.int32)[None, None]
    # a bisection, not a running count: it needs no memory of the strip's size
    before = lambda c: entries(visible & (index < c[..., None]))  # noqa: E731
    sink_end = largest(index.size.bit_length(), visible.shape[:2], lambda c: before(c) <= sinks)
    visible_count = entries(visible)
    spread = row_variance(scores, visible, length) if variance == "row" else visible_variance(scores, visible)
    group = importance.size // scores.shape[1]
    of_head = jnp.repeat(spread, group, axis=1) * (importance**2)[None, :, None]
    count = budget(of_head, variance_ema, visible_count, k_base=k_base, k_min=k_min, k_max=k_max)
    order = ordered(scores, visible, visible & (index < sink_end[..., None]))
    threshold, end = (x.swapaxes(1, 2) for x in thresholds(order, count))
    return Selection(threshold, end, sink_end), RowStatistics(visible_count, count, of_head)
