"""Addresses are refused before anything is written, wherever a path is taken: by the commands, and from Python."""

import contextlib
import errno
import importlib
import io
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from experiments import early_exit, growth_operators, growth_pays
from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.folders import prepare_parent
from gt_jax.configs.data import DataConfig
from gt_jax.configs.presets import tiny
from gt_jax.configs.run import RunConfig
from gt_jax.errors import Refused
from gt_jax.files import parse_json, read_json, refuse_address, write_atomically
from gt_jax.monitoring.picture_file import refuse_picture, write_picture
from gt_jax.monitoring.plan_outputs import wrong_outputs
from gt_jax.monitoring.run_page import read_run
from gt_jax.text.data import open_data
from gt_jax.text.tokenizers import open_tokenizer
from gt_jax.text.vocabulary_files import read_tokens
from gt_jax.training.loop import train_run
from gt_jax.training.run_directory import config_to_train

BUCKET = "gs://no-such-bucket/run"


@pytest.mark.parametrize("words", [
    f"train {BUCKET} --steps 1", f"train run --start {BUCKET}", f"train run --resume --model {BUCKET}",
    "grow s3://bucket/run child", f"grow run {BUCKET}", f"grow run child --plan-out {BUCKET}", f"measure {BUCKET}",
    f"measure run -o {BUCKET}", "evaluate run hf://owner/model", f"verify {BUCKET} child",
    f"calibrate run child {BUCKET}", f"sample {BUCKET}", f"sample run --tokenizer {BUCKET}",
    f"report {BUCKET} -o a.html", f"report run -o {BUCKET}", f"report run -o a.html --png {BUCKET}",
    f"convert {BUCKET} child", f"convert a.pt {BUCKET}",
    f"convert a.pt child --config {BUCKET}", f"convert a.pt child --tokens {BUCKET}", f"describe {BUCKET}",
    f"convert a.pt child --tokenizer {BUCKET}", f"demo --output {BUCKET}", f"train run --text a.txt {BUCKET}",
    f"train run --tfds-dir {BUCKET}", f"train run --tokenizer {BUCKET}", f"evaluate run --passes {BUCKET}",
    f"evaluate run --text {BUCKET}", f"measure run --tokenizer {BUCKET}", f"grow run child --map {BUCKET}",
    f"grow run child --tokenizer {BUCKET}", f"prepare name {BUCKET}", f"plan_pod --model {BUCKET}",
])  # fmt: skip
def test_commands_refuse_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    command, *rest = words.split()
    said = io.StringIO()
    with pytest.raises(SystemExit) as left, contextlib.redirect_stderr(said):
        importlib.import_module(f"gt_jax.{command}").main(rest)
    assert left.value.code == 2 and "is an address" in said.getvalue()
    assert not any(tmp_path.iterdir())


def test_no_option_makes_a_folder_of_an_address() -> None:
    """`type=Path` takes gs://bucket for a folder gs: of the current one; the studies' options are of this kind too."""
    root = Path(__file__).parents[1]
    takes_any = [f"{file.relative_to(root)}, line {number}" for folder in ("gt_jax", "experiments")
                 for file in sorted((root / folder).rglob("*.py"))
                 for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1) if "type=Path" in line]
    assert takes_any == [], "take gt_jax.files.local_path"
    parsers = (growth_pays.parser(), growth_operators.parser(), early_exit.parser())
    for parser, option in itertools.product(parsers, ("--work", "--output", "--text")):
        said = io.StringIO()
        with pytest.raises(SystemExit) as left, contextlib.redirect_stderr(said):
            parser.parse_args([option, BUCKET])
        assert left.value.code == 2 and f"argument {option}: {BUCKET} is an address" in said.getvalue()


def test_python_refuses_an_address_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for work in (lambda: train_run(Path(BUCKET), RunConfig(model=tiny())), lambda: checkpoint.describe(BUCKET),
                 lambda: checkpoint.save(Path("s3://bucket/model"), {}, {}), lambda: checkpoint.load(BUCKET)):
        with pytest.raises(Refused, match=r"is an address .*mount the bucket"):
            work()
    assert not any(tmp_path.iterdir())


def test_configs_name_every_address_in_them() -> None:
    fields = {"text": (BUCKET, "a.txt"), "json_lines": ("s3://b/qa.jsonl",), "tokenizer": "hf://owner/model"}
    with pytest.raises(Refused) as refused:
        DataConfig(**fields)
    lines = str(refused.value).splitlines()[1:]
    assert [line.split(":")[0].strip(" -") for line in lines] == list(fields)
    with pytest.raises(Refused, match="is an address"):
        open_data(DataConfig(tfds="tiny_shakespeare", tfds_dir=BUCKET))
    with pytest.raises(Refused, match=r"start: .*is an address"):
        RunConfig(model=tiny(), start=BUCKET)


@pytest.mark.parametrize(("content", "kind"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    (b"\n<!DOCTYPE html><title>Sign in</title>", "HTML page"), (b"", "empty"), (b"\x1f\x8b\x08\0", "gzip"),
])  # fmt: skip
def test_tokenizers_that_are_something_else_are_named(tmp_path: Path, content: bytes, kind: str) -> None:
    for name in ("tokenizer.json", "spiece.model"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Refused, match=kind):
            open_tokenizer(str(tmp_path / name))
    with pytest.raises(Refused, match=kind):
        read_tokens(tmp_path / "tokenizer.json")


