"""Intervals of proportions: the exact ones where answers are independent, within [0, 1], right as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from gt_jax.evaluation.confidence_intervals import ratio_interval
from gt_jax.evaluation.proportions import difference_interval, proportion_interval


@pytest.mark.parametrize(("share", "units"), [(0.5, 6), (0.9, 20), (0.97, 60)])
@pytest.mark.parametrize("alike", [0.01, 0.5, 0.95])
def test_the_truth_is_inside_as_often_as_they_say(share, units, alike):
    """Units of 1 to 5 answers whose own share is drawn: `alike` is the correlation of two answers of a unit."""
    random, hit = np.random.default_rng(units), 0
    for _ in range(600):
        spread = (1 - alike) / alike
        own, asked = random.beta(share * spread, (1 - share) * spread, units), random.integers(1, 6, units)
        _, low, high = proportion_interval(random.binomial(asked, own).astype(float), asked.astype(float))
        assert 0 <= low <= high <= 1
        hit += low <= share <= high
    assert hit / 600 >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 600)


def test_of_one_answer_a_unit_it_is_nearly_that_of_a_binomial():
    """Clopper and Pearson's; the spread of n answers is taken from n - 1 of them."""
    right = (np.arange(400) < 380).astype(float)
    exact = stats.binomtest(380, 400).proportion_ci()
    np.testing.assert_allclose(proportion_interval(right, np.ones(400))[1:], exact, atol=2e-4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_where_all_say_the_same_a_unit_counts_once(value):
    _, low, high = found = proportion_interval(np.full(30, 8 * value), np.full(30, 8.0))
    exact = stats.binomtest(int(30 * value), 30).proportion_ci()
    np.testing.assert_allclose((low, high), exact)
    assert found.value == value


def test_units_that_are_not_asked_say_nothing_and_few_give_no_limits():
    right, asked = np.array([1.0, 0, 2, 1, 0]), np.array([2.0, 1, 2, 2, 1])
    more = np.append(right, [0, 0]), np.append(asked, [0, 0])
    assert proportion_interval(*more) == proportion_interval(right, asked)
    assert proportion_interval(right[:3], asked[:3]) == (0.6, None, None)
    with pytest.raises(ValueError, match="nothing was asked"):
        proportion_interval(np.zeros(2), np.zeros(2))


def test_a_difference_is_the_paired_interval_and_without_any_a_bound():
    random = np.random.default_rng(0)
    more, asked = random.integers(-1, 3, 30).astype(float), np.full(30, 4.0)
    assert difference_interval(more, asked) == ratio_interval(more, asked)
    value, low, high = difference_interval(np.zeros(30), asked)
    assert value == 0 and -low == high == pytest.approx(1 - 0.025 ** (1 / 30))
