"""The backward kernel: a band of keys stays in VMEM with its gradients, the queries that see it pass by.

With a the attention of a head, x = q.k scale its logits, D = <dO, O> of each query, all of it on the selected keys:

    a = e^(x - log_sum)     da = dO V^T     dx = a (da - D)     dV = a^T dO     dK = scale dx^T Q     dQ = scale dx K

and for the KL, with P = mean_h a_h, M = sum_h [selected_h] importance_h score_h and g the gradient of the KL:

    dM = g (share - P / M),  share = sum P / sum M          d importance_h = sum [selected_h] dM score
    d score = dM sum_h [selected_h] importance_h            score = w s,  s = sigmoid(y),  y = qI.kI scale + bias
    dw = sum_keys d score s     dy = d score w s (1 - s)    d bias = sum dy    dqI = scale dy kI    dkI = scale dy^T qI

Keys lie in the sublanes, queries in the lanes. The gradients of the queries, float32, go out after each band and come
back in with the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.matrix_unit import LANES, NN, NT, TN, Ref, multiply
from pallas_kernels.sparse_attention.tpu.diverge import TINY, attention
from pallas_kernels.sparse_attention.tpu.layout import Plan
from pallas_kernels.sparse_attention.tpu.scores import LOG2_E, Block, QueryRefs, Room, expand_queries, head_lanes
from pallas_kernels.sparse_attention.tpu.select import total


@dataclass
class _Refs:
    """Blocks of one step (row of the batch, tile of queries): see `backward_kernel`."""

    q: Ref
    query: Ref
    query_rows: Ref
    place: Ref
    threshold: Ref
    end: Ref
    weight: Ref
    bias: Ref
    importance: Ref
    log_sum: Ref
    delta: Ref
    d_o: Ref
    d_mass: Ref
    k: Ref
    v: Ref
    keys: Ref
    rows: Ref
    old_q: Ref
    old_query: Ref
    old_weight: Ref
    d_q: Ref
    d_query: Ref
    d_weight: Ref
    d_k: Ref
    d_v: Ref
    d_keys: Ref
    d_shared: Ref
    expanded: Ref
    bounds: Ref
    orders: Ref
    both: Ref
    shares: Ref
    of_k: Ref
    of_v: Ref
    of_keys: Ref
    of_shared: Ref


def backward_kernel(plan: Plan, whole: bool, table: Ref, bands: Ref, at: Ref, *refs: Ref) -> None:
    """Blocks in: table and bands, of live tiles and of live bands of keys, at, the band (scalars); q [1,t,h k], query
    [1,depth,t], query_rows [1,t,depth], place [1,8,t], threshold, end [1,n,r,t], weight [1,n,1,t], bias [1,n],
    importance [1,h], log_sum, delta [1,n,r,t], d_o [1,t,h v]; d_mass, if `whole` [1,8,t] with g share and g, else dM
    [1,band,t]; k, v, keys, rows of the band; so far: d_q [1,h k,t], d_query [1,depth,t], d_weight [1,n,1,t] float32.

    Out: these, but for the scales of d_q and d_query, and d_k, d_v, d_keys [1,band,...], d_shared [1,n+h,1,lanes].
    Scratch: `Room`; P and M [2,s,t], shares of importance [n,s,t], and sums of the last four, all float32.
    """
    x = _Refs(*refs)
    row, i = pl.program_id(0), pl.program_id(1)
    tiles = plan.band // plan.key_tile
    sums = (x.of_k, x.of_v, x.of_keys, x.of_shared)

    @pl.when(i == 0)
    def _start() -> None:
        for ref in sums:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    @pl.when((i == 0) | ((bands[row, at[0], i] & 3) > 0))  # other steps hold the block of the step before
    def _enter() -> None:
        x.d_q[...], x.d_query[...], x.d_weight[...] = x.old_q[...], x.old_query[...], x.old_weight[...]
        expand_queries(plan, x.query[0], x.expanded)


    def step(j: Array, _: None) -> None:
        flag = table[row, i, at[0] * tiles + j] & 3
        first = (at[0] * tiles + j) * plan.key_tile

        @pl.when(flag > 0)
        def _tile() -> None:
            _Tile(plan, x, j, first, flag == 2, whole).run()

    jax.lax.fori_loop(0, tiles, step, None)

    @pl.when(i == pl.num_programs(1) - 1)
    def _end() -> None:
        for ref, held in zip((x.d_k, x.d_v, x.d_keys, x.d_shared), sums, strict=True):
            scale = plan.scale if ref is x.d_k else plan.score_scale if ref is x.d_keys else 1.0
            ref[0] = (held[...] * scale).astype(ref.dtype)


class _Tile:
    """One key tile of the band and one tile of queries."""

    def __init__(self, plan: Plan, refs: _Refs, j: Array, first: Array, cut: Array, whole: bool) -> None:
        self.plan, self.refs, self.whole = plan, refs, whole
        self.tile = pl.ds(pl.multiple_of(j * plan.key_tile, plan.key_tile), plan.key_tile)
        x = refs
        queries = QueryRefs(x.place, x.threshold, x.end, x.weight, x.bias)
        room = Room(x.expanded, x.bounds, x.orders)
        self.block = Block(plan, queries, room, x.keys[0, self.tile], x.rows[0, :, self.tile], first, cut)

    def run(self) -> None:
        """Gradients of all heads, then those of the indexer, which need the attention of all."""
        x, plan = self.refs, self.plan
        target = mass = jnp.zeros(self.block.shape, jnp.float32)
        scores = self.scores(0)
        for n in range(plan.indexer_heads):
            self.block.cut_order(n)
            following = self.scores(n + 1) if n + 1 < plan.indexer_heads else scores
            target, share = self.heads(n, target)
            x.shares[n] = share
            mass, scores = mass + share * scores, following
        x.both[0], x.both[1] = target, mass
        if self.whole:
            target, mass = x.both[0], x.both[1]
            pulled = jnp.where(mass > TINY, target * (1.0 / plan.heads) / jnp.maximum(mass, TINY), 0.0)
            x.both[0] = x.d_mass[0, :1] - x.d_mass[0, 1:2] * pulled
        else:
            x.both[0] = x.d_mass[0, self.tile]
        for n in range(plan.indexer_heads):
            self.indexer(n)

    def scores(self, n: int) -> Float[Array, "s t"]:
        """Of an indexer head, and their order into scratch."""
        scores = self.block.gate(n) * self.block.gates(n)
        self.block.put_order(n, scores)
        return scores

    def heads(self, n: int, target: Float[Array, "s t"]) -> tuple[Float[Array, "s t"], Float[Array, "s t"]]:
        """Adds the gradients of the heads of a group, dK and dQ without the scale; P so far, and the group's share."""
        x, plan, block = self.refs, self.plan, self.block
        thresholds, logs, delta = block.thresholds(n), x.log_sum[0, n] * LOG2_E, x.delta[0, n]
        share = jnp.zeros_like(target)
        for r in range(plan.group):
            key, value = (head_lanes(plan, n, r, width) for width in (plan.key_width, plan.value_width))
            q, d_o, k, v = x.q[0, :, key], x.d_o[0, :, value], x.k[0, self.tile, key], x.v[0, self.tile, value]
            chosen = block.chosen(n, r, thresholds)
            a = attention(plan, chosen, multiply(k, q, NT, plan.exact), logs[r : r + 1])
            slope = _narrow(a * (multiply(v, d_o, NT, plan.exact) - delta[r : r + 1]), plan)
            x.of_v[self.tile, value] += multiply(_narrow(a, plan), d_o, NN, plan.exact)
            x.of_k[self.tile, key] += multiply(slope, q, NN, plan.exact)
            x.d_q[0, key] += multiply(k, slope, TN, plan.exact)
            target = target + a
            share = share + jnp.where(chosen, x.importance[0, n * plan.group + r], 0.0)
        return target, share

    def indexer(self, n: int) -> None:
        """Adds the gradients of one indexer head, and of the importance of the heads that read it."""
        x, plan, block = self.refs, self.plan, self.block
        thresholds, d_mass = block.thresholds(n), x.both[0]
        gates, gate = block.gates(n), block.gate(n)
        scores = gate * gates
        block.put_order(n, scores)
        block.cut_order(n)
        pull = d_mass * scores
        for r in range(plan.group):
            row = plan.indexer_heads + n * plan.group + r
            self.add_shared(row, jnp.where(block.chosen(n, r, thresholds), pull, 0.0))
        d_scores = d_mass * x.shares[n]
        x.d_weight[0, n] += total(d_scores * gates)
        d_logits = d_scores * scores * (1.0 - gates)
        self.add_shared(n, d_logits)
        d_logits = _narrow(d_logits, plan)
        rows = _own(plan, n, x.query_rows[0], 1)
        x.of_keys[self.tile] += multiply(d_logits, rows, NN, plan.exact)
        d_query = multiply(block.keys, d_logits, TN, plan.exact)
        x.d_query[0] += _own(plan, n, d_query, 0)

    def add_shared(self, row: int, x: Float[Array, "s t"]) -> None:
        """Sums over the keys, and over the queries down to one register's lanes."""
        sums = total(x)
        self.refs.of_shared[row] += sum(
            (sums[:, i : i + LANES] for i in range(LANES, sums.shape[1], LANES)), sums[:, :LANES]
        )


def _own(plan: Plan, n: int, x: Array, axis: int) -> Array:
    """With zeros in the depth of other indexer heads."""
    part, first = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis), n * plan.indexer_width
    return jnp.where((part >= first) & (part < first + plan.indexer_width), x, jnp.zeros_like(x))


def _narrow(x: Array, plan: Plan) -> Array:
    return x if plan.exact else x.astype(jnp.bfloat16)
