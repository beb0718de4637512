"""Needle questions, the state test on models of which it is known what they remember, and what the pages say."""

from __future__ import annotations

import itertools
import json

import jax
import numpy as np
import pytest

from experiments import contract, recall_hybrids
from experiments.recall_study import findings, machine, report, scaling, study
from experiments.recall_study.engine import Asked
from experiments.recall_study.material import words_of
from experiments.recall_study.needles import COLOURS, WORDS, Needles, beside_bytes, vocabulary
from experiments.recall_study.states import (
    HIDDEN,
    INTACT,
    MODES,
    REST,
    SWAPPED,
    ZEROED,
    Reader,
    modes_of,
    swapped,
    without_local_path,
)
from experiments.recall_study.study import MIXED, NEEDLES, TEXT, Arm, RecallStudy
from gt_jax.checkpoints.tree_paths import flatten, nest
from gt_jax.errors import Refused
from gt_jax.text.tokenizers import ByteTokenizer
from tests.support import perturbed

SMALL = RecallStudy(width=16, facts=2, stages=(0, 3), prompts=3, window=3)
VOCABULARY = beside_bytes(8)
REVERSED = {int(token): word for word, token in zip(WORDS, VOCABULARY.ids, strict=True)}


def needles(stages=(0, 3), length=64, facts=4):
    return Needles(VOCABULARY, facts, stages, length, seed=5)


def answered(tokens):
    """What a reader of the words says after "NAME has a": the colour of the last sentence that begins so."""
    words = [REVERSED[int(token)] for token in tokens]
    name, colours = words[-3], []
    for at in range(len(words) - 3):
        if words[at : at + 3] == [name, "has", "a"]:
            colours.append(words[at + 3])
    assert len(colours) == 1, "one fact of each name"
    return colours[0]


