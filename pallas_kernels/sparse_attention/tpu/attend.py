"""The kernel that attends: an online softmax over the selected keys, a tile of queries after the other.

With x = q.k scale where selected, over key tiles j:  m' = max(m, max x);  l' = e^(m - m') l + sum e^(x - m');
O' = e^(m - m') O + e^(x - m') V;  and for the entropy log l + m - E/l, E' = e^(m - m') E + sum e^(x - m') x.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.matrix_unit import NT, TN, Ref, multiply
from pallas_kernels.sparse_attention.tpu.layout import SUBLANES, Plan
from pallas_kernels.sparse_attention.tpu.scores import (
    LOG2_E,
    LOWEST,
    MASKED,
    Block,
    QueryRefs,
    Room,
    expand_queries,
    head_lanes,
)
from pallas_kernels.sparse_attention.tpu.select import fold, partial_total, total


def attend_kernel(
    plan: Plan,
    table: Ref,
    q: Ref,
    query: Ref,
    place: Ref,
    threshold: Ref,
    end: Ref,
    weight: Ref,
    bias: Ref,
    k: Ref,
    v: Ref,
    keys: Ref,
    rows: Ref,
    o: Ref,
    log_sum: Ref,
    entropy: Ref,
    *scratch: Ref,
) -> None:
    """Blocks in: q [1,t,h k], query [1,depth,t], place [1,8,t], threshold, end [1,n,r,t], weight [1,n,1,t], bias [1,n],
    k [1,s,h k], v [1,s,h v], keys [1,s,depth], rows [1,8,s]. Out: o [1,t,h v], log_sum, entropy
    [1,n,r,t]. Scratch: `Room`; read [n,r,v,t], top, weights, weighted [n,r,t], logits [r,s,t] float32; their
    exponentials [r,s,t].
    """
    *room, read, top, weights, weighted, held, powers = scratch
    j = pl.program_id(2)
    flag = table[pl.program_id(0), pl.program_id(1), j] & 3

    @pl.when(j == 0)
    def _start() -> None:
        expand_queries(plan, query[0], room[0])
        top[...] = jnp.full(top.shape, LOWEST, jnp.float32)
        for ref in (read, weights, weighted):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    @pl.when(flag > 0)
    def _tile() -> None:
        queries = QueryRefs(place, threshold, end, weight, bias)
        block = Block(plan, queries, Room(*room), keys[0], rows[0], j * plan.key_tile, flag == 2)
        _Tile(block, (q, k, v), (read, top, weights, weighted), held, powers).run()

    @pl.when(j == pl.num_programs(2) - 1)
    def _end() -> None:
        some = jnp.where(weights[...] > 0, weights[...], 1.0)
        logs = jnp.where(weights[...] > 0, top[...] / LOG2_E + jnp.log(some), 0.0)
        log_sum[0] = logs
        entropy[0] = logs - weighted[...] / (LOG2_E * some)
        for n in range(plan.indexer_heads):
            for r in range(plan.group):
                value = head_lanes(plan, n, r, plan.value_width)
                o[0, :, value] = (read[n, r] / some[n, r : r + 1]).T.astype(o.dtype)


class _Tile:
    """A block, group by group of the heads that share an indexer head, in an order in which the units overlap.

    Beside the exponentials of a group run the products of the next, the reading of the one before and the scores of the
    one after the next, on units of their own.
    """

    def __init__(
        self, block: Block, tokens: tuple[Ref, ...], sums: tuple[Ref, ...], held: Ref, powers: Ref
    ) -> None:
        self.block, self.plan, self.held, self.powers = block, block.plan, held, powers
        self.q, self.k, self.v = tokens
        self.read, self.top, self.weights, self.weighted = sums

    def run(self) -> None:
        """All groups."""
        count = self.plan.indexer_heads
        maxima: dict[int, tuple[Array, Array]] = {}
        for n in range(-2, count + 1):
            if n > 0:
                self.reads(n - 1, maxima[n - 1][1])
            if n + 2 < count:
                self.scores(n + 2)
            if 0 <= n + 1 < count:
                maxima[n + 1] = self.logits(n + 1)
            if 0 <= n < count:
                self.exponentials(n, *maxima[n])
            if n + 2 < count:
                self.block.cut_order(n + 2)

    def scores(self, n: int) -> None:
        self.block.put_order(n, self.block.gate(n) * self.block.gates(n))

    def logits(self, n: int) -> tuple[Float[Array, "r t"], Float[Array, "r t"]]:
        """Of the group, into scratch; the maxima so far, and by how much what is summed up fades."""
        plan, tops, thresholds = self.plan, [], self.block.thresholds(n)
        for r in range(plan.group):
            lanes = head_lanes(plan, n, r, plan.key_width)
            logits = multiply(self.k[0, :, lanes], self.q[0, :, lanes], NT, plan.exact)
            logits = jnp.where(self.block.chosen(n, r, thresholds), logits, MASKED)
            self.held[n & 1, r] = logits
            tops.append(fold(logits, jnp.maximum))
        before = self.top[n]
        higher = jnp.maximum(before, jnp.concatenate(tops) * (plan.scale * LOG2_E))
        self.top[n] = higher
        return higher, jnp.exp2(before - higher)

    def exponentials(self, n: int, top: Float[Array, "r t"], fade: Float[Array, "r t"]) -> None:
        """e^(x - m) into scratch, and their sums."""
        plan, heads = self.plan, range(self.plan.group)

        sums = [jnp.zeros((SUBLANES, plan.query_tile), jnp.float32) for _ in range(2 * plan.group)]
        for c in range(0, plan.key_tile, plan.chunk):
            for r in heads:
                x = self.held[n & 1, r, c : c + plan.chunk] * (plan.scale * LOG2_E)
                p = jnp.exp2(x - top[r : r + 1])
                self.powers[n & 1, r, c : c + plan.chunk] = p.astype(self.powers.dtype)
                sums[2 * r] += partial_total(p)
                sums[2 * r + 1] += partial_total(p * x)
        for ref, parts in ((self.weights, sums[::2]), (self.weighted, sums[1::2])):
            ref[n] = ref[n] * fade + jnp.concatenate([total(x) for x in parts])

    def reads(self, n: int, fade: Float[Array, "r t"]) -> None:
        """Adds the values, as weighted."""
        plan = self.plan
        for r in range(plan.group):
            values = self.v[0, :, head_lanes(plan, n, r, plan.value_width)]
            read = multiply(values, self.powers[n & 1, r], TN, plan.exact)
            self.read[n, r] = self.read[n, r] * fade[r : r + 1] + read
