"""Evaluation: the losses of the dense definition, bytes counted one by one, documents told apart, clear refusals."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax import evaluate
from gt_jax.checkpoints import checkpoint
from gt_jax.configs.data import DataConfig
from gt_jax.configs.model import MemoryConfig
from gt_jax.configs.run import RunConfig, TrainConfig
from gt_jax.devices.sharding import Rules
from gt_jax.errors import Refused
from gt_jax.evaluation import held_out
from gt_jax.evaluation.confidence_intervals import ratio_interval
from gt_jax.evaluation.held_out import evaluate_checkpoints
from gt_jax.evaluation.held_out_rows import held_out_rows
from gt_jax.evaluation.scoring import byte_lengths, make_scores, score, targets_of
from gt_jax.models.language_model import LanguageModel, fixed_passes, free_passes
from gt_jax.models.memory_chunks import forward_rows
from gt_jax.text.batches import open_text
from gt_jax.text.data import open_data
from gt_jax.text.tokenizers import ByteTokenizer
from gt_jax.training import accumulation
from tests.rarely import rarely
from tests.support import perturbed, small_model

ROW, END = 24, 256
ADAPTIVE = small_model("D")
PLAIN = small_model("D", False, memory=MemoryConfig(chunk=8, stream=0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text of 60 documents, each of letters of its own, and three checkpoints: two adaptive ones and a plain one."""
    place = tmp_path_factory.mktemp("evaluate")
    random = np.random.default_rng(0)
    documents = [bytes(random.integers(2 * n, 2 * n + 2, random.integers(20, 90)).tolist()) for n in range(60)]
    (place / "text.bin").write_bytes(b"\n<|endoftext|>\n".join(documents))
    (place / "one.bin").write_bytes(bytes(random.integers(0, 256, 3000).tolist()))
    data = DataConfig(text=(str(place / "text.bin"),), sequence_length=ROW, batch_size=2, held_out=0.4)
    for name, config, std in (("a", ADAPTIVE, 0.1), ("b", ADAPTIVE, 0.12), ("plain", PLAIN, 0.1)):
        run = RunConfig(model=config, train=TrainConfig(steps=1), data=data)
        meta = {"kind": "train", "config": config.to_json(), "run": run.to_json(), "step": 7}
        checkpoint.save(place / name, perturbed(config, std), meta)
    (place / "counts.json").write_text(json.dumps({"layer0": {"k_exec": 2, "p_mu": 0.5}}))
    return place


def text_of(folder):
    return open_text(DataConfig.from_json(checkpoint.describe(folder / "a")[1]["run"]["data"]))


@functools.cache
def logits_of(config):
    return jax.jit(lambda *rows: forward_rows(LanguageModel(config), *rows)[0])


def dense(config, variables, batches, control) -> np.ndarray:
    """-log softmax of the target by float64 numpy, from the logits of whole rows."""
    found = []
    for batch in batches:
        rows = jnp.asarray(batch["tokens"]), jnp.asarray(batch["segment_ids"])
        logits = np.asarray(logits_of(config)(variables, *rows, control), np.float64)
        log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        counted = batch["targets"] >= 0
        found.append(-log_p[counted, batch["targets"][counted]])
    return np.concatenate(found)


@pytest.mark.parametrize(("config", "control"), [
    rarely(ADAPTIVE, fixed_passes(3)),  # the figures by hand are of it
    (PLAIN, free_passes()),
])  # fmt: skip
def test_nats_of_each_token_are_those_of_the_dense_definition(folder, config, control):
    batches = text_of(folder).held_out(3)
    found = score(config, perturbed(config), batches, control, Rules())
    np.testing.assert_allclose(found, dense(config, perturbed(config), batches, control), atol=2e-5)
    assert len(found) == len(targets_of(batches))


def test_rows_of_a_large_batch_are_scored_in_parts_that_a_device_can_hold(folder, monkeypatch):
    """A batch that 64 devices trained on, 128 rows of 4,096 tokens, is evaluated on one of them."""
    text = text_of(folder)
    text = dataclasses.replace(text, config=text.config.replace(batch_size=6))
    batches, variables = text.held_out(2), perturbed(PLAIN)
    whole = score(PLAIN, variables, batches, free_passes(), Rules())
    monkeypatch.setattr(accumulation, "TOKENS", 2 * ROW)
    make_scores.cache_clear()  # the shapes are those of a compiled function
    parts = functools.partial(accumulation.parts_that_fit, rules=Rules())
    assert parts(jnp.zeros((6, ROW)), PLAIN) == 3
    assert parts(jnp.zeros((5, ROW)), PLAIN) == 5  # which divide into single ones alone
    origin = ADAPTIVE.replace(adaptive=ADAPTIVE.adaptive.replace(halting="batch"))
    assert parts(jnp.zeros((6, ROW)), origin) == 1
    np.testing.assert_allclose(score(PLAIN, variables, batches, free_passes(), Rules()), whole, atol=1e-6)
    make_scores.cache_clear()


