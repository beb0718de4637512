"""Real processes grow one checkpoint: the values of one, nobody waits for one that gave up, any number resumes."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from gt_jax.checkpoints import checkpoint
from gt_jax.configs import model, presets
from gt_jax.devices.processes import ProcessGroup
from gt_jax.errors import Refused
from gt_jax.grow import main as grow
from tests.support import perturbed

CONFIG = presets.tiny().replace(
    layout="DG*2", width=8, vocab=264, mlp_width=8,
    deltanet=model.DeltaNetConfig(heads=2, value_heads=2, key_width=4, value_width=4),
    gsa=model.GSAConfig(heads=2, head_width=4, indexer_heads=2, indexer_width=4, k_base=8, k_min=4, k_max=16))
STOPPED = """
import sys
from gt_jax.grow import main as grow
from gt_jax.growth import stream
from gt_jax.errors import run_command
stream.SECONDS = 0.0
count = 0

def stop(line):
    global count
    count += 1
    if count > 6:
        raise OSError(28, "No space left on device")

made = stream.grow_checkpoint
stream.grow_checkpoint = lambda *a, **k: made(*a, **{**k, "progress": stop if sys.argv[-1] == "0" else None})
run_command(grow)
"""


def run(arguments: list[str], count: int, program: tuple[str, ...] = ("-m", "gt_jax.grow")) -> list[Any]:
    """(exit code, stdout, stderr) of each of `count` processes that grow together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    flags = [["--coordinator", address, "--processes", str(count), "--process", str(index)] for index in range(count)]
    started = [subprocess.Popen([sys.executable, *program, *arguments, *own], env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for own in flags]
    try:
        said = [process.communicate(timeout=200) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *words) for process, words in zip(started, said, strict=True)]


@pytest.mark.slow
def test_processes_stop_together_and_any_number_finishes_what_one_makes(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "source", perturbed(CONFIG), {"config": CONFIG.to_json(), "kind": "train", "step": 1})
    arguments = [str(tmp_path / "source"), str(tmp_path / "target"), "--plan", "identity", "--seed", "3", "--json"]
    ends = run(arguments, 2, ("-c", STOPPED))
    assert [end[0] for end in ends] == [1, 1], ends
    assert "process 0: " in ends[1][2] and "No space left" in ends[1][2]
    assert not (tmp_path / "target").exists() and (tmp_path / "target.unfinished").is_dir()
    shutil.copytree(tmp_path / "target.unfinished", tmp_path / "by_one.unfinished")
    first, *others = run([*arguments, "--resume"], 3)
    assert [first[0], *(end[0] for end in others)] == [0, 0, 0], (first, others)
    assert [end[1] for end in others] == ["", ""] and json.loads(first[1])["report"]["kept"] > 0
    for name, words in (("by_one", ["--resume"]), ("alone", [])):
        grow([arguments[0], str(tmp_path / name), *arguments[2:], *words, "--no-check"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "by_one", "source", "target"]
    made = [tmp_path / name for name in ("target", "by_one", "alone")]
    assert len({checkpoint.content_hash(path) for path in made}) == 1
    assert checkpoint.describe(made[0])[1] == checkpoint.describe(made[1])[1] == checkpoint.describe(made[2])[1]


def test_one_process_shares_with_nobody() -> None:
    group = ProcessGroup()
    assert group.first and group.gather({"a": 1}) == [{"a": 1}] and group.agree(lambda: 3) == 3
    assert group.share({"b": 1, "a": 2}) == ["a", "b"]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_shares_are_whole_and_even(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {f"t{index}": index * index for index in range(40)}
    monkeypatch.setattr(jax, "process_count", lambda: count)
    shares = []
    for index in range(count):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        shares.append(ProcessGroup().share(costs))
    assert sorted(name for share in shares for name in share) == sorted(costs)
    loads = [sum(costs[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs.values())


@pytest.mark.parametrize(("flags", "words"), [
    (["--processes", "2"], "belong together"),
    (["--coordinator", "a:1", "--processes", "2", "--process", "2"], "one of 0 to 1"),
    (["--distributed", "--process", "1"], "asks the cluster"),
    (["--distributed", "--dry-run"], "run it in one"),
])
def test_flags_that_do_not_go_together(flags: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=words):
        grow([str(tmp_path / "source"), str(tmp_path / "target"), *flags])
