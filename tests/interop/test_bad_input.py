"""Everything that is wrong is listed at once, with exit code 2, and nothing is written."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from gt_jax import convert
from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.tree_paths import nest
from gt_jax.configs.model import DeltaNetConfig
from gt_jax.errors import Refused, run_command
from tests.interop import origin
from tests.interop.origin import CONFIG, OVERRIDES

S = "attn_block.sublayer."


@pytest.fixture(scope="module")
def state():
    return origin.state()


def refusal(tmp_path, tensors, *flags, overrides=OVERRIDES):
    """What converting these tensors says; nothing else may be left."""
    source = origin.write(tmp_path / "source.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(overrides))
    before = sorted(os.listdir(tmp_path))
    said = command(str(source), str(tmp_path / "target"), "--config", str(tmp_path / "config.json"), *flags)
    assert sorted(os.listdir(tmp_path)) == before
    return said


def command(*arguments):
    with pytest.raises(Refused) as caught:
        convert.main(list(arguments))
    return str(caught.value)


def test_all_mismatches_at_once(tmp_path, state):
    broken = dict(state)
    del broken["layers.0.attn_block.sublayer.A_log"], broken["mtp_block.mlp_block.norm.weight"], broken["lambda_r_raw"]
    broken["layers.1.surprise"] = np.zeros(3, np.float32)
    broken["lm_head.weight"] = broken["lm_head.weight"].T.copy()
    broken[f"layers.4.{S}q_proj.weight"] = broken[f"layers.4.{S}q_proj.weight"][1:]
    broken["layers.6.mlp_block.sublayer.moe.W_up"] = broken["layers.6.mlp_block.sublayer.moe.W_up"].astype(np.float64)
    broken["layers.5.alpha"] = np.array([1, 0.7, 0.5, 0.4], np.float32)
    broken["stack.blocks.2.layer_emb"] = state["layers.2.layer_emb"] + 1
    broken["mtp_block.attn.gate_bias"] = np.zeros(5, np.float32)
    broken["stack.blocks.3.layer_emb"] = state["layers.3.layer_emb"]  # this one agrees
    said = refusal(tmp_path, broken, overrides={**OVERRIDES, "width": 17})
    lines = [line for line in said.splitlines() if line.startswith("  - ")]
    for words in (
        "layers.0.attn_block.sublayer.A_log is missing", "mtp_block.mlp_block.norm.weight is missing; [16]",
        "lambda_r_raw is missing; [] is expected",
        "layers.1.surprise (source.safetensors) is not a tensor of this model",
        f"layers.4.{S}q_proj.weight (source.safetensors) has shape [7, 16]; [8, 16] is expected",
        "layers.6.mlp_block.sublayer.moe.W_up (source.safetensors) is float64; float32, which this config stores",
        "layers.5.alpha is [1.0, 0.7, 0.5, 0.4]; other layers have [1.0, 0.7, 0.5, 0.35]",
        "stack.blocks.2.layer_emb (source.safetensors) name one tensor, but their values differ",
        "mtp_block.attn.gate_bias (source.safetensors) name one tensor, but one is float32[2], the other float32[5]",
        "config field width is 17; the tensors say 16",
    ):  # fmt: skip
        assert sum(words in line for line in lines) == 1, (words, said)
    assert "lm_head.weight (source.safetensors) has shape [16, 264]" in said
    assert "layers.3.layer_emb" not in said


def test_a_list_of_parameters_called_layers_is_no_layer(tmp_path):
    said = refusal(tmp_path, {f"layers.{name}": np.zeros(2, np.float32) for name in ("0", "1", "weight")})
    assert "is this a checkpoint of the origin system?" in said


def test_a_whole_layer_that_is_missing(tmp_path, state):
    said = refusal(tmp_path, {name: value for name, value in state.items() if not name.startswith("layers.2.")})
    assert "layers.2 has no tensor of a mixer, and the last layer is 7" in said
    assert "layers.2.mlp_block.norm.weight is missing" in said and f"layers.2.{S}q_proj.weight is missing" in said


@pytest.mark.parametrize("overrides,words", [
    ({"gsa": {"k_top": 3}}, "unknown field 'k_top'"), ({"gsa": {"k_min": 5000}}, "k_min is 5000; it must be at most"),
    ({"moe": {"real_share": 0.35}}, "must be whole"), ({"param_dtype": "bfloat16"}, "does not hold its values exactly"),
    ({"memory": None}, r"lambda_r_raw .* is not a tensor of this model"),
    ({"exit": {"threshold": 0.9}}, "adaptive depth and exit exclude each other"),
    ({"hyper": {"streams": 2}}, "hyper.streams is 2; the tensors say 4"),
])  # fmt: skip
def test_config_fields_and_values(tmp_path, state, overrides, words):
    assert re.search(words, refusal(tmp_path, state, overrides={**OVERRIDES, **overrides}))


def test_arguments(tmp_path, state):
    source = origin.write(tmp_path / "a.safetensors", state)
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "exists").mkdir()
    here, target = str(source), str(tmp_path / "target")
    assert "target" in command(here, str(tmp_path / "exists")) and (tmp_path / "exists").is_dir()
    assert "not a JSON object" in command(here, target, "--config", str(tmp_path / "list.json"))
    assert "cannot be read" in command(here, target, "--config", str(tmp_path / "broken.json"))
    assert "cannot be read" in command(here, target, "--config", str(tmp_path / "none.json"))
    assert "at least 0" in command(here, target, "--step", "-1")
    assert "does not exist" in command(str(tmp_path / "none.pt"), target)
    assert "no tensor file" in command(str(tmp_path / "exists"), target)
    said = command(here, target, "--to", "safetensors", "--step", "1", "--config", "x")
    assert "--step has no meaning" in said and "--config has no meaning" in said
    assert "is a file" in command(here, target, "--to", "safetensors")
    assert not os.path.exists(target)


def test_the_command_ends_with_code_2_and_a_message(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"12")
    done = subprocess.run([sys.executable, "-m", "gt_jax.convert", "a.safetensors", "b"], cwd=tmp_path, timeout=100,
                          env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("refused: ") and "truncated" in done.stderr
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_report_for_a_reader_and_for_a_program(tmp_path, state, capsys):
    source = origin.write(tmp_path / "a.safetensors", {**state, "rotary_emb.inv_freq": np.zeros(3, np.float32),
                                                       "stack.blocks.0.alpha": state["layers.0.alpha"]})
    (tmp_path / "config.json").write_text(json.dumps(OVERRIDES))
    with pytest.raises(SystemExit) as ended:
        run_command(convert.main, [str(source), str(tmp_path / "ours"), "--config", str(tmp_path / "config.json")])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert "step 0, layout DDDG*2, width 16, 487 tensors" in lines[0] and lines[1].startswith("1 second names agree")
    assert convert.main([str(tmp_path / "ours"), str(tmp_path / "b"), "--to", "safetensors", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tensors"] == 487 and report["config"] == CONFIG.to_json()
    assert "params/segment0/layer0/gain" in report["dropped"]


def exported(tmp_path, config, **changed):
    """What exporting a checkpoint of ours says; `changed` leaves by path, None to leave one out."""
    leaves = {path: np.ones(leaf.shape, leaf.dtype) for path, leaf in origin.contract(config).items()}
    leaves = {path: value for path, value in (leaves | changed).items() if value is not None}
    checkpoint.save(tmp_path / "ours", nest(leaves), {"config": config.to_json(), "kind": "grown", "step": 0})
    said = command(str(tmp_path / "ours"), str(tmp_path / "target"), "--to", "safetensors")
    assert os.listdir(tmp_path) == ["ours"]
    return said


def test_gains_other_than_one_are_not_exported(tmp_path):
    said = exported(tmp_path, CONFIG, **{"params/segment0/layer1/gain": np.array([1, 0.7], np.float32),
                                         "params/segment0/layer3/gain": np.array([0.5, 1], np.float32)})
    assert "layer 3 has gain 0.5" in said and "layer 5 has gain 0.7" in said and said.count("has gain") == 2


def test_leaves_that_the_origin_does_not_have(tmp_path):
    said = exported(tmp_path, CONFIG, **{"params/final_norm/scale": None, "params/extra": np.ones(2, np.float32)})
    assert "params/final_norm/scale is not in the checkpoint" in said
    assert "params/extra does not belong to its config" in said


def test_models_that_the_origin_does_not_have(tmp_path):
    other = DeltaNetConfig(heads=2, value_heads=2, key_width=8, value_width=8, variant="groundthink")
    config = CONFIG.plain.replace(stack=CONFIG.stack.replace(kind="lambda"), deltanet=other)
    said = exported(tmp_path, config)
    assert "the lambda stack" in said and "groundthink" in said
