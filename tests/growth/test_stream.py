"""Checkpoint to checkpoint: the same bytes as the pure transform, whatever the budget, and whatever was killed."""

import functools
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from gt_jax.checkpoints import checkpoint, orbax_store
from gt_jax.checkpoints.arrays import ArrayFiles
from gt_jax.checkpoints.check import check
from gt_jax.checkpoints.checksums import note_checksums, noted, sums_of_arrays
from gt_jax.checkpoints.folders import Damaged, publish
from gt_jax.checkpoints.lock import only_writer
from gt_jax.checkpoints.slices import SliceReader
from gt_jax.checkpoints.tree_paths import flatten, nest
from gt_jax.configs import presets
from gt_jax.configs.model import DeltaNetConfig, GSAConfig
from gt_jax.errors import Refused
from gt_jax.growth import stream, transform
from gt_jax.growth.plan import Plan, block_plan, identity_plan
from gt_jax.growth.repetition import from_json
from gt_jax.models import language_model

CONFIG = presets.tiny().replace(
    layout="DG*2", width=8, vocab=16, mlp_width=8,
    deltanet=DeltaNetConfig(heads=2, value_heads=2, key_width=4, value_width=4),
    gsa=GSAConfig(heads=2, head_width=4, indexer_heads=2, indexer_width=4, k_base=8, k_min=4, k_max=16))
COUNTS = (1, 3, 2, 4)
PLAN = block_plan(from_json({f"layer{layer}": {"k_exec": k, "p_mu": 0.5} for layer, k in enumerate(COUNTS)}),
                  CONFIG.depth)
OPTIONS: dict[str, Any] = {"carry": "gain", "noise_std": 1e-4, "seed": 7}
QUIET = {**OPTIONS, "noise_std": 0.0}  # compiles little: for the growths that are killed
SMALL = 8_192  # bytes: slices of a kilobyte


class Case(NamedTuple):
    source: Path
    tree: dict[str, Any]
    grown: dict[str, np.ndarray]
    hash: str
    quiet_hash: str


@pytest.fixture(scope="module", autouse=True)
def small_and_once() -> Any:
    """The model code is asked once what a child's tensors are; small tensors are stored in chunks, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "child_abstract", functools.cache(transform.child_abstract))
        patch.setattr(orbax_store, "CHUNK", 512)
        patch.setattr(stream, "SECONDS", 0.0)  # a line of progress for every source tensor
        yield


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A training checkpoint of random values, and what the pure transform makes of it."""
    random = np.random.default_rng(3)
    tree = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(leaf.dtype), language_model.abstract(CONFIG))
    folder = tmp_path_factory.mktemp("case")
    training = {**tree, "optimizer": ({"mu": np.full((3,), np.nan)}, ()), "step": 12, "price": 0.5}
    metadata = {"config": CONFIG.to_json(), "kind": "train", "step": 12, "data": {"position": 4}}
    checkpoint.save(folder / "source", training, metadata)
    stream.grow_checkpoint(folder / "source", folder / "target", plan=PLAN, **OPTIONS)
    grown = jax.tree.map(np.asarray, transform.grow(tree, PLAN, CONFIG, **OPTIONS))
    stream.grow_checkpoint(folder / "source", folder / "quiet", plan=PLAN, **QUIET)
    hashes = [checkpoint.content_hash(folder / name) for name in ("target", "quiet")]
    return Case(folder / "source", tree, flatten(grown), *hashes)


