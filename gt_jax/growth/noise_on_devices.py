"""The noise of gt_jax.growth.noise under `jax.jit` and on a mesh: the same bits from 32-bit arithmetic alone.

- JAX has no 64-bit integers unless a whole process turns them on, and devices have none in hardware. A word of Philox
  is two uint32 limbs here; their products come from halves (`lax.mulhi` does not lower on a mesh).
- Written out round by round, so that all of it fuses with what uses it. Each value makes its whole block: the price of
  a position that may lie anywhere on a mesh. Growth from disk to disk takes numpy, which makes each block once.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gt_jax.growth.noise import POSITIONS

Word = tuple[Any, Any]  # low and high half, uint32

_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10


def positions(shape: tuple[int, ...], sharding: Any) -> Array:
    """Row-major positions 0, 1, ... of a block, uint32, sharded as the block is."""
    total = jax.lax.full(shape, np.uint32(0), sharding=sharding)
    for axis in range(len(shape)):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=sharding)
        total += along * np.uint32(math.prod(shape[axis + 1 :]) % POSITIONS)
    return total


def limbs(key: np.ndarray) -> np.ndarray:
    """A key of two uint64 as four uint32, lowest first: what a compiled program can take."""
    return np.asarray([int(word) >> shift & 0xFFFFFFFF for word in key for shift in (0, 32)], np.uint32)


def at(key: Array, where: Array, noise_step: Array | np.float32) -> Array:
    """The noise at positions `where` (uint32), float32, of standard deviation noise_std = noise_step * 147.8."""
    bits = random_bits(key, where)
    total = (bits & 255) + (bits >> 8 & 255) + (bits >> 16 & 255) + (bits >> 24)
    return (total.astype(jnp.int32) - 510).astype(jnp.float32) * noise_step


def random_bits(key: Array, where: Array) -> Array:
    """32 bits for each position (uint32): the block where // 8, of it the half word where % 8. `key` is `limbs`."""
    zero = where ^ where
    counter: list[Word] = [((where >> 3) + 1, zero), (zero, zero), (zero, zero), (zero, zero)]  # numpy counts from 1
    keys: list[Word] = [(key[0], key[1]), (key[2], key[3])]
    for turn in range(_ROUNDS):
        if turn:
            keys = [_add(word, weyl) for word, weyl in zip(keys, _WEYL, strict=True)]
        (low0, high0), (low1, high1) = _product(counter[0], _MULTIPLIERS[0]), _product(counter[2], _MULTIPLIERS[1])
        counter = [_xor(high1, counter[1], keys[0]), low1, _xor(high0, counter[3], keys[1]), low0]
    halves = [half for word in counter for half in word]
    for bit in range(3):
        odd = (where >> bit & 1) == 1
        halves = [jnp.where(odd, b, a) for a, b in zip(halves[::2], halves[1::2], strict=True)]
    return halves[0]


def _split(constant: int) -> tuple[np.uint32, np.uint32]:
    return np.uint32(constant & 0xFFFFFFFF), np.uint32(constant >> 32)


def _xor(a: Word, b: Word, c: Word) -> Word:
    return a[0] ^ b[0] ^ c[0], a[1] ^ b[1] ^ c[1]


def _add(a: Word, constant: int) -> Word:
    low, high = _split(constant)
    total = a[0] + low
    return total, a[1] + high + (total < low).astype(jnp.uint32)


def _product(a: Word, constant: int) -> tuple[Word, Word]:
    """The low and the high word of a 64-bit word times a 64-bit constant."""
    low, high = _split(constant)
    (ll, ll_high), (lh, lh_high), (hl, hl_high), (hh, hh_high) = (
        _wide(x, y) for x, y in ((a[0], low), (a[0], high), (a[1], low), (a[1], high)))  # fmt: skip
    second, carry = _sum(ll_high, lh, hl)
    third, carry = _sum(lh_high, hl_high, hh, carry)
    return (ll, second), (third, hh_high + carry)


def _wide(a: Array, constant: np.uint32) -> tuple[Array, Array]:
    """Both halves of the product of two uint32, the upper one from products of their halves."""
    c0, c1 = constant & 0xFFFF, constant >> np.uint32(16)
    a0, a1 = a & 0xFFFF, a >> 16
    low, left, right, high = a0 * c0, a1 * c0, a0 * c1, a1 * c1
    middle = (low >> 16) + (left & 0xFFFF) + (right & 0xFFFF)
    return a * constant, high + (left >> 16) + (right >> 16) + (middle >> 16)


def _sum(first: Array, *others: Array) -> tuple[Array, Array]:
    """The sum modulo 2^32 and what is carried."""
    total, carry = first, first ^ first
    for other in others:
        total = total + other
        carry = carry + (total < other).astype(jnp.uint32)
    return total, carry
