"""Evaluating on tasks and answers: which data a checkpoint means, what it may know of it, and what is independent."""

import json

import numpy as np
import pytest

from gt_jax.configs.data import DataConfig, Weight
from gt_jax.configs.run import RunConfig
from gt_jax.errors import Refused
from gt_jax.evaluation.held_out_rows import held_out_rows
from gt_jax.evaluation.loading import data_config, text_note
from gt_jax.text.data import open_data
from tests.support import small_model

CHAINS = "variable_chains:easiest=1,hardest=3,chains=3,order=forward"
ROW = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("sources")
    for name in ("story", "tale"):
        (place / f"{name}.txt").write_bytes(f"Once upon a time the {name} of a small net was told.\n".encode() * 100)
    for name, more in (("sums", 0), ("other", 500)):
        lines = [{"prompt": f"{n + more}+{n}=", "answer": str(2 * n + more)} for n in range(40)]
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return place


def trained(folder, **changes) -> dict:
    """What the checkpoint of a run on text, a task and answers says of itself."""
    data = DataConfig(**{
        "text": (str(folder / "story.txt"),), "tasks": (CHAINS,), "json_lines": (str(folder / "sums.jsonl"),),
        "mix": (Weight("text", 0.5), Weight("variable_chains", 0.25), Weight("sums", 0.25)), "curriculum_rows": 40,
        "sequence_length": ROW, "batch_size": 2, "held_out": 0.2, **changes,
    })  # fmt: skip
    opened = open_data(data)
    stream = opened.train()
    next(stream)
    return {"kind": "train", "config": small_model().to_json(), "step": 1, "files": opened.files(),
            "run": RunConfig(model=small_model(), data=data).to_json(), "data": stream.state()}  # fmt: skip


def test_the_data_of_a_checkpoint_are_those_of_its_training(folder):
    metadata = trained(folder)
    data = data_config(metadata, None)
    assert data.to_json() == metadata["run"]["data"] and data.parts == ("text", "variable_chains", "sums")
    assert text_note(metadata, open_data(data), "run", False) is None
    even = data_config(metadata, {"mix": tuple(Weight(name, 0.333) for name in data.parts)})
    assert even.tasks == data.tasks and even.shares["text"] == pytest.approx(1 / 3)


def test_named_data_are_in_the_shape_of_the_training_and_nothing_else_of_it(folder):
    metadata = trained(folder)
    alone = data_config(metadata, {"tasks": (CHAINS,), "tokenizer": None})
    assert alone.parts == ("variable_chains",) and alone.sequence_length == ROW and alone.held_out == 0.2
    assert not (alone.text or alone.json_lines or alone.mix or alone.curriculum_rows)
    text = data_config(metadata, {"text": (str(folder / "story.txt"),)})
    assert text.parts == ("text",), "the text of the training, cut as the training cut it, without its tasks"
    assert text_note(metadata, open_data(text), "run", True) is None
    answers = data_config(metadata, {"json_lines": (str(folder / "sums.jsonl"),)})
    assert answers.parts == ("sums",) and text_note(metadata, open_data(answers), "run", True) is None
    both = data_config(metadata, {"text": (str(folder / "story.txt"),), "tasks": ("p_hop:hardest=1,length=31",)})
    assert both.parts == ("text", "p_hop") and both.text == text.text


def test_rows_are_as_long_as_is_named(folder):
    long = folder / "long.jsonl"
    long.write_text(json.dumps({"prompt": "a" * 200, "answer": "b" * 120}) + "\n" + '{"prompt": "c", "answer": "d"}')
    named, converted = {"json_lines": (str(long),), "tokenizer": "bytes"}, {"kind": "converted"}
    with pytest.raises(Refused, match="321 tokens, rows have 256; train and the evaluating commands have --seq"):
        open_data(data_config(converted, named))
    data = data_config(converted, {**named, "sequence_length": 384})
    assert data.sequence_length == 384 and open_data(data).parts["long"].held_out(1)[0]["tokens"].shape == (8, 384)
    metadata = trained(folder)
    own = data_config(metadata, {"sequence_length": 64})
    assert own == data_config(metadata, None).replace(sequence_length=64), "of the data of the training too"
    text = data_config(metadata, {"text": (str(folder / "story.txt"),), "sequence_length": 64})
    assert text.sequence_length == 64
    assert "with another part held out" in text_note(metadata, open_data(text), "run", True)
    with pytest.raises(Refused, match="sequence_length is 0; it must be at least 2"):
        data_config(metadata, {"sequence_length": 0})


