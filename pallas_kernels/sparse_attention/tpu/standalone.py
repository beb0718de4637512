"""The TPU kernels of sparse attention, each of them alone, to be compiled for any chip, with what it costs.

    for kernel in kernels(1, 8192, heads=16, width=128, indexer_heads=4, indexer_width=32, dtype="bfloat16"):
        jax.jit(kernel.run).lower(*kernel.arguments).compile()

Causal rows of one document with survivors in every tile: the most there is to do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_attention.tpu import launch as launch
from pallas_kernels.sparse_attention.tpu import layout as layout
from pallas_kernels.sparse_attention.tpu.cost import counts
from pallas_kernels.sparse_attention.tpu.layout import SUBLANES, Plan


class Kernel(NamedTuple):
    """One kernel: its name in the compiler's dump, what to compile, and its counts for a batch of rows.

    `steps` grid steps do work, in each of which `tiles` pairs of tiles of queries and keys are live; `calls` times.
    """

    name: str
    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    plan: Plan
    calls: int
    steps: int
    tiles: int
    flops: int
    least_bytes: int
    moved_bytes: int
    vmem_bytes: int


def kernels(
    batch: int,
    length: int,
    *,
    heads: int,
    width: int,
    indexer_heads: int,
    indexer_width: int,
    dtype: str = "bfloat16",
    sharding: Any = None,
    tiles: tuple[int, int, int] | None = None,
) -> list[Kernel]:
    """Select, attend, diverge and backward for rows of `length`, a multiple of the tiles."""
    narrow, wide, whole = (
        cast(Any, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(name), sharding=sharding))
        for name in (dtype, "float32", "int32")
    )
    q, index = narrow((batch, length, heads, width)), narrow((batch, length, indexer_heads, indexer_width))
    plan = layout.make_plan((q, q, q), index, tiles, k_base=512, k_min=32, k_max=1024, sinks=4)
    if length % plan.band or length % plan.query_tile:
        raise ValueError(f"length {length} must be a multiple of {plan.band} and {plan.query_tile}")
    call, b, t, n = launch.Call(plan, False), batch, length, indexer_heads
    tokens, rows = narrow((b, t, heads * plan.key_width)), (b, n, plan.group, t)
    values, depth = narrow((b, t, heads * plan.value_width)), narrow((b, t, plan.depth))
    table = whole((b, t // plan.query_tile, t // plan.key_tile))
    place = whole((b, SUBLANES, t))
    laid = launch.Laid(
        q=tokens, query=narrow((b, plan.depth, t)), place=place, threshold=whole(rows), end=whole(rows),
        weight=wide((b, n, 1, t)), bias=wide((1, n)), importance=wide((1, heads)), k=tokens, v=values, keys=depth,
        rows=place, table=table,
    )  # fmt: skip
    shared = launch.Shared(wide((n,)), wide((heads,)), wide(()))
    passing = values, wide(rows), wide(rows), wide((b, SUBLANES, t))
    sums = wide((b, heads * plan.key_width, t)), wide((b, plan.depth, t)), wide((b, n, 1, t))
    bands = whole((b, t // plan.band, t // plan.query_tile))
    runs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "select": (launch.select, (depth, place, wide((b, n, t)), shared, depth, place, whole((b,)))),
        "attend": (launch.softmax, (laid,)),
        "diverge": (functools.partial(launch.divergence, band=None), (laid, wide(rows))),
        "backward": (launch.band_gradients, (laid, bands, whole(()), passing, sums)),
    }
    return [
        Kernel(
            name=f"sparse_attention_{name}", run=functools.partial(run, call), arguments=arguments, plan=plan,
            **counts(plan, name, batch, length, length),
        )
        for name, (run, arguments) in runs.items()
    ]  # fmt: skip
