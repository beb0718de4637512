"""The kernel of the KL between the attention of all heads and the indexer, whose softmax sums are known by now.

P = mean_h a_h, Q = M / sum M with M = sum_h [selected_h] importance_h score_h:  KL = sum P (log P - log M) + sum P log
sum M. Where heads are split over devices, P and M are written, in bands of keys, and added up before anything else.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.matrix_unit import NT, Ref, multiply
from pallas_kernels.sparse_attention.tpu.layout import SUBLANES, Plan
from pallas_kernels.sparse_attention.tpu.scores import (
    LOG2_E,
    MASKED,
    Block,
    QueryRefs,
    Room,
    expand_queries,
    head_lanes,
)
from pallas_kernels.sparse_attention.tpu.select import total

TINY = 1e-30  # below it a sum counts as nothing, as in the reference


def diverge_kernel(plan: Plan, whole: bool, table: Ref, at: Ref, *refs: Ref) -> None:
    """Blocks in: at (scalar), the band; q [1,t,h k], query [1,depth,t], place [1,8,t], threshold, end [1,n,r,t], weight
    [1,n,1,t], bias [1,n], importance [1,h], log_sum [1,n,r,t], k [1,s,h k], keys [1,s,depth], rows [1,8,s].

    Out, `whole`: sums [1,8,t] float32, of P (log P - log M), of P, of M. Otherwise P and M [1,s,t] of these
    heads, P divided by their number. Scratch: `Room`; P and M [2,s,t] float32.
    """
    own = 13 if whole else 14
    q, query, place, threshold, end, weight, bias, importance, log_sum, k, keys, rows, *results = refs[:own]
    *room, both = refs[own:]
    step = pl.program_id(2)
    j = at[0] + step
    flag = table[pl.program_id(0), pl.program_id(1), j] & 3

    @pl.when(step == 0)
    def _start() -> None:
        expand_queries(plan, query[0], room[0])
        if whole:
            results[0][...] = jnp.zeros(results[0].shape, jnp.float32)

    @pl.when(flag > 0)
    def _tile() -> None:
        queries = QueryRefs(place, threshold, end, weight, bias)
        block = Block(plan, queries, Room(*room), keys[0], rows[0], j * plan.key_tile, flag == 2)
        _Tile(block, (q, k), importance, log_sum, both).run()
        if not whole:
            results[0][0], results[1][0] = both[0] * (1.0 / plan.heads), both[1]
            return
        target, mass = both[0] * (1.0 / plan.heads), both[1]
        ratio = jnp.log(jnp.where(target > 0, target, 1.0)) - jnp.log(jnp.maximum(mass, TINY))
        sums = [total(x) for x in (target * ratio, target, mass)]
        rest = jnp.zeros((SUBLANES - len(sums), sums[0].shape[1]), jnp.float32)
        results[0][0] = results[0][0] + jnp.concatenate([*sums, rest])

    if not whole:

        @pl.when(flag == 0)
        def _nothing() -> None:
            for ref in results:
                ref[...] = jnp.zeros(ref.shape, jnp.float32)


class _Tile:
    """A block, group by group: beside the attention of a group run the scores of the next."""

    def __init__(
        self, block: Block, tokens: tuple[Ref, Ref], importance: Ref, log_sum: Ref, both: Ref
    ) -> None:
        self.block, self.plan, self.importance, self.log_sum = block, block.plan, importance, log_sum
        self.q, self.k = tokens
        self.both = both

    def run(self) -> None:
        """P, but for the number of heads, and M of all groups."""
        plan, block = self.plan, self.block
        target = mass = jnp.zeros(block.shape, jnp.float32)
        scores = self.scores(0)
        for n in range(plan.indexer_heads):
            block.cut_order(n)
            following = self.scores(n + 1) if n + 1 < plan.indexer_heads else scores
            thresholds, logs, share = block.thresholds(n), self.log_sum[0, n] * LOG2_E, jnp.zeros_like(mass)
            for r in range(plan.group):
                lanes = head_lanes(plan, n, r, plan.key_width)
                chosen = block.chosen(n, r, thresholds)
                logits = multiply(self.k[0, :, lanes], self.q[0, :, lanes], NT, plan.exact)
                target = target + attention(plan, chosen, logits, logs[r : r + 1])
                share = share + jnp.where(chosen, self.importance[0, n * plan.group + r], 0.0)
            mass, scores = mass + share * scores, following
        self.both[0], self.both[1] = target, mass

    def scores(self, n: int) -> Array:
        scores = self.block.gate(n) * self.block.gates(n)
        self.block.put_order(n, scores)
        return scores


def attention(plan: Plan, chosen: Array, logits: Array, log_sum: Float[Array, "1 t"]) -> Float[Array, "s t"]:
    """The softmax over all keys, of those of a block; log_sum to the base 2."""
    return jnp.exp2(jnp.where(chosen, logits * (plan.scale * LOG2_E) - log_sum, MASKED))
