"""Growing from a source with a changed bit, or without checksums; names that belong to somebody else."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gt_jax.checkpoints import checkpoint, orbax_store
from gt_jax.checkpoints.arrays import ArrayFiles
from gt_jax.checkpoints.check import check
from gt_jax.checkpoints.checksums import note_checksums, sums_of_arrays
from gt_jax.checkpoints.folders import Damaged, publish
from gt_jax.checkpoints.tree_paths import flatten, nest
from gt_jax.errors import Failed, Refused
from tests.growth.stream_case import CONFIG, QUIET, Case, files, flip, grow, where_stored

pytestmark = pytest.mark.usefixtures("small_and_once")


def saved(source: Path, tree: Any, config: Any, by: str) -> None:
    """A checkpoint as a run saves it, one array in a folder each, or one from before checksums were noted by tensor."""
    if by == "arrays":
        values, stage = flatten(tree), source.with_name("stage")
        made = {name: ArrayFiles.of(stage / "state", name, value.shape, value.dtype) for name, value in values.items()}
        for name, array in made.items():
            array.create()
            array.write(0, values[name])
        checkpoint.write_metadata(stage, list(values), {"config": config.to_json()})
        note_checksums(stage, *sums_of_arrays(stage, made, {}))
        publish(stage, source)
        return
    checkpoint.save(source, tree, {"config": config.to_json()})
    if by == "file":
        sums, sizes = source / "checksums.json", json.loads((source / "files.json").read_text())
        sums.write_text(json.dumps(json.loads(sums.read_text())["files"]))
        (source / "files.json").write_text(json.dumps({**sizes, "checksums.json": sums.stat().st_size}))


@pytest.mark.parametrize("by", ["run", "arrays", "file"])
def test_a_flipped_bit_in_the_source_is_refused_by_tensor_and_file(
        case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """The lowest bit of a value in the middle: finite, and as plausible as before."""
    monkeypatch.setattr(orbax_store, "CHUNK", 2**24)  # above 1 KiB Orbax stores raw bytes
    source, random, config = tmp_path / "source", np.random.default_rng(4), CONFIG.replace(vocab=512)
    tree = jax.tree.map(lambda leaf: leaf, case.tree)
    table = tree["params"]["embedding"]["table"] = random.normal(size=(512, 8)).astype(np.float32)
    tree["params"]["unembedding"]["w"] = random.normal(size=(8, 512)).astype(np.float32)
    saved(source, tree, config, by)
    file, place = where_stored(source, table)
    flip(file, place + 400)
    tensor = "" if by == "file" else "params/embedding/table has other values than were written.*"
    error = Damaged if by == "file" else Failed  # by file it is seen before anything is made
    with pytest.raises(error, match=f"{source} is not usable: {tensor}{file.relative_to(source)}"):
        grow(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    flip(file, place + 400)  # from a backup
    report = grow(source, tmp_path / "target", resume=by != "file")
    assert report["source_checksums"] and check(tmp_path / "target").damaged == []


@pytest.mark.parametrize("noted", [True, False], ids=["by tensor", "by file, as before"])
def test_a_flipped_bit_in_a_second_moment_is_refused_too(
        case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: bool) -> None:
    monkeypatch.setattr(orbax_store, "CHUNK", 2**24)
    if not noted:
        monkeypatch.setattr(checkpoint, "stored_moments", lambda leaves: None)
    source, random, config = tmp_path / "source", np.random.default_rng(4), CONFIG.replace(vocab=512)
    params = {**case.tree["params"], "embedding": {"table": random.normal(size=(512, 8)).astype(np.float32)},
              "unembedding": {"w": random.normal(size=(8, 512)).astype(np.float32)}}  # fmt: skip
    second = jax.tree.map(lambda leaf: np.abs(random.normal(size=np.shape(leaf))).astype(np.float32), params)
    saved(source, {**case.tree, "params": params, "optimizer": {"all": {"nu": second, "count": np.int32(7)}}}, config,
          "run")  # fmt: skip
    file, place = where_stored(source, second["embedding"]["table"])
    flip(file, place + 400)
    with pytest.raises(Failed if noted else Damaged, match=f"{source} is not usable"):
        grow(source, tmp_path / "target")
    name = "optimizer/all/nu/embedding/table"  # as a training that starts there reads it
    with pytest.raises(Damaged, match=f"{source} is not usable"):
        checkpoint.load(source, nest({name: checkpoint.describe(source)[0][name]}))
    flip(file, place + 400)
    report = grow(source, tmp_path / "again")
    assert report["moments"] > 0 and report["source_checksums"]


def test_a_source_without_checksums_is_taken_and_the_report_says_so(case: Case, tmp_path: Path) -> None:
    source, said = tmp_path / "source", list[str]()
    shutil.copytree(case.source, source)
    (source / "checksums.json").unlink()
    sizes = json.loads((source / "files.json").read_text())
    del sizes["checksums.json"]
    (source / "files.json").write_text(json.dumps(sizes))
    report = grow(source, tmp_path / "target", progress=said.append)
    assert not report["source_checksums"] and f"{source} has no checksums; its values are taken as they are" in said
    assert check(tmp_path / "target").damaged == []


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_the_unfinished_name_that_no_growth_has_made_stays(
        case: Case, tmp_path: Path, resume: bool) -> None:
    mine = tmp_path / "target.unfinished" / "chapter1.txt"
    mine.parent.mkdir()
    mine.write_text("months of work")
    with pytest.raises(Refused, match=r"target\.unfinished"):
        grow(case.source, tmp_path / "target", resume=resume)
    assert mine.read_text() == "months of work"
    mine.unlink()
    mine.parent.rmdir()
    shutil.copytree(case.source, mine.parent)
    with pytest.raises(Refused, match=r"target\.unfinished"):
        grow(case.source, tmp_path / "target", resume=resume)
    assert files(mine.parent) == files(case.source)


def test_growing_to_the_name_of_a_lock_file_of_a_project(case: Case, tmp_path: Path) -> None:
    (tmp_path / "uv.lock").write_text("version = 1")
    grow(case.source, tmp_path / "uv", **QUIET)
    assert (tmp_path / "uv.lock").read_text() == "version = 1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["uv", "uv.lock"]
