"""Grouped products on a Hopper GPU (compute capability 9.0), by its warpgroup products: only the rows that are there.

Every run begins at a multiple of `block` rows and is filled up with rows of zeros, so a tile of rows has one owner and
nothing inside a tile needs a mask. JAX's own `pallas.ops.gpu.ragged_dot_mgpu` takes runs that begin anywhere: it
multiplies a tile more for each group, and its gradient of the matrices (`transposed_ragged_dot_mgpu`) asks the machine
that traces for its number of cores, so it cannot be compiled for a card that is not there. The products here are built
as those are.

Letters: g groups, r rows, d and f widths, n blocks of rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

DEPTH = 64  # of what is summed in one step of the product with the matrices
STAGES = 4  # tiles on their way from memory while one is multiplied
BLOCKS = (64, 128)  # rows of a tile, of which a warpgroup multiplies 64 at a time
ACCUMULATORS = 128 * 128  # float32 sums that one warpgroup holds, 128 registers of each thread


def unsupported(x: Array, w: Array, block: int) -> list[str]:
    """What the kernels do not do, a line each."""
    problems = []
    if x.dtype != w.dtype or x.dtype not in (jnp.bfloat16, jnp.float16):
        problems.append(f"rows and matrices must both be bfloat16 or both float16, got {x.dtype} and {w.dtype}")
    if block not in BLOCKS:
        problems.append(f"block must be one of {BLOCKS}, got {block}")
    if any(width % 128 for width in w.shape[1:]):
        problems.append(f"both widths must be multiples of 128, got {w.shape[1]} and {w.shape[2]}")
    return problems


def product(
    x: Float[Array, "r _"],
    w: Float[Array, "g d f"],
    sizes: Int[Array, " g"],
    *,
    block: int,
    transposed: bool = False,
    interpret: Any = None,
) -> Float[Array, "r _"]:
    """y_r = x_r w[group of r] [r, f], 0 after the last run; `transposed`, of x [r, f], x_r w[group of r]^T [r, d].

    `sizes` are rows of each group's run, multiples of `block`, as r is. Sums in float32, rounded once to x's dtype.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu  # not on a machine without its parts

    (rows, summed), groups = x.shape, w.shape[0]
    free = w.shape[1] if transposed else w.shape[2]
    width = _width(free, block)
    across = free // width

    def grouped_product(owner_ref: Any, x_ref: Any, w_ref: Any, y_ref: Any, y_tile: Any) -> None:
        place = jax.lax.axis_index("tile")
        row, column = jax.lax.div(place, jnp.int32(across)), jax.lax.rem(place, jnp.int32(across))
        owner = owner_ref[row]

        def step(rows_tile: Any, w_tile: Any, sums: Any) -> None:
            plgpu.wgmma(sums, rows_tile, w_tile.transpose((1, 0)) if transposed else w_tile)
            plgpu.wgmma_wait(1)  # the tiles before may be overwritten from here on

        def summing(sums: Any) -> Array:
            tile = (width, DEPTH) if transposed else (DEPTH, width)
            at = (lambda k: (column, k)) if transposed else (lambda k: (k, column))
            specs = [_tile(plgpu, (block, DEPTH), lambda k: (row, k), x), _tile(plgpu, tile, at, w)]

            @pl.when(owner < groups)
            def _() -> None:
                pipeline = plgpu.emit_pipeline(
                    lambda _, left, right: step(left, right, sums),
                    grid=(summed // DEPTH,), in_specs=specs, max_concurrent_steps=min(STAGES, summed // DEPTH),
                )  # fmt: skip
                pipeline(x_ref, w_ref.at[owner])

            return sums[...]

        total = pl.run_scoped(summing, plgpu.ACC((block, width)))
        _store(plgpu, total, y_tile, y_ref.at[pl.ds(row * block, block), pl.ds(column * width, width)])

    start = jnp.arange(0, rows, block, dtype=jnp.int32)
    owner = jnp.sum(start[:, None] >= jnp.cumsum(sizes)[None], axis=1, dtype=jnp.int32)
    out = jax.ShapeDtypeStruct((rows, free), x.dtype)
    cost = _cost(2 * rows * summed * free, x, w, out)
    run = _launch(plgpu, grouped_product, out, rows // block * across, (block, width), cost, interpret)
    return run(owner, x, w)


def matrix_gradient(
    x: Float[Array, "r d"], gradient: Float[Array, "r f"], sizes: Int[Array, " g"], *, block: int, interpret: Any = None
) -> Float[Array, "g d f"]:
    """dw_i = x_i^T gradient_i over the rows of group i, 0 for an empty one; `sizes` as for `product`.

    Summed in float32, rounded once to x's dtype.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu  # not on a machine without its parts

    (rows, inner), outer, groups = x.shape, gradient.shape[1], sizes.shape[0]
    tall, width = 128, 128
    down, across = inner // tall, outer // width

    def grouped_matrix_gradient(
        first_ref: Any, count_ref: Any, x_ref: Any, gradient_ref: Any, w_ref: Any, w_tile: Any
    ) -> None:
        place = jax.lax.axis_index("tile")
        group, inside = jax.lax.div(place, jnp.int32(down * across)), jax.lax.rem(place, jnp.int32(down * across))
        row, column = jax.lax.div(inside, jnp.int32(across)), jax.lax.rem(inside, jnp.int32(across))
        first, count = first_ref[group], count_ref[group]

        def step(x_tile: Any, gradient_tile: Any, sums: Any) -> None:
            plgpu.wgmma(sums, x_tile.transpose((1, 0)), gradient_tile)
            plgpu.wgmma_wait(1)

        def summing(sums: Any) -> Array:
            specs = [
                _tile(plgpu, (block, tall), lambda n: (first + n, row), x),
                _tile(plgpu, (block, width), lambda n: (first + n, column), gradient),
            ]

            @pl.when(count > 0)
            def _() -> None:
                pipeline = plgpu.emit_pipeline(
                    lambda _, left, right: step(left, right, sums),
                    grid=(count,), in_specs=specs, max_concurrent_steps=STAGES if block == 64 else STAGES - 1,
                )  # fmt: skip
                pipeline(x_ref, gradient_ref)

            return sums[...]

        total = pl.run_scoped(summing, plgpu.ACC((tall, width)))
        _store(plgpu, total, w_tile, w_ref.at[group, pl.ds(row * tall, tall), pl.ds(column * width, width)])

    counts = (sizes // block).astype(jnp.int32)
    out = jax.ShapeDtypeStruct((groups, inner, outer), x.dtype)
    cost = _cost(2 * rows * inner * outer, x, gradient, out)
    run = _launch(plgpu, grouped_matrix_gradient, out, groups * down * across, (tall, width), cost, interpret)
    return run((jnp.cumsum(counts) - counts).astype(jnp.int32), counts, x, gradient)


def _width(free: int, block: int) -> int:
    """Columns of a tile: as many sums as a warpgroup holds, or half, where that divides them."""
    width = ACCUMULATORS // block
    return width if free % width == 0 else 128


def _transforms(plgpu: Any, columns: int, dtype: Any) -> tuple[Any, ...]:
    """How a tile of so many columns lies in shared memory, so that the products can read it."""
    bytes_a_number = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * bytes_a_number * 8)
    return plgpu.TilingTransform((8, swizzle // bytes_a_number)), plgpu.SwizzleTransform(swizzle)


def _tile(plgpu: Any, shape: tuple[int, int], at: Callable[..., Any], like: Array) -> Any:
    return plgpu.BlockSpec(shape, at, transforms=_transforms(plgpu, shape[1], like.dtype), delay_release=1)


def _store(plgpu: Any, sums: Array, tile: Any, target: Any) -> None:
    """Rounds the sums into shared memory and copies them out."""
    tile[...] = sums.astype(tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, target)
    plgpu.wait_smem_to_gmem(0)


def _cost(flops: int, *arrays: Any) -> pl.CostEstimate:
    """Of every block full, each array read or written once."""
    moved = sum(array.size * array.dtype.itemsize for array in arrays)
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)


def _launch(
    plgpu: Any,
    kernel: Callable[..., None],
    out: jax.ShapeDtypeStruct,
    tiles: int,
    tile: tuple[int, int],
    cost: pl.CostEstimate,
    interpret: Any,
) -> Callable[..., Array]:
    """One warpgroup a tile of the result, with such a tile in shared memory."""
    kept = plgpu.SMEM(tile, out.dtype, transforms=_transforms(plgpu, tile[1], out.dtype))
    given = {"cost_estimate": cost, "interpret": interpret}
    known = inspect.signature(plgpu.kernel).parameters  # JAX 0.10 takes no estimate
    options = {name: value for name, value in given.items() if name in known and value is not None}
    return plgpu.kernel(kernel, out_type=out, scratch_types=[kept], grid=(tiles,), grid_names=("tile",), **options)
