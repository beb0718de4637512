"""Intervals: the t-interval where that is exact, paired where two are compared, and right as often as they say."""

from __future__ import annotations

import dataclasses
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from gt_jax.configs.data import DataConfig
from gt_jax.evaluation.confidence_intervals import FEWEST_UNITS, Interval, ratio_interval, sums_by_unit
from gt_jax.evaluation.held_out_rows import held_out_rows
from gt_jax.text.batches import Text, open_text
from gt_jax.text.sources import standard_library

TRIALS = 1500


def documents(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sums of losses, tokens, all losses) of documents of very different lengths, each difficult in its own way."""
    lengths = np.ceil(np.exp(random.normal(5, 0.7, count)))
    difficulty = 2 + 0.4 * random.normal(size=count)
    losses = [level + random.gamma(1.0, 1.0, int(n)) - 1 for level, n in zip(difficulty, lengths, strict=True)]
    return np.array([one.sum() for one in losses]), lengths, np.concatenate(losses)


@pytest.mark.parametrize("count", [5, 10, 20, 50])
def test_the_truth_is_inside_as_often_as_they_say(count):
    """The mean loss a token is 2 whatever the lengths, which are independent of the difficulty."""
    random = np.random.default_rng(count)
    hit = naive = 0
    for _ in range(TRIALS):
        sums, lengths, losses = documents(random, count)
        _, low, high = ratio_interval(sums, lengths)
        hit += low is None or low <= 2 <= high  # of five one may be nearly all: then nothing is claimed
        naive += abs(losses.mean() - 2) <= 1.96 * losses.std() / np.sqrt(len(losses))
    assert 0.93 <= hit / TRIALS <= 0.97
    assert naive / TRIALS < 0.5


def bigrams(documents: list[np.ndarray]) -> np.ndarray:
    """-log p(next byte | byte) of a model that counted pairs: [257, 257] nats."""
    counts = np.full((257, 257), 0.05)
    for one in documents:
        np.add.at(counts, (one[:-1], one[1:]), 1)
    return -np.log(counts / counts.sum(axis=1, keepdims=True))


def unigrams(documents: list[np.ndarray]) -> np.ndarray:
    """-log p(next byte) of a model that counted bytes, as a table of pairs."""
    counts = sum((np.bincount(one, minlength=257) for one in documents), np.full(257, 0.05))
    return np.broadcast_to(-np.log(counts / counts.sum()), (257, 257))


def models(documents: list[np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Tables of a loss and of differences, and the documents that no model was trained on: every second."""
    nats, other, both = bigrams(documents[::6]), bigrams(documents[2::6]), bigrams(documents[::2])
    tables = {"loss": nats, "alike": other - nats, "nested": nats - both, "unlike": unigrams(documents[::2]) - both}
    return tables, np.arange(1, len(documents), 2)


def test_the_truth_is_inside_where_whole_files_of_very_different_length_count():
    """Files drawn again and again from the sources of the standard library, read by models that know none of them.

    Of the draws that give limits, since the others say nothing. All figures together are held in 93 to 97 %, within
    three standard errors of 2,000 draws, which the figures share. A single one may fall short: the difference of unlike
    models over few files, as the module says. With degrees of freedom by the lengths alone the mean is 91 %.
    """
    documents = [np.append(np.frombuffer(one, np.uint8), 256).astype(int) for one in standard_library()[1]]
    total = sum(map(len, documents))
    documents = [one for one in documents if len(one) < total / 20]  # not one that decides all alone
    tables, unseen = models(documents)
    pairs = [documents[index][:-1] * 257 + documents[index][1:] for index in unseen]
    lengths = np.array([len(one) for one in pairs], np.float64)
    held = {}
    for name, table in tables.items():
        sums = np.array([table.ravel()[one].sum() for one in pairs])
        true = sums.sum() / lengths.sum()
        for count in (5, 10, 20, 40):
            random = np.random.default_rng(count)
            drawn = [random.integers(0, len(pairs), count) for _ in range(500)]
            limits = [ratio_interval(sums[one], lengths[one]) for one in drawn]
            held[name, count] = np.mean([low <= true <= high for _, low, high in limits if low is not None])
    error = np.sqrt(0.95 * 0.05 / 2000)
    assert 0.93 - 3 * error <= np.mean(list(held.values())) <= 0.97 + 3 * error
    assert all(0.80 <= share <= 0.995 for share in held.values()), held


