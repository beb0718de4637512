"""The target is there whole or not at all, whatever is killed; and little memory is held."""

import functools
import json
import os
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from gt_jax import describe
from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.check import check
from gt_jax.checkpoints.checksums import noted
from gt_jax.checkpoints.folders import Damaged
from gt_jax.checkpoints.lock import only_writer
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs.model import EmbeddingConfig
from gt_jax.errors import Failed, Refused
from gt_jax.interop import expected_tensors, tensor_files, to_orbax, to_safetensors
from gt_jax.interop.safetensors import SafetensorsFile, _header
from gt_jax.interop.shards import Source
from gt_jax.interop.tensor_files import Unreadable
from tests.interop import killed_conversion, origin
from tests.interop.origin import CONFIG, OVERRIDES


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(source file, its conversion)."""
    folder = tmp_path_factory.mktemp("case")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expected_tensors, "model_leaves", origin.contract)
        source = origin.write(folder / "source.safetensors", origin.state())
        to_orbax.to_orbax([source], folder / "ours", overrides=OVERRIDES)
    return source, folder / "ours"


@pytest.fixture(scope="module")
def ended(tmp_path_factory, case):
    """How the conversions of `killed_conversion` ended, and the folder they wrote to."""
    folder, job = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("job") / "job.json"
    job.write_text(json.dumps({"folder": str(folder), "source": str(case[0]), "ours": str(case[1])}))
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, killed_conversion.__file__, str(job)], capture_output=True, text=True,
                          timeout=500, env=environment, check=True)
    return folder, json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_killed_anywhere_the_target_is_not_there_and_the_next_try_succeeds(case, ended, to):
    folder, said = ended[0], ended[1][to]
    assert said["counted"]["status"] == 0 and said["counted"]["stderr"] == ""
    assert [(kill["status"], kill["there"]) for kill in said["kills"]] == [(-9, False)] * len(said["kills"])
    assert said["last"]["status"] == 0 and said["last"]["stderr"] == ""
    assert not any(name.startswith(f"{to}.") for name in said["last"]["left"])
    if to == "orbax":
        a, b = flatten(checkpoint.load(folder / to)), flatten(checkpoint.load(case[1]))
        assert a.keys() == b.keys() and all(a[path].tobytes() == b[path].tobytes() for path in a)
    else:
        a, b = Source([folder / to]), Source([case[0]])
        assert a.tensors == b.tensors and all(a.read(name).tobytes() == b.read(name).tobytes() for name in a.tensors)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_a_full_disk_is_one_line_and_leaves_nothing(ended, to):
    full = ended[1][to]["full"]
    assert full["status"] == 1 and full["stderr"].startswith("failed: ") and "File too large" in full["stderr"]
    assert "do it again" in full["stderr"]
    assert full["stderr"].count("\n") == 1 and not any(name.startswith(to) for name in full["left"])


def test_two_writers_and_a_target_that_appears(tmp_path, case):
    with only_writer(tmp_path / "target"):
        for convert in (lambda: to_orbax.to_orbax([case[0]], tmp_path / "target", overrides=OVERRIDES),
                        lambda: to_safetensors.to_safetensors(case[1], tmp_path / "target")):
            with pytest.raises(Refused, match="another process"):
                convert()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(Refused, match="exists"):
        to_orbax.to_orbax([case[0]], tmp_path / "dangling")


def test_a_file_that_another_program_writes_meanwhile_is_not_replaced(tmp_path, case, monkeypatch):
    monkeypatch.setattr(expected_tensors, "model_leaves", origin.contract)
    target, written = tmp_path / "new" / "theirs.safetensors", to_safetensors._write

    def write(*arguments):
        written(*arguments)
        target.write_text("a download")

    monkeypatch.setattr(to_safetensors, "_write", write)
    with pytest.raises(Refused, match=r"theirs\.safetensors has come meanwhile, and is left as it is"):
        to_safetensors.to_safetensors(case[1], target)
    assert target.read_text() == "a download" and os.listdir(target.parent) == ["theirs.safetensors"]


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def where_stored(files, value):
    """The file that holds an array's bytes, and where."""
    data = value.tobytes()
    file = next(file for file in files if file.is_file() and data in file.read_bytes())
    return file, file.read_bytes().index(data)


