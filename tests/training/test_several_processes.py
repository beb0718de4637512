"""Two real processes with two devices each do what one process with four does: train, go on where the other stopped;
the same batches, the same losses. `make exhaustive`: verify and evaluate, the same report.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gt_jax import evaluate, train, verify
from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.runs import RunCheckpoints
from gt_jax.devices import sharding
from gt_jax.devices.processes import ProcessGroup
from gt_jax.errors import Refused
from gt_jax.monitoring.metrics import read_metrics
from gt_jax.training import loop
from tests.training import process_group_job

WORDS = ("--text", "story.txt", "--layout", "D", "--plain", "--steps", "4", "--batch-size", "4",
         "--sequence-length", "32", "--checkpoint-every", "2", "--evaluate-every", "4",
         "--schedule", "cosine")  # fmt: skip  # no plateau, whose end would be saved too
MESH = ("--fsdp", "2", "--tensor", "2")
TASK = "pointer_jumps:symbols=5,hardest=4,queries=2"
VERIFY = ("one/2", "one/4", "--json", "--batches", "1", "--jacobian-rows", "4", "--jacobian-iterations", "4")


def started(folder: Path, devices: int, *words: str) -> subprocess.Popen[str]:
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.Popen([sys.executable, *words], cwd=folder, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def two(folder: Path, *words: str) -> list[subprocess.Popen[str]]:
    """Two processes of two devices with the same words and the flags that join them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = ("--coordinator", address, "--processes", "2", "--process")
    return [started(folder, 2, *words, *flags, str(index)) for index in range(2)]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    try:
        said = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *words) for process, words in zip(processes, said, strict=True)]


def cut(run: Path, other: Path) -> None:
    """`other` as `run` was when step 2 was saved and step 3 recorded."""
    shutil.copytree(run, other)
    shutil.rmtree(other / "4")
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join(lines[:3]))


def assert_same_run(one: Path, other: Path) -> None:
    """Losses to float32 rounding, the same lines, steps and positions."""
    lines = [read_metrics(run / "metrics.jsonl") for run in (one, other)]
    assert [line["step"] for line in lines[1]] == [line["step"] for line in lines[0]] == [1, 2, 3, 4, 4]
    for name in ("loss", "held_out_loss", "gradient_norm"):
        values = [[line[name] for line in own if name in line] for own in lines]
        assert len(values[0]) == len(values[1]) > 0
        np.testing.assert_allclose(values[1], values[0], rtol=1e-5)
    assert RunCheckpoints(one).steps() == RunCheckpoints(other).steps() == [2, 4]
    for step in ("2", "4"):
        positions = [checkpoint.describe(run / step)[1]["data"] for run in (one, other)]
        assert positions[0] == positions[1] and positions[0]["batches"] == int(step)


def assert_close(found: Any, wanted: Any) -> None:
    """JSON values equal to float32 rounding."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert_close(found[name], wanted[name])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for pair in zip(found, wanted, strict=True):
            assert_close(*pair)
    else:
        assert found == (pytest.approx(wanted, rel=1e-4, abs=1e-5) if isinstance(wanted, float) else wanted)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the runs lie; this process has four devices there, and compiles runs of one config once."""
    (tmp_path / "story.txt").write_bytes(b"Once upon a time a small net grew deep and was glad of it.\n" * 200)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:4]))
    monkeypatch.setattr(loop, "make_trainer", functools.cache(loop.make_trainer))
    return tmp_path


@pytest.mark.slow
def test_two_processes_train_as_one_and_each_goes_on_where_the_other_stopped(folder: Path) -> None:
    batches = process_group_job.trained(ProcessGroup(), ["one", *WORDS, *MESH])
    cut(folder / "one", folder / "one_then_two")
    (folder / "job.json").write_text(json.dumps([["two", *WORDS, *MESH], ["one_then_two", "--resume", *MESH]]))
    (code, _, said), (other_code, out, other_said) = ended(two(folder, process_group_job.__file__, "job.json"))
    assert (code, other_code, out) == (0, 0, ""), (said, other_said)
    cut(folder / "two", folder / "two_then_one")
    last = process_group_job.trained(ProcessGroup(), ["two_then_one", "--resume", *MESH])
    held_out = len(batches) - 4
    for index in range(2):
        fresh, resumed = json.loads((folder / f"batches.{index}.json").read_text())
        assert fresh == batches and resumed == last == batches[:held_out] + batches[-2:]
    assert len(set(batches[-4:])) == 4
    for name in ("two", "one_then_two", "two_then_one"):
        assert_same_run(folder / "one", folder / name)


@pytest.mark.exhaustive
def test_two_processes_as_they_are_typed_end_alike(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """verify and evaluate: results on one's standard output alone, refusals on both; SIGTERM to one stops both."""
    train.main(["one", *WORDS, *MESH])
    capsys.readouterr()
    for words, main in ((("gt_jax.verify", *VERIFY), verify.main),
                        (("gt_jax.evaluate", "one/2", "one/4", "--json", "--all"), evaluate.main),
                        (("gt_jax.evaluate", "one", "--task", TASK, "--json"), evaluate.main)):  # fmt: skip
        (code, out, said), other = ended(two(folder, "-m", *words))
        assert code == other[0] == 0 and other[1] == "", (said, other[2])
        assert main(words[1:]) == 0
        alone = json.loads(capsys.readouterr().out)
        assert_close(json.loads(out), alone)
        if main is verify.main:
            assert alone["gap"] != 0 and alone["layers"][0]["jacobian"] > 0
    for words in ("verify one/2 none", "verify one/2 one/4 --jacobian-rows 3", "verify one/2 one/4 --picture no/a.png",
                  "evaluate one --fsdp 3"):  # fmt: skip
        ends = ended(two(folder, "-m", *f"gt_jax.{words}".split()))
        assert [end[:2] for end in ends] == [(2, "")] * 2 and all("refused: " in end[2] for end in ends), ends
    processes = two(folder, "-m", "gt_jax.train", "long", *WORDS, *MESH, "--steps", "100000")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (RunCheckpoints(folder / "long").latest() or 0):
        time.sleep(0.1)
    asked = time.monotonic()
    processes[1].send_signal(signal.SIGTERM)
    ends = ended(processes)
    assert [end[0] for end in ends] == [0, 0] and time.monotonic() - asked < 30, ends
    lines = read_metrics(folder / "long" / "metrics.jsonl")
    assert lines[-1]["step"] == RunCheckpoints(folder / "long").latest()


def test_flags_that_do_not_go_together(tmp_path: Path) -> None:
    for main, words in ((train.main, ["run"]), (verify.main, ["a", "b"]), (evaluate.main, ["a"])):
        with pytest.raises(Refused, match="belong together"):
            main([*words, "--processes", "2"])
