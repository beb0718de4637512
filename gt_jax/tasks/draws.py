"""Random numbers of an instance: a function of a seed and numbers, on every machine and in every version of numpy.

Raw Philox bits alone: numpy promises that these never change, which it does not of its `Generator`.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int64


class Draws:
    """A stream of draws of its own for every (seed, stream, number)."""

    def __init__(self, seed: int, stream: int, number: int) -> None:
        self._bits = np.random.Philox(key=np.array([seed << 32 | stream, number], np.uint64))

    def below(self, bound: int, count: int) -> Int64[np.ndarray, " count"]:
        """Whole numbers 0 .. bound - 1."""
        return (self._bits.random_raw(count) % np.uint64(bound)).astype(np.int64)

    def between(self, least: int, most: int, count: int) -> Int64[np.ndarray, " count"]:
        """Whole numbers least .. most."""
        return least + self.below(most - least + 1, count)

    def permutation(self, count: int) -> Int64[np.ndarray, " count"]:
        """An order of 0 .. count - 1."""
        return np.argsort(self._bits.random_raw(count), kind="stable").astype(np.int64)

    def fractions(self, count: int) -> Float64[np.ndarray, " count"]:
        """Numbers in [0, 1), multiples of 2^-53."""
        return (self._bits.random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
