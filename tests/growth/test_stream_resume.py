"""Growths that stop, are killed, or find no room: the source is as it was, and a resume makes the same bytes."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.check import check
from gt_jax.checkpoints.checksums import noted
from gt_jax.checkpoints.folders import Damaged
from gt_jax.checkpoints.lock import lock_file
from gt_jax.errors import Refused
from gt_jax.growth import transform
from gt_jax.growth.plan import identity_plan
from tests.growth.stream_case import (
    CONFIG,
    PLAN,
    QUIET,
    SMALL,
    Case,
    Stopped,
    files,
    flip,
    grow,
    stop_after,
    where_stored,
)

pytestmark = pytest.mark.usefixtures("small_and_once")


def test_a_growth_that_was_interrupted_has_the_checksums_of_an_undisturbed_one(case: Case, tmp_path: Path) -> None:
    grow(case.source, tmp_path / "whole")
    for lines in (3, 30):
        target = tmp_path / f"after{lines}"
        with pytest.raises(Stopped):
            grow(case.source, target, progress=stop_after(lines), memory=SMALL)
        assert grow(case.source, target, resume=True)["kept"] > 0
        found, expected = noted(target), noted(tmp_path / "whole")
        assert found.tensors == expected.tensors and found.files.keys() == expected.files.keys()
        values = [name for name in expected.files if name.startswith("state/params") or name.startswith("state/statis")]
        assert [found.files[name] for name in values] == [expected.files[name] for name in values]
        assert check(target).damaged == []
        for name, value in case.grown.items():
            assert found.tensors[name] == zlib.crc32(value.tobytes()), name
    file, place = where_stored(target, case.grown["params/segment0/layer1/mlp/up/w"][3, 2])
    flip(file, place + 4)
    assert check(target).damaged == [{"file": str(file), "tensors": ["params/segment0/layer1/mlp/up/w"]}]
    with pytest.raises(Damaged, match="params/segment0/layer1/mlp/up/w"):
        checkpoint.content_hash(target)


def test_resume_keeps_what_is_done_and_refuses_another_growth(case: Case, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(Stopped):
        grow(case.source, target, progress=stop_after(30))
    assert [path.name for path in tmp_path.iterdir()] == ["target.unfinished"]
    before = files(tmp_path)
    with pytest.raises(Refused, match=r"target\.unfinished .*--resume"):
        grow(case.source, target)
    with pytest.raises(Refused, match="--resume completes it"):
        checkpoint.resolve(target)
    with pytest.raises(Refused) as refused:
        grow(case.source, target, resume=True, seed=8, carry="weights", plan=identity_plan(CONFIG.depth))
    for line in ("seed: 7 there, 8 now", 'carry: "gain" there, "weights" now', "config: ", "plan: "):
        assert line in str(refused.value)
    embedding = jax.tree.map(lambda leaf: leaf + 1, case.tree["params"]["embedding"])
    changed = {**case.tree, "params": {**case.tree["params"], "embedding": embedding}}
    checkpoint.save(tmp_path / "changed", changed, checkpoint.describe(case.source)[1])
    with pytest.raises(Refused, match=r"params/embedding/table holds other values"):
        grow(tmp_path / "changed", target, resume=True)
    assert {name: content for name, content in files(tmp_path).items() if name in before} == before
    for age, path in enumerate(sorted(tmp_path.rglob("*"))):  # a clock that went backwards: file times decide nothing
        os.utime(path, (1000 - age, 1000 - age))
    report = grow(case.source, target, resume=True)  # with another budget
    assert 0 < report["kept"] < report["tensors"]
    assert checkpoint.content_hash(target) == case.hash
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed", "target"]


def driver(case: Case, folder: Path, scenarios: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run scenarios in forks of one process (see killed_growth.py)."""
    child = transform.child_abstract(CONFIG, PLAN, None)
    job = {"source": str(case.source), "folder": str(folder), "plan": PLAN.to_json(), "scenarios": scenarios,
           "options": {**QUIET, "memory": SMALL},
           "child": {path: [leaf.shape, str(leaf.dtype)] for path, leaf in child.items()}}
    (folder / "job.json").write_text(json.dumps(job))
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("killed_growth.py")), str(folder / "job.json")],
                          env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def changes(case: Case, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How often an undisturbed growth changes the file system."""
    folder = tmp_path_factory.mktemp("undisturbed")
    driver(case, folder, [{"target": str(folder / "whole"), "count": str(folder / "count")}])
    return int((folder / "count").read_text())


def finish(case: Case, target: Path) -> int:
    """Resume what is there; returns how many leaves were kept. Everything must be as if nothing had happened."""
    if target.exists():
        assert checkpoint.content_hash(target) == case.quiet_hash
        return -1
    if any(target.parent.glob(f"{target.name}.*")):
        with pytest.raises(Refused, match="--resume"):
            grow(case.source, target, **QUIET)
    report = grow(case.source, target, memory=SMALL, resume=True, **QUIET)
    assert checkpoint.content_hash(target) == case.quiet_hash
    assert list(target.parent.glob(f"{target.name}.*")) == [] and not lock_file(target).exists()
    return report["kept"]


def kill(case: Case, folder: Path, events: list[int], moments: list[float]) -> list[int]:
    """kill -9 at the given changes of the file system and after so many seconds; how much each resume could keep."""
    before = files(case.source)
    scenarios: list[dict[str, Any]] = [{"target": str(folder / f"at{event}"), "kill": event} for event in events]
    scenarios += [{"target": str(folder / f"after{seconds}"), "seconds": seconds} for seconds in moments]
    ends = driver(case, folder, scenarios)
    assert sum(end["status"] == -9 for end in ends) >= len(events) - 3, ends  # threads: the last may not be reached
    assert files(case.source) == before
    kept = [finish(case, Path(scenario["target"])) for scenario in scenarios]
    assert files(case.source) == before
    return kept


@pytest.mark.slow
def test_killed_at_write_boundaries_and_at_random_times(case: Case, changes: int, tmp_path: Path) -> None:
    """The source is as it was, the target whole or absent, and a resume finishes to the same bytes.

    `pytest -m exhaustive` does it at every change and at thirty moments.
    """
    events = sorted({1, 2, 3, 5, *map(int, np.linspace(8, changes - 20, 3)), *range(changes - 8, changes + 1, 2)})
    moments = np.random.default_rng(11).uniform(0.1, 1.0, size=2)
    kept = kill(case, tmp_path, events, list(map(float, moments)))
    assert any(count > 0 for count in kept) and 0 in kept


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_killed_at_every_write_boundary_and_at_thirty_moments(case: Case, changes: int, tmp_path: Path) -> None:
    """Takes ten minutes or more; the suite has a sample of it."""
    moments = np.random.default_rng(12).uniform(0.05, 2.0, size=30)
    kept = kill(case, tmp_path, list(range(1, changes + 1)), list(map(float, moments)))
    print(f"{changes} changes and {len(moments)} moments: resume kept up to {max(kept)} tensors")


@pytest.mark.slow
def test_full_disk_says_so_and_resume_finishes(case: Case, changes: int, tmp_path: Path) -> None:
    """While the first tensor is written, a later one, and at the end."""
    before = files(case.source)
    moments = (2, 6, changes // 2, changes - 8)
    scenarios = [{"target": str(tmp_path / f"full{moment}"), "full": moment} for moment in moments]
    for scenario, end in zip(scenarios, driver(case, tmp_path, scenarios), strict=True):
        target = Path(str(scenario["target"]))
        assert not target.exists()
        remedy = "raise the limit of a file's size (ulimit -f), then finish with --resume"
        message = f"File too large while writing {target}; {remedy}"
        assert (end["status"], end["stderr"]) == (1, f"failed: [Errno 27] {message}\n")
        finish(case, target)
    assert files(case.source) == before
