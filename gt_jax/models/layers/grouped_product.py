"""Rows sorted by expert, and the product of each expert's rows with its matrix: four ways, one derivative rule.

Letters: e experts, m picks in all, r rows, d and f widths.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

from gt_jax.models.layers.primitives import widen
from pallas_kernels.grouped_product import pallas_gpu
from pallas_kernels.platform import is_hopper, target_device

LARGEST_BLOCK = 128  # rows: enough that a product is bound by arithmetic, not by reading the expert's weights
TILE = 512  # rows of a TPU's tile, for the same reason: its arithmetic is that much faster than its memory
LANES = 128
BLOCKED = ("cpu", "cuda", "rocm")  # platforms of the lowering whose `ragged_dot` is a masked product over all experts


class Dispatch(NamedTuple):
    """Picks in rows, sorted by expert; each expert's run is filled up with empty rows to a multiple of the block.

    `pick`: which pick lies in a row, or the number of picks for an empty row. `row`: in which row a pick lies, or the
    number of rows for one that has none. `sizes`: rows of each expert's run. Runs follow one another from row 0; the
    rows after the last run are empty.
    """

    pick: Int[Array, " r"]
    row: Int[Array, " m"]
    sizes: Int[Array, " e"]


def block_size(picks: int, experts: int) -> int:
    """Rows of a block: a power of two, at most half an expert's fair share, so that at most half as many are empty."""
    share = max(picks // (2 * experts), 1)
    return min(1 << (share.bit_length() - 1), LARGEST_BLOCK)


def block_for(picks: int, x: Float[Array, "*n d"], w: Float[Array, "e _ _"]) -> int:
    """`block_size`; 1 where a TPU's kernel multiplies, whose runs may begin anywhere; where a Hopper GPU's do, theirs.

    Of these two the larger one if that fills up by a fifth at most: they skip blocks that are empty, so few picks cost
    no more for it.
    """
    count = w.shape[0]
    if _tiled(row_count(picks, count, 1), w):
        return 1
    small, large = pallas_gpu.BLOCKS
    wanted = large if 5 * count * (large - 1) <= picks else small
    return wanted if _by_warpgroups(x, w, wanted) else block_size(picks, count)


def row_count(picks: int, count: int, block: int) -> int:
    """Rows that are enough for the picks of `count` experts, however they fall; many rows are whole tiles."""
    rows = (picks + count * (block - 1)) // block * block
    return rows if rows < 4 * TILE else -(-rows // TILE) * TILE


def dispatch(experts: Int[Array, " m"], count: int, block: int) -> Dispatch:
    """Rows for the picks of experts 0 … count-1, in the order of the picks within each expert; others get no row."""
    picks = experts.shape[0]
    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    owner = experts[order]
    sizes = jnp.sum(jax.nn.one_hot(experts, count, dtype=jnp.int32), axis=0)
    runs = -(-sizes // block) * block
    moved = (jnp.cumsum(runs) - runs) - (jnp.cumsum(sizes) - sizes)  # by the empty rows of the experts before
    rows = row_count(picks, count, block)
    row = jnp.arange(picks, dtype=jnp.int32) + moved[jnp.minimum(owner, count - 1)]
    row = jnp.where(owner < count, row, rows).astype(jnp.int32)
    pick = jnp.full((rows,), picks, jnp.int32).at[row].set(order, mode="drop")
    return Dispatch(pick, jnp.zeros((picks,), jnp.int32).at[order].set(row, unique_indices=True), runs)


@jax.custom_vjp
def spread(x: Float[Array, "n d"], source: Int[Array, " r"], rows: Int[Array, "n k"]) -> Float[Array, "r d"]:
    """y_r = x[source_r]; where source_r is n, a row that is nobody's, any row of x. `rows` says the same the other way:
    those that came from each of x.

    The transpose of a gather is a sum of scattered rows, which a TPU sorts first and then writes one by one; as the
    rows are known, it is `collect`, a gather again. Zeros in nobody's rows would be one more write of them all.
    """
    return x.at[jnp.minimum(source, x.shape[0] - 1)].get(mode="promise_in_bounds")


@jax.custom_vjp
def collect(y: Float[Array, "r d"], source: Int[Array, " r"], rows: Int[Array, "n k"]) -> Float[Array, "n d"]:
    """x_n = sum_k y[rows_nk], where rows_nk is r nothing: the transpose of `spread`. Summed in float32 at least.

    What is nothing is left out in the sum, where it costs nothing; a gather that fills it in writes its result twice.
    A gather for each pick: two beside each other are laid out anew by a TPU, and written once more, in float32.
    """
    picked = [y.at[jnp.minimum(one, y.shape[0] - 1)].get(mode="promise_in_bounds") for one in rows.T]
    there = [jnp.where((one < y.shape[0])[:, None], widen(row), 0.0) for one, row in zip(rows.T, picked, strict=True)]
    return functools.reduce(jnp.add, there).astype(y.dtype)


def _kept(function: Callable[..., Array]) -> Callable[..., tuple[Array, tuple[Array, Array]]]:
    return lambda x, source, rows: (function(x, source, rows), (source, rows))


spread.defvjp(_kept(spread), lambda kept, gradient: (collect(gradient, *kept), None, None))
collect.defvjp(_kept(collect), lambda kept, gradient: (spread(gradient, *kept), None, None))


def ragged_product(
    x: Float[Array, "r d"], w: Float[Array, "e _ _"], sizes: Int[Array, " e"], *, transposed: bool = False
) -> Float[Array, "r f"]:
    """Each expert's run of rows times its matrix by `jax.lax.ragged_dot`; 0 after the last run."""
    return _inside(jax.lax.ragged_dot(x, jnp.swapaxes(w, 1, 2) if transposed else w, sizes), sizes)


def blocked_product(
    x: Float[Array, "r d"], w: Float[Array, "e _ _"], sizes: Int[Array, " e"], *, block: int, transposed: bool = False
) -> Float[Array, "r f"]:
    """`ragged_product` for runs that are multiples of `block`: each block of rows times its expert's matrix.

    One block after the other: a product of all at once copies a matrix for each, and took three times as long.
    """

    def one(_: None, piece: tuple[Array, Array, Array]) -> tuple[None, Array]:
        rows, real, owner = piece
        return None, jnp.where(real, rows @ (w[owner].T if transposed else w[owner]), 0.0)

    _, product = jax.lax.scan(one, None, (x.reshape(-1, block, x.shape[1]), *_owners(x, w, sizes, block)))
    return product.reshape(x.shape[0], -1)


def blocked_gradients(
    x: Float[Array, "r d"], w: Float[Array, "e _ _"], sizes: Int[Array, " e"], gradient: Float[Array, "r f"],
    *, block: int, transposed: bool = False,
) -> tuple[Float[Array, "r d"], Float[Array, "e _ _"]]:
    """dx = gradient w^T and dw_i = x_i^T gradient_i, block after block; dw is added to in place, in float32."""

    def one(dw: Array, piece: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        rows, pulled, real, owner = piece
        pulled = jnp.where(real, pulled, 0.0)
        left, right = (pulled, rows) if transposed else (rows, pulled)
        more = jnp.matmul(left.T, right, preferred_element_type=dw.dtype)
        return dw.at[owner].add(more), pulled @ (w[owner] if transposed else w[owner].T)

    pieces = (x.reshape(-1, block, x.shape[1]), gradient.reshape(-1, block, gradient.shape[1]))
    dw, dx = jax.lax.scan(one, jnp.zeros_like(widen(w)), (*pieces, *_owners(x, w, sizes, block)))
    return dx.reshape(x.shape), dw.astype(w.dtype)


def _owners(x: Array, w: Array, sizes: Array, block: int) -> tuple[Array, Array]:
    """Of each block of rows, whether it lies in a run, and whose."""
    start = jnp.arange(0, x.shape[0], block, dtype=jnp.int32)
    owner = jnp.sum(start[:, None] >= jnp.cumsum(sizes)[None], axis=1)
    return owner < w.shape[0], jnp.minimum(owner, w.shape[0] - 1)


def tiled_product(
    x: Float[Array, "r d"], w: Float[Array, "e _ _"], sizes: Int[Array, " e"],
    *, transposed: bool = False, interpret: bool = False,
) -> Float[Array, "r f"]:
    """`ragged_product` by megablox, the TPU kernel that comes with JAX; its derivative is `tiled_gradients`.

    After the last run stands what the kernel found there, which may be no number: zeros would be one more write of all.
    """
    inner, outer = reversed(w.shape[1:]) if transposed else w.shape[1:]
    tiles = _tiles(x.shape[0], inner, outer)
    return gmm(x, w, sizes, x.dtype, tiles, transpose_rhs=transposed, interpret=interpret)


def tiled_gradients(
    x: Float[Array, "r d"], w: Float[Array, "e _ _"], sizes: Int[Array, " e"], gradient: Float[Array, "r f"],
    *, transposed: bool = False, interpret: bool = False,
) -> tuple[Float[Array, "r d"], Float[Array, "e _ _"]]:
    """dx = gradient w^T by runs, dw_i = x_i^T gradient_i, both by megablox; after the last run dx is anything.

    XLA's own derivative of `ragged_dot` multiplies, on a TPU too, every row by every expert, from an array [e, r, d].
    """
    dx = tiled_product(gradient, w, sizes, transposed=not transposed, interpret=interpret)
    left, right = (gradient, x) if transposed else (x, gradient)
    tiles = _tiles(x.shape[0], *w.shape[1:])
    return dx, tgmm(left.T, right, sizes, w.dtype, tiles, interpret=interpret)


def _tiles(rows: int, inner: int, outer: int) -> tuple[int, int, int]:
    """(rows, summed, free) of a tile: enough rows that a tile of weights is read for little."""
    return math.gcd(rows, TILE), min(inner, 1024), min(outer, 1024)


def takes_tiles(rows: int, inner: int, outer: int) -> bool:
    """Whether the TPU kernel is for this shape: whole tiles of rows, widths that are whole registers."""
    return math.gcd(rows, TILE) >= LANES and inner % LANES == 0 and outer % LANES == 0


def _inside(product: Float[Array, "r f"], sizes: Int[Array, " e"]) -> Float[Array, "r f"]:
    """0 after the last run."""
    inside = jnp.arange(product.shape[0], dtype=jnp.int32) < jnp.sum(sizes)
    return jnp.where(inside[:, None], product, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_product(
    x: Float[Array, "r d"], w: Float[Array, "e _ _"], sizes: Int[Array, " e"], block: int, transposed: bool = False
) -> Float[Array, "r f"]:
    """Each expert's run of rows times its matrix; runs are multiples of `block`, rows after the last are nobody's.

    Matrices are [e, d, f], or with `transposed` [e, f, d]. `tiled_product` on a TPU and `pallas_gpu.product` on a
    Hopper GPU where the shape allows; else `blocked_product` on CPUs and GPUs, where `ragged_dot` multiplies every row
    by every expert; else `ragged_product`. Its own derivative rule, for what is kept: x and w as they are, not what any
    of the ways makes of them.
    """
    if _tiled(x.shape[0], w):
        return tiled_product(x, w, sizes, transposed=transposed)
    if _by_warpgroups(x, w, block):
        return pallas_gpu.product(x, w, sizes, block=block, transposed=transposed)
    blocked = functools.partial(blocked_product, block=block, transposed=transposed)
    ragged = functools.partial(ragged_product, transposed=transposed)
    return jax.lax.platform_dependent(x, w, sizes, **dict.fromkeys(BLOCKED, blocked), default=ragged)


def _tiled(rows: int, w: Array) -> bool:
    """Known when tracing, so that on other machines the kernel is not even traced."""
    return target_device()[0] == "tpu" and takes_tiles(rows, *w.shape[1:])


def _by_warpgroups(x: Array, w: Array, block: int) -> bool:
    """As `_tiled`."""
    return is_hopper(*target_device()) and not pallas_gpu.unsupported(x, w, block)


def _grouped_forward(
    x: Array, w: Array, sizes: Array, block: int, transposed: bool
) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped_product(x, w, sizes, block, transposed), (x, w, sizes)


def _grouped_backward(
    block: int, transposed: bool, kept: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, Array, None]:
    x, w, sizes = kept
    if _tiled(x.shape[0], w):
        return *tiled_gradients(*kept, gradient, transposed=transposed), None
    if _by_warpgroups(x, w, block):
        dx = pallas_gpu.product(gradient, w, sizes, block=block, transposed=not transposed)
        left, right = (gradient, x) if transposed else (x, gradient)
        return dx, pallas_gpu.matrix_gradient(left, right, sizes, block=block), None

    def ragged(x: Array, w: Array, sizes: Array, gradient: Array) -> tuple[Array, Array]:
        dx, dw = jax.vjp(lambda x, w: ragged_product(x, w, sizes, transposed=transposed), x, w)[1](gradient)
        return dx, dw

    blocked = functools.partial(blocked_gradients, block=block, transposed=transposed)
    return *jax.lax.platform_dependent(*kept, gradient, **dict.fromkeys(BLOCKED, blocked), default=ragged), None


grouped_product.defvjp(_grouped_forward, _grouped_backward)
