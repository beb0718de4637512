"""Two real processes with two devices each train as one process with four: the same losses, the same checkpoint."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gt_jax import checkpoint, train
from gt_jax.checkpoint_runs import RunCheckpoints
from gt_jax.errors import Refused
from gt_jax.metrics import read_metrics

WORDS = ("--text", "story.txt", "--layout", "D", "--plain", "--steps", "4", "--batch-size", "4",
         "--sequence-length", "32", "--checkpoint-every", "2", "--evaluate-every", "4", "--fsdp", "2", "--tensor", "2")


def started(folder: Path, devices: int, *words: str) -> subprocess.Popen[str]:
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.Popen([sys.executable, "-m", "gt_jax.train", *words], cwd=folder, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def trained(folder: Path, name: str, count: int) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = [("--coordinator", address, "--processes", str(count), "--process", str(i)) for i in range(count)]
    processes = [started(folder, 4 // count, name, *WORDS, *(own if count > 1 else ())) for own in flags]
    try:
        said = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, said


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_bytes(b"Once upon a time a small net grew deep and was glad of it.\n" * 200)
    for name, count in (("one", 1), ("two", 2)):
        trained(tmp_path, name, count)
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for name in ("loss", "held_out_loss", "gradient_norm"):
        values = [[line[name] for line in lines if name in line] for lines in (one, two)]
        assert len(values[0]) == len(values[1]) > 0
        np.testing.assert_allclose(values[1], values[0], rtol=1e-5)
    assert RunCheckpoints(tmp_path / "two").steps() == [2, 4]
    positions = [checkpoint.describe(tmp_path / name)[1]["data"] for name in ("one", "two")]
    assert positions[0] == positions[1]


def test_flags_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="belong together"):
        train.main([str(tmp_path / "run"), "--processes", "2"])