def test_what_was_converted_has_checksums_and_a_flipped_bit_is_found(tmp_path, case, monkeypatch):
    """In, out and in again; a bit in each of the two that we have written."""
    monkeypatch.setattr(expected_tensors, "model_leaves", origin.contract)
    ours, said = tmp_path / "ours", []
    shutil.copytree(case[1], ours)
    assert check(ours).damaged == [] and noted(ours).tensors.keys() == checkpoint.describe(ours)[0].keys()
    report = to_safetensors.to_safetensors(ours, tmp_path / "back.safetensors")
    assert report["source_checksums"] and describe.main([str(tmp_path / "back.safetensors"), "--check"]) == 0
    again = to_orbax.to_orbax([tmp_path / "back.safetensors"], tmp_path / "again", progress=said.append)
    assert again["source_checksums"] and not any("no checksums" in line for line in said)
    foreign = tmp_path / "foreign.safetensors"
    header, start = _header(case[0], case[0].stat().st_size)
    del header["__metadata__"]
    text = json.dumps(header).encode()
    foreign.write_bytes(len(text).to_bytes(8, "little") + text + case[0].read_bytes()[start:])
    report = to_orbax.to_orbax([foreign], tmp_path / "third", overrides=OVERRIDES, progress=said.append)
    assert not report["source_checksums"] and any("no checksums" in line for line in said)
    with pytest.raises(Refused, match=r"foreign\.safetensors has no checksums"):
        describe.main([str(foreign), "--check"])

    path = "params/embedding/kronecker/w"
    value = checkpoint.load_paths(ours, [path])[path]
    file, place = where_stored(sorted((ours / "state").rglob("*")), value[0, 0])
    flip(file, place + 2)
    with pytest.raises(Damaged, match=f"{path} has other values than were written; damaged: {file.relative_to(ours)}"):
        to_safetensors.to_safetensors(ours, tmp_path / "worse.safetensors")
    assert check(ours).damaged == [{"file": str(file), "tensors": [path]}]
    name = next(name for name, info in SafetensorsFile(tmp_path / "back.safetensors").tensors.items()
                if np.prod(info.shape) > 64)
    value = SafetensorsFile(tmp_path / "back.safetensors").read(name).reshape(-1)[:32]
    flip(*where_stored([tmp_path / "back.safetensors"], value))
    with pytest.raises(Unreadable, match=f"back.safetensors is damaged: {name} has other values"):
        to_orbax.to_orbax([tmp_path / "back.safetensors"], tmp_path / "fourth")
    with pytest.raises(Failed, match=name):
        describe.main([str(tmp_path / "back.safetensors"), "--check"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again", "back.safetensors", "foreign.safetensors", "ours", "third"]


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_what_somebody_else_has_given_the_unfinished_name_stays(tmp_path, case, monkeypatch, to):
    monkeypatch.setattr(expected_tensors, "model_leaves", origin.contract)
    if to == "orbax":
        mine = tmp_path / "target.converting" / "chapter1.txt"
        mine.parent.mkdir()
    else:
        mine = tmp_path / "target.unfinished"
    mine.write_text("months of work")
    with pytest.raises(Refused, match="the conversion to target needs that name"):
        if to == "orbax":
            to_orbax.to_orbax([case[0]], tmp_path / "target", overrides=OVERRIDES)
        else:
            to_safetensors.to_safetensors(case[1], tmp_path / "target")
    assert mine.read_text() == "months of work" and len(list(tmp_path.iterdir())) == 1


def test_the_name_of_a_converted_file_is_on_the_disk(tmp_path, case, monkeypatch):
    events, fsync, link = [], os.fsync, os.link
    monkeypatch.setattr(expected_tensors, "model_leaves", origin.contract)
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), events.append(os.readlink(f"/proc/self/fd/{file}"))))
    monkeypatch.setattr(os, "link", lambda a, b: (link(a, b), events.append(f"{a} to {b}")))
    to_safetensors.to_safetensors(case[1], tmp_path / "target")
    target = tmp_path / "target"
    assert events == [f"{target}.unfinished", f"{target}.unfinished to {target}", str(tmp_path)]


def test_memory_is_bounded_by_groups_and_the_largest_leaf(tmp_path, monkeypatch):
    limit = 2_000_000
    small = functools.partial(tensor_files.groups, limit=limit)
    for module in (to_orbax, to_safetensors):
        monkeypatch.setattr(module, "groups", small)
    config = CONFIG.plain.replace(
        layout="D,D,D", width=128, embedding=EmbeddingConfig("table"), gsa=None, hyper=None, mtp=None, memory=None,
        moe=CONFIG.moe.replace(experts=16, expert_width=1024))
    state = {name: np.zeros(shape, np.float32) for name, shape in origin.shapes(config).items()}
    total = sum(value.nbytes for value in state.values())
    source = origin.write(tmp_path / "a.safetensors", state)
    del state
    largest = 16 * 128 * 1024 * 4
    bound = largest + limit + 4_000_000  # the last is Python's own: names, metadata, Orbax's objects
    assert total > 3 * bound
    for work in (lambda: to_orbax.to_orbax([source], tmp_path / "ours", overrides={"layout": "D,D,D"}),
                 lambda: to_safetensors.to_safetensors(tmp_path / "ours", tmp_path / "b.safetensors")):
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < bound, (peak, bound)