def grow(source: Path, target: Path, **changes: Any) -> dict[str, Any]:
    return stream.grow_checkpoint(source, target, **{"plan": PLAN, **OPTIONS, **changes})


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("memory", [SMALL, stream.MEMORY])
def test_equals_the_pure_transform_bit_for_bit(case: Case, tmp_path: Path, memory: int) -> None:
    before, lines = files(case.source), list[str]()
    report = grow(case.source, tmp_path / "target", memory=memory, progress=lines.append)
    found = flatten(checkpoint.load(tmp_path / "target"))
    assert found.keys() == case.grown.keys()
    for name, value in case.grown.items():
        assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes(), name
    assert checkpoint.content_hash(tmp_path / "target") == case.hash
    assert files(case.source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    sources = len([name for name in checkpoint.describe(case.source)[0] if name.startswith(("params/", "statistics/"))])
    assert len(lines) > sources and f"{sources}/{sources} source tensors" in lines[-1]
    assert all(word in lines[-1] for word in ("MiB", "/s", "resident"))
    assert report["tensors"] == len(found) and report["bytes"] == sum(value.nbytes for value in found.values())
    assert report["kept"] == 0 and report["dropped"][-3:] == ["optimizer", "price", "step"]
    assert "params/segment0/layer0/halting/embedding" in report["dropped"]


def test_the_child_carries_its_config_and_where_it_came_from(case: Case, tmp_path: Path) -> None:
    report = grow(case.source, tmp_path / "made" / "here" / "target", memory=SMALL)
    child, _, _, metadata = checkpoint.load_model(tmp_path / "made" / "here" / "target")
    assert child.layout == "DG*5" and child.adaptive is None
    assert metadata == {"config": child.to_json(), "kind": "grown", "step": 0, "grown_from": report["grown_from"],
                        "lineage": [{"kind": "train", "data": {"position": 4}, "step": 12}]}
    grown_from = metadata["grown_from"]
    assert Plan.from_json(grown_from["plan"]) == PLAN
    assert grown_from["step"] == 12 and grown_from["source"] == str(case.source)
    assert grown_from["k_exec"] == list(COUNTS) and len(grown_from["coefficients"]) == 10
    assert grown_from["content_hash"] == checkpoint.content_hash(case.source, under=["params", "statistics"])
    assert grown_from["seed"] == 7 and grown_from["versions"]["jax"] == jax.__version__


def test_opens_with_the_ordinary_call_of_orbax(case: Case, tmp_path: Path) -> None:
    grow(case.source, tmp_path / "target", memory=SMALL)
    stand_ins = nest({name: np.zeros_like(value) for name, value in case.grown.items()})
    loaded = flatten(ocp.load(tmp_path / "target", stand_ins))
    assert all(loaded[name].tobytes() == value.tobytes() for name, value in case.grown.items())


def test_bfloat16_child_of_a_run_directory(case: Case, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "12").symlink_to(case.source)
    grow(tmp_path / "run", tmp_path / "target", dtype="bfloat16")
    leaves, metadata = checkpoint.describe(tmp_path / "target")
    assert metadata["config"]["param_dtype"] == "bfloat16" and metadata["grown_from"]["source"].endswith("run/12")
    expected = flatten(transform.grow(case.tree, PLAN, CONFIG, dtype="bfloat16", **OPTIONS))
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)}
    for name, value in checkpoint.load_paths(tmp_path / "target", list(leaves)).items():
        assert value.tobytes() == np.asarray(expected[name]).tobytes(), name


def test_refuses_paths_that_lie_in_each_other(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(case.source.parent)
    link = tmp_path / "link"
    link.symlink_to(case.source)
    for target, words in ((Path("source"), "same path"), (Path("x/../source"), "same path"), (link, "same path"),
                          (link / "inside", "inside the source"), (case.source.parent, "inside the target"),
                          (case.source.parent / "target", "exists")):
        with pytest.raises(Refused, match=words):
            grow(case.source, target)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(Refused, match="exists"):
        grow(case.source, tmp_path / "dangling")
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="choose a folder that is writable"):
        grow(case.source, tmp_path / "file" / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "link"]


def test_refuses_what_is_no_source(case: Case, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="does not exist"):
        grow(tmp_path / "nothing", tmp_path / "target")
    other = CONFIG.replace(layout="DG*3")
    for name, tree, metadata, words in (
            ("narrow", case.tree, {"config": CONFIG.replace(width=12).to_json()}, r"table has shape \(16, 8\)"),
            ("deep", case.tree, {"config": other.to_json()}, "does not fit its own config"),
            ("lacking", {**case.tree, "statistics": {}}, {"config": CONFIG.to_json()}, "variance_ema is missing")):
        checkpoint.save(tmp_path / name, tree, metadata)
        with pytest.raises(Refused, match=words):
            grow(tmp_path / name, tmp_path / "target")
    with pytest.raises(Refused, match="layout"):
        grow(case.source, tmp_path / "target", plan=identity_plan(other.depth))
    for changes, words in (({"dtype": "float16"}, "bfloat16"), ({"seed": -1}, "seed"), ({"noise_std": -1.0}, "noise")):
        with pytest.raises(Refused, match=words):
            grow(case.source, tmp_path / "target", **changes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "lacking", "narrow"]


