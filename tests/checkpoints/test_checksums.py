"""A single flipped bit is found, by file and by tensor, in every kind of checkpoint; what was never noted is said."""

import itertools
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gt_jax import describe
from gt_jax.checkpoints import arrays, checkpoint, checksums
from gt_jax.checkpoints.arrays import ArrayFiles
from gt_jax.checkpoints.checksums import Written, combined, joined, noted, sums_of_arrays
from gt_jax.checkpoints.folders import Damaged, publish
from gt_jax.checkpoints.slices import SliceReader
from gt_jax.errors import Failed, Refused

TREE = {"params": {"embedding": {"table": np.arange(600, dtype=np.float32).reshape(20, 30)},
                   "gain": np.ones(3, np.float32)}, "statistics": {"x": np.arange(5)}, "step": 7}
METADATA: dict[str, Any] = {"config": {}, "kind": "train"}


def flip(file: Path, place: int | None = None) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    file.write_bytes(data)


def flip_value(folder: Path, value: np.ndarray) -> Path:
    """One bit of the stored bytes of an array above 1 KiB (smaller ones lie compressed among Orbax's nodes)."""
    data = value.tobytes()
    file = next(file for file in sorted((folder / "state").rglob("*")) if file.is_file() and data in file.read_bytes())
    flip(file, file.read_bytes().index(data) + len(data) // 2)
    return file


def by_arrays(folder: Path, order: list[tuple[int, int]], keep: int) -> dict[str, np.ndarray]:
    """A checkpoint written in pieces; pieces after the `keep`-th are not summed, as if a journal had none of them."""
    stage = folder.with_name(folder.name + ".unfinished")
    values = {"params/w": np.arange(40, dtype=np.float32).reshape(4, 10), "params/scalar": np.asarray(3, np.float32)}
    files = {name: ArrayFiles.of(stage / "state", name, value.shape, value.dtype) for name, value in values.items()}
    written = Written(stage)
    for array in files.values():
        array.create()
    for number, (start, stop) in enumerate(order):
        files["params/w"].write(start, values["params/w"].reshape(-1)[start:stop], written if number < keep else None)
    files["params/scalar"].write(0, values["params/scalar"], written)
    checkpoint.write_metadata(stage, list(values), METADATA)
    checksums.note_checksums(stage, *sums_of_arrays(stage, files, json.loads(json.dumps(written.pieces()))))
    publish(stage, folder)
    return values


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_two_runs_of_bytes_have_the_sum_of_both(a: bytes, b: bytes) -> None:
    assert combined(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


@given(st.binary(min_size=1, max_size=100), st.lists(st.integers(0, 100)), st.randoms())
def test_pieces_in_any_order_join_to_the_whole(data: bytes, cuts: list[int], random: Any) -> None:
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [[begin, end - begin, zlib.crc32(data[begin:end])] for begin, end in itertools.pairwise(edges)]
    random.shuffle(pieces)
    assert joined(pieces) == [[0, len(data), zlib.crc32(data)]]


@settings(max_examples=15, deadline=None)
@given(st.sets(st.integers(1, 39)), st.randoms(), st.integers(0, 40))
def test_what_is_summed_while_it_is_written_is_what_the_files_hold(
        tmp_path_factory: pytest.TempPathFactory, cuts: set[int], random: Any, keep: int) -> None:
    """Chunks of 16 values that stick out, pieces in any order, some of them unknown."""
    folder = tmp_path_factory.mktemp("arrays") / "made"
    edges = sorted({0, 40, *cuts})
    order = list(itertools.pairwise(edges))
    random.shuffle(order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "CHUNK", 64)
        values = by_arrays(folder, order, keep)
    found = noted(folder)
    everything = {str(file.relative_to(folder)): zlib.crc32(file.read_bytes()) for file in folder.rglob("*")
                  if file.is_file() and file.name not in ("checksums.json", "files.json")}
    assert found.files == everything
    assert found.tensors == {name: zlib.crc32(value.tobytes()) for name, value in values.items()}
    for name, value in values.items():
        assert (checkpoint.load_paths(folder, [name])[name] == value).all()


def test_a_save_notes_every_file_and_every_tensor_of_the_model(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "model", TREE, METADATA)
    assert noted(tmp_path / "model").tensors == {
        "params/embedding/table": zlib.crc32(TREE["params"]["embedding"]["table"].tobytes()),  # type: ignore[index]
        "params/gain": zlib.crc32(np.ones(3, np.float32).tobytes()),
        "statistics/x": zlib.crc32(np.arange(5).astype(checkpoint.describe(tmp_path / "model")[0]["statistics/x"].dtype)
                                   .tobytes())}


def test_who_reads_slices_or_leaves_hears_which_tensor_and_file(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "model", TREE, METADATA)
    leaves, _ = checkpoint.describe(tmp_path / "model")
    file = flip_value(tmp_path / "model", TREE["params"]["embedding"]["table"])  # type: ignore[index]
    name = file.relative_to(tmp_path / "model")
    words = f"params/embedding/table has other values than were written; damaged: {name}"
    with pytest.raises(Damaged, match=words):
        SliceReader(tmp_path / "model", leaves).digest("params/embedding/table")
    with pytest.raises(Damaged, match=words):
        checkpoint.read_leaves(tmp_path / "model", leaves)
    SliceReader(tmp_path / "model", leaves).digest("params/gain")
    abstract = {"params": {"embedding": {"table": leaves["params/embedding/table"]}}}
    for load in (lambda: checkpoint.load(tmp_path / "model"), lambda: checkpoint.load(tmp_path / "model", abstract),
                 lambda: checkpoint.load_paths(tmp_path / "model", ["params/embedding/table"])):
        with pytest.raises(Damaged, match=words):
            load()
    assert checkpoint.load_paths(tmp_path / "model", ["params/gain"])


def check(capsys: pytest.CaptureFixture[str], path: Path) -> str:
    assert describe.main([str(path), "--check"]) == 0
    return capsys.readouterr().out


def test_check_says_that_all_is_as_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path / "run" / "3", TREE, METADATA)
    by_arrays(tmp_path / "made", [(0, 40)], 1)
    for path in (tmp_path / "run", tmp_path / "run" / "3", tmp_path / "made"):
        said = check(capsys, path)
        assert said.startswith(f"{path}: ") and said.endswith("all as they were written\n") and said.count("\n") == 1
    assert describe.main([str(tmp_path / "run"), "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["damaged"] == []


def test_check_finds_a_flipped_bit_in_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path / "run" / "3", TREE, METADATA)
    by_arrays(tmp_path / "made", [(0, 40)], 1)
    for place in (tmp_path / "run" / "3", tmp_path / "made"):
        for file in sorted(place.rglob("*")):
            if not file.is_file() or not file.stat().st_size or file.name == "checksums.json":
                continue
            whole = file.read_bytes()
            flip(file)
            with pytest.raises(Failed) as failed:
                describe.main([str(place), "--check"])
            named = [line for line in str(failed.value).splitlines()[1:] if str(file) in line]
            assert named or file.name == "files.json", (file, failed.value)
            if file.parent.name == "params.w":
                assert named == [f"  - {file} (params/w)"]
            file.write_bytes(whole)
    check(capsys, tmp_path / "run")
    file = flip_value(tmp_path / "run" / "3", TREE["params"]["embedding"]["table"])  # type: ignore[index]
    (tmp_path / "run" / "3" / "commit_success.txt").unlink()
    with pytest.raises(Failed) as failed:  # all at once, and of a run every step
        describe.main([str(tmp_path / "run"), "--check"])
    assert str(failed.value).splitlines() == [
        f"{tmp_path / 'run'} is damaged:", f"  - {tmp_path / 'run' / '3' / 'commit_success.txt'}",
        f"  - {file} (params/embedding/table)"]


def test_check_says_where_there_are_no_checksums(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "model", TREE, METADATA)
    shutil.copytree(tmp_path / "model", tmp_path / "older")
    sizes = json.loads((tmp_path / "older" / "files.json").read_text())
    (tmp_path / "older" / "checksums.json").unlink()
    with pytest.raises(Failed, match=r"older/checksums\.json"):  # it had some
        describe.main([str(tmp_path / "older"), "--check"])
    del sizes["checksums.json"]
    (tmp_path / "older" / "files.json").write_text(json.dumps(sizes))
    with pytest.raises(Refused, match=r"has no checksums .* nothing says whether a bit has changed"):
        describe.main([str(tmp_path / "older"), "--check"])
    with pytest.raises(Refused, match="does not exist"):
        describe.main([str(tmp_path / "nothing"), "--check"])


def test_checksums_by_file_alone_are_read_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As they were before tensors were noted."""
    checkpoint.save(tmp_path / "model", TREE, METADATA)
    file = tmp_path / "model" / "checksums.json"
    flat = json.loads(file.read_text())["files"]
    file.write_text(json.dumps(flat))
    assert noted(tmp_path / "model") == (flat, {}) and noted(tmp_path / "model").by_file_alone
    sizes = json.loads((tmp_path / "model" / "files.json").read_text())
    (tmp_path / "model" / "files.json").write_text(json.dumps({**sizes, "checksums.json": file.stat().st_size}))
    check(capsys, tmp_path / "model")
    damaged = flip_value(tmp_path / "model", TREE["params"]["embedding"]["table"])  # type: ignore[index]
    with pytest.raises(Failed, match=str(damaged)):
        describe.main([str(tmp_path / "model"), "--check"])
    table = "params/embedding/table"
    leaves, _ = checkpoint.describe(tmp_path / "model")
    for read in (lambda: checkpoint.load(tmp_path / "model"), lambda: checkpoint.content_hash(tmp_path / "model"),
                 lambda: checkpoint.load(tmp_path / "model", {"params": {"embedding": {"table": leaves[table]}}}),
                 lambda: checkpoint.load_paths(tmp_path / "model", [table])):
        with pytest.raises(Damaged, match=f"{damaged.name} holds other bytes than were written"):
            read()


def test_a_changed_bit_of_the_checksums_themselves_is_found(tmp_path: Path) -> None:
    """In a name too: nothing would be compared with the tensor, or file, that has it."""
    file = tmp_path / "checksums.json"
    checksums.note_checksums(tmp_path, {"params/w": 12, "params/gain": 345}, {"state/d/0": 6})
    whole = file.read_bytes()
    found = noted(tmp_path)
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        with pytest.raises(Damaged, match="checksums cannot be read"):
            noted(tmp_path)
    file.write_text(json.dumps(found._asdict()))  # as it was before it had one of its own
    assert noted(tmp_path) == found


def test_what_says_what_a_checkpoint_is_is_compared_by_whoever_opens_it(tmp_path: Path) -> None:
    """A config or lineage with another number is still JSON, and no tensor's checksum knows of it."""
    checkpoint.save(tmp_path / "model", TREE, {**METADATA, "config": {"k_max": 4}})
    by_arrays(tmp_path / "made", [(0, 40)], 1)
    for folder in (tmp_path / "model", tmp_path / "made"):
        files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.stat().st_size
                 and file.parent.name != "d" and file.name.split(".")[0] != "c"]
        assert {"_CHECKPOINT_METADATA", "_METADATA", "checksums.json", "files.json"} < {file.name for file in files}
        for file in files:
            whole = file.read_bytes()
            flip(file)
            for read in (checkpoint.describe, checkpoint.load):
                with pytest.raises(Damaged):
                    read(folder)
            file.write_bytes(whole)
    file = tmp_path / "model" / "_CHECKPOINT_METADATA"
    file.write_text(file.read_text().replace('"k_max": 4', '"k_max": 5'))
    with pytest.raises(Damaged, match="_CHECKPOINT_METADATA holds other bytes than were written"):
        checkpoint.load(tmp_path / "model")
