"""Answers of a model where they are asked: those of the dense logits, counted by instance, by difficulty, by passes."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.evaluation import answer_table as tables
from gt_jax.evaluation import pieces
from gt_jax.evaluation.answer_table import answer_table
from gt_jax.evaluation.answers import Answers, answers, asked, make_answers, right_and_nats
from gt_jax.evaluation.confidence_intervals import ratio_interval
from gt_jax.evaluation.proportions import proportion_interval
from gt_jax.models.language_model import LanguageModel, apply_network, fixed_passes
from gt_jax.monitoring.answer_lines import answer_lines
from gt_jax.monitoring.answer_plots import panel_of
from tests.support import perturbed, small_model

MODEL = small_model("D")
ROWS, LENGTH = 3, 20


@functools.cache
def logits(passes: int) -> np.ndarray:
    """Of the tokens of `batches`, float64 [2, b, t, v]."""
    twice = jax.jit(functools.partial(apply_network, LanguageModel(MODEL), control=fixed_passes(passes)))
    rows = [(one["tokens"], one["segment_ids"]) for one in unasked()]
    return np.stack([np.asarray(twice(perturbed(MODEL), *one).logits, np.float64) for one in rows])


@functools.cache
def unasked() -> list[dict[str, np.ndarray]]:
    """Two batches of rows of two instances and padding; the last row of the second is the first of the first."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 257, (2, ROWS, LENGTH)).astype(np.int32)
    tokens[1, -1] = tokens[0, 0]
    ids = np.broadcast_to(np.repeat([1, 2, 0], [9, 8, 3]).astype(np.int32), (ROWS, LENGTH))
    return [{"tokens": one, "segment_ids": ids} for one in tokens]


def batches() -> list[dict[str, np.ndarray]]:
    """Asked at half of the tokens; half of the answers are what the model says when it runs each layer twice."""
    random, found = np.random.default_rng(1), []
    for one, of in zip(unasked(), logits(2), strict=True):
        difficulty = np.where(one["segment_ids"] > 0, random.integers(0, 2, (ROWS, LENGTH)), 0)
        difficulty = (difficulty * random.integers(1, 7, difficulty.shape)).astype(np.int32)
        answer = np.where(random.integers(0, 2, difficulty.shape) == 1, of.argmax(-1), 7)
        targets = np.where(difficulty > 0, answer, -1).astype(np.int32)
        found.append({**one, "difficulty": difficulty, "targets": targets})
    return found


def test_right_and_nats_are_those_of_the_dense_logits(monkeypatch):
    """Those of three tokens of a row at a time, with two passes forced."""
    monkeypatch.setattr(pieces, "LOGITS", 3 * ROWS * MODEL.vocab)
    make_answers.cache_clear()
    where = asked(batches())
    found = answers(MODEL, perturbed(MODEL), batches(), where, fixed_passes(2))
    make_answers.cache_clear()
    of, target = logits(2)[tuple(where.place.T)], np.stack([one["targets"] for one in batches()])[tuple(where.place.T)]
    np.testing.assert_array_equal(found.right, of.argmax(-1) == target)
    nats = np.log(np.exp(of).sum(-1)) - np.take_along_axis(of, target[:, None], 1)[:, 0]
    np.testing.assert_allclose(found.nats, nats, atol=2e-5)
    assert (found.passes == 2).all() and 0.2 < found.right.mean() < 0.8
    np.testing.assert_array_equal(found.ran, [[1, 1, 0, 0]])


def test_what_is_asked_and_of_which_instance():
    where, given = asked(batches()), np.stack([one["difficulty"] for one in batches()])
    np.testing.assert_array_equal(where.place, np.argwhere(given > 0))
    np.testing.assert_array_equal(where.difficulty, given[given > 0])
    batch, row, token = where.place.T
    names = (batch * ROWS + row) * 2 + (token >= 9)
    names = np.where(names >= 10, names - 10, names)  # of the same tokens
    pairs = np.unique(np.stack([names, where.instance]), axis=1)
    assert pairs.shape[1] == len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == where.instance.max() + 1 == 10


def test_nothing_asked_is_said():
    one = {name: values for name, values in batches()[0].items() if name != "difficulty"}
    with pytest.raises(ValueError, match="without the key difficulty: 1"):
        asked([batches()[0], one])
    with pytest.raises(ValueError, match="nothing is asked"):
        asked([{**batches()[0], "difficulty": np.zeros((ROWS, LENGTH), np.int32)}])


def test_the_first_of_equal_tokens_counts_and_what_is_not_finite_is_never_right():
    of = jnp.array([[[1.0, 3.0, 3.0], [1.0, 3.0, 3.0], [jnp.nan, 0.0, 0.0], [0.0, 0.0, jnp.inf], [2.0, 0.0, 0.0]]])
    right, nats = right_and_nats(of, jnp.array([[1, 2, 0, 2, -1]]))
    np.testing.assert_array_equal(right, [[1, 0, 0, 0, 0]])
    assert nats[0, 4] == 0 and np.isnan(nats[0, 2])


# A model that is known: layer 0 runs d passes, 4 at most, for an answer of difficulty d, and needs them; layer 1 runs
# once. Every tenth answer is wrong whatever it does.
LAYERS = small_model("DG")
WRONG = 10


