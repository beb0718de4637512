"""How far a mean over held-out text may be from what other text of its kind would give.

A figure such as nats a token is a ratio of sums over units, R = sum y / sum x, and units, not tokens, are what is
independent: the tokens of one document are alike. With R_i the ratio without unit i, of n (the jackknife of clusters):

    standard error^2 = (n - 1)/n sum_i (R_i - mean R_i)^2        R +- t_m(1 - (1 - confidence)/2) standard error
    m = (sum x)^2 / sum x^2 - 1, the degrees of freedom: n - 1 where all units are as long, fewer where few are long

- It needs no seed and no distribution, it is the t-interval of the mean where all x are the same, and where one unit
  is much of the text it is wide, while percentiles of a bootstrap are then too narrow.
- Two models on the same units: the difference of their sums is such a ratio itself, and its interval is the paired one.
- Below `FEWEST_UNITS` units, or where one of them is nearly all there is (m < 1), nothing bounds what another would
  have said: there are no limits then, and a verdict says so.
- In simulations 95 % intervals hold the truth in 93 to 97 % of cases, with 5 to 50 units; those that take the tokens
  for independent in 26 %.
- Real text is less kind. Of held-out parts of 5 to 40 files of the standard library, drawn 500 times each and read as
  `evaluate` reads them, 97 to 98 % for a loss, but 92 to 97 % for the difference of two models. Where whole files of
  very different length count (3,000 draws, with replacement), the difference of unlike models is decided by a few of
  them: 87 to 93 % with 10 to 40 files, and more files to 40 do not mend it. Fewer degrees of freedom, by the squares of
  the lengths, hold 91 to 98 % there but 98 to 99.6 % for a loss; by the kurtosis they change little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

FEWEST_UNITS = 4


class Interval(NamedTuple):
    """An estimate between its confidence limits, which are None where there are too few units for any."""

    value: float
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, float | None]:
        """The three by name."""
        return self._asdict()

    def sign(self) -> int | None:
        """1 above zero and -1 below, both limits; 0 where zero is between them, None where there are none."""
        if self.low is None or self.high is None:
            return None
        return (self.low > 0) - (self.high < 0)

    def between(self, limits: Sequence[float]) -> tuple[int, int] | None:
        """First and last of the classes, cut at ascending `limits`, that the interval reaches; None as above."""
        if self.low is None or self.high is None:
            return None
        first, last = np.searchsorted(np.asarray(limits), [self.low, self.high], side="right").tolist()
        return first, last


def ratio_interval(
    numerators: Float[np.ndarray, " units"], denominators: Float[np.ndarray, " units"], confidence: float = 0.95,
    fewest: int = FEWEST_UNITS,
) -> Interval:  # fmt: skip
    """Sum of numerators over sum of denominators, with limits where there are `fewest` units or more.

    Raises ValueError where the second sum is not > 0.
    """
    total, size = float(np.sum(numerators)), float(np.sum(denominators))
    if not size > 0:
        raise ValueError(f"denominators sum to {size}; a ratio needs a positive sum")
    freedom = size**2 / float(np.sum(np.square(denominators))) - 1
    rest, count = size - denominators, len(numerators)
    if count < fewest or freedom < 1 or not (rest > 0).all():
        return Interval(total / size, None, None)
    without = (total - numerators) / rest
    error = np.sqrt((count - 1) / count * np.sum(np.square(without - np.mean(without))))
    # Imported here: a third of a second that only who asks for an interval should pay.
    from scipy.special import stdtrit

    reach = float(stdtrit(freedom, 0.5 + confidence / 2) * error)
    return Interval(total / size, total / size - reach, total / size + reach)


def sums_by_unit(
    values: Float[np.ndarray, " tokens"], units: Int[np.ndarray, " tokens"]
) -> Float[np.ndarray, " units"]:
    """The sum of the values of each unit, units in ascending order of their number; float64."""
    _, place = np.unique(units, return_inverse=True)
    return np.bincount(place, weights=values.astype(np.float64))
