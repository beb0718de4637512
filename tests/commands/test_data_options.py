"""The options that name data, as a user types them: what they mean, what they leave, what they refuse."""

import inspect
import json
import os

import numpy as np
import pytest

from gt_jax import evaluate, train
from gt_jax.checkpoints import checkpoint
from gt_jax.configs.presets import tiny
from gt_jax.configs.run import RunConfig
from gt_jax.devices.sharding import Rules, global_batch
from gt_jax.errors import Refused
from gt_jax.evaluation.loading import text_config
from gt_jax.monitoring.metrics import read_metrics
from gt_jax.sample import main as sample
from gt_jax.training.loop import train_run
from gt_jax.training.step import shard_batch

CHAINS = "variable_chains:hardest=2,chains=3"
WHOLE = "variable_chains:easiest=1,hardest=2,chains=3,order=forward,letters=52"
MODEL = {"layout": "D", "width": 16, "mlp_width": 16,
         "deltanet": {"heads": 1, "value_heads": 1, "key_width": 8, "value_width": 8, "chunk_size": 16}}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("options")
    (place / "story.txt").write_bytes(b"Once upon a time a small net grew deep and was glad of it.\n" * 40)
    lines = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(40)]
    (place / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (place / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n[]\n')
    (place / "model.json").write_text(json.dumps(MODEL))
    return place


def config_of(*words: str, base: RunConfig | None = None) -> RunConfig:
    return train.run_config(train.parser().parse_args(["run", *words]), base or RunConfig(model=tiny()))


def test_what_the_options_mean():
    data = config_of("--task", CHAINS, "--task", "p_hop", "--mix", "text=0.5,variable_chains=0.25,p_hop=0.25",
                     "--curriculum", "0.3", "--steps", "200", "--batch-size", "4").data  # fmt: skip
    assert data.tasks == (WHOLE, "p_hop:easiest=1,hardest=6,symbols=4,length=63"), "with all of their options"
    assert data.shares == {"text": 0.5, "variable_chains": 0.25, "p_hop": 0.25} and data.text == ()
    assert data.curriculum_rows == 240, "0.3 of 200 steps of 4 rows"
    packed = config_of("--text", "a.JSONL", "b.jsonl.gz", "c.ndjson", "d.json", "e.jsonl.txt").data
    assert list(map(os.path.basename, packed.json_lines)) == ["a.JSONL", "b.jsonl.gz", "c.ndjson"]
    both = config_of("--text", "a.txt", "b.jsonl", "c.txt", "--task", "p_hop").data
    whole = [os.path.abspath(name) for name in ("a.txt", "b.jsonl", "c.txt")]  # a run is resumed in any folder
    assert both.text == (whole[0], whole[2]) and both.json_lines == (whole[1],)
    assert both.shares == pytest.approx({"text": 1 / 3, "p_hop": 1 / 3, "b": 1 / 3})
    assert config_of("--task", "addition").data.parts == ("addition",)
    assert config_of().data == RunConfig(model=tiny()).data


def test_every_command_that_reads_data_takes_what_the_options_name():
    from gt_jax.calibrate import calibrate
    from gt_jax.evaluation.verification import verify
    from gt_jax.verify import parser

    words = ["a", "b", "--text", "x.txt", "y.jsonl", "--task", CHAINS, "--mix", "text=0.5,y=0.3,variable_chains=0.2"]
    named = text_config(parser().parse_args(words))
    assert named["text"] == ("x.txt",) and named["json_lines"] == ("y.jsonl",) and named["tasks"] == (WHOLE,)
    assert [one.part for one in named["mix"]] == ["text", "y", "variable_chains"]
    assert text_config(parser().parse_args(["a", "b"])) is None
    assert text_config(parser().parse_args(["a", "b", "--sequence-length", "64"]))["sequence_length"] == 64
    for function in (calibrate, verify):
        assert set(named) <= set(inspect.signature(function).parameters)


def test_a_source_that_is_named_replaces_all_that_the_run_had():
    base = config_of("--task", CHAINS, "--mix", "text=0.5,variable_chains=0.5", "--curriculum", "0.5")
    assert config_of("--text", "a.txt", base=base).data == config_of("--text", "a.txt").data
    assert config_of("--task", "addition", base=base).data == config_of("--task", "addition").data
    moved = config_of("--resume", "--text", "a.txt", base=base).data  # of a run that goes on it is where the text lies
    assert moved == base.data.replace(text=config_of("--text", "a.txt").data.text)
    # and a source that is named alone leaves the others, their shares and the curriculum
    assert config_of("--resume", "--task", CHAINS, base=base) == base
    many = config_of("--text", "a.txt", "--task", CHAINS, "--mix", "text=0.7,variable_chains=0.3")
    assert config_of("--resume", "--task", CHAINS, base=many) == many
    kept = config_of("--steps", "7", "--batch-size", "2", base=base).data
    assert kept == base.data.replace(batch_size=2), "a curriculum is so many rows, however many steps are added"
    weighed = config_of("--mix", "text=0.9,variable_chains=0.1", base=base).data
    assert weighed.tasks == base.data.tasks and weighed.shares["text"] == 0.9
    again = config_of("--task", CHAINS, "--mix", "text=0.5,variable_chains=0.5", "--curriculum", "0.5", base=base)
    assert again == base, "a run is resumed with the words that began it"


def test_a_run_is_resumed_with_the_words_that_made_its_model(tmp_path):
    words = ["--preset", "tiny", "--plain", "--layout", "D*2", "--dtype", "bfloat16"]
    stored = config_of(*words[2:])
    (tmp_path / "config.json").write_text(json.dumps(stored.to_json()))

    def again(*words: str) -> RunConfig:
        arguments = train.parser().parse_args([str(tmp_path), "--resume", *words])
        return train.run_config(arguments, train.default_config(arguments))

    assert again() == again(*words) == stored
    for others in (words[:3], ["--preset", "small", *words[2:]]):
        with pytest.raises(Refused, match=f"does not train preset {others[1]}"):
            again(*others)


@pytest.mark.parametrize(("file", "words", "says"), [
    ({"adaptive": {"threshold": 0.3}}, ("--weights", "hard"), "adaptive.threshold is 0.3 in .*hard makes it 0.5"),
    ({"adaptive": {"initial_bias": 0.0}}, ("--weights", "hard"), "initial_bias is 0.0 .*--weights hard makes it 2.0"),
    ({"adaptive": {"state_width": 32}}, ("--gates", "state", "--weights", "hard"), "--gates state makes it 16"),
    ({"adaptive": {"threshold": 0.3}}, ("--plain",), "--plain makes it null"),
    ({"layout": "D*2", "remat": "none"}, ("--layout", "D*3", "--remat", "layer"),
     r"(?s)layout is .*--layout D\*3 .*remat is .*--remat layer"),
    ({"adaptive": {"weights": "hard", "threshold": 0.3}}, ("--weights", "hard"), None),
    ({"adaptive": {"threshold": 0.5}, "compute_dtype": "bfloat16"}, ("--weights", "hard", "--dtype", "bfloat16"), None),
    ({"width": 32}, ("--gates", "state", "--layout", "D*2"), None),
])  # fmt: skip
def test_a_flag_does_not_change_what_the_file_names(tmp_path, file, words, says):
    (tmp_path / "c.json").write_text(json.dumps(file))
    words = ("--model", str(tmp_path / "c.json"), *words)
    if says is None:
        adaptive = config_of(*words).model.to_json()["adaptive"]
        assert adaptive | file.get("adaptive", {}) == adaptive
        return
    with pytest.raises(Refused, match=says):
        config_of(*words)


@pytest.mark.parametrize(("words", "says"), [
    (("--price-rule", "budget", "--forced-until", "0.5"), ("forces no passes unless it is told how many",)),
    (("--task", "nope", "--task", "p_hop:hardest=99"), ("task 'nope' is not known; the tasks are pointer_jumps",
                                                        "hardest is 99; it can be at most 9")),
    (("--task", "p_hop", "--mix", "text=0.5,p_hop=0.4"), ("the weights of mix sum to 0.9",)),
    (("--task", "p_hop", "--mix", "text=0.5,addition=0.5"), ("mix names addition", "mix has no weight for p_hop")),
    (("--mix", "text=much,half"), ("'text=much' is no PART=WEIGHT", "'half' is no PART=WEIGHT")),
    (("--mix", "text=-1,p_hop=nan"), ("the weight of text is -1.0", "'p_hop=nan': weight is nan")),
    (("--task", "p_hop", "--curriculum", "1.5"), ("--curriculum is 1.5",)), (("--curriculum", "0.5"), ("--task",)),
    (("--text", "bad.jsonl"), ("bad.jsonl, line 1: field 'answer' is missing", "bad.jsonl, line 3: it is no object")),
    (("--text", "sums.jsonl", "--sequence-length", "4"), ("an answer longer than a row", "sums.jsonl, line 1:")),
    (("--task", "pointer_jumps", "--sequence-length", "32"), ("rows of 32 tokens are too short",)),
    (("--task", "p_hop", "--model", "narrow.json"), ("need 257",)),
])  # fmt: skip
def test_bad_data_are_refused_and_leave_nothing(folder, monkeypatch, words, says):
    monkeypatch.chdir(folder)
    (folder / "narrow.json").write_text('{"vocab": 128}')
    with pytest.raises(Refused) as error:
        train.main(["new", *words])
    assert all(words in str(error.value) for words in says)
    assert not (folder / "new").exists()


@pytest.mark.slow
def test_a_mix_is_trained_on_evaluated_and_sampled(folder, monkeypatch, capsys):
    """The commands read the data of the run; held-out batches that say more than a model reads do not trouble them."""
    monkeypatch.chdir(folder)
    config = config_of("--model", "model.json", "--text", "story.txt", "sums.jsonl", "--task", CHAINS, "--mix",
                       "text=0.25,sums=0.25,variable_chains=0.5", "--curriculum", "0.5", "--sequence-length", "32",
                       "--batch-size", "2", "--steps", "2")  # fmt: skip
    train_run(folder / "run", config.replace(train=config.train.replace(evaluation_batches=4)), show=True)
    short = "sums has 1 held-out rows of the 2 that its weight asks for"
    assert capsys.readouterr().err.count(short) == 1
    metadata = checkpoint.describe(folder / "run")[1]
    assert metadata["data"]["batches"] == 2 and set(metadata["data"]["parts"]) == {"text", "sums", "variable_chains"}
    held = read_metrics(folder / "run" / "metrics.jsonl")[-1]
    by_part = [held[f"held_out_loss_{name}"] for name in ("text", "sums", "variable_chains")]
    assert min(by_part) < held["held_out_loss"] < max(by_part)

    assert evaluate.main(["run", "--batches", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["units"]["kind"] == "unit" and len(found["notes"]) == 1
    assert found["notes"][0].startswith(short)
    assert found["models"][0]["nats_per_token"]["value"] == pytest.approx(held["held_out_loss"], rel=1e-4)
    assert sample(["run", "--task", CHAINS, "--instances", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("variable_chains, held-out instance") == 2 and "of 6 answers right" in shown
    with pytest.raises(Refused, match="leave one out"):
        sample(["run", "--prompt", "Once", "--task", CHAINS])
    with pytest.raises(Refused, match=r"(?s)--length is of texts that are continued.*--stop is"):  # answers have none
        sample(["run", "--task", CHAINS, "--stop", "x", "--length", "9"])
    with pytest.raises(Refused, match="--instances is how many of a task"):
        sample(["run", "--prompt", "Once", "--instances", "2"])
    with pytest.raises(Refused, match="--instances 2 is how many of a task are shown; run continues texts"):
        sample(["run", "--instances", "2"])


def test_only_what_a_model_reads_goes_to_the_devices():
    batch = {name: np.ones((2, 4), np.int32) for name in ("tokens", "targets", "segment_ids", "difficulty")}
    for of in (global_batch(batch, Rules()), shard_batch(batch, Rules())):
        assert set(of) == {"tokens", "targets", "segment_ids"}
