"""The selection of a tile of queries: a strip of their scores of all keys, filled and then counted tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.positions import sees
from pallas_kernels.sparse_attention.common.selection import (
    Variance,
    budget,
    entries,
    ordered,
    thresholds,
    variance_of,
)
from pallas_kernels.sparse_attention.common.tiles import Keys, Queries, Selection
from pallas_kernels.tiles import take


class RowStatistics(NamedTuple):
    """Of each query of a tile: its visible keys [b,t], its budget and the variance that set it [b,h,t]."""

    visible_count: Array
    budget: Array
    variance: Array


class Strip(NamedTuple):
    """Of a tile of queries: `scores` and their `order` (0: not visible) [1,n,t,s]; visible keys and sink_end [1,t]."""

    scores: Array
    order: Array
    visible_count: Array
    sink_end: Array


def fill_strip(
    score: Callable[[Keys], Array], queries: Queries, keys: Keys, row: Array, span: tuple[Array, Array], tile: int,
    sinks: int,
) -> Strip:  # fmt: skip
    """Scores of the key tiles of `span`, and what is known of the keys before each."""

    def step(j: Array, strip: Strip) -> Strip:
        part = take(keys, row, j, tile)
        scores = score(part)
        visible = sees(queries.position, queries.segment, part.position, part.segment)
        sink = strip.visible_count[..., None] + jnp.cumsum(visible, axis=-1, dtype=jnp.int32) <= sinks
        order = ordered(scores, visible, visible & sink)
        return Strip(
            jax.lax.dynamic_update_slice_in_dim(strip.scores, scores, j * tile, axis=3),
            jax.lax.dynamic_update_slice_in_dim(strip.order, order, j * tile, axis=3),
            strip.visible_count + entries(visible),
            strip.sink_end + entries(sink),
        )

    (_, t, n), s = queries.weight.shape, keys.k.shape[1]
    like = jax.eval_shape(score, jax.eval_shape(lambda: take(keys, row, 0, tile)))
    start = Strip(
        jnp.zeros((1, n, t, s), like.dtype),
        jnp.zeros((1, n, t, s), jnp.int32),
        jnp.zeros((1, t), jnp.int32),
        jnp.full((1, t), span[0] * tile, jnp.int32),
    )
    return jax.lax.fori_loop(*span, step, start)


def select_rows(
    strip: Strip,
    span: tuple[Array, Array],
    tile: int,
    importance: Float[Array, " h"],
    variance_ema: Float[Array, ""],
    length: Int[Array, "1"],
    *,
    k_base: int,
    k_min: int,
    k_max: int,
    variance: Variance,
) -> tuple[Selection, RowStatistics]:
    """Budget and thresholds as in the dense definition, from sums and counts that go tile by tile."""
    _, n, t, s = strip.scores.shape
    h = importance.size

    def over_tiles(of_tile: Callable[[Array], Array], start: Array) -> Array:
        return jax.lax.fori_loop(*span, lambda j, found: found + of_tile(j), start)

    def part(x: Array, j: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, j * tile, tile, axis=3)

    def total(f: Callable[[Array], Array]) -> Array:
        def of_tile(j: Array) -> Array:
            return jnp.sum(jnp.where(part(strip.order, j) > 0, f(part(strip.scores, j)), 0.0), axis=-1)

        return over_tiles(of_tile, jnp.zeros((1, n, t), strip.scores.dtype))

    def counted(holds: Callable[[Array, Array], Array]) -> Array:
        def of_tile(j: Array) -> Array:
            index = j * tile + jnp.arange(tile, dtype=jnp.int32)[None, None, None, None]
            return entries(holds(part(strip.order, j)[:, :, None], index))

        return over_tiles(of_tile, jnp.zeros((1, n, h // n, t), jnp.int32))

    size = length[:, None] if variance == "row" else jnp.maximum(strip.visible_count, 1)
    spread = variance_of(total, strip.visible_count, size)
    of_head = jnp.repeat(spread, h // n, axis=1) * (importance**2)[None, :, None]
    count = budget(of_head, variance_ema, strip.visible_count, k_base=k_base, k_min=k_min, k_max=k_max)
    found = thresholds(counted, count.reshape(1, n, h // n, t), s)
    threshold, end = (x.reshape(1, h, t).swapaxes(1, 2) for x in found)
    return Selection(threshold, end, strip.sink_end), RowStatistics(strip.visible_count, count, of_head)
