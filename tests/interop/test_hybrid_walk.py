"""The walk of docs/convert.md, command by command, on a folder of a tiny model; and gains that do not fold."""

import json
import os
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from gt_jax import convert, describe, forward, initialise, load, save
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs.presets import preset
from gt_jax.errors import Refused
from gt_jax.interop import expected_tensors, fold_cost, to_hf
from gt_jax.interop.hf_folder import HFFolder
from gt_jax.models.language_model import abstract

PAGE = Path(__file__).parents[2] / "docs" / "convert.md"
HYBRID = preset("qwen3_5_9b")
CONFIG = HYBRID.replace(
    layout="DA", width=16, vocab=40, mlp_width=12, param_dtype="float32", compute_dtype="float32",
    deltanet=HYBRID.deltanet.replace(heads=1, value_heads=2, key_width=4, value_width=4, chunk_size=16),
    attention=HYBRID.attention.replace(heads=2, kv_heads=1, head_width=8))  # fmt: skip


@pytest.fixture(autouse=True)
def real_leaves(monkeypatch):
    monkeypatch.setattr(expected_tensors, "model_leaves", lambda config: flatten(abstract(config)))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """A folder as it is downloaded: shards, an index, a tokenizer, a generation config."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "random", CONFIG, initialise(CONFIG, seed=0))
    to_hf.to_hf(tmp_path / "random", tmp_path / "Qwen3.5-9B", shard_bytes=4000)
    Tokenizer(BPE(vocab={chr(97 + i): i for i in range(26)}, merges=[])).save("Qwen3.5-9B/tokenizer.json")
    (tmp_path / "Qwen3.5-9B" / "generation_config.json").write_text('{"eos_token_id": [3, 4]}\n')
    return tmp_path


def walk():
    """The commands of the walk, for two layers in place of 32."""
    page = PAGE.read_text(encoding="utf-8").split("### A walk")[1]
    commands = re.search(r"```\n(.*?)```", page, re.S)[1].replace("--target-layers 64", "--target-layers 4")
    made = re.search(r"```python\n(.*?)```", page, re.S)[1].replace("range(32)", "range(2)")
    return [shlex.split(line)[3:] for line in commands.splitlines()], made


@pytest.mark.slow
def test_the_walk(downloaded, capsys):
    commands, made = walk()
    exec(made, {})
    run = {"convert": convert.main, "describe": describe.main, "grow": grow_main()}
    assert [name for name, *_ in commands] == ["convert", "describe", "grow", "convert"]
    for name, *arguments in commands:
        assert run[name](arguments) == 0
    said = capsys.readouterr().out
    assert "tokenizer.json, generation_config.json" in said and "layers with gain 0" in said
    deep, shallow = HFFolder(downloaded / "deep"), HFFolder(downloaded / "Qwen3.5-9B")
    assert deep.config.depth.types == "DDAA" or len(deep.config.depth) == 4
    assert deep.data["num_hidden_layers"] == 4 == len(deep.data["layer_types"])
    for name in ("tokenizer.json", "generation_config.json"):
        assert (deep.path / name).read_bytes() == (shallow.path / name).read_bytes()
    grown, source = load(downloaded / "grown"), load(downloaded / "ours")
    tokens = jnp.arange(22).reshape(2, 11)
    want = forward(source.config, source.variables, tokens).logits
    np.testing.assert_allclose(forward(grown.config, grown.variables, tokens).logits, want, atol=1e-6)
    convert.main(["deep", "again"])  # what went out comes in, and computes the same
    again = load(downloaded / "again")
    np.testing.assert_allclose(forward(again.config, again.variables, tokens).logits, want, atol=1e-6)


def grow_main():
    import importlib

    return importlib.import_module("gt_jax.grow").main


@pytest.mark.slow
def test_other_gains_go_out_only_when_asked_and_their_cost_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    by = {"gain": 0.5, "w": 8}
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * by.get(path[-1].key, 1), initialise(CONFIG, seed=0))
    Tokenizer(BPE(vocab={chr(97 + i): i for i in range(26)}, merges=[])).save("tokenizer.json")
    save("model", CONFIG, variables, {"tokenizer": str(tmp_path / "tokenizer.json")})
    Path("text").write_text("abcdefghij" * 3)
    with pytest.raises(Refused, match=r"layer 0 has gain 0.5, which qwen3_5_text has no place for"):
        convert.main(["model", "out", "--to", "hf"])
    assert convert.main(["model", "out", "--to", "hf", "--approximate", "text", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    cost, tokens = report["cost"], jnp.asarray([[ord(letter) - 97 for letter in "abcdefghij" * 3]])
    convert.main(["out", "back", "--json"])
    back = load("back")
    after = forward(back.config, back.variables, tokens).logits
    before = forward(CONFIG, variables, tokens).logits
    difference = float(jnp.max(jnp.abs(after - before)) / jnp.max(jnp.abs(before)))
    assert cost["tokens"] == 30 and cost["logits"] > 1e-4 and abs(cost["logits"] - difference) < 1e-4 * difference
    assert cost["loss"] != cost["loss_folded"]
    assert fold_cost.carries_gain("params/segment0/layer0/mlp/experts/down/w", False)
    assert not fold_cost.carries_gain("params/segment0/layer0/mlp/down/w", True)
