"""What lies where a file of tensors, or of JSON, should: named for what it is. Names of wrapped models; steps."""

import json

import numpy as np
import pytest

from gt_jax import convert
from gt_jax.configs.json_config import read_object
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.run import read_run_config
from gt_jax.errors import Refused
from gt_jax.files import other_kind
from gt_jax.growth import plan_entries, repetition
from gt_jax.interop.inferred_config import infer
from gt_jax.interop.shards import Source
from gt_jax.interop.tensor_names import canonical
from gt_jax.interop.torch_files import _whole
from tests.interop import origin
from tests.interop.origin import OVERRIDES

OTHERS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n": "a git-lfs pointer",
    b"/annex/objects/SHA256E-s12--ab.safetensors\n": "a git-annex pointer",
    b"<!DOCTYPE html>\n<html><head><title>Sign in</title>": "an HTML page",
    b"\xef\xbb\xbf\r\n  <HTML lang=en>": "an HTML page",
    b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>': "an XML message",
    b"": "empty", b"\x1f\x8b\x08\x00rest": "compressed with gzip", b"GGUF\x03\x00\x00\x00": "a GGUF file",
}  # fmt: skip
READERS = {
    "model.safetensors": lambda path: Source([path]),
    "model.pt": lambda path: Source([path]),
    "model.safetensors.index.json": lambda path: Source([path]),
    "counts.json": repetition.read,
    "plan.json": plan_entries.read_object,
    "fields.json": lambda path: read_object(path, "--config"),
    "config.json": lambda path: read_run_config(path.parent),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_something_else_is_named_for_what_it_is(tmp_path, name):
    for content, kind in OTHERS.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Refused, match=kind) as caught:
            READERS[name](tmp_path / name)
        assert name in str(caught.value)


def test_a_file_that_is_what_it_should_be_is_nothing_else(tmp_path):
    origin.write(tmp_path / "a.safetensors", {"a": np.zeros(2, np.float32)})
    (tmp_path / "b.json").write_text("\ufeff{}", encoding="utf-8")  # the mark that some editors write
    assert other_kind(tmp_path / "a.safetensors") is None and read_object(tmp_path / "b.json", "--config") == {}


@pytest.mark.parametrize("word", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_refused(tmp_path, word):
    (tmp_path / "a.json").write_text(f'{{"learning_rate": {word}}}')
    with pytest.raises(Refused, match="finite"):
        OptimizerConfig.from_json(read_object(tmp_path / "a.json", "--model"))
    with pytest.raises(Refused, match="learning_rate is nan; it must be finite"):
        OptimizerConfig(learning_rate=float("nan"))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "model.", "_fsdp_wrapped_module."])
def test_a_wrapped_model_is_read_as_the_model(tmp_path, prefix):
    """The same names, config and values; a layer that was compiled by itself has the wrapper within its names."""
    state = origin.state()
    inside = {name.replace("layers.1.", "layers.1._orig_mod."): value for name, value in state.items()}
    plain = Source([origin.write(tmp_path / "plain.safetensors", state)])
    wrapped = Source([origin.write(tmp_path / "wrapped.safetensors", {prefix + name: value for name, value in
                                                                     inside.items()})])  # fmt: skip
    assert wrapped.tensors == plain.tensors and wrapped.ignored == [prefix + name for name in plain.ignored]
    assert infer(wrapped.tensors, overrides=OVERRIDES) == infer(plain.tensors, overrides=OVERRIDES)
    name = next(iter(plain.tensors))
    np.testing.assert_array_equal(wrapped.read(name), plain.read(name))
    assert plain.notes == [] and f"wrapped.safetensors: the prefix of a wrapped model is taken off, '{prefix}' of " in \
        wrapped.notes[0]  # fmt: skip


def test_the_prefix_is_said_once_by_the_command(tmp_path, capsys):
    tensors = {f"module.{name}": value for name, value in origin.state().items()}
    source = origin.write(tmp_path / "a.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps({**OVERRIDES, "width": 17}))  # refused before anything is written
    with pytest.raises(Refused, match="config field width is 17"):
        convert.main([str(source), str(tmp_path / "b"), "--config", str(tmp_path / "config.json")])
    assert capsys.readouterr().err.count("prefix of a wrapped model is taken off, 'module.' of ") == 1


def test_names_within_the_model_keep_what_looks_like_a_wrapper():
    assert canonical("layers.0.attn_block.module.x") == "layers.0.attn_block.module.x"
    assert canonical("model_norm.weight") == "model_norm.weight"


@pytest.mark.parametrize(("stored", "step"), [
    (7, 7), (np.int64(7), 7), (np.array(7), 7), (np.array([7.0]), 7), (7.0, 7), (0, 0), (True, None), ("seven", None),
    (7.5, None), (-1, None), (float("nan"), None), (float("inf"), None), (np.array([7, 8]), None), (np.array([]), None),
])  # fmt: skip
def test_a_step_is_read_however_it_was_stored(stored, step):
    """A tensor of PyTorch has `shape` and `item()` as an array of NumPy has."""
    assert _whole(stored) == step


def test_a_step_that_is_no_number_is_said(tmp_path):
    torch = pytest.importorskip("torch")
    for stored, step in ((torch.tensor(7), 7), (torch.tensor([7, 8]), None), ("seven", None)):
        torch.save({"state_dict": {"a": torch.zeros(2)}, "global_step": stored}, tmp_path / "a.pt")
        source = Source([tmp_path / "a.pt"])
        assert source.step == step and list(source.tensors) == ["a"]
        assert (step is None) == any("'global_step' is " in note for note in source.notes)