def test_names_every_tensor_that_is_not_finite(case: Case, tmp_path: Path) -> None:
    flat = {name: value.copy() for name, value in flatten(case.tree).items()}
    flat["params/segment0/layer1/mlp/up/w"][1, 2, 3] = np.nan
    flat["params/segment0/layer0/halting/embedding"][0, 1] = -np.inf
    checkpoint.save(tmp_path / "source", nest(flat), {"config": CONFIG.to_json()})
    with pytest.raises(Refused) as refused:
        grow(tmp_path / "source", tmp_path / "target")
    assert "params/segment0/layer1/mlp/up/w holds nan at [1, 2, 3]" in str(refused.value)
    assert "params/segment0/layer0/halting/embedding holds -inf at [0, 1]" in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_overflow_of_the_target_is_refused_and_leaves_nothing(case: Case, tmp_path: Path) -> None:
    flat = {name: value.copy() for name, value in flatten(case.tree).items()}
    flat["params/unembedding/w"][1, 2] = np.finfo(np.float32).max  # rounds to infinity in bfloat16
    checkpoint.save(tmp_path / "source", nest(flat), {"config": CONFIG.to_json()})
    with pytest.raises(Refused, match=r"params/unembedding/w would hold inf at \[1, 2\], bfloat16"):
        grow(tmp_path / "source", tmp_path / "target", dtype="bfloat16", memory=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_budget_below_the_chunks_of_the_source_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"embedding/table needs .* bytes\), it is stored in large chunks") as refused:
        grow(case.source, tmp_path / "target", memory=1000)
    least = int(str(refused.value).split("at least ")[1].split()[0])
    grow(case.source, tmp_path / "target", memory=least)
    assert checkpoint.content_hash(tmp_path / "target") == case.hash


def test_a_source_that_cannot_be_read_half_way_keeps_what_is_done(
        case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = SliceReader.read, iter(range(20))

    def read_until(reader: SliceReader, part: Any) -> Any:
        if next(calls, None) is not None:
            return read(reader, part)

        def wait() -> Any:
            raise Damaged(f"{reader.where} cannot be read")

        return wait

    monkeypatch.setattr(SliceReader, "read", read_until)
    with pytest.raises(Damaged):
        grow(case.source, tmp_path / "target")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["target.unfinished"]
    assert grow(case.source, tmp_path / "target", resume=True)["kept"] > 0
    assert checkpoint.content_hash(tmp_path / "target") == case.hash


def test_two_growths_into_one_target(case: Case, tmp_path: Path) -> None:
    with only_writer(tmp_path / "target"), pytest.raises(Refused, match="another process is writing"):
        grow(case.source, tmp_path / "target")
    assert not any(tmp_path.iterdir())


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def where_stored(folder: Path, value: np.ndarray) -> tuple[Path, int]:
    """The file of a checkpoint that holds an array, and where in it."""
    data = np.ascontiguousarray(value).tobytes()
    file = next(file for file in sorted((folder / "state").rglob("*")) if file.is_file() and data in file.read_bytes())
    return file, file.read_bytes().index(data)


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
    with pytest.raises(Damaged, match=f"{source} is not usable: {tensor}{file.relative_to(source)}"):
        grow(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    flip(file, place + 400)  # from a backup
    report = grow(source, tmp_path / "target", resume=by != "file")
    assert report["source_checksums"] and check(tmp_path / "target").damaged == []


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


class Stopped(Exception):
    """Raised by a progress callback: a growth that stops between two source tensors."""


def stop_after(lines: int) -> Any:
    remaining = iter(range(lines))

    def progress(line: str) -> None:
        if next(remaining, None) is None:
            raise Stopped

    return progress


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
    if any(not path.name.endswith(".lock") for path in target.parent.glob(f"{target.name}.*")):
        with pytest.raises(Refused, match="--resume"):
            grow(case.source, target, **QUIET)
    report = grow(case.source, target, memory=SMALL, resume=True, **QUIET)
    assert checkpoint.content_hash(target) == case.quiet_hash
    assert list(target.parent.glob(f"{target.name}.*")) == []
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
    events = sorted({1, 2, 3, 5, *map(int, np.linspace(8, changes - 20, 5)), *range(changes - 8, changes + 1, 2)})
    moments = np.random.default_rng(11).uniform(0.1, 1.0, size=3)
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
        message = f"File too large while writing {target}; make room, then finish with --resume"
        assert (end["status"], end["stderr"]) == (1, f"failed: [Errno 27] {message}\n")
        finish(case, target)
    assert files(case.source) == before
