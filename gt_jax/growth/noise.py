"""Noise by position: what a value gets depends on a key and on where it stands in its block, and on nothing else.

- 32 random bits a position: numpy's Philox4x64-10 (Salmon et al. 2011), advanced to the position. A block of its
  counter makes 256 bits, for eight positions in a row: position p has bits 32 (p mod 8) and up of block p // 8.
- The noise is the centred sum of the four random bytes, a bell with tails cut at 3.45 sigma, in steps of `step`. A
  Normal(0, 1) through erf_inv differs in its last bit from one compiled program to the next; this sum is an integer of
  10 bits, its product with a step of 14 bits is exact in float32, and so every program adds the same number, whether or
  not it fuses the multiplication and the addition.
- Here in numpy, for growth from disk to disk; gt_jax.growth.noise_on_devices makes the same bits under `jax.jit`.
"""

from __future__ import annotations

import hashlib

import numpy as np

POSITIONS = 2**32
PIECE = 2**16  # values; a piece with its bits stays in a core's cache
_FOUR_BYTES_STD = float(np.sqrt(4 * (256**2 - 1) / 12))
_EVEN_BYTES, _BOTH = np.uint32(0x00FF00FF), np.uint32(0x10001)


def stable_hash(text: str) -> int:
    """The first 32 bits of SHA-256: the same number on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def key_of(seed: int, name: str, layer: int) -> np.ndarray:
    """Philox's key of a tensor, uint64 [2]: seed and hash of the name in the first word, target layer in the other."""
    return np.asarray([seed << 32 | stable_hash(name), layer], np.uint64)


def step(noise_std: float) -> np.float32:
    """noise_std in units of one step of the sum of four bytes, cut to 14 significant bits."""
    mantissa, exponent = np.frexp(noise_std / _FOUR_BYTES_STD)
    return np.float32(np.ldexp(np.round(mantissa * 2**14), exponent - 14))


def random_bits(key: np.ndarray, start: int, count: int) -> np.ndarray:
    """32 bits each for positions start, start + 1, ...: uint32 [count]."""
    block, skipped = divmod(start, 8)
    philox = np.random.Philox(key=key)
    philox.advance(block)  # by blocks of the counter
    # not random_raw, which takes the interpreter's lock anew for every word
    words = np.random.Generator(philox).integers(0, 2**64 - 1, (skipped + count + 1) // 2, np.uint64, endpoint=True)
    return words.astype("<u8", copy=False).view("<u4")[skipped : skipped + count]


def at(key: np.ndarray, start: int, count: int, noise_step: np.float32) -> np.ndarray:
    """The noise at positions start, start + 1, ..., float32 [count], of standard deviation noise_step * 147.8."""
    total = np.empty(count, np.float32)
    for begin in range(0, count, PIECE):
        part = total[begin : begin + PIECE]
        np.copyto(part, _sums(random_bits(key, start + begin, part.size)))
        part -= np.float32(510)
        part *= noise_step
    return total


def _sums(bits: np.ndarray) -> np.ndarray:
    """The sum of the four bytes of each value, uint16: of even and odd bytes first, then of both in the upper half."""
    pairs = bits & _EVEN_BYTES
    np.right_shift(bits, np.uint32(8), out=bits)
    bits &= _EVEN_BYTES
    pairs += bits
    pairs *= _BOTH
    return pairs.view("<u2")[1::2]
