"""The walks of docs/convert.md, command by command, on a folder of a tiny model; gains that do not fold; experts."""

import functools
import gzip
import importlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from gt_jax import convert, describe, forward, initialise, load, save
from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.arrays import ArrayFiles
from gt_jax.checkpoints.opened import open_checkpoint
from gt_jax.checkpoints.tree_paths import flatten, nest
from gt_jax.configs.presets import preset
from gt_jax.devices import sharding
from gt_jax.errors import Refused
from gt_jax.interop import expected_tensors, fold_cost, safetensors, to_hf
from gt_jax.interop.from_hf import from_hf
from gt_jax.interop.hf_folder import HFFolder
from gt_jax.interop.safetensors import Writer
from gt_jax.interop.tensor_files import Info, checksum
from gt_jax.models.language_model import abstract
from gt_jax.text.tokenizers import open_tokenizer
from tests.support import perturbed

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


def walk(block=0):
    """The commands of the walk, for two layers in place of 32: the first ones, or those by way of a retrofit."""
    page = PAGE.read_text(encoding="utf-8").split("### A walk")[1]
    found = [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", page, re.S | re.M) if not kind]
    commands = next(text for text in found if ("gt_jax retrofit" in text) == bool(block))
    commands = commands.replace("--target-layers 64", "--target-layers 4")
    made = re.search(r"```python\n(.*?)```", page, re.S)[1].replace("range(32)", "range(2)")
    return [shlex.split(line)[3:] for line in commands.splitlines()], made


@pytest.mark.exhaustive  # that of an adaptive model walks through the same commands
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
    return importlib.import_module("gt_jax.grow").main


@pytest.mark.slow
def test_the_walk_of_an_adaptive_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
    save("random", CONFIG.replace(layout="D"), initialise(CONFIG.replace(layout="D"), seed=0))
    to_hf.to_hf("random", "Qwen3.5-9B")
    Tokenizer(BPE(vocab={chr(97 + i): i for i in range(26)}, merges=[])).save("Qwen3.5-9B/tokenizer.json")
    Path("story.txt").write_text("abcdefghij" * 40)
    convert.main(["Qwen3.5-9B", "ours"])
    small = {"train": ["--sequence-length", "16", "--batch-size", "2", "--steps", "4", "--evaluate-every", "0"],
             "measure": ["--batches", "1"], "grow": ["--no-check"], "retrofit": ["--no-check"]}  # fmt: skip
    commands, _ = walk(block=1)
    assert [name for name, *_ in commands] == ["retrofit", "train", "measure", "grow", "convert"]
    for name, *arguments in commands:
        words = [*arguments, *small.get(name, ())]
        if name == "train":
            words = [word for word in words if word != "400"]
            words.remove("--steps")
        assert importlib.import_module(f"gt_jax.{name}").main(words) == 0
    said = capsys.readouterr().out
    assert "all gates closed" in said and "folded" in said
    counts = json.loads(Path("counts.json").read_text())
    assert counts["layer0"]["k_exec"] > 1, "the schedule has opened the gates"
    assert len(HFFolder(Path("wanted")).config.depth) == counts["layer0"]["k_exec"]


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
    sample = importlib.import_module("gt_jax.sample")  # the module: gt_jax has a function of this name
    assert sample._tokens("aB", open_tokenizer("tokenizer.json")).tolist() == [0]
    assert "has no token for all of --prompt 'aB'; the model reads 'a'" in capsys.readouterr().err
    Path("latin").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(Refused, match=r"the text of --approximate cannot be encoded by .*tokenizer.json: 'utf-8'"):
        convert.main(["model", "out", "--to", "hf", "--approximate", "latin"])
    Path("packed").write_bytes(gzip.compress(("ABC" + "abcdefghij" * 3).encode("utf-16")))
    assert convert.main(["model", "packed_out", "--to", "hf", "--approximate", "packed", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["cost"]["tokens"] == 30 and "do not come back from their tokens" in output.err
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


def test_what_is_rounded_on_the_way_out_is_said_and_its_cost_is_that_of_what_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = CONFIG.replace(layout="D", param_dtype="bfloat16")
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if path[-1].key == "gain" else (leaf * 1.003).astype(leaf.dtype), initialise(config, 0))
    Tokenizer(BPE(vocab={chr(97 + i): i for i in range(26)}, merges=[])).save("tokenizer.json")
    save("model", config, variables, {"tokenizer": str(tmp_path / "tokenizer.json")})
    Path("text").write_text("abcdefghij" * 3)
    convert.main(["model", "unmeasured", "--to", "hf"])
    assert "tensors rounded to bfloat16, " in (said := capsys.readouterr().out) and "--approximate TEXT says" in said
    convert.main(["model", "out", "--to", "hf", "--approximate", "text", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["folded"] == {} and list(report["rounded"]) == ["bfloat16"]
    convert.main(["out", "back", "--json"])
    back, tokens = load("back"), jnp.asarray([[ord(letter) - 97 for letter in "abcdefghij" * 3]])
    before = flatten(variables)
    rounded = {path for path, leaf in flatten(back.variables).items() if not np.array_equal(leaf, before[path])}
    assert len(rounded) == report["rounded"]["bfloat16"] + 2, "q, k and v taps are one tensor there"
    logits = [forward(config, one, tokens).logits for one in (variables, back.variables)]
    difference = float(jnp.max(jnp.abs(logits[1] - logits[0])) / jnp.max(jnp.abs(logits[0])))
    assert difference > 1e-5 and report["cost"]["logits"] == pytest.approx(difference, rel=1e-3)


def test_an_export_that_was_killed_at_its_first_file_is_cleared(tmp_path):
    stage = tmp_path / "deep.unfinished"
    stage.mkdir()
    (stage / ".config.json.gt_jax-tmp").write_text("{")
    (stage / "notes.json").touch()
    with pytest.raises(Refused, match=r"deep\.unfinished is nothing that gt_jax has made"):
        to_hf.clear_export(stage, tmp_path / "deep")
    (stage / "notes.json").unlink()
    to_hf.clear_export(stage, tmp_path / "deep")
    assert not stage.exists()


EXPERTS = preset("qwen3_5_35b_a3b")
MOE = EXPERTS.replace(
    layout="A", width=16, vocab=40, mlp_width=12, param_dtype="float32", compute_dtype="float32",
    attention=CONFIG.attention, moe=EXPERTS.moe.replace(experts=3, expert_width=4, top_k=2))  # fmt: skip


def random_experts():
    """Variables of the model with experts, their gains 1."""
    return {path: np.ones_like(value) if path.endswith("/gain") else value
            for path, value in flatten(perturbed(MOE)).items()}  # fmt: skip


def downloaded_experts(place):
    """A folder of that model whose experts' tensors are fused, as newer releases have them, and these tensors."""
    save(place / "random", MOE, nest(random_experts()))
    to_hf.to_hf(place / "random", place / "apart")
    Tokenizer(BPE(vocab={chr(97 + i): i for i in range(26)}, merges=[])).save(str(place / "apart" / "tokenizer.json"))
    apart = HFFolder(place / "apart")
    tensors, of_experts = {}, {}
    for name in apart.places:
        found = re.fullmatch(r"(.*experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if found:
            of_experts.setdefault(found[1], {})[found[3], int(found[2])] = apart.read(name)
        else:
            tensors[name] = apart.read(name)
    for name, parts in of_experts.items():
        gate, up, down = (np.stack([parts[kind, expert] for expert in range(3)]) for kind in ("gate", "up", "down"))
        tensors |= {f"{name}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{name}.down_proj": down}
    shutil.copytree(place / "apart", place / "fused", ignore=shutil.ignore_patterns("*.safetensors*"))
    with Writer(place / "fused" / "model.safetensors",
                {name: Info(value.shape, value.dtype) for name, value in tensors.items()}) as writer:  # fmt: skip
        for name, value in tensors.items():
            writer.put(name, value)
    return place / "fused", tensors


def test_fused_experts_come_in_as_single_ones_do_and_go_out_fused(tmp_path, monkeypatch):
    fused, tensors = downloaded_experts(tmp_path)
    summed, asked, all_tensors = [], [], HFFolder.tensors
    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "checksum", lambda value: summed.append(value.ndim) or checksum(value))
        patch.setattr(HFFolder, "tensors", property(lambda self: asked.append(self) or all_tensors.fget(self)))
        from_hf(fused, tmp_path / "ours")
    assert summed.count(3) == 2, "what experts share is compared once, not once an expert"
    assert len(asked) < 6, "the table of all tensors is not made anew for each of them"
    got = flatten(checkpoint.load(tmp_path / "ours"))
    for path, value in random_experts().items():
        np.testing.assert_allclose(got[path], value, rtol=0, atol=1e-7 * path.endswith("/scale"), err_msg=path)  # 1 + w
    to_hf.to_hf(tmp_path / "ours", tmp_path / "again")
    again = HFFolder(tmp_path / "again")
    assert set(again.places) == set(tensors)
    assert all(np.array_equal(again.read(name), value) for name, value in tensors.items())


def test_a_conversion_that_is_killed_or_meets_a_full_disk_leaves_no_checkpoint(tmp_path, monkeypatch):
    fused, _ = downloaded_experts(tmp_path)
    target, stage = tmp_path / "ours", tmp_path / "ours.converting"
    write = ArrayFiles.write

    def full(self, *arguments):
        if self.folder.name.endswith("final_norm.scale"):
            raise OSError(28, "No space left on device")
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ArrayFiles, "write", full)
        with pytest.raises(OSError, match=r"No space left on device while writing .*ours; make room, then do it again"):
            from_hf(fused, target)
        assert not target.exists() and not stage.exists()
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)  # a kill clears nothing away
        with pytest.raises(OSError, match="No space left"):
            from_hf(fused, target)
    assert not target.exists() and stage.exists()
    for place in (target, stage):
        with pytest.raises(Refused):
            open_checkpoint(place)
    from_hf(fused, target)
    assert not stage.exists() and open_checkpoint(target).config == MOE