@pytest.mark.exhaustive  # the intervals' own tests draw from known distributions
def test_the_truth_is_inside_on_real_text():
    """Held-out parts drawn again and again from the sources of the standard library: a loss, and paired differences.

    Each is evaluated as the command does by default, on eight batches. The truth is that of all files that no model
    was trained on. The bounds are what 450 draws can tell: 0.95 less three standard errors of sqrt(0.95 * 0.05 / 450);
    a difference may fall short by 0.03 more, as the module says, and all may be held more often.
    """
    paths = sorted(map(str, Path(sysconfig.get_path("stdlib")).glob("*.py")))
    text = open_text(DataConfig(text=tuple(paths), sequence_length=512, batch_size=4))
    ends = np.flatnonzero(text.tokens == 256) + 1
    spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
    documents = [text.tokens[start:stop].astype(int) for start, stop in spans]
    tables, unseen = models(documents)
    pairs = np.concatenate([documents[index][:-1] * 257 + documents[index][1:] for index in unseen])
    truth = {name: table.ravel()[pairs].mean() for name, table in tables.items()}
    random, trials, hits = np.random.default_rng(0), 150, list[list[bool]]()
    for count in (10, 20, 40):
        for _ in range(trials):
            drawn = np.sort(random.choice(unseen, count, replace=False))
            hits.append(held_by(dataclasses.replace(text, held_out_spans=spans[drawn]), tables, truth))
    held = dict(zip(tables, np.mean(hits, axis=0).tolist(), strict=True))
    error = np.sqrt(0.95 * 0.05 / len(hits))
    assert 0.95 - 3 * error <= held["loss"] <= 0.99
    assert all(0.92 - 3 * error <= share <= 0.99 for share in held.values()), held


def held_by(text: Text, tables: dict[str, np.ndarray], truth: dict[str, float]) -> list[bool]:
    """Whether each figure's interval, from eight batches of this text, holds what is true."""
    found = held_out_rows(text, 8)
    assert found.kind == "document"
    tokens, targets = (np.concatenate([batch[name] for batch in found.batches]) for name in ("tokens", "targets"))
    units, counted = found.scored_units(), targets >= 0
    sizes = sums_by_unit(np.ones(len(units)), units)
    limits = [ratio_interval(sums_by_unit(table[tokens[counted], targets[counted]], units), sizes)
              for table in tables.values()]  # fmt: skip
    return [one.low is None or bool(one.low <= true <= one.high)
            for one, true in zip(limits, truth.values(), strict=True)]  # fmt: skip


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


def test_too_few_units_have_no_limits_and_none_no_value():
    assert ratio_interval(np.array([6.0]), np.array([2.0])) == (3.0, None, None)
    few = np.arange(1.0, FEWEST_UNITS)
    assert ratio_interval(2 * few, few) == (2.0, None, None)
    assert ratio_interval(np.array([6.0, 1.0, 1.0, 1.0]), np.array([90.0, 1.0, 1.0, 1.0])).low is None  # one is all
    with pytest.raises(ValueError, match=r"sum to 0\.0"):
        ratio_interval(np.zeros(2), np.zeros(2))


def test_what_an_interval_says_in_words():
    assert [Interval(0.0, *limits).sign() for limits in ((1, 2), (-2, -1), (-1, 1), (None, None))] == [1, -1, 0, None]
    cuts = (0.03, 0.1)
    reached = [Interval(0.0, *limits).between(cuts) for limits in ((0, 0.02), (0.02, 0.05), (0, 1), (0.2, 0.3))]
    assert reached == [(0, 0), (0, 1), (0, 2), (2, 2)] and Interval(0.0, None, None).between(cuts) is None


def test_order_and_scale_change_nothing():
    random = np.random.default_rng(3)
    sums, lengths, _ = documents(random, 15)
    order, found = random.permutation(15), ratio_interval(sums, lengths)
    np.testing.assert_allclose(ratio_interval(sums[order], lengths[order]), found)
    np.testing.assert_allclose(ratio_interval(8 * sums, 4 * lengths), 2 * np.array(found))
    units = random.integers(0, 5, 100) * 3
    values = random.normal(size=100)
    np.testing.assert_allclose(sums_by_unit(values, units), [values[units == u].sum() for u in range(0, 15, 3)])