def test_what_is_no_json_is_a_value_error_and_nothing_else(tmp_path: Path) -> None:
    for text, words in (("NaN", "no JSON number"), ("[" * 100_000, "nested too deeply"), ("9" * 5000, "digits")):
        (tmp_path / "a.json").write_text(f'{{"width": {text}')
        with pytest.raises(ValueError, match=words):
            read_json(tmp_path / "a.json")
    for text in ("[" * 100_000, '{"a":' * 100_000, b"\xff", "", '{"a": 1, "a": 2}'):
        with pytest.raises(ValueError, match=r"."):
            parse_json(text, once=True)


def test_a_pipe_gives_json_once_and_no_text(tmp_path: Path) -> None:
    """`--model <(echo …)` is read once, as it must be; a text is hashed too, and read again on resume."""
    read, write = os.pipe()
    os.write(write, b'{"width": 16}')
    os.close(write)
    assert read_json(Path(f"/dev/fd/{read}")) == {"width": 16}
    os.close(read)
    os.mkfifo(tmp_path / "a.txt")  # nobody writes there: to open it would wait for ever
    os.mkfifo(tmp_path / "a.jsonl")
    for fields in ({"text": (str(tmp_path / "a.txt"),)}, {"json_lines": (str(tmp_path / "a.jsonl"),)}):
        with pytest.raises(Refused, match="it is a pipe or a device"):
            open_data(DataConfig(**fields))


def test_a_run_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    """The checkpoint goes when the run it is of has newer ones, and would take the other run with it."""
    checkpoint.save(tmp_path / "run" / "6", {"x": np.zeros(2, np.float32)}, {"config": {}})
    for place in (tmp_path / "run" / "6" / "new", tmp_path / "run" / "6" / "state" / "a" / "new"):
        with pytest.raises(Refused, match=r"would lie in the checkpoint .*6, which goes when it is old"):
            config_to_train(place, RunConfig(model=tiny()), resume=False)
        with pytest.raises(Refused, match=r"would lie in the checkpoint .*6, which goes when it is old"):
            prepare_parent(place)  # what every other command does before it writes
    config_to_train(tmp_path / "run" / "new", RunConfig(model=tiny()), resume=False)


def test_pictures_and_plans_in_a_checkpoint_are_refused(tmp_path: Path) -> None:
    step = tmp_path / "run" / "6"
    (step / "state").mkdir(parents=True)
    (step / "_CHECKPOINT_METADATA").touch()
    says = f"it would lie in the checkpoint {step}, which goes when it is old; name another place"
    with pytest.raises(Refused) as refused:
        refuse_picture(step / "state" / "a.png")
    assert str(refused.value) == f"--picture {step / 'state' / 'a.png'}: {says}"
    assert wrong_outputs(None, step / "plan.json", step / "a.png") == [
        f"--plan-out {step / 'plan.json'}: {says}", f"--picture {step / 'a.png'}: {says}"]
    refuse_picture(tmp_path / "run" / "a.png")
    assert wrong_outputs(None, tmp_path / "run" / "plan.json", None) == []


@pytest.mark.parametrize("values", [
    '"loss": "abc"', '"loss": []', '"loss": [1.0]', '"gate_mean": []', '"gate_mean": [[1], 2]', '"held_out_loss": [1]',
    '"gate_mean": [1.0, 2.0]', '"null_rate": {}',
])  # fmt: skip
def test_a_metric_that_is_no_number_is_refused(tmp_path: Path, values: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RunConfig(model=tiny()).to_json()))
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"step": 6, "loss": "NaN", "gate_mean": [0.5]}}\n{{"step": 7, {values}}}\n')
    with pytest.raises(Refused, match=r"metrics.jsonl.*\n.*step 7 .*no number"):
        read_run(tmp_path)


def test_a_small_file_that_cannot_be_written_leaves_nothing_and_has_a_name_of_its_own(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.html.tmp").write_text("of the user")
    (tmp_path / "a.html").write_text("before")
    (tmp_path / "a.html").chmod(0o640)
    write_atomically(tmp_path / "a.html", "now")
    assert (tmp_path / "a.html").read_text() == "now" and (tmp_path / "a.html").stat().st_mode & 0o777 == 0o640

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"while writing .*a.html; make room, then do it again"):
        write_atomically(tmp_path / "a.html", "later")
    there = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert there == {"a.html": "now", "a.html.tmp": "of the user"}


@pytest.mark.parametrize("second_names", [True, False])
def test_a_file_that_came_meanwhile_is_left_as_it_is(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second_names: bool) -> None:
    def refused(*names: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")  # as of FAT, and of some network drives

    if not second_names:
        monkeypatch.setattr(os, "link", refused)
    write_atomically(tmp_path / "counts.json", "mine", replace=False)
    with pytest.raises(FileExistsError, match=r"it has come meanwhile, and is left as it is: .*counts.json"):
        write_atomically(tmp_path / "counts.json", "later", replace=False)
    image = tmp_path / "a.png"
    with pytest.raises(FileExistsError):
        write_picture(lambda drawn: (drawn.write(b"PNG"), image.write_text("of another")), image)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "counts.json": "mine", "a.png": "of another"}


def test_paths_are_no_addresses() -> None:
    for path in ("runs/a", "/data/gs:/b", "a:b", "C:/runs", "./gs:", "12:/a", "run:1/a"):
        refuse_address(path)
    for path in ("gs://b", "gs:/b", "file:///tmp/a", "s3+http://b/c"):
        with pytest.raises(Refused):
            refuse_address(path)
