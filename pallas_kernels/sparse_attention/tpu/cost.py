"""How much the TPU kernels of sparse attention do: products, exponentials and bytes, for the compiler and for reports.

Causal rows of one document with survivors in every tile: the most there is to do.
"""

from __future__ import annotations

from jax.experimental import pallas as pl

from pallas_kernels.sparse_attention.tpu import layout as layout
from pallas_kernels.sparse_attention.tpu.layout import Plan


def estimate(plan: Plan, name: str, batch: int, queries: int, keys: int, calls: int) -> pl.CostEstimate:
    """Of one of the `calls` that work through whole tiles of queries and keys; an exponential a pair and head."""
    whole = counts(plan, name, batch, queries, keys)
    pairs = whole["tiles"] * plan.query_tile * plan.key_tile
    exponentials = 0 if name == "select" else pairs * plan.heads
    return pl.CostEstimate(
        flops=whole["flops"] // calls,
        transcendentals=exponentials // calls,
        bytes_accessed=whole["moved_bytes"] // calls,
    )


def counts(plan: Plan, name: str, batch: int, queries: int, keys: int) -> dict[str, int]:
    """Of causal rows of whole tiles: pairs of tiles on and below the diagonal."""
    rows, columns = queries // plan.query_tile, keys // plan.key_tile
    last = [min(columns, -(-(i + 1) * plan.query_tile // plan.key_tile)) for i in range(rows)]
    live = batch * sum(last)
    per_band = plan.band // plan.key_tile
    steps = {
        "select": batch * queries // plan.strip,
        "backward": batch * sum(-(-x // per_band) for x in last),
    }.get(name, live)
    return {
        "calls": keys // plan.band if name == "backward" else 1,
        "steps": steps,
        "tiles": live,
        "flops": live * plan.query_tile * plan.key_tile * flops_of_pair(plan, name),
        "least_bytes": batch * queries * least_bytes_of_token(plan, name),
        "moved_bytes": batch * layout.moved_bytes(plan, name, queries, keys),
        "vmem_bytes": layout.step_bytes(plan, name, keys),
    }


def flops_of_pair(plan: Plan, name: str) -> int:
    """Of matrix products, of one query and one key, all heads; scores of indexer heads over the depth of all."""
    key, value = 2 * plan.heads * plan.key_width, 2 * plan.heads * plan.value_width
    scores = 2 * plan.indexer_heads * plan.depth
    return {
        "select": 2 * plan.depth * plan.lanes // plan.strip,
        "attend": scores + key + value,
        "diverge": scores + key,
        "backward": 4 * scores + 3 * key + 2 * value,  # scores twice: before and after the attention of all heads
    }[name]


def least_bytes_of_token(plan: Plan, name: str) -> int:
    """Arguments and results of a token once, as the interface has them: neither padding nor sums that come and go."""
    key, value = plan.heads * plan.key_width * plan.item, plan.heads * plan.value_width * plan.item
    index, heads = 2 * plan.indexer_heads * plan.indexer_width * plan.item, 4 * plan.heads
    scores = index + 4 * plan.indexer_heads
    return {
        "select": scores + 3 * heads,
        "attend": scores + 2 * key + 2 * value + 4 * heads,
        "diverge": scores + 2 * key + 3 * heads + 12,
        "backward": 2 * scores + 4 * key + 3 * value + 4 * heads + 8,
    }[name]