def test_a_reader_of_the_words_answers_every_question():
    batch = needles().batch(step=2, rows=6, progress=1.0)
    asked = 0
    for tokens, targets, segments in zip(*(batch[name] for name in ("tokens", "targets", "segment_ids")), strict=True):
        for at in np.flatnonzero(targets >= 0):
            own = tokens[(segments == segments[at]) & (np.arange(len(tokens)) <= at)]
            assert answered(own) == REVERSED[int(targets[at])] and REVERSED[int(targets[at])] in COLOURS
            asked += 1
    assert asked >= 6 * 4
    first = needles().batch(2, 6, progress=0.0)
    assert {int(row.max()) for row in first["segment_ids"]} == {64 // 48}, "no distractors at first, whole instances"
    np.testing.assert_array_equal(batch["tokens"], needles().batch(2, 6, 1.0)["tokens"])


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_twins_differ_in_the_colour_of_the_fact_at_its_place(place):
    test = needles().test(place, 3, 20)
    for prompt, twin, question, answer, other in zip(*test[2:7], strict=True):
        (at,) = np.flatnonzero(prompt != twin)
        assert (prompt[at], twin[at]) == (answer, other) and at == test.told - 3
        assert answered([*prompt, *question]) == REVERSED[int(answer)]
        assert answered([*twin, *question]) == REVERSED[int(other)]
    assert test.told == 6 + round(3 * place) * 4 + round(3 * place) * 6


def test_nothing_is_cut_and_answers_are_one_token():
    with pytest.raises(Refused, match="4 facts and 57 distractors with its questions is 276 tokens; rows of 275"):
        needles(stages=(0, 57), length=275)
    with pytest.raises(Refused, match="57 distractors are 276 tokens and would be cut"):
        RecallStudy(length=200)
    with pytest.raises(Refused, match=r"no single token for red, blue, (.|\n)*tokens of their own beside bytes"):
        vocabulary(ByteTokenizer(), "bytes.json")
    assert words_of("bytes").size == 257 + len(WORDS) and len(set(words_of("bytes").ids.tolist())) == len(WORDS)


@pytest.fixture(scope="module")
def read():
    """By layout: the logits of every mode, the twins' own, and the caches; models of one layer, random weights."""
    asked = Needles(VOCABULARY, 2, (3,), SMALL.row, seed=1)
    test = asked.test(0.0, 3, 4)
    found = {}
    for layout in ("D", "A"):
        config = SMALL.model(Arm(layout, 0.0, TEXT), VOCABULARY.size)
        drawn = flatten(perturbed(config, 0.4))
        slow = {path: leaf - 6.0 if path.endswith("a_log") else leaf for path, leaf in drawn.items()}
        variables = jax.tree.map(lambda a: a[None], nest(slow))  # states that last from the fact to the question
        reader = Reader(config, SMALL.row)
        logits = reader.by_mode(variables, test, test.prompts.shape[1], modes_of(config))
        twins = reader.remembered(variables, test.twins)
        found[layout] = (logits, reader.logits(variables, twins, test.questions), twins)
    return found


def test_what_only_the_state_can_know_follows_the_state(read):
    """A layer of D remembers three tokens beside its state, all alike in twins: the state is the whole difference."""
    logits, twins, _ = read["D"]
    assert np.abs(logits[INTACT] - twins).max() > 1e-3
    np.testing.assert_array_equal(logits[SWAPPED], twins)
    np.testing.assert_array_equal(logits[REST], logits[INTACT])
    assert np.abs(logits[ZEROED] - logits[INTACT]).max() > 1e-3


def test_what_only_keys_can_know_follows_the_rest(read):
    logits, twins, _ = read["A"]
    assert np.abs(logits[INTACT] - twins).max() > 1e-3
    np.testing.assert_array_equal(logits[REST], twins)
    for mode in (SWAPPED, ZEROED):
        np.testing.assert_array_equal(logits[mode], logits[INTACT])
    assert np.abs(logits[HIDDEN] - logits[INTACT]).max() > 1e-3


def test_a_swap_with_itself_changes_nothing_and_both_halves_make_the_whole(read):
    for layout in ("D", "A"):
        cache = read[layout][2]
        other = jax.tree.map(lambda a: a + 1, cache)
        for states in (True, False):
            same = jax.tree.leaves(jax.tree.map(np.array_equal, swapped(cache, cache, states), cache))
            assert all(same) and len(same) > 2
        whole = swapped(swapped(cache, other, True), other, False)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, whole, other)))


def test_the_answer_is_the_likeliest_colour_and_the_local_path_is_that_of_s_layers():
    asked = Asked(SMALL, VOCABULARY, None)
    logits = np.zeros((1, 2, VOCABULARY.size))
    logits[..., 0], logits[0, 0, VOCABULARY.colours[3]], logits[0, 1, VOCABULARY.colours[6]] = 9.0, 1.0, 1.0
    np.testing.assert_array_equal(asked.picked(logits), [VOCABULARY.colours[[3, 6]]])
    hybrid = SMALL.model(Arm("DS*2", 0.7, MIXED), 99)
    assert hybrid.sliding.drop == 0.7 and hybrid.sliding.evaluation_scale == pytest.approx(0.3)
    assert without_local_path(hybrid).sliding.evaluation_scale == 0.0
    assert modes_of(hybrid) == MODES and "local path off" not in modes_of(SMALL.model(Arm("DA", 0.0, TEXT), 99))


def test_recall_rows_are_answered_from_the_row_and_memorisation_is_not():
    small = machine.SCALES["minutes"]
    for task in machine.TASKS:
        batch = machine.drawn(small, task, 0, 1, 0, 8)
        for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
            if task == machine.PARITY:
                np.testing.assert_array_equal(targets, np.cumsum(tokens) % 2)
                continue
            told = {a: b for a, b in itertools.pairwise(tokens.tolist()) if b >= machine.KEYS > a}
            for token, target in zip(tokens, targets, strict=True):
                if target >= 0 and task != machine.MEMORISATION:
                    assert told[int(token)] == target
            assert task != machine.MEMORISATION or not told
    assert machine.SCALES["small"].model(machine.NEGATIVE).deltanet.beta_max == 2.0


