"""How the TPU kernels of sparse attention are launched: grids, blocks and what stays in VMEM between steps.

Blocks of keys follow the table of live tiles: a step whose tile has no survivors holds the block before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.sparse_attention.tpu import layout as layout
from pallas_kernels.sparse_attention.tpu.attend import attend_kernel
from pallas_kernels.sparse_attention.tpu.backward import backward_kernel
from pallas_kernels.sparse_attention.tpu.cost import estimate
from pallas_kernels.sparse_attention.tpu.diverge import diverge_kernel
from pallas_kernels.sparse_attention.tpu.layout import LANES, SUBLANES, Plan
from pallas_kernels.sparse_attention.tpu.scores import room_shapes
from pallas_kernels.sparse_attention.tpu.select import select_kernel


class Call(NamedTuple):
    """What is fixed when compiling."""

    plan: Plan
    interpret: bool | pltpu.InterpretParams

    @property
    def dtype(self) -> jnp.dtype:
        """Of tokens in the kernels."""
        return jnp.dtype(jnp.float32 if self.plan.exact else jnp.bfloat16)


class Shared(NamedTuple):
    """What all tokens share: `bias` [n], `importance` [h] (logits), `variance_ema` []."""

    bias: Array
    importance: Array
    variance_ema: Array


class Laid(NamedTuple):
    """The arguments as the kernels take them; `place` and `rows` are positions and segments, `table` the live tiles."""

    q: Array
    query: Array
    place: Array
    threshold: Array
    end: Array
    weight: Array
    bias: Array
    importance: Array
    k: Array
    v: Array
    keys: Array
    rows: Array
    table: Array


def _launch(
    call: Call, kernel: Callable[..., None], name: str, grid: tuple[int, ...], parallel: int, scalars: list[Array],
    operands: list[tuple[Array, Any]], results: list[tuple[Any, Any]], scratch: list[Any], aliases: dict[int, int],
    sizes: tuple[int, int, int], calls: int = 1,
) -> tuple[Array, ...]:  # fmt: skip
    """`operands`: (array, spec); `results`: (shape and dtype, spec); the first `parallel` axes may go in any order.

    `sizes`: rows of the batch, queries and keys, which this and other calls work through, `calls` in all.
    """
    order = [pltpu.PARALLEL] * parallel + [pltpu.ARBITRARY] * (len(grid) - parallel)
    call_kernel = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars), grid=grid, in_specs=[spec for _, spec in operands],
            out_specs=[spec for _, spec in results], scratch_shapes=scratch,
        ),
        out_shape=[shape for shape, _ in results],
        input_output_aliases={len(scalars) + key: value for key, value in aliases.items()},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=order, vmem_limit_bytes=layout.VMEM_LIMIT
        ),
        cost_estimate=estimate(call.plan, name, *sizes, calls),
        interpret=call.interpret,
        name=f"sparse_attention_{name}",
    )
    return tuple(call_kernel(*scalars, *(array for array, _ in operands)))


def select(
    call: Call, query: Array, place: Array, weight: Array, shared: Shared, keys: Array, rows: Array, length: Array
) -> tuple[Array, ...]:
    """threshold, end, budget [b,n,r,t'], seen [b,8,t'], variance [b,n,1,t'], flags [b,query tiles,key tiles]."""
    plan, (b, t, _), s = call.plan, query.shape, keys.shape[1]
    strips, tiles = t // plan.strip, s // plan.key_tile
    of_row = jnp.concatenate([place[:, :2], jnp.broadcast_to(length[:, None, None], (b, 1, t)), place[:, 3:]], axis=1)
    of_row = jnp.repeat(of_row.swapaxes(1, 2)[:, :, None], plan.indexer_heads, axis=2)
    squares = jnp.square(importances(shared)).reshape(plan.indexer_heads, plan.group).T
    of_heads = jnp.concatenate([shared.bias.astype(jnp.float32)[None], squares])
    of_heads = jnp.pad(jnp.repeat(of_heads, plan.strip, axis=1), [(0, 0), (0, plan.lanes)])[:, : plan.lanes]

    def block(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, *shape), lambda b, i, _: (b, i, 0, 0))

    def fixed(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda b, i, _: (0,) * x.ndim)

    def of_batch(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, *x.shape[1:]), lambda b, i, _: (b, 0, 0))

    ema = shared.variance_ema.astype(jnp.float32).reshape(1, 1)
    heads = jax.ShapeDtypeStruct((b, strips, plan.group, plan.lanes), jnp.int32), block(plan.group, plan.lanes)
    width = layout.padded(tiles, LANES)
    results = _launch(
        call, functools.partial(select_kernel, plan), "select", (b, strips), 2, [layout.strip_spans(plan, place, rows)],
        [
            (layout.lay_strip_queries(plan, query), block(plan.depth, plan.lanes)),
            (layout.lay_strips(plan, of_row), block(SUBLANES, plan.lanes)),
            (layout.lay_strips(plan, weight.swapaxes(1, 2))[:, :, None], block(1, plan.lanes)),
            (of_heads, fixed(of_heads)),
            (ema, pl.BlockSpec(memory_space=pltpu.SMEM)),
            (keys, of_batch(keys)),
            (rows, of_batch(rows)),
        ],
        [
            heads, heads, heads,
            (jax.ShapeDtypeStruct((b, strips, SUBLANES, plan.lanes), jnp.int32), block(SUBLANES, plan.lanes)),
            (jax.ShapeDtypeStruct((b, strips, 1, plan.lanes), jnp.float32), block(1, plan.lanes)),
            (jax.ShapeDtypeStruct((b, strips, 1, width), jnp.int32), block(1, width)),
        ],
        [pltpu.VMEM((s, plan.lanes), jnp.int32)], {}, (b, t, s),
    )  # fmt: skip
    *of_queries, flags = results
    flags = flags.reshape(b, t // plan.query_tile, -1, width)[..., :tiles].max(axis=2)
    threshold, end, count, seen, variance = (layout.take_strips(plan, x) for x in of_queries)
    return threshold, end, count, seen[:, 0], variance, flags


def importances(shared: Shared) -> Float[Array, " h"]:
    """Of each head, in (0, 1)."""
    return jax.nn.sigmoid(shared.importance.astype(jnp.float32))


def _queries(call: Call, x: Laid, at: Callable[..., Any]) -> list[tuple[Array, Any]]:
    """q, query, place, threshold, end, weight, bias; `at` gives (row of the batch, tile of queries) of a step."""
    t = call.plan.query_tile

    def rows(array: Array) -> tuple[Array, pl.BlockSpec]:
        return array, _row_spec(array.shape, t, at)

    q = x.q, pl.BlockSpec((1, t, x.q.shape[2]), lambda *step: (*at(*step), 0))
    return [q, *map(rows, (x.query, x.place, x.threshold, x.end, x.weight)), (x.bias, _SCALARS)]


def _row_spec(shape: tuple[int, ...], t: int, at: Callable[..., Any]) -> pl.BlockSpec:
    """All rows of lanes [b,...,t'] of a tile of queries."""
    between = shape[1:-1]
    return pl.BlockSpec((1, *between, t), lambda *step: (at(*step)[0], *(0,) * len(between), at(*step)[1]))


_SCALARS = pl.BlockSpec(memory_space=pltpu.SMEM)


def _keys(call: Call, arrays: list[Array], size: int, at: Callable[..., Any]) -> list[tuple[Array, Any]]:
    """Tokens [b,s,...] and, last, rows [b,8,s]; `at` gives (row of the batch, tile of keys)."""
    specs = [pl.BlockSpec((1, size, x.shape[2]), lambda *step: (*at(*step), 0)) for x in arrays[:-1]]
    rows = pl.BlockSpec((1, SUBLANES, size), lambda *step: (at(*step)[0], 0, at(*step)[1]))
    return list(zip(arrays, [*specs, rows], strict=True))


def _rows_out(x: Array, rows: tuple[int, ...], t: int) -> tuple[Any, pl.BlockSpec]:
    shape = x.shape[0], *rows, x.shape[1]
    return jax.ShapeDtypeStruct(shape, jnp.float32), _row_spec(shape, t, lambda b, i, *_: (b, i))


def _scratch(call: Call) -> list[Any]:
    return [pltpu.VMEM(shape, jnp.int32 if integers else call.dtype) for shape, integers in room_shapes(call.plan)]


def softmax(call: Call, x: Laid) -> tuple[Array, ...]:
    """Output [b,t',h v], log of the softmax's sum and entropy [b,n,r,t']."""
    plan, (b, t, _) = call.plan, x.q.shape
    wide = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    tile, heads = plan.query_tile, (plan.indexer_heads, plan.group)
    o = jax.ShapeDtypeStruct((b, t, x.v.shape[2]), call.dtype)
    rows = _rows_out(x.q, heads, tile)
    return _launch(
        call, functools.partial(attend_kernel, plan), "attend", (b, t // tile, x.table.shape[2]), 2, [x.table],
        [
            *_queries(call, x, lambda b, i, *_: (b, i)),
            *_keys(call, [x.k, x.v, x.keys, x.rows], plan.key_tile, lambda b, i, j, table: (b, table[b, i, j] >> 2)),
        ],
        [(o, pl.BlockSpec((1, tile, o.shape[2]), lambda b, i, *_: (b, i, 0))), rows, rows],
        [
            *_scratch(call), wide((*heads, plan.value_width, tile)), *[wide((*heads, tile))] * 3,
            wide((2, plan.group, plan.key_tile, tile)),
            pltpu.VMEM((2, plan.group, plan.key_tile, tile), call.dtype),
        ], {}, (b, t, x.k.shape[1]),
    )  # fmt: skip


def divergence(call: Call, x: Laid, log_sum: Array, band: Array | None) -> tuple[Array, ...]:
    """Sums [b,8,t'] over all keys; or, with a band, mean attention and mass [b,band,t'] of this device's heads."""
    plan, (b, t, _) = call.plan, x.q.shape
    block = plan.key_tile, plan.query_tile
    tile, per_band = plan.query_tile, plan.band // plan.key_tile
    tiles = x.table.shape[2] if band is None else per_band
    at = (jnp.zeros((), jnp.int32) if band is None else band * per_band).reshape(1)
    if band is None:
        results = [_rows_out(x.q, (SUBLANES,), tile)]
    else:
        strip = jax.ShapeDtypeStruct((b, plan.band, t), jnp.float32)
        results = [(strip, pl.BlockSpec((1, plan.key_tile, tile), lambda b, i, j, *_: (b, j, i)))] * 2
    return _launch(
        call, functools.partial(diverge_kernel, plan, band is None), "diverge", (b, t // tile, tiles), 2, [x.table, at],
        [
            *_queries(call, x, lambda b, i, *_: (b, i)), (x.importance, _SCALARS),
            (log_sum, _row_spec(log_sum.shape, tile, lambda b, i, *_: (b, i))),
            *_keys(
                call, [x.k, x.keys, x.rows], plan.key_tile,
                lambda b, i, j, table, at: (b, table[b, i, j + at[0]] >> 2),
            ),
        ],
        results, [*_scratch(call), pltpu.VMEM((2, *block), jnp.float32)], {},
        (b, t, x.k.shape[1]), 1 if band is None else x.k.shape[1] // plan.band,
    )  # fmt: skip


def _row_block(shape: tuple[int, ...]) -> pl.BlockSpec:
    """One block for each row of the batch."""
    return pl.BlockSpec((1, *shape), lambda b, *_: (b, *(0,) * len(shape)))


def band_gradients(
    call: Call, x: Laid, table: Array, band: Array, of_queries: tuple[Array, ...], sums: tuple[Array, ...]
) -> tuple[Array, ...]:
    """The gradients that a band of keys adds to the queries', and its own."""
    plan, (b, t, _) = call.plan, x.q.shape
    tile, (d_o, delta, log_sum, d_mass) = plan.query_tile, of_queries

    def at(b: Any, i: Any, _: Any, table: Any, band: Any) -> tuple[Any, Any]:
        return b, table[b, band[0], i] >> 2

    def tokens(array: Array) -> tuple[Array, pl.BlockSpec]:
        return array, pl.BlockSpec((1, tile, array.shape[2]), lambda *step: (*at(*step), 0))

    def rows(array: Array) -> tuple[Array, pl.BlockSpec]:
        return array, _row_spec(array.shape, tile, at)

    queries = _queries(call, x, at)
    operands = [
        *queries[:2], tokens(x.query.swapaxes(1, 2)), *queries[2:], (x.importance, _SCALARS),
        rows(log_sum), rows(delta), tokens(d_o), rows(d_mass),
        *_keys(call, [x.k, x.v, x.keys, x.rows], plan.band, lambda b, i, _, table, band: (b, band[0])),
        *map(rows, sums),
    ]  # fmt: skip
    widths = x.k.shape[2], x.v.shape[2], plan.depth
    shapes: list[tuple[int, ...]] = [(plan.band, width) for width in widths]
    shapes.append((plan.indexer_heads + plan.heads, 1, LANES))
    dtypes = [call.dtype] * 3 + [jnp.dtype(jnp.float32)]
    results = [(jax.ShapeDtypeStruct(y.shape, y.dtype), rows(y)[1]) for y in sums]
    results += [
        (jax.ShapeDtypeStruct((b, *shape), dtype), _row_block(shape))
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    block = plan.key_tile, tile
    scratch = [
        *_scratch(call), *(pltpu.VMEM((rows, *block), jnp.float32) for rows in (2, plan.indexer_heads)),
        *(pltpu.VMEM(shape, jnp.float32) for shape in shapes),
    ]
    aliases = {len(operands) - len(sums) + i: i for i in range(len(sums))}
    return _launch(
        call, functools.partial(backward_kernel, plan, not plan.head_axes), "backward", (b, t // tile), 1,
        [x.table, table, band.reshape(1)], operands, results, scratch, aliases,
        (b, t, x.k.shape[1]), x.k.shape[1] // plan.band,
    )  # fmt: skip
