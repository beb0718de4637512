"""Checkpoints: what is saved comes back exactly, half of one is never taken for one, and nothing is overwritten."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from gt_jax.checkpoints import checkpoint, orbax_store
from gt_jax.checkpoints.arrays import ArrayFiles
from gt_jax.checkpoints.folders import Damaged
from gt_jax.checkpoints.runs import RunCheckpoints
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs import presets
from gt_jax.errors import Refused
from tests.rarely import rarely

CONFIG = presets.tiny().replace(width=8, vocab=16)
METADATA = {"config": CONFIG.to_json(), "kind": "train", "step": 3, "data": {"position": [1, 2], "epoch": None}}


class Counts(NamedTuple):
    first: Any
    second: Any


def model_tree(value: float = 0.0) -> dict[str, Any]:
    """The outline of a model: bfloat16, float32, integers, 0-d."""
    layers = {f"layer{slot}": {"gain": np.full((2,), value, np.float32), "w": jnp.full((2, 3, 5), value, jnp.bfloat16)}
              for slot in range(4)}
    table = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32) + np.float32(value)
    statistics = {"segment0": {"layer3": {"variance_ema": np.arange(2, dtype=np.float32)}}}
    return {"params": {"embedding": {"table": table}, "segment0": layers}, "statistics": statistics}


def same(left: Any, right: Any) -> bool:
    """Equal structure, dtypes, shapes and bits."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return jax.tree.structure(left) == jax.tree.structure(right) and all(
        np.asarray(a).dtype == np.asarray(b).dtype and np.asarray(a).shape == np.asarray(b).shape
        and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "model", model_tree(), METADATA)
    return tmp_path / "model"


def test_numpy_round_trip_with_metadata(saved: Path) -> None:
    assert same(checkpoint.load(saved), jax.tree.map(np.asarray, model_tree()))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(checkpoint.load(saved)))
    leaves, metadata = checkpoint.describe(saved)
    assert metadata == METADATA
    assert leaves == {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                      for name, leaf in sorted(flatten(model_tree()).items())}


def test_opens_with_the_ordinary_call_of_orbax(saved: Path) -> None:
    stand_ins = jax.tree.map(np.asarray, model_tree())
    assert same(ocp.load(saved, stand_ins), stand_ins)
    assert ocp.metadata(saved).custom_metadata == METADATA


def test_training_tree_keeps_its_structure(tmp_path: Path) -> None:
    """Named tuples, tuples, empty optimizer states, None, 0-d arrays and Python numbers."""
    params = {"w": jnp.ones((4, 3), jnp.bfloat16), "b": jnp.zeros(())}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3), optax.scale(2.0)).init(params)
    tree = {"params": params, "optimizer": optimizer, "step": jnp.int32(7), "flag": np.bool_(True), "rate": 0.5,
            "pair": (Counts(np.int64(2**40), {}), [None, np.zeros((1, 3), np.float16)])}
    checkpoint.save(tmp_path / "c", tree, METADATA)
    wanted = jax.tree.map(np.asarray, {**tree, "rate": np.float32(0.5)})
    assert same(checkpoint.load(tmp_path / "c", wanted), wanted)
    assert any(isinstance(state, optax.EmptyState) for state in checkpoint.load(tmp_path / "c", wanted)["optimizer"])


def test_restores_onto_a_mesh(tmp_path: Path) -> None:
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    tree = {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8), NamedSharding(mesh, P("fsdp", "tensor"))),
            "b": jax.device_put(jnp.arange(8, dtype=jnp.bfloat16), NamedSharding(mesh, P()))}
    checkpoint.save(tmp_path / "c", tree, METADATA)
    other = jax.make_mesh((8,), ("data",))
    abstract = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(other, P(None, "data"))),
                "b": jax.ShapeDtypeStruct((8,), jnp.bfloat16)}
    loaded = checkpoint.load(tmp_path / "c", abstract)
    assert loaded["w"].sharding.is_equivalent_to(abstract["w"].sharding, 2)
    assert isinstance(loaded["b"], jax.Array) and len(loaded["b"].devices()) == 1
    assert same(jax.tree.map(np.asarray, loaded), jax.tree.map(np.asarray, tree))
    assert same(checkpoint.load(tmp_path / "c"), jax.tree.map(np.asarray, tree))


