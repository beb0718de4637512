"""`.pt`: read without running anything in it. Without PyTorch only the refusals that need none are tested."""

import os
import pickle
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.errors import Refused
from gt_jax.interop import torch_files
from gt_jax.interop.shards import Source
from gt_jax.interop.to_orbax import to_orbax
from tests.interop import origin


class Code:
    def __reduce__(self):
        return os.system, ("touch proof",)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def tensors(torch, state):
    def tensor(value):
        if value.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(value.copy())

    return {name: tensor(value) for name, value in state.items()}


def refused(path):
    with pytest.raises(Refused) as caught:
        Source([path])
    return str(caught.value)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_equals_the_same_tensors_in_safetensors(tmp_path, torch, dtype, monkeypatch):
    monkeypatch.setattr(torch_files, "_HELD", 10_000)  # so that the file is mapped anew many times
    state = origin.state(dtype=dtype)
    found = tensors(torch, state)
    found["layers.0.attn_block.sublayer.rotary_emb.inv_freq"] = torch.ones(3)
    found["stack.bootstrap_layer.layer_emb"] = found["layers.0.layer_emb"]
    name = "layers.1.attn_block.sublayer.q_proj.weight"
    found[name] = found[name].T.contiguous().T  # other strides, the same values
    training = {"model_state_dict": found, "optimizer": {"lr": 0.1, "m": torch.ones(5)}, "step": 31}
    torch.save(training, tmp_path / "a.pt")
    bare = {name: torch.nn.Parameter(value) for name, value in tensors(torch, state).items()}
    torch.save(bare, tmp_path / "bare.pth")
    origin.write(tmp_path / "a.safetensors", state)
    reports = [to_orbax([tmp_path / name], tmp_path / f"ours-{name}", overrides=origin.OVERRIDES)
               for name in ("a.pt", "bare.pth", "a.safetensors")]
    assert [report["step"] for report in reports] == [31, 0, 0]
    assert (reports[0]["aliases"], reports[0]["ignored"]) == (1, 1)
    one, *others = (flatten(checkpoint.load(report["target"])) for report in reports)
    for other in others:
        assert one.keys() == other.keys() and all(one[path].tobytes() == other[path].tobytes() for path in one)


def test_shards(tmp_path, torch):
    for number in (0, 1):
        torch.save({"model_state_dict": {f"layers.{number}.x": torch.ones(2)}}, tmp_path / f"part-{number}-of-2.pt")
    assert set(Source([tmp_path]).tensors) == {"layers.0.x", "layers.1.x"}
    (tmp_path / "part-1-of-2.pt").unlink()
    assert "part-1-of-2.pt is not there" in refused(tmp_path)


def test_code_is_refused_and_not_run(tmp_path, torch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state_dict": {"a": torch.ones(2)}, "args": Code()}, tmp_path / "a.pt")
    said = refused(tmp_path / "a.pt")
    assert "holds code" in said and "system" in said and "nothing of it was run" in said
    assert os.listdir(tmp_path) == ["a.pt"]


def test_code_in_a_plain_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"model_state_dict": Code()}))
    assert "no archive of torch.save" in refused(tmp_path / "a.pt")
    assert os.listdir(tmp_path) == ["a.pt"]


def test_truncated_and_foreign_files(tmp_path, torch):
    torch.save({"a": torch.ones(1000)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.pt").write_bytes(whole[:size])
        assert "truncated" in refused(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as file:
        file.writestr("x", "y")
    assert "b.pt cannot be read" in refused(tmp_path / "b.pt")


@pytest.mark.parametrize("held,words", [
    ([1, 2], "holds a list"), ({"model": {}}, "holds no state dict"), ({"model_state_dict": {}}, "holds no state dict"),
])  # fmt: skip
def test_files_without_a_state_dict(tmp_path, torch, held, words):
    torch.save(held, tmp_path / "a.pt")
    assert words in refused(tmp_path / "a.pt")


def test_all_entries_that_are_no_plain_tensors(tmp_path, torch):
    torch.save({"a": torch.ones(2), "b": 3, "c": torch.ones(2).to_sparse(), "d": torch.ones(2, dtype=torch.complex64)},
               tmp_path / "a.pt")
    said = refused(tmp_path / "a.pt")
    assert "'b' is a int, no tensor" in said and "'c' is a tensor of layout" in said and "complex64" in said


def test_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04")
    assert "pip install 'gt-jax[torch]'" in refused(tmp_path / "a.pt")