def test_documents_are_told_apart_by_their_letters(folder):
    text = text_of(folder)
    found = held_out_rows(text)
    np.testing.assert_equal(found.batches, text.held_out())
    targets, units = targets_of(found.batches), found.scored_units()
    assert found.kind == "document" and len(np.unique(units)) == len(text.held_out_spans) > 10
    inside = (targets != END) & (targets != ord("\n"))
    letters = [np.unique(targets[inside & (units == unit)] // 2) for unit in np.unique(units)]
    assert all(len(one) == 1 for one in letters) and len({int(one[0]) for one in letters}) == len(letters)


def test_a_few_rows_are_of_as_many_documents_as_they_can_be():
    """What `evaluate` reads by default: 64 rows of 64 pieces; the first 64 rows are of 8 pieces."""
    text = open_text(DataConfig())
    whole, found = held_out_rows(text), held_out_rows(text, 8)
    assert len(found.batches) == 8 and all(batch["tokens"].shape == (8, 256) for batch in found.batches)
    every = np.concatenate([batch["tokens"] for batch in whole.batches])
    units = np.concatenate(whole.units)
    rows = np.concatenate([batch["tokens"] for batch in found.batches])
    places = [int(np.flatnonzero((every == row).all(axis=1))[0]) for row in rows]
    assert min(np.diff(places)) >= 8 and places[-1] > 0.95 * len(every)
    first, spread = (len(np.unique(of)) for of in (units[:64], np.concatenate(found.units)))
    assert spread > 1.5 * first and spread >= 15


def test_copies_of_a_document_are_one_unit(tmp_path):
    """They are held out together, and taken for independent they would make any interval narrow."""
    random = np.random.default_rng(0)
    documents = [bytes(random.integers(0, 256, random.integers(60, 90)).tolist()) for _ in range(40)] * 5
    (tmp_path / "text.bin").write_bytes(b"".join(one + b"\n<|endoftext|>\n" for one in documents))
    text = open_text(DataConfig(text=(str(tmp_path / "text.bin"),), sequence_length=ROW, batch_size=2, held_out=0.2))
    found = held_out_rows(text)
    assert found.kind == "document"
    assert len(np.unique(found.scored_units())) == len(text.held_out_spans) / 5 == 8


def test_of_one_document_the_places_are_what_is_independent(folder):
    text = open_text(text_of(folder).config.replace(text=(str(folder / "one.bin"),)))
    found = held_out_rows(text)
    assert found.kind == "place" and len(np.unique(found.scored_units())) == len(text.held_out_spans) > 3
    where = [int(np.flatnonzero((text.held_out_spans[:, 0] <= at) & (at < text.held_out_spans[:, 1]))[0])
             for at in range(len(text.tokens)) if (text.held_out_spans[:, 0] <= at).any()
             and ((text.held_out_spans[:, 0] <= at) & (at < text.held_out_spans[:, 1] - 1)).any()]  # fmt: skip
    np.testing.assert_array_equal(np.sort(found.scored_units()), where)


def test_the_figures_by_hand(folder):
    found = evaluate_checkpoints([folder / "a", folder / "b"], batches=None)
    text = text_of(folder)
    batches = text.held_out()
    targets, units = targets_of(batches), held_out_rows(text).scored_units()
    assert (found["tokens"], found["ends"]) == (len(targets), int((targets == END).sum())) and found["ends"] > 10
    assert found["bytes"] == found["tokens"] - found["ends"]
    assert found["units"] == {"kind": "document", "count": len(np.unique(units))} and found["notes"] == []
    deviations = {"a": 0.1, "b": 0.12}
    nats = {name: dense(ADAPTIVE, perturbed(ADAPTIVE, std), batches, free_passes()) for name, std in deviations.items()}
    counts = np.array([(units == unit).sum() for unit in np.unique(units)], float)
    for name, one in zip(nats, found["models"], strict=True):
        assert one["checkpoint"] == str(folder / name) and one["step"] == 7 and one["passes"] is None
        sums = np.array([nats[name][units == unit].sum() for unit in np.unique(units)])
        np.testing.assert_allclose(list(one["nats_per_token"].values()), ratio_interval(sums, counts), atol=1e-4)
        assert one["bits_per_byte"]["value"] == pytest.approx(
            nats[name].sum() / math.log(2) / found["bytes"], abs=1e-4)  # fmt: skip
        assert one["perplexity"]["high"] == pytest.approx(math.exp(one["nats_per_token"]["high"]))
    (one,) = found["differences"]
    limits = one["nats_per_token"]
    assert limits["value"] == pytest.approx(nats["b"].mean() - nats["a"].mean(), abs=1e-4)
    signs = {"worse": limits["low"] > 0, "better": limits["high"] < 0,
             "cannot be told apart": limits["low"] <= 0 <= limits["high"]}  # fmt: skip
    assert signs[one["verdict"]]
    assert evaluate_checkpoints([folder / "a", folder / "a"])["differences"][0]["verdict"] == "cannot be told apart"


def test_passes_are_fixed_as_asked(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    values = []
    for words in ("2", "counts.json", None):
        assert evaluate.main(["a", "--json", "--batches", "2", *([] if words is None else ["--passes", words])]) == 0
        (one,) = json.loads(capsys.readouterr().out)["models"]
        assert one["passes"] == (None if words is None else [2])
        values.append(one["nats_per_token"]["value"])
    batches = held_out_rows(text_of(folder), 2).batches
    wanted = dense(ADAPTIVE, perturbed(ADAPTIVE), batches, fixed_passes(2)).mean()
    assert values[0] == values[1] == pytest.approx(wanted, abs=1e-5) and values[2] != values[0]


def test_a_report_for_a_reader(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert evaluate.main(["a", "b", "--batches", "2"]) == 0
    out = capsys.readouterr().out
    assert "bits per byte" in out and "intervals: 95 %, over " in out and "documents\n" in out
    assert "b against a: " in out and any(line.split()[:4] == ["a", "7", "by", "gates"] for line in out.splitlines())


TASK = "pointer_jumps:symbols=4,hardest=3,queries=3"


def test_answers_of_a_task_by_difficulty(folder, capsys, monkeypatch):
    """Those of the dense logits, of a plain model with chunks of memory too, compared in pairs; the picture of both."""
    monkeypatch.chdir(folder)
    words = ["a", "plain", "--task", TASK, "--batches", "2", "--picture", "answers.png"]
    assert evaluate.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    data = open_data(DataConfig(tasks=(TASK,), sequence_length=ROW, batch_size=2, held_out=0.4))
    right, difficulty = {}, np.concatenate([of["difficulty"][of["difficulty"] > 0] for of in data.held_out(2)])
    for one, config in zip(found["models"], (ADAPTIVE, PLAIN), strict=True):
        said = [np.asarray(logits_of(config)(perturbed(config), of["tokens"], of["segment_ids"], free_passes()))
                for of in data.held_out(2)]  # fmt: skip
        hits = [(logits.argmax(-1) == of["targets"])[of["difficulty"] > 0]
                for logits, of in zip(said, data.held_out(2), strict=True)]  # fmt: skip
        right[config] = np.concatenate(hits)
        answers = one["answers"]["pointer_jumps"]
        assert (answers["answers"], answers["instances"]) == (36, 4) and answers["hardest"] == [3]
        assert answers["accuracy"] == pytest.approx(
            {str(d): right[config][difficulty == d].mean() for d in np.unique(difficulty)})  # fmt: skip
        nats = dense(config, perturbed(config), data.held_out(2), free_passes()).mean()
        # one is summed in float64, the other batch by batch in float32
        assert answers["nats"] == pytest.approx(one["nats_per_token"]["value"], rel=1e-6)
        assert answers["nats"] == pytest.approx(nats, abs=1e-4)
        assert len(answers["cuts"]) == (config.adaptive is not None) and len(answers["forced"]) in (0, 4)
    (one,) = found["differences"]
    gain = one["answers"]["pointer_jumps"]["accuracy_all"]["value"]
    assert gain == pytest.approx(right[PLAIN].mean() - right[ADAPTIVE].mean())
    tiny = {"value": -2.3e-6, "low": -4e-6, "high": -6e-7}  # shown as far as the verdict needs
    of = {**found, "differences": [{**found["differences"][0], "nats_per_token": tiny, "verdict": "better"}]}
    assert "-0.0000023 (-0.0000040 to -0.0000006) nats a token" in "\n".join(evaluate.report_lines(of))
    lines = "\n".join(evaluate.report_lines(found))
    assert "pointer_jumps, a:" in lines and "pointer_jumps, plain against a: " in lines and "k_exec" in lines
    assert [one["depth"] for one in found["models"]] == ["gates", "once"] and "  by gates  " in lines
    assert (folder / "answers.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(Refused, match=r"--picture answers.png exists"):
        evaluate.main(words)
    with pytest.raises(Refused, match="no answer of known difficulty"):
        evaluate.main(["a", "--picture", "other.png"])


def test_targets_that_stand_for_no_byte_have_no_bits_a_byte(folder, capsys):
    """Ends of documents are legal targets."""
    ends = folder / "ends.jsonl"
    ends.write_text("".join(json.dumps({"tokens": [n, 66], "targets": [-1, END]}) + "\n" for n in range(20)))
    assert evaluate.main([str(folder / "a"), str(folder / "b"), "--text", str(ends), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == 0 and found["ends"] == found["tokens"] > 0
    assert found["models"][0]["bits_per_byte"] == {"value": "NaN", "low": None, "high": None}
    assert found["models"][0]["nats_per_token"]["value"] > 0 and evaluate.report_lines(found)


def test_all_rows_of_several_parts_are_said_to_be_no_mix(folder, capsys, monkeypatch):
    monkeypatch.setattr(held_out, "score", lambda _, __, rows, *rest: np.ones(len(targets_of(rows))))
    mixed = ["--text", str(folder / "text.bin"), "--task", TASK, "--mix", "text=0.9,pointer_jumps=0.1"]
    notes = []
    for rows in ("--all", "--batches=4", "--batches=90"):
        assert evaluate.main([str(folder / "a"), *mixed, rows, "--json"]) == 0
        notes.append(" ".join(json.loads(capsys.readouterr().out)["notes"]))
    assert "--all takes each part whole" in notes[0] and "% pointer_jumps by tokens" in notes[0]
    assert notes[1] == notes[2].partition("text has")[0].rstrip(), "there are as many rows as the weights ask for"
    assert re.search(r"text has \d+ held-out rows of the \d+ that its weight asks for, so it counts for less", notes[2])


def test_a_model_that_diverged_is_shown_as_that(folder, capsys, monkeypatch):
    """Its losses are not a number: no verdict comes of them, and what is printed is JSON."""
    nats = iter([1.0, float("nan")] * 2)
    monkeypatch.setattr(held_out, "score", lambda _, __, rows, *rest: np.full(len(targets_of(rows)), next(nats)))
    words = [str(folder / "a"), str(folder / "b"), "--batches", "4"]
    assert evaluate.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"][1]["nats_per_token"] == {"value": "NaN", "low": None, "high": None}
    assert found["models"][1]["perplexity"]["value"] == "NaN" and found["models"][0]["perplexity"]["low"] is not None
    assert found["differences"][0]["verdict"] == "no verdict: the figure is nan"
    assert evaluate.main(words) == 0 and "no verdict: the figure is nan" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "says"), [
    (("gone",), "gone"),
    (("a", "--batches", "0"), "--batches is 0"),
    (("a", "--all", "--batches", "3"), "exclude each other"),
    (("a", "--text", "missing.txt"), "missing.txt"),
    (("a", "--passes", "many"), "--passes 'many' is no number of passes"),
    (("a", "--passes", "2, " * 100), "--passes '2, 2, .* is no number of passes"),
    (("a", "--passes", "5"), "a layer of a runs 1 to 4 times"),
    (("a", "--passes", "1,2"), "--passes has 2 numbers; a has 1 layers"),
    (("plain", "--passes", "2"), "leave it out"),
    (("a", "--passes", "turned.json"), "turned.json was measured on a model of layout G; the source has D"),
    (("a", "other"), "vocab is 264 in a and 300 in other"),
    (("a", "plain", "other", "--passes", "0"), "(?s)vocab is 264.*1 to 4 times"),
    (("narrow",), "narrow does not say which tokenizer its 200 tokens are of"),
])  # fmt: skip
def test_what_cannot_be_evaluated_is_refused(folder, monkeypatch, capsys, words, says):
    monkeypatch.chdir(folder)
    for name, vocab in (("other", 300), ("narrow", 200)):
        if not (folder / name).exists():
            config = small_model("D", False, vocab=vocab)
            checkpoint.save(folder / name, perturbed(config), {"config": config.to_json(), "kind": "train"})
    (folder / "turned.json").write_text('{"_meta": {"layout": "G"}, "layer0": {"k_exec": 2, "p_mu": 0.5}}')
    with pytest.raises(Refused, match=says):
        evaluate.main(list(words))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("change", [{"held_out": 0.1}, {"split": "fill"}])
def test_text_that_another_model_may_know_is_noted(folder, tmp_path, change):
    here = checkpoint.describe(folder / "a")[1]
    run = RunConfig.from_json(here["run"])
    other = run.replace(data=run.data.replace(**change))
    checkpoint.save(tmp_path / "elsewhere", perturbed(ADAPTIVE), {**here, "run": other.to_json()})
    notes = evaluate_checkpoints([folder / "a", tmp_path / "elsewhere"], batches=1)["notes"]
    assert len(notes) == 1 and "may know what is held out" in notes[0]


class Words(ByteTokenizer):
    """A tokenizer whose tokens are words, the last one the end of a document."""

    vocab_size, end_of_document = 5, 4

    def texts(self) -> list[bytes]:
        return [text.encode() for text in ("", "a", "häuser", "の", "<end>")]


def test_bytes_of_any_tokenizer():
    assert byte_lengths(Words()).tolist() == [0, 1, 7, 3, 0]