def test_longer_instances_than_were_trained_on_get_longer_rows(folder):
    metadata = trained(folder)
    long = data_config(metadata, {"tasks": ("variable_chains:hardest=10,chains=4",)})
    assert long.sequence_length == 96, "88 tokens need three times the row"
    part = open_data(long).parts["variable_chains"]
    assert part.held_out(1)[0]["difficulty"].max() == 10
    assert text_note(metadata, open_data(long), "run", True) is None, "held out by the same rule, so never trained on"
    with_text = data_config(metadata, {"tasks": long.tasks, "text": (str(folder / "story.txt"),)})
    assert with_text.sequence_length == ROW, "what is held out of a text goes by its rows"
    with pytest.raises(Refused, match="rows of 32 tokens are too short"):
        open_data(with_text)


def test_what_a_model_may_know_is_said_part_by_part(folder):
    metadata = trained(folder)
    more = data_config(metadata, None).replace(held_out=0.4)
    note = text_note(metadata, open_data(more), "run", True)
    assert "run was trained on this text with another part held out" in note
    assert "it may know instances of variable_chains that are held out here" in note
    fewer = data_config(metadata, {"tasks": (CHAINS,)}).replace(held_out=0.1)
    assert text_note(metadata, open_data(fewer), "run", True) is None, "a smaller share is a part of the larger one"
    strange = data_config(metadata, {"json_lines": (str(folder / "other.jsonl"),)})
    assert "another text than run was trained on" in text_note(metadata, open_data(strange), "run", True)
    (folder / "sums.jsonl").rename(folder / "kept")
    (folder / "sums.jsonl").write_bytes((folder / "other.jsonl").read_bytes())
    changed = text_note(metadata, open_data(data_config(metadata, None)), "run", False)
    (folder / "kept").rename(folder / "sums.jsonl")
    assert "hash differs" in changed


def test_a_training_on_the_text_alone_knows_the_text_of_a_mix(folder):
    alone = trained(folder, tasks=(), json_lines=(), mix=(), curriculum_rows=0)
    mixed = open_data(DataConfig.from_json(trained(folder)["run"]["data"]))
    note = text_note(alone, mixed, "run", True)
    assert note is not None and "another text" in note and "held out" not in note, "of the answers; the text is its own"
    assert text_note(alone, mixed.parts["text"], "run", True) is None


def test_units_are_numbered_through_all_parts(folder):
    data = open_data(DataConfig.from_json(trained(folder)["run"]["data"]))
    rows = held_out_rows(data, 4)
    np.testing.assert_equal(rows.batches, data.held_out(4))
    assert rows.kind == "unit" and len(rows.units) == len(rows.batches)
    by_part, first = {}, 0
    for name, batches in data.held_out_by_part(4).items():
        units = rows.units[first:first + len(batches)]
        first += len(batches)
        by_part[name] = {int(unit) for batch, of in zip(batches, units, strict=True)
                         for unit in of[batch["targets"] >= 0]}  # fmt: skip
    assert not by_part["text"] & by_part["sums"] and not by_part["variable_chains"] & by_part["sums"]
    assert len(by_part["variable_chains"]) == 2 and len(by_part["sums"]) > 2
    task = held_out_rows(open_data(data.config.replace(text=(), json_lines=(), mix=())), 2)
    assert task.kind == "instance" and len(set(task.scored_units().tolist())) == 4


def test_a_held_out_part_in_which_nothing_is_asked_has_no_loss(folder, monkeypatch):
    """Not 0: `verify`, `calibrate` and `evaluate` read it all."""
    data = open_data(DataConfig(text=(str(folder / "story.txt"),), sequence_length=ROW, batch_size=2, held_out=0.2))
    quiet = [{**batch, "targets": np.full_like(batch["targets"], -1)} for batch in data.held_out(2)]
    monkeypatch.setattr(type(data), "held_out", lambda self, batches: quiet)
    with pytest.raises(Refused, match="nothing is asked in these 4 held-out rows"):
        held_out_rows(data, 2)
