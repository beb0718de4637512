"""Which names stand for one tensor, and what is inferred from names and shapes."""

import numpy as np
import pytest

from gt_jax.configs.model import ModelConfig
from gt_jax.configs.presets import preset
from gt_jax.errors import Refused
from gt_jax.interop import inferred_config, tensor_names
from gt_jax.interop.tensor_files import Info
from tests.interop import origin
from tests.interop.origin import CONFIG, OVERRIDES

Q = "attn_block.sublayer.q_proj.weight"


def infos(config: ModelConfig, dtype: str = "float32") -> dict[str, Info]:
    return {name: Info(shape, np.dtype(dtype)) for name, shape in origin.shapes(config).items()}


@pytest.mark.parametrize("name,known", [
    (f"layers.5.{Q}", f"layers.5.{Q}"), (f"stack.blocks.5.{Q}", f"layers.5.{Q}"),
    (f"stack.bootstrap_layer.{Q}", f"layers.0.{Q}"), (f"stack.mid_layers.4.block.{Q}", f"layers.5.{Q}"),
    (f"stack.blocks.5.wrapper.layer.{Q}", f"layers.5.{Q}"), (f"layers.5.wrapper.layer.{Q}", f"layers.5.{Q}"),
    (f"stack.bootstrap_layer.wrapper.layer.{Q}", f"layers.0.{Q}"),
    (f"stack.mid_layers.0.block.wrapper.layer.{Q}", f"layers.1.{Q}"),
    ("stack.blocks.2.layer_emb", "layers.2.layer_emb"),
    ("mtp_block.attn.W_q.weight", "mtp_block.attn_block.sublayer.W_q.weight"),
    ("mtp_block.mlp.moe.W_up", "mtp_block.mlp_block.sublayer.moe.W_up"),
    ("mtp_block.attn_block.norm.weight", "mtp_block.attn_block.norm.weight"), ("norm.weight", "norm.weight"),
    ("layers.0.attn_block.sublayer.rotary_emb.inv_freq", None), ("rotary_emb.inv_freq", None),
    ("stack.mid_layers.3.wrapper.layer.x", "stack.mid_layers.3.wrapper.layer.x"),
])  # fmt: skip
def test_canonical_names(name: str, known: str | None) -> None:
    assert tensor_names.canonical(name) == known


def test_every_leaf_has_a_name_of_its_own_and_all_names_are_the_origins() -> None:
    leaves, without = tensor_names.leaves(origin.contract(CONFIG), CONFIG)
    found = [name for leaf in leaves for name in leaf.origins] + tensor_names.alpha_names(CONFIG)
    assert len(found) == len(set(found)) and set(found) == set(origin.shapes(CONFIG))
    assert {path.split("/")[-1] for path in without} == {"gain", "token_bytes", "token_length"}


@pytest.mark.parametrize("name", ["3b", "3b_table", "8b"])
def test_presets_are_inferred_from_their_shapes(name: str) -> None:
    config = preset(name)
    alpha = None if config.adaptive is None else config.adaptive.alpha
    assert inferred_config.infer(infos(config, "bfloat16"), alpha) == (config, [])


def test_tiny_preset_is_inferred_with_what_the_tensors_do_not_say() -> None:
    config = preset("tiny_3b")
    found = inferred_config.infer(infos(config), config.adaptive.alpha, {**OVERRIDES, "stack": {"kind": "midpoint"}})
    assert found.problems == ["ModelConfig is not valid:\n    - adaptive depth and stack 'midpoint' exclude each other"]
    assert found.config == config.replace(
        gsa=preset("3b").gsa.replace(heads=4, head_width=16, indexer_heads=2, indexer_width=8),
        deltanet=preset("3b").deltanet.replace(heads=4, value_heads=4, key_width=16, value_width=16),
        memory=preset("3b").memory, init_std=0.02)
    assert inferred_config.infer(infos(config), config.adaptive.alpha, OVERRIDES) == (config, [])


def test_layouts() -> None:
    for layout, types in (("DDDG*5", "DDDG" * 5), ("D*2,G,D", "DDGD")):
        config = CONFIG.plain.replace(layout=layout)
        assert inferred_config.infer(infos(config)).config.layout == layout and config.depth.types == types
    found = inferred_config.infer(infos(CONFIG.plain), None, {"layout": "DDD,G,DDDG"})
    assert found.config.layout == "DDD,G,DDDG" and found.problems == []


def test_one_misshaped_tensor_does_not_change_the_widths() -> None:
    shapes = infos(CONFIG)
    shapes["layers.0.attn_block.sublayer.A_log"] = Info((7,), np.dtype("float32"))
    shapes["layers.0.attn_block.norm.weight"] = Info((99,), np.dtype("float32"))
    assert inferred_config.infer(shapes, CONFIG.adaptive.alpha, OVERRIDES) == (CONFIG, [])


def test_fewer_key_heads_than_value_heads_need_the_config() -> None:
    assert inferred_config.infer(infos(CONFIG), None, {"deltanet": {"heads": 1}}).config.deltanet.key_width == 8
    assert inferred_config.infer(infos(CONFIG), None, {"deltanet": {"heads": 3}}).problems == [
        "config field deltanet.heads is 3; the tensors say 2"]


def test_all_wrong_overrides_are_listed_at_once() -> None:
    wrong = {"width": 17, "gsa": {"k_bass": 4, "k_min": "few"}, "moe": {"top_k": 100}, "topk": 2, "memory": 5,
             "embedding": {"kind": "table"}, "layout": "DDDG*3"}
    found = inferred_config.infer(infos(CONFIG), CONFIG.adaptive.alpha, wrong)
    text = "\n".join(found.problems)
    for words in ("width is 17; the tensors say 16", "unknown field 'k_bass'", "'few' is not int", "top_k is 100",
                  "unknown field 'topk'", "5 is not an object", "layout is 'DDDG*3'; the tensors say 'DDDG*2'",
                  "embedding.kind is 'table'; the tensors say 'kronecker'"):
        assert words in text, words
    assert found.config.width == 16


def test_another_system_is_refused() -> None:
    with pytest.raises(Refused, match=r"no layer has tensors of a mixer.*model\.layers\.0"):
        inferred_config.infer({"model.layers.0.self_attn.q_proj.weight": Info((4, 4), np.dtype("float32"))})
