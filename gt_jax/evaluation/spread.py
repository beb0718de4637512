"""How much the weight of a pass differs between tokens: what a layer of constant strength cannot give.

A feed-forward copy of a pass has the mean weight m = E[w]. Of the update that the pass adds, u = w d with d = |gain|
alpha |Delta|/|h| of the token, it so misses (w - m) d:

    spread = E[((w - m) d)^2] / E[(w d)^2],    sd = sqrt(E[w^2] - m^2)

|Delta|/|h| of a token counts as 10 at most. The first pass of the first layer, which makes the stream, reaches that,
and is so most of the mean squares; uncut it would be more still. The share of all passes together is larger by that
than it would be of what is really added.

0 where every token has the same weight. Where few tokens live and the finished ones would move far it is above 1: the
mean moves them too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class WeightSpread(NamedTuple):
    """By layer and pass, float64: sd of the weight, mean square of what the pass adds over |h|, and its spread."""

    std: Float[np.ndarray, "l p"]
    update_square: Float[np.ndarray, "l p"]
    spread: Float[np.ndarray, "l p"]

    @property
    def whole(self) -> float:
        """The spread of all passes together: sum of spread * update_square over that of update_square."""
        total = float(np.sum(self.update_square))
        return float(np.sum(self.spread * self.update_square)) / total if total > 0 else 0.0


def weight_spread(survival: Float[np.ndarray, "l p"], moments: Float[np.ndarray, "l p 4"]) -> WeightSpread:
    """From the mean weight and the means over tokens of w^2, (w d)^2, w d^2 and d^2 (`PassStatistics`)."""
    mean = np.asarray(survival, np.float64)
    square, added, crossed, moved = np.moveaxis(np.asarray(moments, np.float64), -1, 0)
    missed = np.maximum(added - 2 * mean * crossed + mean**2 * moved, 0.0)
    share = np.divide(missed, added, out=np.zeros_like(added), where=added > 0)
    return WeightSpread(np.sqrt(np.maximum(square - mean**2, 0.0)), added, share)
