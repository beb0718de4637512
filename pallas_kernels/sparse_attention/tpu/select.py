"""The kernel that selects: scores of a strip of queries, their variance and budget, and the threshold of each head.

The strip [keys, lanes] stays in VMEM: of all indexer heads of the strip's queries, integers that order like the
selection. Between the smallest and the largest of a row, bisection on them finds an integer that as many keys reach as
the budget allows; for most rows long before the last bit, and then it stops. Heads with the same budget share the work.

A histogram would need fewer passes, but the vector unit cannot scatter: 256 bins are 256 comparisons an element, where
bisection takes one a bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.matrix_unit import NN, Ref, multiply
from pallas_kernels.sparse_attention.common.selection import SINK_KEY, budget
from pallas_kernels.sparse_attention.tpu.layout import LANES, SUBLANES, Plan, padded
from pallas_kernels.sparse_attention.tpu.scores import (
    block_gates,
    block_order,
    block_sees,
    key_columns,
    key_index,
    plain_order,
)

_FAR = jnp.iinfo(jnp.int32).max


def select_kernel(
    plan: Plan,
    spans: Ref,
    query: Ref,
    place: Ref,
    weight: Ref,
    shared: Ref,
    ema: Ref,
    keys: Ref,
    rows: Ref,
    threshold: Ref,
    end: Ref,
    count: Ref,
    seen: Ref,
    variance: Ref,
    flags: Ref,
    strip: Ref,
) -> None:
    """Blocks in: spans (scalars) [b,strips,2], query [1,1,depth,lanes], place [1,1,8,lanes] (position, segment, length
    of the row), weight [1,1,1,lanes], shared [1+r,lanes] (bias; squared importance of each head), ema [1,1], keys
    [1,s,depth], rows [1,8,s]. Out: threshold, end, count [1,1,r,lanes]; seen [1,1,8,lanes] (visible keys, sink_end);
    variance [1,1,1,lanes]; flags [1,1,1,tiles] (0: nothing selected in the key tile, 2: ties end inside).
    Scratch: the strip [s,lanes].
    """
    span = spans[_program(0), _program(1), 0], spans[_program(0), _program(1), 1]
    place = place[0, 0]

    def fill(with_sinks: bool, j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        return _fill_tile(plan, with_sinks, j, carry, (query, place, weight, shared), (keys, rows), strip)

    def missing(state: tuple[Array, tuple[Array, ...]]) -> Array:
        j, carry = state
        return (j < span[1]) & _any((carry[0] < plan.sinks) & (place[1:2] != -1))

    def more(state: tuple[Array, tuple[Array, ...]]) -> tuple[Array, tuple[Array, ...]]:
        return state[0] + 1, fill(True, *state)

    zero, none = jnp.zeros((1, plan.lanes), jnp.int32), jnp.zeros((1, plan.lanes), jnp.float32)
    start: tuple[Array, ...] = (zero, zero + span[0] * plan.key_tile, none, none, zero + _FAR, zero)
    first, start = jax.lax.while_loop(missing, more, (span[0], start))  # sinks lie in the first tiles
    visible, sink_end, mean, spread, lowest, highest = jax.lax.fori_loop(
        first, span[1], functools.partial(fill, False), start
    )
    spread = _variance(plan, visible, mean, spread, place[2:3])
    wanted = budget(
        (spread * shared[1:])[None], ema[0, 0], visible,
        k_base=plan.k_base, k_min=plan.k_min, k_max=plan.k_max,
    )[0]  # fmt: skip
    of_strip = _Strip(plan, strip, span)
    sinks = jnp.minimum(visible, plan.sinks)
    for h in range(plan.group):
        _select_head(of_strip, h, wanted[h : h + 1], (visible, sinks, lowest, highest), threshold, end, count)
    seen[0, 0] = jnp.concatenate([visible, sink_end, jnp.zeros((SUBLANES - 2, plan.lanes), jnp.int32)])
    variance[0, 0] = spread
    flags[0, 0] = of_strip.flags(threshold[0, 0], end[0, 0])


def _program(axis: int) -> Array:
    return jax.experimental.pallas.program_id(axis)


def _fill_tile(
    plan: Plan,
    with_sinks: bool,
    j: Array,
    carry: tuple[Array, ...],
    queries: tuple[Ref, ...],
    keys: tuple[Ref, Ref],
    strip: Ref,
) -> tuple[Array, ...]:
    """Scores of one key tile into the strip; how many are visible, where sinks end, mean and squared deviations.

    Means of parts are joined as m = m1 + (m2 - m1) n2 / n, squares as M = M1 + M2 + (m2 - m1)^2 n1 n2 / n.
    """
    visible_count, sink_end, mean, spread, lowest, highest = carry
    query, place, weight, shared = queries
    tile = jax.experimental.pallas.ds(j * plan.key_tile, plan.key_tile)
    columns = key_columns(keys[1][0, :, tile])
    scores = weight[0, 0] * block_gates(plan, keys[0][0, tile], query[0, 0], shared[:1])
    visible = block_sees(columns, place[:1], place[1:2])
    sink = visible
    if with_sinks:
        sink = visible_count + _ranks(visible) <= plan.sinks
        sink_end = sink_end + total(jnp.where(sink, 1, 0))
    order = block_order(scores, visible, sink) if with_sinks else plain_order(scores, visible)
    strip[tile] = order
    new = total(jnp.where(visible, 1, 0))
    before, added = (x.astype(jnp.float32) for x in (visible_count, new))
    tile_mean = total(jnp.where(visible, scores, 0.0)) / jnp.maximum(added, 1.0)
    squares = total(jnp.where(visible, jnp.square(scores - tile_mean), 0.0))
    step, joined = tile_mean - mean, jnp.maximum(before + added, 1.0)
    return (
        visible_count + new,
        sink_end,
        mean + step * (added / joined),
        spread + squares + jnp.square(step) * (before * added / joined),
        jnp.minimum(lowest, fold(jnp.where(visible, order, _FAR), jnp.minimum)),
        jnp.maximum(highest, fold(jnp.where(sink, 0, order) if with_sinks else order, jnp.maximum)),
    )


def _ranks(visible: Array) -> Int[Array, "s lanes"]:
    """1 for the first visible key of the tile: a running sum over the sublanes, as a product; exact up to 2^24."""
    shape = visible.shape[0], visible.shape[0]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return multiply(jnp.where(row >= column, 1.0, 0.0), jnp.where(visible, 1.0, 0.0), NN, False).astype(jnp.int32)


def _variance(
    plan: Plan, visible: Int[Array, "1 lanes"], mean: Array, spread: Array, length: Int[Array, "1 lanes"]
) -> Float[Array, "1 lanes"]:
    """Over the visible keys, or over the row, the other entries counted as 0."""
    count = visible.astype(jnp.float32)
    if plan.variance == "visible":
        return spread / jnp.maximum(count, 1.0)
    size = length.astype(jnp.float32)
    whole = mean * count / size
    return (spread + count * jnp.square(mean - whole) + (size - count) * jnp.square(whole)) / size


def fold(x: Array, join: Callable[[Array, Array], Array]) -> Array:
    """[s, lanes] joined over the sublanes: [1, lanes], halves at a time, so that no operation waits for all others."""
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        if x.shape[0] % 2 or (half % SUBLANES and x.shape[0] > SUBLANES):
            return _last(x, join)
        x = join(x[:half], x[half:])
    return x


def _last(x: Array, join: Callable[[Array, Array], Array]) -> Array:
    parts = [x[i : i + SUBLANES] for i in range(0, x.shape[0], SUBLANES)]
    whole = parts[0]
    for part in parts[1:]:
        whole = join(whole, part)
    return fold(whole, join)


def total(x: Array) -> Array:
    """Sums over the sublanes."""
    return fold(x, jnp.add)


class _Strip:
    """The integers of a strip, and passes over its key tiles."""

    def __init__(self, plan: Plan, strip: Ref, span: tuple[Array, Array]) -> None:
        self.plan, self.strip, self.span = plan, strip, span

    def tile(self, j: Array) -> Int[Array, "s lanes"]:
        return self.strip[jax.experimental.pallas.ds(j * self.plan.key_tile, self.plan.key_tile)]

    def counted(self, holds: Callable[[Array, Array], Array]) -> Int[Array, "1 lanes"]:
        """How many keys of each row there are with holds(integer, first index of the tile)."""

        def step(j: Array, found: Array) -> Array:
            return found + partial_total(jnp.where(holds(self.tile(j), j * self.plan.key_tile), 1, 0))

        return total(jax.lax.fori_loop(*self.span, step, jnp.zeros((SUBLANES, self.plan.lanes), jnp.int32)))

    def flags(self, threshold: Int[Array, "r lanes"], end: Int[Array, "r lanes"]) -> Int[Array, "1 tiles"]:
        """Of each key tile: 0 where nothing is selected, 2 where ties end inside, else 1."""
        least, size = fold_rows(threshold, jnp.minimum), self.plan.key_tile
        tiles = padded(self.strip.shape[0] // size, LANES)
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, tiles), 1)

        def step(j: Array, row: Array) -> Array:
            some = _any(partial_total(jnp.where(self.tile(j) >= least, 1, 0)) > 0)
            cut = _any((end > j * size) & (end < (j + 1) * size))
            return jnp.where(lane == j, jnp.where(some, jnp.where(cut, 2, 1), 0), row)

        return jax.lax.fori_loop(*self.span, step, jnp.zeros((1, tiles), jnp.int32))


def fold_rows(x: Array, join: Callable[[Array, Array], Array]) -> Array:
    """[r, lanes] joined to [1, lanes], few rows."""
    whole = x[:1]
    for i in range(1, x.shape[0]):
        whole = join(whole, x[i : i + 1])
    return whole


def partial_total(x: Array) -> Array:
    """Sums over the sublanes down to one register's."""
    while x.shape[0] > SUBLANES and (x.shape[0] // 2) % SUBLANES == 0:
        x = x[: x.shape[0] // 2] + x[x.shape[0] // 2 :]
    parts = [x[i : i + SUBLANES] for i in range(0, x.shape[0], SUBLANES)]
    return sum(parts[1:], parts[0])


def _any(x: Array) -> Array:
    return jnp.max(jnp.where(x, 1.0, 0.0)) > 0


def _select_head(
    strip: _Strip,
    h: int,
    wanted: Int[Array, "1 lanes"],
    rows: tuple[Array, ...],
    threshold: Ref,
    end: Ref,
    count: Ref,
) -> None:
    """Threshold and end of head h of every indexer head: as those before it if they have the same budget."""
    pl, row = jax.experimental.pallas, slice(h, h + 1)
    count[0, 0, row] = wanted
    same = _any(wanted != count[0, 0, h - 1 : h]) == False if h else jnp.bool_(False)  # noqa: E712

    @pl.when(jnp.logical_not(same))
    def _search() -> None:
        found, reached = _bisect(strip, wanted, *rows)
        threshold[0, 0, row] = found
        end[0, 0, row] = jnp.full_like(found, _FAR)

        @pl.when(_any(reached != wanted))
        def _ties() -> None:
            end[0, 0, row] = _end_of_ties(strip, found, wanted)

    if h:

        @pl.when(same)
        def _copy() -> None:
            threshold[0, 0, row] = threshold[0, 0, h - 1 : h]
            end[0, 0, row] = end[0, 0, h - 1 : h]


def _bisect(
    strip: _Strip, wanted: Array, visible: Array, sinks: Array, lowest: Array, highest: Array
) -> tuple[Int[Array, "1 lanes"], Int[Array, "1 lanes"]]:
    """An integer that `wanted` keys reach, or the largest that more do, and how many reach it."""
    only_sinks = wanted <= sinks
    low = jnp.where(only_sinks, SINK_KEY, lowest)
    high = jnp.where(only_sinks, SINK_KEY + 1, highest + 1)
    reached = jnp.where(only_sinks, sinks, visible)

    def unsure(state: tuple[Array, Array, Array]) -> Array:
        low, high, reached = state
        return _any((reached != wanted) & (high - low > 1))

    def halve(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, reached = state
        middle = low + jax.lax.shift_right_logical(high - low, 1)
        found = strip.counted(lambda x, _: x >= middle)
        enough = found >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle), jnp.where(enough, found, reached)

    low, _, reached = jax.lax.while_loop(unsure, halve, (low, high, reached))
    return low, reached


def _end_of_ties(strip: _Strip, threshold: Array, wanted: Array) -> Int[Array, "1 lanes"]:
    """The largest index before which no more keys equal the threshold than are still missing above it."""
    missing = wanted - strip.counted(lambda x, _: x > threshold)
    bits = int(strip.strip.shape[0]).bit_length()

    def step(i: Array, end: Array) -> Array:
        later = end | jax.lax.shift_left(jnp.int32(1), bits - 1 - i)

        def before(x: Array, first: Array) -> Array:
            return (x == threshold) & (key_index(x.shape, first) < later)

        return jnp.where(strip.counted(before) <= missing, later, end)

    return jax.lax.fori_loop(0, bits, step, jnp.zeros_like(threshold))