def test_partial_loading(saved: Path) -> None:
    name = "params/segment0/layer1/w"
    assert list(checkpoint.load_paths(saved, [name])) == [name]
    table = {"params": {"embedding": {"table": jax.ShapeDtypeStruct((16, 8), np.float32)}}}
    loaded = checkpoint.load(saved, table)
    assert same(np.asarray(loaded["params"]["embedding"]["table"]), model_tree()["params"]["embedding"]["table"])
    with pytest.raises(Refused, match=r"params/nothing is not in the checkpoint"):
        checkpoint.load_paths(saved, [name, "params/nothing"])


def test_one_process_of_several_may_load_paths_alone(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax waits at every load for all processes; the end of a growth looks at the child in the first one."""
    wanted = flatten(jax.tree.map(np.asarray, checkpoint.load(saved)))

    def waits_for_ever(*_: Any, **__: Any) -> None:
        raise AssertionError("a load of Orbax waits for the other processes")

    monkeypatch.setattr(orbax_store.ocp, "load", waits_for_ever)
    found = checkpoint.load_paths(saved, wanted)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes()


def test_all_mismatches_are_listed_at_once(saved: Path) -> None:
    wanted = {"params": {"embedding": {"table": jax.ShapeDtypeStruct((16, 9), np.float32)},
                         "segment0": {"layer0": {"w": jax.ShapeDtypeStruct((2, 3, 5), np.float32)}},
                         "other": jax.ShapeDtypeStruct((), np.float32)}}
    with pytest.raises(Refused) as refused:
        checkpoint.load(saved, wanted)
    for part in ("table is float32[16, 8] in the checkpoint, float32[16, 9] here", "bfloat16[2, 3, 5]", "params/other"):
        assert part in str(refused.value)


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rng is a random key(.|\n)*text is a str(.|\n)*none.* has no elements"):
        tree = {"rng": jax.random.key(0), "text": "x", "void": {"none": np.zeros((0, 3))}}
        checkpoint.save(tmp_path / "c", tree, METADATA)
    with pytest.raises(ValueError, match="free of '/'"):
        checkpoint.save(tmp_path / "c", {"a/b": np.zeros(1)}, METADATA)
    with pytest.raises(TypeError, match="JSON"):
        checkpoint.save(tmp_path / "c", {"a": np.zeros(1)}, {"config": np.zeros(1)})
    assert not any(tmp_path.iterdir())


def test_refuses_an_existing_path_and_leaves_it_alone(saved: Path) -> None:
    before = checkpoint.content_hash(saved)
    with pytest.raises(Refused, match="exists"):
        checkpoint.save(saved, model_tree(1.0), METADATA)
    assert checkpoint.content_hash(saved) == before


def test_refuses_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="choose a folder that is writable"):
        checkpoint.save(tmp_path / "file" / "model", model_tree(), METADATA)


def test_refuses_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o500)
    if os.geteuid() == 0:  # root may write anywhere but on a read-only file system: the answer is that of one
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(Refused, match="not writable"):
        checkpoint.save(tmp_path / "model", model_tree(), METADATA)


@pytest.mark.parametrize("removed", ["_CHECKPOINT_METADATA", "orbax.checkpoint", "state/_METADATA",
                                     "state/manifest.ocdbt", "state"])
def test_half_a_checkpoint_is_refused(saved: Path, removed: str) -> None:
    path = saved / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(Damaged, match="half a checkpoint, without"):
        checkpoint.load(saved)


def test_damaged_files_are_refused_by_name(saved: Path) -> None:
    for text in ("{", "[" * 100_000):
        (saved / "state" / "_METADATA").write_text(text)
        with pytest.raises(Damaged, match=r"model is not usable: its metadata cannot be read"):
            checkpoint.describe(saved)


def test_truncated_values_are_refused(saved: Path) -> None:
    truncate_values(saved)
    with pytest.raises(Damaged, match=r"state/.* has \d+ bytes instead of \d+"):
        checkpoint.load(saved)
    next((saved / "state").rglob("d/*")).unlink()
    with pytest.raises(Damaged, match=r"state/.* is missing"):
        checkpoint.load(saved)


def test_garbled_values_are_refused(saved: Path) -> None:
    """Files of the right size but of other content; what Orbax and TensorStore print about it stays unheard."""
    leaves, _ = checkpoint.describe(saved)
    for file in (saved / "state").rglob("d/*"):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(Damaged, match="cannot be read: "):
        checkpoint.describe(saved)
    with pytest.raises(Damaged, match="cannot be read: "):
        checkpoint.read_leaves(saved, leaves)


def truncate_values(path: Path) -> None:
    for file in (path / "state").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)


def test_resolve_names_what_is_there_instead(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("")
    (tmp_path / "grown.unfinished").mkdir()
    (tmp_path / "grown.unfinished" / "journal.0.jsonl").write_text("")
    (tmp_path / "saved.unfinished.tmp").mkdir()
    ocp.save(tmp_path / "foreign", {"a": np.zeros(1)})
    for name, words in {"absent": "does not exist", "empty": "is an empty folder", "file": "is a file",
                        "other": "neither a checkpoint nor steps", "foreign": "has no gt_jax metadata",
                        "saved": r"saved\.unfinished\.tmp was interrupted", "grown": "--resume",
                        "grown.unfinished": "interrupted"}.items():
        with pytest.raises(Refused, match=words):
            checkpoint.resolve(tmp_path / name)


def test_load_model(saved: Path, tmp_path: Path) -> None:
    loaded, params, statistics, metadata = checkpoint.load_model(saved)
    assert loaded == CONFIG and metadata == METADATA
    assert same({"params": params, "statistics": statistics}, jax.tree.map(np.asarray, model_tree()))
    for name, changes, words in (("unknown", {"colour": 1}, "unknown field 'colour'"),
                                 ("other", {"width": 12, "layout": "DDDG*3"}, r"\(16, 12\)(.|\n)*layer3/gain")):
        changed = {**METADATA, "config": {**CONFIG.to_json(), **changes}}
        checkpoint.save(tmp_path / name, model_tree(), changed)
        with pytest.raises(Refused, match=words):
            checkpoint.load_model(tmp_path / name)


def test_content_hash_sees_values_not_layout(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = model_tree()
    with monkeypatch.context() as other:
        other.setattr(orbax_store, "_context", lambda database: ocp.Context())  # compressed, in other files
        checkpoint.save(tmp_path / "compressed", jax.tree.map(np.asarray, tree), METADATA)
    plain = tmp_path / "plain"
    for name, leaf in flatten(tree).items():
        files = ArrayFiles.of(tmp_path / "made" / "state", name, leaf.shape, np.dtype(leaf.dtype))
        files.create()
        files.write(0, np.asarray(leaf))
    checkpoint.write_metadata(tmp_path / "made", list(flatten(tree)), METADATA)
    checkpoint.publish(tmp_path / "made", plain)
    expected = checkpoint.content_hash(saved)
    assert checkpoint.content_hash(tmp_path / "compressed") == checkpoint.content_hash(plain) == expected
    assert checkpoint.describe(plain)[1] == METADATA
    tree["params"]["segment0"]["layer2"]["gain"][1] = np.nextafter(np.float32(0), np.float32(1))
    checkpoint.save(tmp_path / "changed", {**tree, "step": 1}, METADATA)
    assert checkpoint.content_hash(tmp_path / "changed") != expected
    only = [checkpoint.content_hash(path, under=["statistics"]) for path in (saved, tmp_path / "changed")]
    assert only[0] == only[1] != expected


def test_run_keeps_the_newest_steps(tmp_path: Path) -> None:
    run = RunCheckpoints(tmp_path / "run", keep=2)
    assert run.steps() == [] and run.latest() is None and run.restore_latest(model_tree()) is None
    for step in (5, 10, 100):
        run.save(step, model_tree(step), METADATA)
    assert run.steps() == [10, 100] and run.latest() == 100
    assert sorted(path.name for path in run.root.iterdir()) == ["10", "100"]
    assert checkpoint.resolve(run.root) == run.root / "100"
    tree, metadata = run.restore(10, jax.tree.map(np.asarray, model_tree()))
    assert metadata["step"] == 10 and same(tree, jax.tree.map(np.asarray, model_tree(10)))
    with pytest.raises(Refused, match="exists"):
        run.save(100, model_tree(), METADATA)
    with pytest.raises(Refused, match="at least one"):
        RunCheckpoints(tmp_path, keep=0)


def test_run_passes_over_damaged_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warnings: list[str] = []
    run = RunCheckpoints(tmp_path, keep=4, warn=warnings.append)
    for step in (1, 2, 3):
        run.save(step, model_tree(step), METADATA)
    (tmp_path / "9.unfinished").mkdir()
    (tmp_path / "3" / "_CHECKPOINT_METADATA").unlink()
    assert run.latest() == 2 and run.steps() == [1, 2]
    assert len(warnings) == 1 and "step 3" in warnings[0] and "step 2 is used" in warnings[0]
    assert checkpoint.resolve(tmp_path).name == "2"  # as a command that only reads does; it says so, once
    assert checkpoint.resolve(tmp_path).name == "2" and capsys.readouterr().err == f"{warnings[0]}\n"
    truncate_values(tmp_path / "2")
    assert run.latest() == 1
    warnings.clear()
    restored = run.restore_latest(jax.tree.map(np.asarray, model_tree()))
    assert restored is not None and restored[0] == 1 and restored[2]["step"] == 1
    assert len(warnings) == 2 and "bytes instead of" in warnings[1] and "2.damaged" in warnings[1]
    run.save(2, model_tree(2), METADATA)  # the resumed run comes past again
    assert run.steps() == [1, 2] and not (tmp_path / "9.unfinished").exists()


@pytest.mark.parametrize("then", [
    None, ValueError("the values are not where its metadata says"),
    rarely(OSError(5, "?")),
])  # fmt: skip
def test_ctrl_c_while_a_step_is_read_makes_no_damaged_step_of_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: Exception | None) -> None:
    """Orbax swallows the interrupt of its event loop, and finds nothing: the step is whole, and stays the newest."""
    run = RunCheckpoints(tmp_path, keep=2)
    for step in (1, 2):
        run.save(step, {"x": np.zeros(2, np.float32)}, METADATA)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where it is ignored

    def swallows(path: Path) -> Any:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        if then is not None:
            raise then
        return found(path)

    found = ocp.metadata
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ocp, "metadata", swallows)
            run.restore_latest({"x": np.zeros(2, np.float32)})
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.steps() == [1, 2] and sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_a_run_of_damaged_steps_only_is_refused(tmp_path: Path) -> None:
    run = RunCheckpoints(tmp_path)
    run.save(1, model_tree(), METADATA)
    truncate_values(tmp_path / "1")
    for _ in range(2):  # nothing is set aside: a second try must not begin the run anew
        with pytest.raises(Damaged, match="no step of the run"):
            run.restore_latest(jax.tree.map(np.asarray, model_tree()))
    assert os.listdir(tmp_path) == ["1"]
    with pytest.raises(Damaged, match="no step of this run is complete"):
        run.latest()


def test_a_changed_byte_in_any_file_of_the_newest_step_is_found(tmp_path: Path) -> None:
    """TensorStore reads it without a word where it is a value's. The step is named, the one before it is used."""
    warnings: list[str] = []
    run, random = RunCheckpoints(tmp_path, warn=warnings.append), np.random.default_rng(0)
    stand_ins, newest = jax.tree.map(np.asarray, model_tree()), tmp_path / "2"
    for step in (1, 2):
        run.save(step, model_tree(step), METADATA)
    there = [file for file in newest.rglob("*") if file.is_file() and file.stat().st_size]
    files = sorted(str(file.relative_to(newest)) for file in there)
    assert any(name.startswith("state/d/") for name in files) and "state/ocdbt.process_0/manifest.ocdbt" in files
    for name in files:
        whole = (newest / name).read_bytes()
        place = int(random.integers(len(whole)))
        (newest / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1 << int(random.integers(8))])
                                    + whole[place + 1:])
        warnings.clear()
        restored = run.restore_latest(stand_ins)
        assert restored is not None and restored[0] == 1 and same(restored[1], jax.tree.map(np.asarray, model_tree(1)))
        assert len(warnings) == 1 and f"{newest} " in warnings[0] and "step 1 is used" in warnings[0], name
        if name.startswith("state/d/"):
            assert f"{name} holds other bytes" in warnings[0]
        os.rename(tmp_path / "2.damaged", newest)
        (newest / name).write_bytes(whole)
    assert run.restore_latest(stand_ins)[0] == 2  # type: ignore[index]


