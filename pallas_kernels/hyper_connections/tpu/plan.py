"""What is fixed while a kernel is traced: sizes, tiles, and where each number of a token lies.

A grid step is a tile of tokens with all streams and their whole width, so that norm and projection need one pass over
it. Numbers of a token are rows of `tile` lanes, tokens in the lanes; to scale tokens they are turned into columns.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.matrix_unit import LANES

ROWS = 16  # tokens handled together: a register of bfloat16, two of float32
HALF = 8
SUBLANES = 8
VMEM_LIMIT = 56 << 20  # of the 64 MiB of the smallest chip
TILE = 128
SLAB = 512  # lanes of the width whose matrix products run beside the multiplies and adds
WIDE_SLAB = 1024  # where those are few
UNROLLED = 8  # registers of lanes an iteration

Carry = TypeVar("Carry")


def up(size: int, unit: int) -> int:
    """The next multiple."""
    return size + -size % unit


def _part(width: int, most: int) -> int:
    """The largest whole number of registers, up to `most` lanes, that divides a width."""
    return next(size for size in range(min(most, width), 0, -LANES) if width % size == 0)


@dataclass(frozen=True)
class Plan:
    """Streams, their width, tokens of a row, Sinkhorn's constants, the norm's, whether products are float32's."""

    streams: int
    width: int
    length: int
    rounds: int
    floor: float
    epsilon: float
    exact: bool
    unrolled: bool = True  # False for the interpreter, which compiles what is unrolled slowly
    tile: int = TILE

    @property
    def numbers(self) -> int:
        """What a token's state is projected to: n for the read, n for the write, n^2 for the mix."""
        return self.streams * (self.streams + 2)

    @property
    def rows(self) -> int:
        """Those in whole registers of float32."""
        return up(self.numbers, SUBLANES)

    @property
    def packed(self) -> int:
        """Those in whole registers of bfloat16."""
        return up(self.numbers, ROWS)

    @property
    def record(self) -> int:
        """Rows kept of a token: coefficients, normed projection, and 1 / root mean square."""
        return 2 * self.rows + SUBLANES

    @property
    def tiles(self) -> int:
        return -(-self.length // self.tile)

    @property
    def padded(self) -> int:
        """Tokens of a row in whole tiles, as records have them."""
        return self.tiles * self.tile

    @property
    def ragged(self) -> bool:
        """Whether the last tile has tokens that are none."""
        return self.padded != self.length

    @property
    def slab(self) -> int:
        return _part(self.width, SLAB)

    @property
    def wide_slab(self) -> int:
        return _part(self.width, WIDE_SLAB)

    @property
    def phi_rows(self) -> int:
        """Of phi as the kernels take it: itself, or its high, low and high halves in bfloat16."""
        return self.packed if self.exact else 3 * self.packed

    def mixes(self, i: int, j: int) -> int:
        """The row of H_res[i, j]; that of H_pre[j] is j, that of H_post[i] is n + i."""
        return 2 * self.streams + i * self.streams + j


def each_rows(plan: Plan, body: Callable[[Any], None], unrolled: bool = False) -> None:
    """`body` of every `ROWS` tokens of a tile, given their slice; unrolled, it is scheduled with what is beside it."""

    def step(i: Array, carry: None) -> None:
        body(pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS))

    jax.lax.fori_loop(0, plan.tile // ROWS, step, None, unroll=unrolled and plan.unrolled)


def each_slab(plan: Plan, slab: int, body: Callable[[Any], None]) -> None:
    """`body` of every slab of lanes, given its start."""

    def step(i: Array, carry: None) -> None:
        body(pl.multiple_of(i * slab, LANES))

    jax.lax.fori_loop(0, plan.width // slab, step, None)


def over_lanes(width: int, body: Callable[[Any, Carry], Carry], start: Carry) -> Carry:
    """`body` of every register of lanes in turn, given their slice and what the one before gave."""
    unrolled = next(count for count in (UNROLLED, 4, 2, 1) if width % (count * LANES) == 0)

    def step(i: Array, carry: Carry) -> Carry:
        for k in range(unrolled):
            carry = body(pl.ds(pl.multiple_of((i * unrolled + k) * LANES, LANES), LANES), carry)
        return carry

    return jax.lax.fori_loop(0, width // (unrolled * LANES), step, start)


def spread(rows: Float[Array, "k tile"], k: int) -> Float[Array, "tile l"]:
    """Number k of each token in every lane."""
    return jnp.broadcast_to(rows[k : k + 1], (LANES, rows.shape[1])).T


def gathered(sums: Float[Array, "tile l"]) -> Float[Array, "1 tile"]:
    """The sum over the lanes of each token, as a row."""
    return jnp.sum(sums.T, axis=0, keepdims=True)


def turned(rows: Float[Array, "k tile"]) -> Float[Array, "tile l"]:
    """Numbers of tokens as columns, in whole registers."""
    past = -rows.shape[0] % LANES
    return jnp.concatenate([rows, jnp.zeros((past, rows.shape[1]), jnp.float32)]).T if past else rows.T


def real_tokens(plan: Plan, tile_index: Array) -> Array:
    """[1, tile]: which tokens of this tile there are."""
    return tile_index * plan.tile + jax.lax.broadcasted_iota(jnp.int32, (1, plan.tile), 1) < plan.length


def total(terms: Iterable[Array]) -> Array:
    """A sum of few arrays."""
    return functools.reduce(operator.add, terms)