def test_the_fit_finds_a_law_and_three_sizes_find_another():
    sizes = [1e3, 3e3, 1e4, 3e4, 1e5]
    found = scaling.fitted(sizes, [2.0 * (n / 1e3) ** -0.5 + 1.5 for n in sizes])
    assert found.alpha == pytest.approx(0.5, abs=0.01) and found.floor == pytest.approx(1.5, abs=0.02)
    off = [0.0, 0.0, 0.02, 0.0, 0.0]  # one size of five a little off the law
    rows = [{"task": TEXT, "model": f"width {width}", "seed": seed, "rate": 1e-3, "width": width, "parameters": int(n),
             "nats": 2.0 * (n / 1e3) ** -0.5 + 1.5 + off[index] + 0.01 * (seed - 1)}
            for index, (width, n) in enumerate(zip((8, 12, 16, 24, 32), sizes, strict=True)) for seed in range(3)]
    told = scaling.summary(rows)
    low, high = told["intervals"]["alpha"]
    assert low < told["fit"]["alpha"] < high and len(told["three_sizes"]) == 10
    alphas = [one["alpha"] for one in told["three_sizes"]]
    assert min(alphas) < 0.42 and max(alphas) > 0.55 and 0.45 < told["fit"]["alpha"] < 0.55
    with pytest.raises(Refused, match="at least five sizes"):
        scaling.ScalingStudy(widths=(8, 16, 24))


def row(arm, seed, bits, stays, follows):
    figure = {"value": 0.0, "low": None, "high": None}
    mode = {"stays": {**figure, "value": stays}, "follows": {**figure, "value": follows}, "costs": figure}
    return {"task": arm.training, "model": arm.name, "seed": seed, "layout": arm.layout, "drop": arm.drop,
            "window": arm.window, "rate": 1e-3, "steps": 5, "bits_per_byte": bits, "curve": [],
            "accuracy": {"0": {"0": 1.0}, "3": {"0": stays}},
            "state": {cut: {name: mode if name == SWAPPED else {**mode, "stays": {**figure, "value": 0.9}}
                            for name in MODES} for cut in ("question", "fact")}}  # fmt: skip


def test_pages_and_pictures_come_from_the_stored_file_alone(tmp_path, capsys):
    arms = [Arm("DS*2", 0.7, training) for training in (TEXT, MIXED)]
    rows = [row(arm, seed, 2.0 + 0.1 * (arm.training == MIXED) + seed, 0.05, 0.9) for arm in arms for seed in (0, 1)]
    small = SMALL.of(arms)
    told = findings.arms_summary(rows)
    mixed = told[arms[1].name]
    assert mixed["costs_in_text"]["mean"] == pytest.approx(0.1) and findings.follows_at(mixed) == pytest.approx(90.0)
    right = lambda task, model: 0.95 if task != machine.PARITY or "2" in model else 0.5  # noqa: E731
    checks = [{"task": task, "model": model, "seed": 0, "accuracy": right(task, model), "chance": 0.1}
              for task in machine.TASKS for model in machine.MODELS]  # fmt: skip
    sizes = [{"task": TEXT, "model": f"{w}", "seed": s, "rate": 1e-3, "width": w, "parameters": w**2,
              "nats": 3 - w / 99} for w in (8, 12, 16, 24, 32) for s in (0, 1)]  # fmt: skip
    for part, config, made, summary in (
        ("state", small, rows, findings.arms_summary), ("scaling", scaling.SCALES["small"], sizes, scaling.summary),
        ("machine", machine.SCALES["small"], checks, findings.machine_summary)):  # fmt: skip
        stored = contract.stored(command="python -m x", config=config, machine={"cores": 2}, seconds=60.0, rows=made,
                                 summary=summary(made), content="")  # fmt: skip
        contract.write(tmp_path / f"recall_{part}.json", stored)
        assert type(config).from_json(json.loads((tmp_path / f"recall_{part}.json").read_text())["config"]) == config
        assert recall_hybrids.main(["--part", part, "--render", "--output", str(tmp_path)]) == 0
        page = capsys.readouterr().out
        assert page == (tmp_path / f"recall_{part}.md").read_text() + "\n"
        assert (tmp_path / f"recall_{part}.png").read_bytes().startswith(b"\x89PNG")
        if part == "state":
            assert "90 % right; 90 % follow the swapped state (at least the 80 asked for)" in page and "+0.100" in page
        if part == "machine":
            assert page.count("| yes |") == 8 and "| no |" not in page


