"""A slice of a grown tensor in numpy: the bytes of `transform.grow_slice` without a compiled program.

Both make c * (W + N) with float32 sums and products, each rounded once, and the noise is exact: nothing is left for a
compiler to do otherwise. (Values below 1.2e-38, which XLA takes for 0, are kept here.)
"""

from __future__ import annotations

import numpy as np

from gt_jax.growth import noise, rules
from gt_jax.growth.transform import Leaf, noise_key


def grow_slice(leaf: Leaf, block: int, values: np.ndarray, start: int = 0, *, carry: str, noise_std: float,
               seed: int) -> np.ndarray:
    """The part of a block that begins at flat position `start`, from that part of its source, flat; `leaf.dtype`.

    A plain copy into the same dtype is the slice itself. What the dtype cannot hold is infinite in the result.
    """
    how = rules.treatment(leaf.rule, carry)
    noisy = how.noisy and noise_std > 0
    if leaf.rule in rules.NEUTRAL and not leaf.parts[block].coefficient:
        return np.full_like(values, rules.NEUTRAL[leaf.rule], leaf.dtype)
    with np.errstate(over="ignore"):
        if not noisy and not how.scaled:
            return values.astype(leaf.dtype, copy=False)
        key, step = noise_key(leaf, block, seed), noise.step(noise_std)
        coefficient, made = np.float32(leaf.parts[block].coefficient), np.empty(values.shape, leaf.dtype)
        for begin in range(0, values.size, noise.PIECE):
            part = values[begin : begin + noise.PIECE].astype(np.float32)
            if noisy:
                part += noise.at(key, start + begin, part.size, step)
            if how.scaled:
                part *= coefficient
            made[begin : begin + noise.PIECE] = part
    return made
