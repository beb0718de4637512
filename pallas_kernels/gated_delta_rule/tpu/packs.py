"""Packs of heads, and what the TPU kernels do with them: matrix products, masks, the triangular inverse.

A *pack* is p value heads (p is 1 or 2) side by side in the lanes of one array: tokens [C, p v] or [v, p C], states
[k, p v] or [v, p k], what tokens are to each other [C, p C]. Two heads fill the registers of the vector unit, 128 lanes
wide, when C is 64, and the matrix unit, 256 wide on newer chips. A product of packs, head by head, is one product with
a block-diagonal matrix:

    [X1 | X2] @ [[Y1, 0], [0, Y2]] = [X1 Y1 | X2 Y2]

`expand` makes the matrix on the right. Two heads that share their key and query need no zeros where k or q stand.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.matrix_unit import LANES, NN, Form, lane_index, multiply, split

MASKED = -1e30  # an exponent; -inf would make the difference of two masked ones nan


@dataclass(frozen=True)
class Plan:
    """What is fixed when a kernel is compiled; widths are padded to the lanes.

    exact: float32 products, for float32 inputs and for beta above 1; otherwise the matrix unit's bfloat16, in one or
        three passes.
    matrix_unit: its width, 128 or 256.
    """

    chunk: int
    key_heads: int  # a step
    group: int  # value heads a key head
    key_width: int
    value_width: int
    scale: float
    exact: bool
    segmented: bool
    matrix_unit: int

    @property
    def heads(self) -> int:
        return self.key_heads * self.group

    @property
    def pack(self) -> int:
        useful = self.chunk < LANES or self.matrix_unit > LANES
        return 2 if useful and self.heads % 2 == 0 else 1

    @property
    def packs(self) -> int:
        return self.heads // self.pack

    @property
    def gates(self) -> tuple[str, ...]:
        """What the kernels get of each head and token: `tpu.layout.lay_gates`."""
        return ("sum", "fine", "gamma", "lam", "beta") if self.exact else ("sum", "gamma", "lam", "beta")

    def keys(self, pack: int) -> list[int]:
        """The key head of each value head of a pack."""
        return [head // self.group for head in self.members(pack)]

    def members(self, pack: int) -> range:
        return range(pack * self.pack, (pack + 1) * self.pack)

    def shares_key(self, pack: int) -> bool:
        return self.pack > 1 and len(set(self.keys(pack))) == 1


def expand(x: Float[Array, "r w"], pack: int) -> Float[Array, "pr w"]:
    """[X1 | X2] -> [[X1, 0], [0, X2]]."""
    if pack == 1:
        return x
    width = x.shape[1] // pack
    if width % LANES:
        head = lane_index(x.shape) >> (width.bit_length() - 1)
        return jnp.concatenate([jnp.where(head == i, x, jnp.zeros_like(x)) for i in range(pack)], axis=0)
    zero = jnp.zeros((x.shape[0], width), x.dtype)
    parts = [x[:, i * width : (i + 1) * width] for i in range(pack)]
    rows = [[part if i == j else zero for j in range(pack)] for i, part in enumerate(parts)]
    return jnp.concatenate([jnp.concatenate(row, axis=1) for row in rows], axis=0)


def transpose(x: Float[Array, "c pc"], pack: int) -> Float[Array, "c pc"]:
    """[X1 | X2] -> [X1^T | X2^T], square blocks."""
    if pack == 1:
        return x.T
    size = x.shape[0]
    turned = expand(x, pack).T  # block-diagonal: the rows of the other blocks are zeros, so blocks add up
    return sum((turned[i * size : (i + 1) * size] for i in range(1, pack)), turned[:size])


def widen(columns: Sequence[Float[Array, "c 1"]], width: int) -> Float[Array, "c pw"]:
    """One number a token and head, over the `width` lanes that the head has in a pack."""
    size = columns[0].shape[0]
    if width % LANES == 0 or len(columns) == 1:
        return jnp.concatenate([jnp.broadcast_to(x, (size, width)) for x in columns], axis=1)
    shape = (size, width * len(columns))
    head, wide = lane_index(shape) >> (width.bit_length() - 1), jnp.broadcast_to(columns[0], shape)
    for i, column in enumerate(columns[1:], 1):
        wide = jnp.where(head == i, jnp.broadcast_to(column, shape), wide)
    return wide


def multiply_finely(x: Array, y: Array, form: Form, exact: bool, pack: int = 1) -> Array:
    """X Y with y expanded over the pack, in passes: (Xh + Xl)(Yh + Yl) without Xl Yl; bfloat16 has no low part."""
    return multiply_each([x], y, form, exact, pack)[0]


def multiply_each(xs: Sequence[Array], y: Array, form: Form, exact: bool, pack: int = 1) -> list[Array]:
    """X Y for each X (form NN or NT), as `multiply_finely`; one below the other, so that Y is loaded once for all.

    To load a matrix takes the matrix unit longer than 64 rows take to pass it.
    """
    if exact:
        return _cut_rows(multiply(jnp.concatenate(xs), expand(y, pack), form, True), len(xs))
    parts, right = [split(x) for x in xs], [expand(part, pack) for part in split(y)]
    left = [part for own in parts for part in own]
    products = iter(_cut_rows(multiply(jnp.concatenate(left), right[0], form, False), len(left)))
    totals = [functools.reduce(jnp.add, [next(products) for _ in own]) for own in parts]
    for low in right[1:]:
        rest = _cut_rows(multiply(jnp.concatenate([own[0] for own in parts]), low, form, False), len(xs))
        totals = [total + x for total, x in zip(totals, rest, strict=True)]
    return totals


def _cut_rows(x: Array, count: int) -> list[Array]:
    size = x.shape[0] // count
    return [x[i * size : (i + 1) * size] for i in range(count)]


@dataclass(frozen=True)
class Masks:
    """Pairs of tokens of a chunk, over a pack: token in the rows, other token in the lanes."""

    seen: Bool[Array, "c pc"]  # the other is not later, and of the same segment
    seeing: Bool[Array, "c pc"]  # the transpose
    before: Bool[Array, "c pc"]
    after: Bool[Array, "c pc"]


def masks(chunk: int, pack: int, run_column: Array | None, run_row: Array | None) -> Masks:
    """Masks of a pack; the runs count segment starts, [C, 1] and [1, p C]."""
    shape = (chunk, pack * chunk)
    row, column = jax.lax.broadcasted_iota(jnp.int32, shape, 0), lane_index(shape) & (chunk - 1)
    seen, seeing = row >= column, row <= column
    if run_column is not None and run_row is not None:
        same = jnp.broadcast_to(run_column, shape) == jnp.broadcast_to(run_row, shape)
        seen, seeing = seen & same, seeing & same
    return Masks(seen, seeing, row > column, row < column)


def invert_unit_upper(systems: list[Float[Array, "c pc"]], plan: Plan) -> list[Float[Array, "c pc"]]:
    """(I + R)^-1 of every pack of strictly upper triangular matrices, by the ladder (see `common.triangular_inverse`).

        X = I;   for s = 1, 2, 4 .. C/2:   X <- X - X (R_s X),   R_s the upper right s x s of each 2s block

    then, after bfloat16 rungs, one step of refinement with three passes: X <- X + X (I - X - R X). All packs climb
    together, so that the matrix unit has other products to do while one waits; where it is 256 wide, two packs of
    64 x 64 blocks go as one.
    """
    size, pack = plan.chunk, plan.pack
    joined = 2 if 2 * pack * size <= plan.matrix_unit and len(systems) % 2 == 0 else 1
    if joined > 1:
        pairs = zip(systems[::2], systems[1::2], strict=True)
        systems = [jnp.concatenate(pair, axis=1) for pair in pairs]
    inverses = _climb(systems, size, pack * joined, plan.exact)
    width = pack * size
    return [x[:, i * width : (i + 1) * width] for x in inverses for i in range(joined)]


def _climb(systems: list[Array], size: int, pack: int, exact: bool) -> list[Array]:
    shape = (size, pack * size)
    row, column = jax.lax.broadcasted_iota(jnp.int32, shape, 0), lane_index(shape) & (size - 1)
    eye = jnp.where(row == column, 1.0, 0.0)
    inverses = []
    for rung in range(size.bit_length() - 1):
        block = ((row >> (rung + 1)) == (column >> (rung + 1))) & ((row >> rung) < (column >> rung))
        parts = [jnp.where(block, upper, 0.0) for upper in systems]
        if rung == 0:
            inverses = [eye - part for part in parts]
            continue
        right = [multiply(part, expand(_narrow(x, exact), pack), NN, exact)
                 for part, x in zip(parts, inverses, strict=True)]  # fmt: skip
        inverses = [x - multiply(x, expand(_narrow(y, exact), pack), NN, exact)
                    for x, y in zip(inverses, right, strict=True)]  # fmt: skip
    if exact:
        return inverses
    rests = [eye - x - multiply_finely(upper, x, NN, exact, pack) for upper, x in zip(systems, inverses, strict=True)]
    return [x + multiply(x, expand(_narrow(rest, exact), pack), NN, exact)
            for x, rest in zip(inverses, rests, strict=True)]  # fmt: skip


def _narrow(x: Array, exact: bool) -> Array:
    return x if exact else x.astype(jnp.bfloat16)
