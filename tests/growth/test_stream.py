"""Checkpoint to checkpoint: the same bytes as the pure transform, whatever the budget; what does not fit is refused."""

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.folders import Damaged
from gt_jax.checkpoints.lock import only_writer
from gt_jax.checkpoints.slices import SliceReader
from gt_jax.checkpoints.tree_paths import flatten, nest
from gt_jax.errors import Failed, Refused
from gt_jax.growth import stream, transform
from gt_jax.growth.plan import Plan, identity_plan
from gt_jax.growth.unfinished import UnfinishedGrowth
from tests.growth.stream_case import CONFIG, COUNTS, OPTIONS, PLAN, SMALL, Case, files, grow

pytestmark = pytest.mark.usefixtures("small_and_once")


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
        grow(tmp_path / "source", tmp_path / "new" / "deep" / "target")
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
    read, unfinished = SliceReader.read, UnfinishedGrowth(tmp_path / "target")

    def read_until(reader: SliceReader, part: Any) -> Any:
        if not unfinished.finished():
            return read(reader, part)

        def wait() -> Any:
            raise Damaged(f"{reader.where} cannot be read")

        return wait

    monkeypatch.setattr(SliceReader, "read", read_until)
    with pytest.raises(Failed, match=r"cannot be read; what was made .* is kept in .*target\.unfinished: .* --resume"):
        grow(case.source, tmp_path / "target", memory=SMALL)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["target.unfinished"]
    assert grow(case.source, tmp_path / "target", resume=True)["kept"] > 0
    assert checkpoint.content_hash(tmp_path / "target") == case.hash


def test_two_growths_into_one_target(case: Case, tmp_path: Path) -> None:
    with only_writer(tmp_path / "target"), pytest.raises(Refused, match="another process is writing"):
        grow(case.source, tmp_path / "target")
    assert not any(tmp_path.iterdir())
