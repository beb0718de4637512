"""What a model was trained on goes with it: held-out text stays held out, training goes on where it stopped.

Counts measured on other values, or on other layers, grow nothing; text is not read with tokens nobody knows.
"""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from gt_jax import describe, train
from gt_jax.calibrate import calibrate
from gt_jax.checkpoints import checkpoint
from gt_jax.configs.data import DataConfig
from gt_jax.configs.lineage import LINEAGE, carried, chain, newest
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.run import RunConfig, TrainConfig
from gt_jax.configs.standing import gone_on, stood
from gt_jax.devices.processes import ProcessGroup
from gt_jax.devices.sharding import mesh_for_rows
from gt_jax.errors import Refused
from gt_jax.evaluation.held_out import evaluate_checkpoints
from gt_jax.evaluation.loading import data_config, text_note
from gt_jax.evaluation.measurement import measure_checkpoint
from gt_jax.evaluation.model_files import open_checkpoint
from gt_jax.grow import main as grow
from gt_jax.growth import repetition
from gt_jax.growth.plan import identity_plan
from gt_jax.growth.stream import grow_checkpoint
from gt_jax.text.batches import open_text
from gt_jax.text.tokenizers import chosen_tokenizer, tokenizer_of
from gt_jax.training.loop import train_run
from tests.support import perturbed, small_model

