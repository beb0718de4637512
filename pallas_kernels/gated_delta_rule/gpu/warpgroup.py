"""What a warpgroup does: products on the matrix unit of values that are sums of bfloat16 parts, rows and columns.

Pallas' interpreter knows neither a left operand in registers nor an accumulator that starts from a value: for it the
same sums are plain products of the same rounded operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array

from pallas_kernels.gated_delta_rule.gpu.plan import C, Plan

plgpu: Any = mosaic_gpu  # its types are those of the JAX that is installed, which may be too old to run this
Ref = Any  # of an array in global or shared memory, of a barrier
Operand = Any  # a value in registers, or a Ref in shared memory
Parts = Sequence[Operand]  # high, and low where there is one
Pair = tuple[Parts, Parts]

class Place(NamedTuple):
    """Which 64 value columns, which value head, which row of the batch."""

    tile: Array
    head: Array
    row: Array

    @property
    def columns(self) -> Any:
        return pl.ds(self.tile * C, C)


LAYOUT = plgpu.Layout.WGMMA
ROW, COLUMN = LAYOUT.reduce(1), LAYOUT.reduce(0)
SQUARE = (C, C)
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
TILED_WIDE = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
MASKED = -1e30  # an exponent; -inf would make the difference of two masked ones nan
COMPILER = plgpu.CompilerParams(  # the other semantics finds no layouts for the ladder
    lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True
)


def interpreter(plan: Plan) -> Any:
    """What `plgpu.kernel` takes as `interpret`."""
    return plgpu.InterpretGPUParams() if plan.interpreted else None


def tile(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """Scratch in shared memory, as TMA and the matrix unit take it."""
    return plgpu.SMEM(shape, dtype, transforms=TILED if jnp.dtype(dtype).itemsize == 2 else TILED_WIDE)


def split(x: Array, parts: int) -> list[Array]:
    """The bfloat16 parts of a float32 value."""
    high = x.astype(jnp.bfloat16)
    return [high] if parts == 1 else [high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)]


def join(parts: Sequence[Array]) -> Array:
    """The float32 value of its parts."""
    first, *rest = (part.astype(jnp.float32) for part in parts)
    return sum(rest, start=first)


def turned(parts: Parts) -> list[Ref]:
    """The transposes of operands in shared memory."""
    return [part.transpose((1, 0)) for part in parts]


def passes(left: Parts, right: Parts) -> list[tuple[Operand, Operand]]:
    """The products of parts that count: all but low times low."""
    return [(a, b) for i, a in enumerate(left) for j, b in enumerate(right) if i + j < 2]


def multiply(
    interpreted: bool,
    sums: Sequence[tuple[tuple[int, int], Sequence[Pair]]],
    start: Sequence[Array] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> list[Array]:
    """For each (shape, pairs) the float32 sum of the products, all in flight at once while `meanwhile` runs.

    `start` is what the sums begin with.
    """
    products = [[one for left, right in pairs for one in passes(left, right)] for _, pairs in sums]
    if interpreted:
        return _interpret(products, start, meanwhile)

    def compute(accumulators: Sequence[Ref]) -> None:
        for accumulator, own in zip(accumulators, products, strict=True):
            for left, right in own:
                plgpu.wgmma(accumulator, left, right)
        if meanwhile is not None:
            meanwhile()

    def from_nothing(*accumulators: Ref) -> list[Array]:
        compute(accumulators)
        return [accumulator[...] for accumulator in accumulators]

    if start is None:
        return pl.run_scoped(from_nothing, *(plgpu.ACC(shape, jnp.float32) for shape, _ in sums))
    return pl.run_state(compute)([plgpu.ACC.init(value) for value in start])


def _interpret(
    products: Sequence[Sequence[tuple[Operand, Operand]]],
    start: Sequence[Array] | None,
    meanwhile: Callable[[], None] | None,
) -> list[Array]:
    if meanwhile is not None:
        meanwhile()

    def value(x: Operand) -> Array:
        in_registers = not hasattr(x, "transforms") and isinstance(jax.typeof(x), jax.core.ShapedArray)
        return (x if in_registers else x[...]).astype(jnp.float32)

    found = [[jnp.dot(value(a), value(b), precision="highest") for a, b in own] for own in products]
    sums = [sum(own[1:], start=own[0]) for own in found]
    return sums if start is None else [a + b for a, b in zip(start, sums, strict=True)]


def rows(x: Array, width: int = C) -> Array:
    """One number a row, over the columns."""
    return lax.broadcast_in_dim(x, (x.shape[0], width), [0])


def columns(x: Array, height: int = C) -> Array:
    """One number a column, over the rows."""
    return lax.broadcast_in_dim(x, (height, x.shape[0]), [1])


def load_row(ref: Ref) -> Array:
    """A vector, one number a row."""
    return plgpu.load(ref, layout=ROW)


def load_column(ref: Ref) -> Array:
    """A vector, one number a column."""
    return plgpu.load(ref, layout=COLUMN)


def index(axis: Any) -> Array:
    """The number of each row, or of each column."""
    return plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=axis)


def put(refs: Sequence[Ref], parts: Sequence[Array]) -> None:
    """Write the parts of a value."""
    for ref, part in zip(refs, parts, strict=True):
        ref[...] = part


def put_identity(ref: Ref) -> None:
    """Write I, the right operand that turns a transposed left one exactly."""
    ref[...] = jnp.where(rows(index(ROW)) == columns(index(COLUMN)), 1.0, 0.0).astype(ref.dtype)
    plgpu.commit_smem()


def take_turns(work: Sequence[tuple[int, Callable[[], None]]]) -> None:
    """Each warpgroup does its own part with the registers a thread that stand beside it: 512 in all, 168 at first."""
    for warpgroup, (registers, run) in enumerate(work):

        @pl.when(lax.axis_index("warpgroup") == warpgroup)
        def _own(registers: int = registers, run: Callable[[], None] = run) -> None:
            plgpu.set_max_registers(registers, action="increase" if registers > 168 else "decrease")
            run()


def arrive_if(needed: Array, barrier: Ref) -> None:
    """Arrive where somebody waits for it: an arrival that nobody waits for is an error to the interpreter."""

    @pl.when(needed)
    def _arrive() -> None:
        plgpu.barrier_arrive(barrier)


def pair_decay(plan: Plan, summands: int, sums: Ref, run: Ref) -> Array:
    """e^(G_i - G_j) for tokens i >= j of one segment, else 0; the sums may be given as a coarse and a fine part."""
    differences = [rows(load_row(sums.at[part])) - columns(load_column(sums.at[part])) for part in range(summands)]
    seen = rows(index(ROW)) >= columns(index(COLUMN))
    if plan.segmented:
        seen = seen & (rows(load_row(run)) == columns(load_column(run)))
    return jnp.exp(jnp.where(seen, sum(differences[1:], differences[0]), MASKED))


def slabs(plan: Plan) -> list[Any]:
    """The key columns of each slab."""
    starts = [sum(plan.slabs[:i]) for i in range(len(plan.slabs))]
    return [pl.ds(start, width) for start, width in zip(starts, plan.slabs, strict=True)]


def in_slabs(plan: Plan, ref: Ref) -> list[list[Ref]]:
    """The parts [p, rows, k] of each slab of columns."""
    return [[ref.at[part, :, slab] for part in range(ref.shape[0])] for slab in slabs(plan)]


def parts_of(ref: Ref, *slot: Array) -> list[Ref]:
    """The parts of what stands in shared memory, in a slot of a ring if one is given."""
    return [ref.at[(*slot, part)] for part in range(ref.shape[len(slot)])]


def groups(refs: Sequence[Ref], *kinds: type[Any]) -> list[Any]:
    """The refs of a kernel in its named tuples, in order."""
    found, start = [], 0
    for kind in kinds:
        found.append(kind(*refs[start : start + len(kind._fields)]))
        start += len(kind._fields)
    return found


def zeros(shape: tuple[int, ...], layout: Any = LAYOUT) -> Array:
    """A float32 value to sum into."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
