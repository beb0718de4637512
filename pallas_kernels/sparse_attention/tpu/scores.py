"""What every TPU kernel of sparse attention computes first: the indexer's scores of a block, and their order.

The kernels compare scores with thresholds that another kernel found, so all of them get them here: the same product,
[keys, depth] x [depth, lanes] with zeros in the depth of other indexer heads, and the same operations after it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.matrix_unit import NN, Ref, multiply
from pallas_kernels.sparse_attention.common.selection import SINK_KEY
from pallas_kernels.sparse_attention.tpu.layout import Plan

LOG2_E = math.log2(math.e)
MASKED = -1e30  # a logit that is not there
LOWEST = -1e20  # where maxima start: far above what is not there, far below what is


def block_gates(
    plan: Plan, keys: Float[Array, "s depth"], query: Float[Array, "depth lanes"], bias: Array
) -> Float[Array, "s lanes"]:
    """sigmoid(kI . qI scale + bias)"""
    logits = multiply(keys, query, NN, plan.exact) * plan.score_scale
    return jax.nn.sigmoid(logits + bias)


def key_columns(rows: Int[Array, "8 s"]) -> tuple[Int[Array, "s 1"], Int[Array, "s 1"]]:
    """Position and segment of each key, down the sublanes."""
    turned = rows.T
    return turned[:, :1], turned[:, 1:2]


def block_sees(
    keys: tuple[Int[Array, "s 1"], Int[Array, "s 1"]], position: Int[Array, "1 lanes"], segment: Int[Array, "1 lanes"]
) -> Bool[Array, "s lanes"]:
    """Causal and within the segment."""
    return (keys[1] == segment) & (keys[0] <= position)


def key_index(shape: tuple[int, ...], first: Array | int) -> Int[Array, "s lanes"]:
    """Place in the row of every key of a block."""
    return first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)


def block_order(
    scores: Float[Array, "s lanes"], visible: Bool[Array, "s lanes"], sink: Bool[Array, "s lanes"]
) -> Int[Array, "s lanes"]:
    """`selection.ordered` of a block."""
    return jnp.where(visible & sink, SINK_KEY, plain_order(scores, visible))


def plain_order(scores: Float[Array, "s lanes"], visible: Bool[Array, "s lanes"]) -> Int[Array, "s lanes"]:
    """`block_order` where there are no sinks."""
    return jnp.where(visible, jax.lax.bitcast_convert_type(scores, jnp.int32) + 1, 0)


class Room(NamedTuple):
    """Scratch: the queries of each indexer head with zeros in the depth of the others [n,depth,t]; bounds of the order
    of a block [2,s,t]; orders of two groups of heads [2,r,s,t], the one at work and the next.
    """

    expanded: Ref
    bounds: Ref
    orders: Ref


class QueryRefs(NamedTuple):
    """Of a tile of queries: place [1,8,t] (position, segment, sink_end), threshold, end [1,n,r,t], weight [1,n,1,t],
    bias [1,n].
    """

    place: Ref
    threshold: Ref
    end: Ref
    weight: Ref
    bias: Ref


class Block:
    """A tile of keys, indexer [s,depth] and rows [8,s], and one of queries: what each head has selected.

    Sinks and what is not visible are the same for all heads: order = min(max(bits + 1, low), high), with low = high
    where the key is a sink (the largest integer) or not visible (0).
    """

    def __init__(
        self, plan: Plan, queries: QueryRefs, room: Room, keys: Array, rows: Array, first: Array, cut: Array
    ) -> None:
        """`first` is the place of the first key in the row; `cut` says that ties end within the block."""
        self.plan, self.queries, self.room, self.keys, self.first, self.cut = plan, queries, room, keys, first, cut
        place = queries.place[0]
        self.shape = keys.shape[0], place.shape[1]
        visible = block_sees(key_columns(rows), place[:1], place[1:2])
        high = jnp.where(visible, SINK_KEY, 0)
        room.bounds[0] = jnp.where(key_index(self.shape, first) < place[2:3], high, 0)
        room.bounds[1] = high

    def gates(self, n: int) -> Float[Array, "s t"]:
        """Sigmoids of an indexer head."""
        return block_gates(self.plan, self.keys, self.room.expanded[n], self.queries.bias[0, n])

    def gate(self, n: int) -> Float[Array, "1 t"]:
        """The indexer's weight of a head."""
        return self.queries.weight[0, n]

    def put_order(self, n: int, scores: Float[Array, "s t"]) -> None:
        """Integers that order like the selection, into scratch."""
        bits = jax.lax.bitcast_convert_type(scores, jnp.int32) + 1
        self.room.orders[n & 1, 0] = jnp.minimum(jnp.maximum(bits, self.room.bounds[0]), self.room.bounds[1])

    def cut_order(self, n: int) -> None:
        """Where ties end within the block: for each head of the group, less 1 past its end."""

        def each(i: Array, _: None) -> None:
            r = self.plan.group - 1 - i  # the first head's order, which all start from, is replaced last
            end = self.queries.end[0, n, pl.ds(r, 1)]
            index = key_index(self.shape, self.first)
            past = jnp.where((self.first < end) & (end <= index), 1, 0)
            self.room.orders[n & 1, r] = self.room.orders[n & 1, 0] - past

        # a loop of no steps where nothing is cut: the compiler would compute what stands in a branch in any case
        jax.lax.fori_loop(0, jnp.where(self.cut, self.plan.group, 0), each, None)

    def thresholds(self, n: int) -> Int[Array, "r t"]:
        """What the heads of a group ask for in this block: above the threshold once its ties have ended."""
        threshold, end = self.queries.threshold[0, n], self.queries.end[0, n]
        return jnp.where(end <= self.first, threshold + 1, threshold)

    def chosen(self, n: int, r: int, thresholds: Int[Array, "r t"], part: Any = slice(None)) -> Bool[Array, "s t"]:
        """What head r of the indexer head's group has selected, of a part of the keys."""
        return self.room.orders[n & 1, jnp.where(self.cut, r, 0), part] >= thresholds[r : r + 1]


def head_lanes(plan: Plan, n: int, r: int, width: int) -> slice:
    """Where head r of a group lies in the lanes."""
    head = n * plan.group + r
    return slice(head * width, (head + 1) * width)


def room_shapes(plan: Plan) -> list[tuple[tuple[int, ...], bool]]:
    """Shapes of `Room`, and whether of integers."""
    block = plan.key_tile, plan.query_tile
    expanded = plan.indexer_heads, plan.depth, plan.query_tile
    return [(expanded, False), ((2, *block), True), ((2, plan.group, *block), True)]


def expand_queries(plan: Plan, query: Float[Array, "depth t"], expanded: Ref) -> None:
    """For each indexer head, its queries with zeros in the depth of the others."""
    part = jax.lax.broadcasted_iota(jnp.int32, query.shape, 0)
    for n in range(plan.indexer_heads):
        own = (part >= n * plan.indexer_width) & (part < (n + 1) * plan.indexer_width)
        expanded[n] = jnp.where(own, query, jnp.zeros_like(query))
