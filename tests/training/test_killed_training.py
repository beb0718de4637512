"""A run that ends badly, again and again, and is resumed: it comes out as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.runs import RunCheckpoints
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.monitoring.metrics import read_metrics
from tests.training import killed_training

KILLS, STEPS = 30, 240  # more than the lives get through on a machine with nothing else to do
WORDS = ["--text", "story.txt", "--layout", "DG", "--batch-size", "2", "--sequence-length", "32", "--checkpoint-every",
         "2", "--evaluate-every", "5"]  # fmt: skip


def lived(folder: Path, name: str, lives: list[dict[str, Any]], *words: str) -> list[dict[str, Any]]:
    """How the lives of a run ended, one after the other; what the first one compiles, the others find."""
    (folder / "story.txt").write_bytes(b"Once upon a time a small net grew deep and was glad of it.\n" * 400)
    (folder / "job.json").write_text(json.dumps({"run": name, "words": [*WORDS, *words], "lives": lives}))
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, killed_training.__file__, "job.json"], cwd=folder, env=environment,
                          capture_output=True, text=True, check=True)  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def kills(seed: int) -> list[dict[str, Any]]:
    """Half of them at a change of the file system, most of those inside a save, half at a moment of the clock."""
    rng = np.random.default_rng(seed)
    made: list[dict[str, Any]] = [{"change": int(rng.integers(1, 60))} for _ in range(KILLS // 2)]
    made += [{"line": int(rng.integers(1, 9)), "seconds": float(rng.uniform(0, 0.2))} for _ in range(KILLS // 2)]
    return [made[index] for index in rng.permutation(KILLS)]


def assert_same(whole: Path, other: Path) -> None:
    """Every value of both checkpoints, the text's position, and every line of metrics but for the time."""
    steps = RunCheckpoints(whole).steps()
    assert RunCheckpoints(other).steps() == steps and len(steps) == 3  # the newest two, and the plateau's end
    for step in map(str, steps):
        one, two = (flatten(checkpoint.load(run / step)) for run in (whole, other))
        assert one.keys() == two.keys() and {name.split("/")[0] for name in one} >= {"params", "optimizer", "price"}
        for name, value in one.items():
            assert (value.dtype, value.shape) == (two[name].dtype, two[name].shape), name
            assert value.tobytes() == two[name].tobytes(), name
        metadata = [checkpoint.describe(run / step)[1] for run in (whole, other)]
        assert metadata[0] == metadata[1] and metadata[0]["data"]["batches"] == int(step)
    lines = [[{key: value for key, value in line.items() if not key.startswith("time_")}
              for line in read_metrics(run / "metrics.jsonl")] for run in (whole, other)]  # fmt: skip
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[1] if "loss" in line] == list(range(1, steps[-1] + 1))


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_thirty_kills_change_no_bit(tmp_path: Path) -> None:
    whole, = lived(tmp_path, "whole", [{}], "--steps", str(STEPS))
    assert whole["status"] == 0, whole
    *killed, last = lived(tmp_path, "killed", [*kills(0), {}], "--steps", str(STEPS))
    for life in killed:
        print(life["life"], life["left"])
    assert [life["status"] for life in killed] == [-signal.SIGKILL] * KILLS and last["status"] == 0, killed
    assert sum(any(".unfinished" in name for name in life["left"]) for life in killed) >= 5
    assert_same(tmp_path / "whole", tmp_path / "killed")