def known(config, variables, given, where, control, rules):
    runs = np.minimum(where.difficulty, 4)
    if (forced := np.broadcast_to(np.asarray(control.forced), (2,)))[0]:
        runs = np.full_like(runs, forced[0])
    right = (runs >= where.difficulty) & (np.arange(len(runs)) % WRONG > 0)
    passes = np.stack([runs, np.ones_like(runs) * max(1, forced[1])])
    return Answers(right, np.ones(len(runs)), passes, np.array([[1, 0.6, 0.3, 0.03], [1, 0, 0, 0]]))


@pytest.fixture
def rows() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(2)
    difficulty = random.integers(0, 7, (40, 12)).astype(np.int32)
    tokens = random.integers(0, 250, difficulty.shape).astype(np.int32)
    return [{"tokens": tokens, "targets": tokens, "difficulty": difficulty, "segment_ids": np.ones_like(tokens)}]


def test_the_table_of_a_model_that_is_known(rows, monkeypatch):
    monkeypatch.setattr(tables, "answers", known)
    said: list[str] = []
    found = answer_table(LAYERS, {}, rows, say=said.append)
    assert [line.split(":")[0] for line in said] == [
        "free passes", *(f"{k} forced" for k in range(1, 5)), "layer 0 cut"], "layer 1 has no second pass to cut"
    difficulty = rows[0]["difficulty"][rows[0]["difficulty"] > 0]
    may = np.arange(len(difficulty)) % WRONG > 0
    share = {d: may[difficulty == d].mean() for d in range(1, 7)}
    values = {d: one.value for d, one in found.accuracy.by_difficulty.items()}
    assert values == pytest.approx({d: share[d] if d <= 4 else 0 for d in share})
    for k, one in found.forced.items():
        at = {d: figure.value for d, figure in one.accuracy.by_difficulty.items()}
        assert at == pytest.approx({d: share[d] if d <= k else 0 for d in share})
        lost = (may & (difficulty > k) & (difficulty <= 4)).mean()
        assert one.cost.all.value == pytest.approx(lost) and one.cost.hardest.value == 0
    assert list(found.forced) == [1, 2, 3, 4] and found.hardest == (5, 6)
    assert {d: one.value for d, one in found.passes.items()} == {d: (min(d, 4) + 1) / 2 for d in share}
    assert found.passes_by_layer == {d: (min(d, 4), 1) for d in share}
    assert 0.9 < found.spearman.value < 1 and found.spearman.low < found.spearman.value < found.spearman.high
    cut = found.cuts[0]
    assert (cut.k_exec, cut.kind, cut.passes_run) == (4, "D", pytest.approx(1.93))
    assert cut.cost == found.forced[1].cost and cut.accuracy == found.forced[1].accuracy.all
    assert (found.cuts[1].k_exec, found.cuts[1].cost.all.value, found.cuts[1].accuracy) == (1, 0, found.accuracy.all)


def test_intervals_are_over_instances(rows, monkeypatch):
    """A row is an instance here; the same answers as so many instances would give narrower limits."""
    monkeypatch.setattr(tables, "answers", known)
    found = answer_table(LAYERS, {}, rows, cuts=False)
    difficulty = rows[0]["difficulty"]
    right = np.zeros(difficulty.shape)
    right[difficulty > 0] = known(None, None, None, asked(rows), fixed_passes(0), None).right
    here = difficulty == 2
    assert found.instances == 40 and found.answers == (difficulty > 0).sum()
    order = np.argsort([one.tobytes() for one in rows[0]["tokens"]])  # the order of the sum is not the rows'
    sums, counts = (right * here).sum(axis=1)[order], here.sum(axis=1)[order].astype(float)
    np.testing.assert_allclose(found.accuracy.by_difficulty[2], proportion_interval(sums, counts))
    after = right * (difficulty <= 1)
    asked_all = (difficulty > 0).sum(axis=1).astype(float)
    np.testing.assert_allclose(found.forced[1].cost.all, ratio_interval((right - after).sum(axis=1), asked_all))


def test_what_is_stored_is_plain_and_whole(rows, monkeypatch):
    monkeypatch.setattr(tables, "answers", known)
    stored = answer_table(LAYERS, {}, rows).to_json()
    assert json.loads(json.dumps(stored, allow_nan=False)) == stored
    names = {str(d) for d in range(1, 7)}
    assert stored["accuracy"].keys() == stored["passes"].keys() == stored["intervals"]["accuracy"].keys() == names
    assert all(of.keys() == names for of in stored["accuracy_forced"].values())
    assert stored["accuracy_forced"].keys() == stored["forced"].keys() == {"1", "2", "3", "4"}
    assert [one["k_exec"] for one in stored["cuts"]] == [4, 1] and isinstance(stored["spearman"], float)
    assert len(answer_lines(stored)) == 11 and panel_of(stored, "a").accuracy.keys() >= {"free passes"}
    low, high = stored["intervals"]["accuracy"]["1"]
    assert low < stored["accuracy"]["1"] < high


def test_a_plain_model_and_fixed_passes_have_no_other_passes_to_compare_with(monkeypatch):
    plain = answer_table(MODEL.plain, perturbed(MODEL.plain), batches())
    assert plain.forced == {} and plain.cuts == () and plain.spearman is None
    assert {one.value for one in plain.passes.values()} == {1}
    fixed = answer_table(MODEL, perturbed(MODEL), batches(), fixed_passes(2), forced=(1,))
    assert list(fixed.forced) == [1] and fixed.cuts == () and {one.value for one in fixed.passes.values()} == {2}
    assert fixed.accuracy.all.value > fixed.forced[1].accuracy.all.value > 0