CONFIG = small_model("D")
COUNTS = {"layer0": {"k_exec": 1, "survival": [1.0, 0.0, 0.0, 0.0]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A source as a run saves it after 3 batches of two files, its held-out share and rows its own, and its child."""
    place = tmp_path_factory.mktemp("lineage")
    random = np.random.default_rng(0)
    for name, size in (("one.txt", 3000), ("two.txt", 2000), ("other.txt", 3000)):
        (place / name).write_bytes(bytes(random.integers(97, 122, size).tolist()))
    data = DataConfig(text=(str(place / "two.txt"), str(place / "one.txt")), sequence_length=24, batch_size=2,
                      held_out=0.3, seed=5)  # fmt: skip
    optimizer = OptimizerConfig(learning_rate=3e-3, schedule="wsd")
    text, run = open_text(data), RunConfig(model=CONFIG, data=data, train=TrainConfig(optimizer=optimizer, steps=20))
    stream = text.train()
    for _ in range(3):
        next(stream)
    metadata = {"kind": "train", "config": CONFIG.to_json(), "step": 3, "run": run.to_json(), "data": stream.state(),
                "text": text.summary(), "files": text.files(), "price": 0.25}  # fmt: skip
    checkpoint.save(place / "source", perturbed(CONFIG), metadata)
    grow_checkpoint(place / "source", place / "grown", plan=identity_plan(CONFIG.depth))
    return place


def metadata_of(place):
    return checkpoint.describe(place)[1]


def test_a_child_holds_out_what_its_source_held_out(folder, tmp_path):
    """Copies of the files under other names, in another order: the same text by its hash, so the same split."""
    for name in ("one.txt", "two.txt"):
        shutil.copy(folder / name, tmp_path / f"copy of {name}")
    own = open_text(data_config(metadata_of(folder / "source"), None))
    grown, copies = metadata_of(folder / "grown"), tuple(str(tmp_path / f"copy of {n}.txt") for n in ("one", "two"))
    for named in (None, {"text": copies}, {"tokenizer": "bytes"}):
        text = open_text(data_config(grown, named))
        assert text.content_hash() == own.content_hash()
        assert np.array_equal(text.held_out_spans, own.held_out_spans)
        assert (text.config.sequence_length, text.config.batch_size) == (24, 2)
        assert text_note(grown, text, "grown", named is not None) is None
    with pytest.raises(Refused, match=r"one.txt is one of the 2 files of a training"):
        data_config(grown, {"text": copies[:1]})
    other = open_text(data_config(grown, {"text": (str(folder / "other.txt"),)}))
    assert "nothing of it was trained on" in text_note(grown, other, "grown", True)
    uneven = open_text(dataclasses.replace(own.config, held_out=0.1))
    assert "another part held out" in text_note(grown, uneven, "grown", True)
    assert "nothing says" in text_note({"config": CONFIG.to_json()}, own, "bare", True)
    lines = []
    found = evaluate_checkpoints([folder / "grown"], {"text": copies}, 1, say=lines.append)
    assert found["notes"] == []


def test_an_earlier_training_on_a_part_of_the_text_is_noticed(folder):
    """What it held out of one file is not what is held out of two: some of this part was trained on."""
    metadata = metadata_of(folder / "source")
    text = open_text(data_config(metadata, None))
    alone = open_text(text.config.replace(text=(str(folder / "one.txt"),)))
    first = {"kind": "train", "run": metadata["run"], "files": alone.files(), "data": alone.train().state()}
    assert text_note(metadata, text, "source", False) is None
    assert "one.txt, a part of this text" in text_note({**metadata, LINEAGE: [first]}, text, "source", False)


def test_a_file_that_a_training_read_among_others_is_noticed(folder):
    """As where models are compared on the text of the first: the second trained on that file and another one."""
    metadata = metadata_of(folder / "source")
    alone = open_text(data_config(metadata, None).replace(text=(str(folder / "one.txt"),)))
    assert "one.txt, a part of this text" in text_note(metadata, alone, "second", True)


def test_a_calibration_reads_its_text(folder):
    """Its training part, by the split of then: held out is what that held out, as with a training."""
    metadata = metadata_of(folder / "grown")
    other = open_text(data_config(metadata, {"text": (str(folder / "other.txt"),)}))
    assert "nothing of it was trained on" in text_note(metadata, other, "grown", True)
    fit = {"data": other.train().state(), "files": other.files(), "grown": "grown"}
    fitted = {**metadata, "kind": "calibrated", "calibrated": fit}
    assert text_note(fitted, other, "fitted", True) is None
    uneven = open_text(other.config.replace(held_out=0.1))
    assert "another part held out" in text_note(fitted, uneven, "fitted", True)


def test_a_changed_text_is_noticed(folder, tmp_path):
    (tmp_path / "moving.txt").write_bytes((folder / "one.txt").read_bytes())
    metadata = metadata_of(folder / "source")
    run = {**metadata["run"], "data": {**metadata["run"]["data"], "text": [str(tmp_path / "moving.txt")]}}
    text = open_text(DataConfig.from_json(run["data"]))
    assert "hash differs" in text_note({**metadata, "run": run}, text, "source", False)


def test_training_goes_on_in_the_same_text_where_the_source_stopped(folder, tmp_path):
    def started(*words):
        arguments = train.parser().parse_args([str(tmp_path / "run"), "--start", str(folder / "grown"), *words])
        return train.asked_config(arguments)

    config = started("--steps", "1")
    source = RunConfig.from_json(metadata_of(folder / "source")["run"])
    assert config.data == source.data and config.train == gone_on(source.train, 3, 1)
    assert config.train.optimizer == source.train.optimizer.replace(warmup=1.0), "the plateau's rate, a short warm-up"
    other = started("--text", str(folder / "other.txt"))
    assert other.data == source.data.replace(text=(str(folder / "other.txt"),))
    named = started("--learning-rate", "0.5", "--schedule", "cosine", "--warmup", "0.1").train.optimizer
    assert named == source.train.optimizer.replace(learning_rate=0.5, schedule="cosine", warmup=0.1)
    assert metadata_of(folder / "grown")["grown_from"]["stood"] == stood(source.train, 3).to_json()

    train_run(tmp_path / "run", config, show=False)
    metadata = metadata_of(tmp_path / "run")
    assert metadata["data"]["batches"] == 4
    assert [step["kind"] for step in chain(metadata)] == ["train", "grown", "train"]
    assert metadata[LINEAGE] == carried(metadata_of(folder / "grown"))


def test_a_start_is_one_step_of_a_run(folder, tmp_path, monkeypatch):
    """Lineage and values are of the same step, though another job saves a newer one between."""
    shutil.copytree(folder / "grown", tmp_path / "from" / "0")
    describe_, loaded, load = checkpoint.describe, [], checkpoint.load

    def described(path):
        found = describe_(path)
        if not (tmp_path / "from" / "9").exists():
            shutil.copytree(folder / "grown", tmp_path / "from" / "9")
        return found

    def loading(path, shapes):
        loaded.append(str(checkpoint.resolve(path)))
        return load(path, shapes)

    source = RunConfig.from_json(metadata_of(folder / "source")["run"])
    config = source.replace(model=open_checkpoint(folder / "grown").config, start=str(tmp_path / "from"),
                            train=source.train.replace(steps=1))  # fmt: skip
    monkeypatch.setattr(checkpoint, "describe", described)
    monkeypatch.setattr(checkpoint, "load", loading)
    train_run(tmp_path / "run", config, show=False)
    assert loaded == [str(tmp_path / "from" / "0")]


def test_a_position_fits_only_its_own_text_split_rows_and_order(folder):
    text = open_text(data_config(metadata_of(folder / "source"), None))
    place = metadata_of(folder / "source")["data"]
    files = {"files": place["files"]}  # which a run adds to its position, by their hashes
    assert text.position_after([None, {"position": 4}, place]) | files == place
    wider = open_text(text.config.replace(batch_size=4))
    assert wider.position_after([place])["batches"] == 2  # 6 rows are read: the next whole batch of 4 follows
    for change in ({"held_out": 0.2}, {"sequence_length": 32}, {"seed": 6}, {"text": (str(folder / "other.txt"),)}):
        assert open_text(text.config.replace(**change)).position_after([place]) is None


@pytest.mark.exhaustive  # growth/test_calibration.py has the chain of a fitted child
def test_calibration_keeps_the_chain(folder, tmp_path):
    with jax.set_mesh(mesh_for_rows(1)):
        calibrate(folder / "source", folder / "grown", tmp_path / "fitted", batches=1, iterations=1)
    metadata = metadata_of(tmp_path / "fitted")
    assert [step["kind"] for step in chain(metadata)] == ["train", "grown", "calibrated"]
    assert newest(metadata, "grown_from") == metadata_of(folder / "grown")["grown_from"]
    assert metadata["calibrated"]["data"]["content"] == metadata_of(folder / "source")["data"]["content"]
    assert [file["sha256"] for file in metadata["calibrated"]["files"]] == [
        file["sha256"] for file in metadata_of(folder / "source")["files"]]
    assert tokenizer_of(metadata) == "bytes" and data_config(metadata, None) == data_config(
        metadata_of(folder / "source"), None)  # fmt: skip
    lines = describe.report_lines(describe.describe(str(tmp_path / "fitted")))
    assert any("└─ grown from" in line for line in lines) and any("└─ trained at step 3" in line for line in lines)


def test_one_process_hashes_the_source_and_a_newer_step_changes_nothing(folder, tmp_path, monkeypatch):
    class Second(ProcessGroup):
        """A process that is not the first, while another command saves a step of the grown run."""

        first = False

        def agree(self, work):
            result = work()
            if not (tmp_path / "run" / "9").exists():
                shutil.copytree(folder / "grown", tmp_path / "run" / "9")
            return result

        def on_first(self, work):
            pass

    def hashed(*words):
        raise AssertionError("a process that is not the first reads the whole source")

    shutil.copytree(folder / "grown", tmp_path / "run" / "0")
    monkeypatch.setattr(checkpoint, "content_hash", hashed)
    words = folder / "source", tmp_path / "run", tmp_path / "fitted"
    with jax.set_mesh(mesh_for_rows(1)):
        fitted = calibrate(*words, batches=1, iterations=1, group=Second())
    assert fitted["grown"] == str(tmp_path / "run" / "0")


def test_counts_of_other_values_grow_nothing_and_leave_nothing(folder, tmp_path, capsys, monkeypatch):
    own = measure_checkpoint(folder / "source", None, 1)
    assert own["_meta"]["content_hash"] == checkpoint.content_hash(folder / "source", ("params", "statistics"))
    for name, meta in (("own", {}), ("other", {"content_hash": "0" * 64}), ("turned", {"layout": "G"})):
        (tmp_path / f"{name}.json").write_text(json.dumps({**own, "_meta": {**own["_meta"], **meta}}))
    (tmp_path / "bare.json").write_text(json.dumps(COUNTS))

    def words(name):
        return [str(folder / "source"), str(tmp_path / "deep"), "--repetition", str(tmp_path / f"{name}.json")]

    with pytest.raises(Refused, match=r"other.json was measured on a checkpoint of other values"):
        grow(words("other"))
    with pytest.raises(Refused, match=r"turned.json was measured on a model of layout G; the source has D"):
        grow(words("turned"))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("deep")]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):  # as the last name is given
        patched.setattr("gt_jax.growth.stream.rename", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
        grow(words("own"))
    with pytest.raises(Refused, match="What was grown is kept: --resume with the counts of this source"):
        grow([*words("other"), "--resume"])
    assert (tmp_path / "deep.unfinished").is_dir()
    shutil.rmtree(tmp_path / "deep.unfinished")
    capsys.readouterr()
    assert grow([*words("own"), "--no-check"]) == 0
    assert "content_hash" not in capsys.readouterr().err
    kept = metadata_of(tmp_path / "deep")["grown_from"]["counts"]
    assert kept["origin"].endswith("own.json") and len(kept["sha256"]) == 64
    assert kept["measured"]["content_hash"] == own["_meta"]["content_hash"]
    shutil.rmtree(tmp_path / "deep")
    assert grow([*words("bare"), "--no-check"]) == 0
    assert "bare.json does not say which checkpoint was measured" in capsys.readouterr().err


def test_a_plan_file_keeps_the_record_of_its_counts(folder, tmp_path, capsys):
    """A plan made from counts is refused where the counts are, and leaves what they leave."""
    own = measure_checkpoint(folder / "source", None, 1)
    for name, meta in (("own", {}), ("other", {"content_hash": "0" * 64})):
        counts = tmp_path / f"{name}.json"
        counts.write_text(json.dumps({**own, "_meta": {**own["_meta"], "loss": float("inf"), **meta}}))
        plan = ["--repetition", str(counts), "--plan-out", str(tmp_path / f"{name}.plan")]
        assert grow([str(folder / "source"), "--dry-run", *plan]) == 0
    source, deep = str(folder / "source"), str(tmp_path / "deep")
    with pytest.raises(Refused, match=r"other.json was measured on a checkpoint of other values"):
        grow([source, deep, "--plan-file", str(tmp_path / "other.plan")])
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("deep")]
    assert grow([source, deep, "--no-check", "--plan-file", str(tmp_path / "own.plan")]) == 0
    record = metadata_of(deep)["grown_from"]["counts"]
    read = repetition.read(tmp_path / "own.json")
    assert (record["sha256"], record["k_exec"], record["origin"]) == (read.sha256, list(read.k_exec), read.origin)
    assert record["measured"]["content_hash"] == own["_meta"]["content_hash"]

    stored = json.loads((tmp_path / "own.plan").read_text())
    capsys.readouterr()

    def tried(change):
        (tmp_path / "changed.plan").write_text(json.dumps(change(json.loads(json.dumps(stored)))))
        grow([source, "--dry-run", "--plan-file", str(tmp_path / "changed.plan")])
        return capsys.readouterr().err

    def meta(**changes):
        def change(plan):
            plan["counts"]["values"]["_meta"] |= changes
            return plan
        return change

    assert "carries no counts" in tried(lambda plan: {name: plan[name] for name in plan if name != "counts"})
    assert "warning" not in tried(lambda plan: plan)
    for change, message in (
        (meta(layout="G"), "measured on a model of layout G"), (meta(alpha=[1.0, 0.5, 0.2, 0.1]), "_meta.alpha is"),
        (lambda plan: {**plan, "counts": 3}, "key 'counts' is no object"),
        (lambda plan: {**plan, "counts": {**plan["counts"], "values": {}}}, "counts.values is not valid"),
        (lambda plan: {**plan, "counts": {**plan["counts"], "values": {"layer0": {"k_exec": 1}, "layer1": {
            "k_exec": 1}}}}, "counts are of 2 layers"),
    ):  # fmt: skip
        with pytest.raises(Refused, match=message):
            tried(change)


def test_counts_in_memory_belong_to_their_layout():
    import gt_jax

    counts = repetition.from_json({"_meta": {"layout": "G"}, **COUNTS})
    with pytest.raises(Refused, match="layout G; the source has D"):
        gt_jax.grow(CONFIG, perturbed(CONFIG), counts)


def test_text_is_not_read_with_tokens_that_nobody_knows(folder, tmp_path):
    wide = {"config": {"vocab": 50257}, "kind": "converted", "step": 0}
    for read in (lambda: data_config(wide, None), lambda: data_config(wide, {"text": (str(folder / "one.txt"),)}),
                 lambda: chosen_tokenizer(wide, None, "ours")):  # fmt: skip
        with pytest.raises(Refused, match=r"does not say which tokenizer its 50257 tokens are of.*--tokenizer"):
            read()
    assert data_config(wide, {"tokenizer": "bytes"}).tokenizer == "bytes"
    assert chosen_tokenizer({**wide, "tokenizer": "bytes"}, None, "ours") == "bytes"
    assert [chosen_tokenizer({"config": {"vocab": vocab}}, None, "ours") for vocab in (257, 264)] == ["bytes", "bytes"]
    with pytest.raises(Refused, match="bytes has 257 ids, ours a vocabulary of 100"):
        chosen_tokenizer({"config": {"vocab": 100}}, "bytes", "ours")
    config = CONFIG.replace(vocab=600)
    checkpoint.save(tmp_path / "wide", perturbed(config), {"config": config.to_json(), "kind": "converted", "step": 0})
    with pytest.raises(Refused, match="--tokenizer"):
        measure_checkpoint(tmp_path / "wide", None, 1)
    with pytest.raises(Refused, match="--tokenizer"):
        train.default_config(train.parser().parse_args(["new", "--start", str(tmp_path / "wide")]))
