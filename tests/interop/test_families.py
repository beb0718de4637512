"""Public hybrids without the other system: tables element by element, configs both ways, what is refused and why.

That the values mean the same there is held by tests/oracle.
"""

import json
import re
import struct

import ml_dtypes
import numpy as np
import pytest

from gt_jax.configs.model import MTPConfig
from gt_jax.configs.presets import PRESETS, preset
from gt_jax.errors import Refused
from gt_jax.interop import to_hf
from gt_jax.interop.families.registry import FAMILIES, family_for, recognised
from gt_jax.interop.families.rows import LINEAR, PLUS_ONE, TAPS, Part, Unit, flat_start
from gt_jax.interop.from_hf import _lost_bits, with_bits
from gt_jax.interop.hf_folder import HFFolder, is_hf_folder
from gt_jax.interop.safetensors import Writer
from gt_jax.interop.tensor_files import Info

HYBRIDS = {"qwen3_5_9b": "qwen3_5_text", "qwen3_5_35b_a3b": "qwen3_5_moe_text", "qwen3_next_80b_a3b": "qwen3_next",
           "olmo_hybrid_7b": "olmo_hybrid"}  # fmt: skip
TINY = {"model_type": "qwen3_5_text", "num_hidden_layers": 4, "hidden_size": 8, "vocab_size": 12, "dtype": "bfloat16",
        "intermediate_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4}


def unit(groups, *forms, cut=()):
    return Unit("t", None, "t", 0, tuple(Part(str(i), (0,), form) for i, form in enumerate(forms)), groups, cut)


def test_interleaved_heads_land_where_their_equations_read_them():
    # 2 key heads of 3, 4 value heads of 5: there, key head g's rows are [q 3 | k 3 | v 2*5 | z 2*5]
    there = np.arange(2 * 26 * 7.0).reshape(52, 7)
    shapes = {"0": (1, 7, 2, 3), "1": (1, 7, 2, 3), "2": (1, 7, 4, 5), "3": (1, 7, 4, 5)}
    one = unit(2, LINEAR, LINEAR, LINEAR, LINEAR)
    q, k, v, z = one.to_ours(there, shapes)
    for g in range(2):
        for i in range(3):
            assert (q[:, g, i] == there[26 * g + i]).all() and (k[:, g, i] == there[26 * g + 3 + i]).all()
        for j in range(2):
            for i in range(5):
                assert (v[:, 2 * g + j, i] == there[26 * g + 6 + 5 * j + i]).all()
                assert (z[:, 2 * g + j, i] == there[26 * g + 16 + 5 * j + i]).all()
    assert one.shape(shapes) == there.shape and (one.to_theirs([q, k, v, z]) == there).all()


def test_one_convolution_is_cut_by_channels():
    there = np.arange(14 * 4.0).reshape(14, 1, 4)
    shapes = {"0": (1, 4, 2, 2), "1": (1, 4, 2, 2), "2": (1, 4, 2, 3)}
    one = unit(1, TAPS, TAPS, TAPS, cut=("a", "b", "c"))
    q, k, v = one.to_ours(there, shapes)
    assert (v[:, 1, 2] == there[13, 0]).all() and (k[3] == there[4:8, 0, 3].reshape(2, 2)).all()
    assert q.shape == (4, 2, 2)
    assert (one.to_theirs([q, k, v]) == there).all()
    assert one.stored(shapes) == {"a": (5, 1, 4), "b": (5, 1, 4), "c": (4, 1, 4)}  # as torch.chunk cuts


def test_places_of_blocks_and_experts():
    assert flat_start(Part("p", (), LINEAR), (3, 4)) == 0
    assert flat_start(Part("p", (2,), LINEAR), (3, 4, 5)) == 40
    assert flat_start(Part("p", (1, 2), LINEAR), (3, 4, 5, 6)) == (1 * 4 + 2) * 30


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_norms_come_back_bit_for_bit(dtype):
    weight = np.array([0.0, -0.0, 1e-30, -1e-9, 0.3, -0.7, 3.0, 1e-4, 60.0], np.float32).astype(dtype)
    held = PLUS_ONE.to_ours(weight, weight.shape)
    assert held.dtype == np.float32 and np.allclose(held, 1 + weight.astype(np.float64), rtol=1e-7)
    back = PLUS_ONE.to_origin(held).astype(dtype)
    assert (PLUS_ONE.to_ours(back, back.shape) == held).all()  # nothing that either system computes with is lost
    kept = _lost_bits(weight)
    assert kept is not None and with_bits(back, kept, held).tobytes() == weight.tobytes()
    held[:4] = 0.0, 1.01, 1.5, 2.0  # trained on since: what was lost is not that of another number
    now = PLUS_ONE.to_origin(held).astype(dtype)
    assert with_bits(now, kept, held)[:4].tobytes() == now[:4].tobytes()
    assert with_bits(now, kept, held)[4:].tobytes() == weight[4:].tobytes()
    assert _lost_bits(np.array([0.25, -0.5], dtype)) is None


@pytest.mark.parametrize("name", HYBRIDS)
def test_configs_go_both_ways(name):
    config, family = preset(name), FAMILIES[HYBRIDS[name]]
    assert family.cannot_express(config) == [] and family_for(config, HYBRIDS[name]) is family
    assert family_for(config, None).cannot_express(config) == []
    assert family.cannot_express(config.replace(layout="D*3,A*2")) == []
    assert family.cannot_express(config.replace(gsa=preset("tiny").gsa)) == []  # of layers that it does not have
    old = {"rope_theta": 5.0, "partial_rotary_factor": 0.125, "rope_scaling": None}  # as transformers 4 wrote them
    made = to_hf.config_file(config, family, old)
    rope = made["rope_parameters"]
    assert (made["rope_theta"], made["partial_rotary_factor"]) == (
        rope["rope_theta"], rope.get("partial_rotary_factor", 0.125))  # fmt: skip
    assert "rope_theta" not in to_hf.config_file(config, family, {}) and "rope_scaling" not in made
    half, whole = np.dtype(np.float16), np.dtype(np.float32)
    assert to_hf.commonest({"a": Info((3, 4), half), "b": Info((5,), whole), "c": Info((2,), whole)}) == "float16"
    defaults = family.config({"rope_parameters": {"rope_theta": 1e7}} if "qwen" in name else {})
    assert defaults.replace(param_dtype="bfloat16", compute_dtype="bfloat16") == config


def test_what_a_family_cannot_express_is_told_field_by_field():
    config = preset("qwen3_5_9b")
    predicting = config.replace(gsa=preset("tiny").gsa, mtp=MTPConfig())  # whose G layer no family has
    told = {line.split()[0] for line in FAMILIES["qwen3_5_text"].cannot_express(predicting)}
    assert {"mtp.weight", "gsa.heads"} <= told
    reasons = FAMILIES["qwen3_5_text"].cannot_express(
        config.replace(deltanet=config.deltanet.replace(rope="standard", beta_max=2.0)))
    assert [line.split()[0] for line in reasons] == ["deltanet.beta_max", "deltanet.rope"]
    for name in ("tiny", "8b", "groundthink_dsds"):
        with pytest.raises(Refused, match=r"no family has such a model"):
            family_for(preset(name), None)
    with pytest.raises(Refused, match="adaptive"):
        family_for(config.replace(adaptive=preset("tiny").adaptive, remat="pass"), "qwen3_5_text")
    assert set(HYBRIDS) <= set(PRESETS)


@pytest.mark.parametrize("change,words", [
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'; only 'default'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling has rope_type 'linear'"),
    ({"rope_scaling": {"type": "yarn"}, "rope_parameters": {"rope_theta": 1e7}}, "rope_scaling has rope_type 'yarn'"),
    ({"rope_scaling": "yarn", "rope_parameters": {"rope_theta": 1e7}}, "rope_scaling is 'yarn'; it must be an object"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only silu"),
    ({"attention_bias": "yes"}, "attention_bias is 'yes'; it must be true or false"),
    ({"attn_output_gate": False}, "attn_output_gate is False"),
    ({"layer_types": ["linear_attention", "sliding_attention"]}, "'sliding_attention'; known are"),
    ({"layer_types": ["linear_attention"] * 3}, "num_hidden_layers is 4, but layer_types has 3"),
    ({"head_dim": 8.5}, "head_dim is 8.5; it must be a whole number"),
    ({"num_attention_heads": 3, "num_key_value_heads": 2}, "multiple of kv_heads 2"),
])  # fmt: skip
def test_configs_that_cannot_be_represented(change, words):
    with pytest.raises(Refused) as caught:
        FAMILIES["qwen3_5_text"].config({**TINY, **change})
    assert words in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_of_a_config_breaks_the_reader(family):
    """A field of another type, or a number that no tensor has, is refused by its name or has no meaning."""
    linear = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    names = [*FAMILIES[family].defaults, *linear, "layer_types", "rope_scaling", "head_dim", "num_key_value_heads"]
    for name in names:
        for value in ("x", ["x"], [[1]], {"a": 1}, {"rope_theta": 10**400}, -1, 0, 1e-320, float("nan"), 10**400):
            try:
                FAMILIES[family].config({name: value})
            except Refused as error:
                assert re.search(name.partition("rope_")[1] or name, str(error)) or "is not valid" in str(error)
    with pytest.raises(Refused, match=r"num_hidden_layers is 1000000000000; .* at most 65536"):
        FAMILIES[family].config({"num_hidden_layers": 10**12})  # they would be listed one by one
    with pytest.raises(Refused, match=r"model_type \[\]; known are"):
        recognised({"model_type": []}, "config.json")


def test_olmo_has_its_own_sizes_where_none_are_given_and_no_others():
    olmo = FAMILIES["olmo_hybrid"]
    assert olmo.config({"linear_num_key_heads": None}) == olmo.config({})
    with pytest.raises(Refused, match=r"linear_num_key_heads is 0(.|\n)*head_dim is '8'"):
        olmo.config({"linear_num_key_heads": 0, "head_dim": "8"})


def test_olmo_without_rotary_embedding_says_so_with_a_number_and_not_with_nothing():
    olmo = FAMILIES["olmo_hybrid"]
    assert olmo.config({"rope_parameters": {"rope_theta": None}}).attention.rope == "none"
    assert olmo.config({}).attention.rope_base == 10000.0
    with pytest.raises(Refused, match=r"rope_parameters is null"):
        olmo.config({"rope_parameters": None})


@pytest.mark.parametrize("data,words", [
    ({"model_type": "llama"}, "known are olmo_hybrid, qwen3_5, qwen3_5_moe, qwen3_5_moe_text, qwen3_5_text, qwen3_n"),
    ({**TINY, "auto_map": {"AutoModel": "modeling_x.X"}}, "auto_map names code"),
    ({**TINY, "quantization_config": {"quant_method": "fp8"}}, "quantised weights (fp8)"),
    ({"model_type": "qwen3_5"}, "text_config is not there"),
    ({"model_type": "qwen3_5", "text_config": {"quantization_config": {"quant_method": "gptq"}}}, "text_config.quant"),
])  # fmt: skip
def test_config_files_that_are_refused(data, words):
    with pytest.raises(Refused) as caught:
        recognised(data, "config.json")
    assert words in str(caught.value)


def folder(path, shards, config=None, index=None):
    """A folder with these tensors in shards, bfloat16."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config or TINY))
    for file, tensors in shards.items():
        infos = {name: Info((2, 2), np.dtype(ml_dtypes.bfloat16)) for name in tensors}
        with Writer(path / file, infos) as writer:
            for name in infos:
                writer.put(name, np.full((2, 2), 1, ml_dtypes.bfloat16))
    if index is not None:
        (path / "model.safetensors.index.json").write_text(index)
    return path


def test_names_of_multimodal_releases(tmp_path):
    names = ["model.language_model.norm.weight", "model.visual.blocks.0.w", "mtp.layers.0.w", "model.visual.x"]
    found = HFFolder(folder(tmp_path / "f", {"model.safetensors": names},
                            {"model_type": "qwen3_5", "text_config": TINY, "tie_word_embeddings": True}))
    assert list(found.places) == ["model.norm.weight"] and len(found.left_out) == 3
    assert found.config.embedding.tied and found.config.param_dtype == "bfloat16"


def test_tensors_that_are_there_twice(tmp_path):
    found = HFFolder(folder(tmp_path / "f", {"a.safetensors": ["x"], "b.safetensors": ["x"]}))
    assert "x is there twice, as x (a.safetensors) and as x (b.safetensors)" in found.problems
    tied = {**TINY, "tie_word_embeddings": True}
    both = ["model.embed_tokens.weight", "lm_head.weight"]
    same = HFFolder(folder(tmp_path / "g", {"model.safetensors": both}, tied))
    assert list(same.places) == both[:1] and not same.problems and len(same.left_out) == 1


@pytest.mark.parametrize("index,words", [
    ('{"weight_map": {"x": "a.safetensors", "y": "gone.safetensors"}}', "gone.safetensors is not there, but"),
    ('{"weight_map": {"x": "a.safetensors", "x": "a.safetensors"}}', "has 'x' twice"),
    ('{"weight_map": {"x": "../a.safetensors"}}', "names files elsewhere"),
])  # fmt: skip
def test_indices_that_do_not_fit(tmp_path, index, words):
    with pytest.raises(Refused) as caught:
        HFFolder(folder(tmp_path / "f", {"a.safetensors": ["x"]}, index=index))
    assert words in str(caught.value)


def test_what_a_trainer_leaves_beside_the_tensors_is_not_read(tmp_path):
    path = folder(tmp_path / "f", {"model.safetensors": ["model.norm.weight"]})
    for name in ("training_args.bin", "optimizer.pt", "pytorch_model.bin.index.json"):
        (path / name).write_bytes(b"PK")
    assert list(HFFolder(path).places) == ["model.norm.weight"]


def test_an_index_and_a_shard_that_disagree(tmp_path):
    found = HFFolder(folder(tmp_path / "f", {"a.safetensors": ["x"], "b.safetensors": ["x", "y"]},
                            index='{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'))
    assert "x in b.safetensors is not in model.safetensors.index.json" in found.problems


def test_quantised_tensors_are_named(tmp_path):
    path = folder(tmp_path / "f", {})
    header = json.dumps({"model.norm.weight": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(Refused, match=r"model.norm.weight has dtype F8_E4M3"):
        HFFolder(path)


def test_a_folder_without_a_tokenizer(tmp_path):
    path = folder(tmp_path / "f", {"model.safetensors": ["model.norm.weight"]})
    (path / "vocab.json").write_text("{}")
    with pytest.raises(Refused, match=r"no tokenizer .*vocab.json alone are not read.*--tokenizer"):
        HFFolder(path).tokenizer()


def test_a_config_that_is_none(tmp_path):
    path = folder(tmp_path / "f", {"model.safetensors": ["x"]})
    (path / "config.json").write_text('{"model_type": "qwen3_5_text", "model_type": "llama"}')
    with pytest.raises(Refused, match="it has 'model_type' twice"):
        HFFolder(path)
    for content, words in ((b"<html>", "an HTML page"), (b"{", "Expecting"), (b"", "empty")):
        (path / "config.json").write_bytes(content)
        with pytest.raises(Refused, match=f"config.json cannot be read: it is {words}|{words}"):
            is_hf_folder(path)  # not: it holds no tensors of the origin
