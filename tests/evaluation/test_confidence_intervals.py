"""Intervals: the t-interval where that is exact, paired where two are compared, and right as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from gt_jax.evaluation.confidence_intervals import ratio_interval, sums_by_unit

TRIALS = 600


def documents(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sums of losses, tokens, all losses) of documents of very different lengths, each difficult in its own way."""
    lengths = np.ceil(np.exp(random.normal(5, 0.7, count)))
    difficulty = 2 + 0.4 * random.normal(size=count)
    losses = [level + random.gamma(1.0, 1.0, int(n)) - 1 for level, n in zip(difficulty, lengths, strict=True)]
    return np.array([one.sum() for one in losses]), lengths, np.concatenate(losses)


@pytest.mark.parametrize("count", [5, 10, 30])
def test_the_truth_is_inside_as_often_as_they_say(count):
    """The mean loss a token is 2 whatever the lengths, which are independent of the difficulty."""
    random = np.random.default_rng(count)
    hit = naive = 0
    for _ in range(TRIALS):
        sums, lengths, losses = documents(random, count)
        _, low, high = ratio_interval(sums, lengths)
        hit += low <= 2 <= high
        naive += abs(losses.mean() - 2) <= 1.96 * losses.std() / np.sqrt(len(losses))
    assert 0.93 <= hit / TRIALS <= 0.98  # 0.95, and twice its standard error of 0.009 below
    assert naive / TRIALS < 0.5


def test_stretches_of_rows_bear_correlation_between_neighbours():
    """Rows whose difficulty drifts: 20 stretches of 24 rows hold the truth, 480 rows taken for independent do not."""
    random = np.random.default_rng(2)
    hit = naive = 0
    for _ in range(TRIALS // 2):
        drift, noise = np.zeros(480), random.normal(size=(480, 2))
        drift[0] = noise[0, 0] / np.sqrt(1 - 0.7**2)
        for row in range(1, 480):
            drift[row] = 0.7 * drift[row - 1] + noise[row, 0]
        rows = 3 + drift + noise[:, 1]
        units = np.arange(480) // 24
        _, low, high = ratio_interval(sums_by_unit(rows, units), np.full(20, 24.0))
        _, first, last = ratio_interval(rows, np.ones(480))
        hit, naive = hit + (low <= 3 <= high), naive + (first <= 3 <= last)
    assert hit / (TRIALS // 2) >= 0.91 and naive / (TRIALS // 2) < 0.75  # 0.93 in 2000 trials


def test_of_units_of_one_size_it_is_the_t_interval():
    values = np.random.default_rng(0).normal(size=12)
    found = ratio_interval(values * 7, np.full(12, 7.0), 0.9)
    wanted = stats.t.interval(0.9, 11, values.mean(), stats.sem(values))
    np.testing.assert_allclose(found, (values.mean(), *wanted))


def test_paired_limits_are_narrow_where_two_models_err_alike():
    random = np.random.default_rng(1)
    sums, lengths, _ = documents(random, 40)
    other = sums + lengths * (0.05 + 0.01 * random.normal(size=40))
    difference = ratio_interval(other - sums, lengths)
    apart = [ratio_interval(x, lengths) for x in (other, sums)]
    assert difference.value == pytest.approx(apart[0].value - apart[1].value)
    assert 0 < difference.low < 0.05 < difference.high and apart[1].high > apart[0].low
    assert difference.high - difference.low < 0.1 * (apart[0].high - apart[0].low)


def test_one_unit_has_no_limits_and_none_no_value():
    assert ratio_interval(np.array([6.0]), np.array([2.0])) == (3.0, None, None)
    assert ratio_interval(np.array([6.0, 1.0]), np.array([2.0, 0.0])) == (3.5, None, None)
    with pytest.raises(ValueError, match=r"sum to 0\.0"):
        ratio_interval(np.zeros(2), np.zeros(2))


def test_order_and_scale_change_nothing():
    random = np.random.default_rng(3)
    sums, lengths, _ = documents(random, 15)
    order, found = random.permutation(15), ratio_interval(sums, lengths)
    np.testing.assert_allclose(ratio_interval(sums[order], lengths[order]), found)
    np.testing.assert_allclose(ratio_interval(8 * sums, 4 * lengths), 2 * np.array(found))
    units = random.integers(0, 5, 100) * 3
    values = random.normal(size=100)
    np.testing.assert_allclose(sums_by_unit(values, units), [values[units == u].sum() for u in range(0, 15, 3)])
