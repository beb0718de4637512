"""Spearman's rank correlation of two counts, with an interval over units whose observations are alike.

    rho = correlation of the ranks of x and y; equal values share the mean of their ranks

- x and y take few values, so all is in the table of how often each pair is seen; that without a unit is the table less
  that of the unit, and so the jackknife over units costs no sorting:

    z = artanh(rho),  standard error^2 = (n - 1)/n sum_i (z_i - mean z)^2,  limits = tanh(z +- t_(n-1) standard error)

- Where x or y is constant there is no correlation. Where rho is 1 or -1 nothing bounds it.
- Units beyond what `_CELLS` holds are taken together at random, each in one of as many groups as fit.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from gt_jax.evaluation.confidence_intervals import FEWEST_UNITS, Interval

_CELLS = 1 << 24


def spearman(
    x: Int[np.ndarray, " n"], y: Int[np.ndarray, " n"], units: Int[np.ndarray, " n"] | None = None,
    confidence: float = 0.95,
) -> Interval | None:  # fmt: skip
    """Rank correlation of x and y, with limits where `units` are given and are enough; None where there is none."""
    if x.size == 0:
        return None
    (x_values, x_place), (y_values, y_place) = (np.unique(a, return_inverse=True) for a in (x, y))
    shape = len(x_values), len(y_values)
    if min(shape) < 2:
        return None
    groups, place = _groups(units, x.size, _CELLS // (shape[0] * shape[1]))
    cells = (place * shape[0] + x_place) * shape[1] + y_place
    tables = np.bincount(cells, minlength=groups * shape[0] * shape[1]).reshape(groups, *shape).astype(np.float64)
    whole = tables.sum(axis=0)
    rho = float(correlation_of_ranks(whole))
    if units is None or groups < FEWEST_UNITS or abs(rho) > 1 - 1e-12:
        return Interval(rho, None, None)
    with np.errstate(divide="ignore", invalid="ignore"):
        without = np.arctanh(correlation_of_ranks(whole - tables))
    if not np.isfinite(without).all():
        return Interval(rho, None, None)
    error = np.sqrt((groups - 1) / groups * np.sum(np.square(without - without.mean())))
    from scipy.special import stdtrit  # imported here for who asks for no interval

    reach = float(stdtrit(groups - 1, 0.5 + confidence / 2) * error)
    low, high = np.tanh([np.arctanh(rho) - reach, np.arctanh(rho) + reach]).tolist()
    return Interval(rho, low, high)


def _groups(units: Int[np.ndarray, " n"] | None, size: int, most: int) -> tuple[int, Int[np.ndarray, " n"]]:
    """How many groups of units there are, and the group of each observation."""
    if units is None:
        return 1, np.zeros(size, np.int64)
    names, place = np.unique(units, return_inverse=True)
    most = max(most, FEWEST_UNITS)
    if len(names) <= most:
        return len(names), place
    return most, (np.random.default_rng(0).permutation(len(names)) % most)[place]


def correlation_of_ranks(tables: Float[np.ndarray, "*n x y"]) -> Float[np.ndarray, "*n"]:
    """Spearman's correlation of each table of counts, rows and columns in ascending order of their values.

    NaN where one of the two is constant.
    """
    x, y = tables.sum(axis=-1), tables.sum(axis=-2)
    middle = (x.sum(axis=-1, keepdims=True) + 1) / 2
    x_rank, y_rank = (np.cumsum(a, axis=-1) - (a - 1) / 2 - middle for a in (x, y))
    together = np.einsum("...xy,...x,...y->...", tables, x_rank, y_rank)
    spread = np.sum(x * x_rank**2, axis=-1) * np.sum(y * y_rank**2, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(spread > 0, together / np.sqrt(spread), np.nan))