CHILD = """
import resource, sys, time
import numpy as np
from gt_jax.checkpoints.runs import RunCheckpoints
run = RunCheckpoints(sys.argv[1], keep=2)
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
print("ready", flush=True)
for step in range(1, 400):
    run.save(step, {"w": np.full((64, 64), step, np.float32)}, {"config": {}, "kind": "train"})
    print(step, flush=True)
"""


def child(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.31, 0.47])
def test_killed_while_saving(tmp_path: Path, delay: float) -> None:
    """After kill -9 every step that was reported is there or was replaced by a newer one, and each is whole."""
    with child(str(tmp_path)) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        assert process.stdout.readline() == "1\n"  # however busy the machine is, one is there
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        reported = [1, *(int(line) for line in process.stdout.read().split())]
    run = RunCheckpoints(tmp_path)
    latest = run.latest()
    assert latest is not None and latest >= max(reported)
    for step in run.steps():
        assert (checkpoint.load(tmp_path / str(step))["w"] == step).all()
    run.save(500, {"w": np.zeros(1)}, {"config": {}})
    assert run.steps() == [latest, 500]
    assert all(path.name.isdecimal() for path in tmp_path.iterdir())


def test_full_disk_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a disk without space; it holds for a whole process."""
    with child(str(tmp_path), "limit") as process:
        _, message = process.communicate()
    assert process.returncode == 1
    assert "OSError: [Errno 27] File too large while writing" in message and "nothing is left there" in message
    assert not any(tmp_path.iterdir())


def test_only_a_run_itself_saves_a_step_in_it(tmp_path: Path) -> None:
    """What somebody else puts there would be taken for the newest one."""
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(Refused, match=f"{tmp_path / '900'} would be taken for a step of the run {tmp_path}"):
        checkpoint.save(tmp_path / "900", model_tree(), {**METADATA, "kind": "grow"})
    checkpoint.save(tmp_path / "900", model_tree(), METADATA)
    checkpoint.save(tmp_path / "grown", model_tree(), {**METADATA, "kind": "grow"})


def test_too_few_open_files_are_no_damage(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax finds no values then, and only logs why; the loop that it cannot make fails in every method."""
    monkeypatch.setattr(orbax_store, "_files_allowed", lambda: 12)
    monkeypatch.setattr(orbax_store.ocp, "metadata", lambda path: SimpleNamespace(metadata=None))
    with pytest.raises(OSError, match=r"too many open files \(this process may have 12; ulimit -n 256 raises that\)"):
        checkpoint.describe(saved)


def test_metadata_is_plain_json_on_disk(saved: Path) -> None:
    assert json.loads((saved / "_CHECKPOINT_METADATA").read_text())["custom_metadata"] == METADATA


