"""How far a mean over held-out text may be from what other text of its kind would give.

A figure such as nats a token is a ratio of sums over units, R = sum y / sum x, and units, not tokens, are what is
independent: the tokens of one document are alike. With R_i the ratio without unit i, of n (the jackknife of clusters):

    standard error^2 = (n - 1)/n sum_i (R_i - mean R_i)^2        R +- t_m(1 - (1 - confidence)/2) standard error
    m = (sum x)^2 / sum x^2 - 1, the degrees of freedom: n - 1 where all units are as long, fewer where few are long

- It needs no seed and no distribution, it is the t-interval of the mean where all x are the same, and where one unit
  is much of the text it is wide, while percentiles of a bootstrap are then too narrow.
- Two models on the same units: the difference of their sums is such a ratio itself, and its interval is the paired one.
- In simulations (its test makes them) 95 % intervals hold the truth in 94 to 96 % of 4000 cases with 5, 10 and 30
  documents of very different lengths; those that take the tokens for independent in 26 %.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Interval(NamedTuple):
    """An estimate between its confidence limits, which are None where one unit is all there is."""

    value: float
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, float | None]:
        """The three by name."""
        return self._asdict()


def ratio_interval(
    numerators: Float[np.ndarray, "units"], denominators: Float[np.ndarray, "units"], confidence: float = 0.95
) -> Interval:
    """sum of numerators over sum of denominators, with its limits; raises ValueError where the second sum is not > 0.

    A unit without which nothing would be left to divide by leaves no limits.
    """
    total, size = float(np.sum(numerators)), float(np.sum(denominators))
    if not size > 0:
        raise ValueError(f"denominators sum to {size}; a ratio needs a positive sum")
    rest, count = size - denominators, len(numerators)
    if count < 2 or not (rest > 0).all():
        return Interval(total / size, None, None)
    without = (total - numerators) / rest
    error = np.sqrt((count - 1) / count * np.sum(np.square(without - np.mean(without))))
    # Imported here: a third of a second that only who asks for an interval should pay.
    from scipy.special import stdtrit

    freedom = size**2 / np.sum(np.square(denominators)) - 1
    reach = float(stdtrit(freedom, 0.5 + confidence / 2) * error)
    return Interval(total / size, total / size - reach, total / size + reach)


def sums_by_unit(
    values: Float[np.ndarray, "tokens"], units: Int[np.ndarray, "tokens"]
) -> Float[np.ndarray, "units"]:
    """The sum of the values of each unit, units in ascending order of their number; float64."""
    _, place = np.unique(units, return_inverse=True)
    return np.bincount(place, weights=values.astype(np.float64))