def test_rows_of_arms_that_are_there_are_kept_and_none_is_lost(tmp_path):
    arms = [Arm("DS*2", 0.7, training) for training in (TEXT, MIXED)]
    rows = [row(arm, seed, 2.0, 0.05, 0.9) for arm in arms for seed in (0, 1)]
    stored = contract.stored(command="python -m x", config=SMALL.of(arms), seconds=60.0, rows=rows, content="",
                             machine={"cores": 2, "processor": "P"}, summary=findings.arms_summary(rows))  # fmt: skip
    more = SMALL.of([*arms, Arm("DA*2", 0.0, MIXED)])
    kept = study.unchanged(more, stored, "")
    assert [one["model"] for one in kept] == [one["model"] for one in stored["rows"]]
    assert kept[0]["kept_from"]["command"] == "python -m x" and not study.unchanged(more.of(more.arms[2:]), stored, "")
    contract.check_kept(tmp_path, stored, kept, [arm.name for arm in more.settings], "model")
    with pytest.raises(Refused, match=r"it has rows of .* trained on text, which this study leaves out"):
        contract.check_kept(tmp_path, stored, kept[:1], [arms[1].name], "model")
    elsewhere = more.replace(text=("elsewhere/a.txt",), tokenizer="elsewhere/b.model")  # the hash says what they hold
    assert study.unchanged(elsewhere, {**stored, "config": {**stored["config"], "text": ["a.txt"]}}, "")
    with pytest.raises(Refused, match=r"steps of the stored rows is 600; this study has 7\n.*another text"):
        study.unchanged(more.replace(steps=7), stored, "else")
    assert "Rows of an earlier run" in report.write("state")(tmp_path, {**stored, "rows": kept})


@pytest.mark.exhaustive  # what it traces is what an arm is made of when it is trained
def test_every_scale_is_valid():
    for scales in study.SCALES.values():
        for one in scales.values():
            assert all(one.model(arm, 300).vocab == 300 for arm in one.arms) and one.row % 8 == 0
    for one in study.SCALES["mixers"].values():  # to within half of what one unit more in each MLP adds
        sizes = [study.parameters(one.model(arm, 300)) for arm in one.arms]
        assert max(abs(size - sizes[0]) for size in sizes) <= 1.5 * 4 * one.width and len(set(sizes)) > 1
    for scale in scaling.SCALES.values():
        assert [scale.model(width, 300).width for width in scale.widths] == list(scale.widths)
    assert {NEEDLES, TEXT, MIXED} == {arm.training for arm in study.SCALES["state"]["accelerator"].arms}


def test_words_that_make_no_study_are_refused():
    with pytest.raises(Refused, match="the scales are minutes, small, accelerator"):
        recall_hybrids.configured(recall_hybrids.parser().parse_args(["--part", "machine", "--scale", "large"]))
    with pytest.raises(Refused, match="--part scaling has none"):
        recall_hybrids.main(["--part", "scaling", "--keep"])
    with pytest.raises(Refused, match=r"(?s)--text is of the other parts.*--tokenizer is of the other parts"):
        recall_hybrids.main(["--part", "machine", "--text", "a.txt", "--tokenizer", "b.model"])
    with pytest.raises(Refused, match="trainings has 'words'"):
        SMALL.of([Arm("D", 0.0, "words")])
