"""The target is there whole or not at all, whatever is killed; and little memory is held."""

import functools
import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.lock import only_writer
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs.model import EmbeddingConfig
from gt_jax.errors import Refused
from gt_jax.interop import expected_tensors, tensor_files, to_orbax, to_safetensors
from gt_jax.interop.shards import Source
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
