"""Addresses are refused before anything is written, wherever a path is taken: by the commands, and from Python."""

import contextlib
import importlib
import io
from pathlib import Path

import pytest

from gt_jax.checkpoints import checkpoint
from gt_jax.configs.presets import tiny
from gt_jax.configs.run import RunConfig
from gt_jax.errors import Refused
from gt_jax.files import refuse_address
from gt_jax.training.loop import train_run

BUCKET = "gs://no-such-bucket/run"


@pytest.mark.parametrize("words", [
    f"train {BUCKET} --steps 1", f"train run --start {BUCKET}", f"train run --resume --model {BUCKET}",
    "grow s3://bucket/run child", f"grow run {BUCKET}", f"grow run child --plan-out {BUCKET}", f"measure {BUCKET}",
    f"measure run -o {BUCKET}", "evaluate run hf://owner/model", f"verify {BUCKET} child",
    f"calibrate run child {BUCKET}",
])  # fmt: skip
def test_commands_refuse_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    command, *rest = words.split()
    said = io.StringIO()
    with pytest.raises(SystemExit) as left, contextlib.redirect_stderr(said):
        importlib.import_module(f"gt_jax.{command}").main(rest)
    assert left.value.code == 2 and "is an address" in said.getvalue()
    assert not any(tmp_path.iterdir())


def test_python_refuses_an_address_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for work in (lambda: train_run(Path(BUCKET), RunConfig(model=tiny())), lambda: checkpoint.describe(BUCKET),
                 lambda: checkpoint.save(Path("s3://bucket/model"), {}, {}), lambda: checkpoint.load(BUCKET)):
        with pytest.raises(Refused, match=r"is an address .*mount the bucket"):
            work()
    assert not any(tmp_path.iterdir())


def test_paths_are_no_addresses() -> None:
    for path in ("runs/a", "/data/gs:/b", "a:b", "C:/runs", "./gs:", "12:/a", "run:1/a"):
        refuse_address(path)
    for path in ("gs://b", "gs:/b", "file:///tmp/a", "s3+http://b/c"):
        with pytest.raises(Refused):
            refuse_address(path)
