"""Spearman's correlation: that of ranks with ties shared, in any order, with limits that hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from gt_jax.evaluation import rank_correlation
from gt_jax.evaluation.rank_correlation import spearman


def drawn(random: np.random.Generator, units: int, noise: float, own: float) -> tuple[np.ndarray, ...]:
    """(passes, difficulty, unit) of ten answers a unit; `own` is how far units differ as a whole."""
    difficulty = random.integers(1, 9, (units, 10))
    passes = difficulty / 2 + noise * random.normal(size=difficulty.shape) + own * random.normal(size=(units, 1))
    return np.clip(np.round(passes), 0, 8).astype(int).ravel(), difficulty.ravel(), np.repeat(np.arange(units), 10)


def test_it_is_the_correlation_of_ranks_that_ties_share():
    x, y, units = drawn(np.random.default_rng(0), 30, 1.5, 0.5)
    found = spearman(x, y, units)
    assert found.value == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)
    ranks = [np.array([np.mean(np.flatnonzero(np.sort(a) == value)) for value in a]) for a in (x, y)]
    assert found.value == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)
    order = np.random.default_rng(1).permutation(x.size)
    np.testing.assert_allclose(spearman(x[order], y[order], units[order]), found)
    np.testing.assert_allclose(spearman(x**3 - 7, y, 5 * units + 3), found)  # ranks alone count
    assert spearman(x, -y).value == pytest.approx(-found.value)


def test_the_jackknife_leaves_out_unit_after_unit(monkeypatch):
    x, y, units = drawn(np.random.default_rng(2), 12, 1.0, 1.0)
    without = np.arctanh([stats.spearmanr(x[units != u], y[units != u])[0] for u in range(12)])
    error = np.sqrt(11 / 12 * np.sum((without - without.mean()) ** 2))
    reach = stats.t.ppf(0.975, 11) * error
    value, *limits = spearman(x, y, units)
    np.testing.assert_allclose(limits, np.tanh([np.arctanh(value) - reach, np.arctanh(value) + reach]))
    monkeypatch.setattr(rank_correlation, "_CELLS", 0)  # then as few groups as there may be
    assert spearman(x, y, units).value == value and spearman(x, y, units).low is not None


@pytest.mark.parametrize(("units", "noise", "own"), [(12, 0.3, 0.0), (12, 2.0, 1.0), (40, 2.0, 1.0)])
def test_the_truth_is_inside_as_often_as_they_say(units, noise, own):
    random, trials = np.random.default_rng(units), 300
    true = spearman(*drawn(random, 4000, noise, own)[:2]).value
    limits = [spearman(*drawn(random, units, noise, own))[1:] for _ in range(trials)]
    held = np.mean([low <= true <= high for low, high in limits])
    assert 0.95 - 3 * np.sqrt(0.95 * 0.05 / trials) <= held


def test_where_there_is_none_and_where_nothing_bounds_it():
    some = np.arange(20) % 5
    assert spearman(np.ones(20, int), some) is None and spearman(some, np.ones(20, int)) is None
    assert spearman(some[:0], some[:0]) is None
    assert spearman(some, 2 * some, np.arange(20)) == (1.0, None, None)
    assert spearman(some, some[::-1], np.arange(20) % 3).low is None  # three units
