"""Configs refuse what cannot be, go through JSON; the depth notation goes through text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gt_jax.configs import layout, model, presets
from gt_jax.configs.attention import AttentionConfig
from gt_jax.configs.json_config import changed_by_file
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.run import RunConfig, TrainConfig, differences
from gt_jax.errors import Refused
from tests.support import small_model

segments = st.lists(st.tuples(st.text("DGSA", min_size=1, max_size=5), st.integers(1, 40)), min_size=1, max_size=4)


def test_a_layout_and_what_it_does_without_are_checked_together(tmp_path):
    (tmp_path / "no.json").write_text('{"gsa": null}')
    with pytest.raises(Refused, match="gsa must be given"):
        changed_by_file(presets.tiny(), tmp_path / "no.json")
    made = changed_by_file(presets.tiny(), tmp_path / "no.json", layout="D*2")
    assert made.gsa is None and str(made.depth) == "D*2"


@given(segments)
def test_notation_goes_there_and_back(parts):
    depth = layout.Layout(tuple(layout.Segment(*part) for part in parts))
    assert layout.parse(str(depth)) == depth
    assert len(depth) == len(depth.types)
    for layer, kind in enumerate(depth.types):
        index, block, slot = depth.position(layer)
        assert depth.segments[index].pattern[slot] == kind
        assert depth.layer(index, block, slot) == layer
    with pytest.raises(IndexError):
        depth.position(len(depth))


@given(st.text("DG", min_size=1, max_size=24))
def test_types_find_their_notation(types):
    assert layout.from_types(types).types == types


def test_the_examples_of_the_design():
    assert layout.parse("DDDG*5").types == "DDDG" * 5
    assert str(layout.from_types("DDDG" * 5)) == "DDDG*5"
    assert layout.parse("D*5,G*3").types == "DDDDDGGG"


@pytest.mark.parametrize(
    ("text", "says"),
    [("DDXG", "'X'"), ("DDDG*0", "at least 1"), ("DDDG*-1", "at least 1"), ("", "not a segment"), ("DDDG*", "DDDG\\*"),
     ("DDDG*2,", "not a segment"), ("DDDG x2", "not a segment"), ("DDDG*2.5", "not a segment")],
)  # fmt: skip
def test_bad_notation_is_refused_with_the_part_that_is_wrong(text, says):
    with pytest.raises(Refused, match=says):
        layout.parse(text)


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_presets_go_through_json(name):
    preset = presets.preset(name)
    assert model.ModelConfig.from_json(json.loads(json.dumps(preset.to_json()))) == preset
    assert model.ModelConfig.from_json(preset.plain.to_json()).adaptive is None


def test_run_config_goes_through_json_and_differences_name_the_fields():
    run = RunConfig(model=small_model())
    assert RunConfig.from_json(json.loads(json.dumps(run.to_json()))) == run
    other = run.replace(train=TrainConfig(steps=7), data=run.data.replace(seed=1))
    assert differences(run, other) == ["train.steps: 400 and 7", "data.seed: 0 and 1"]


def test_all_problems_are_reported_at_once():
    with pytest.raises(Refused) as refused:
        model.DeltaNetConfig(heads=0, value_heads=4, key_width=8, value_width=0, beta_max=3.0)
    assert all(name in str(refused.value) for name in ("heads", "value_width", "beta_max"))


def test_numbers_that_are_too_large_are_refused():
    """Steps are counted in int32, and a seed of 2**32 draws as 0 does."""
    with pytest.raises(Refused, match="at most 65536"):
        layout.parse("DG*99999999999")  # to list its layers would need more memory than there is
    with pytest.raises(Refused, match=r"steps is 2147483648; .*below 2\*\*31\n.*seed is 4294967296; .*below 2\*\*32"):
        TrainConfig(steps=2**31, seed=2**32)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"width": "128"}, "'width'"), ({"colour": 1}, "'colour'"), ({"compute_dtype": "float16"}, "float16"),
     ({"layout": "DDSG*2"}, "sliding must be given"), ({"layout": "DB*2"}, "resolvent must be given"),
     ({"layout": "DB*2", "resolvent": {"heads": 48}}, r"resolvent.heads is 48; width 128 must be a multiple of it"),
     ({"resolvent": {"heads": 0, "bound": 0.0}}, r"heads is 0(.|\n)*bound is 0.0; it must be positive"),
     ({"gsa": {"heads": 4}}, "head_width"),
     ({"layout": "DDA*2"}, "attention must be given"), ({"width": True}, "'width'"),
     ({"width": 2**63, "init_std": 10**400}, r"'width': .*beyond 64 bits\n.*'init_std': .*beyond 64 bits")],
)  # fmt: skip
def test_json_that_does_not_fit_is_refused(change, says):
    data = {**presets.tiny().to_json(), **change}
    with pytest.raises(Refused, match=says):
        model.ModelConfig.from_json(data)


def test_a_config_stored_before_a_field_was_there_says_what_was_computed_then():
    stored = presets.tiny_3b().to_json()
    del stored["adaptive"]["features"]
    assert ModelConfig.from_json(stored).adaptive.features == "mixer_input"
    assert {name for name, make in presets.PRESETS.items()
            if (adaptive := make().adaptive) is not None and adaptive.features == "stream_mean"
            } == {"3b", "3b_table", "tiny_3b"}  # fmt: skip


def test_a_pass_on_living_tokens_needs_tokens_that_finish_and_lengths_that_fall():
    stored = presets.tiny().to_json()
    del stored["adaptive"]["context"], stored["adaptive"]["lengths"]
    assert ModelConfig.from_json(stored).adaptive.context == "all"
    for lengths in ((), (0.5,), (1.0, 0.3, 0.4), (1.0, 0.0)):
        with pytest.raises(Refused, match=r"it must fall from 1\.0(.|\n)*context 'alive' needs halting 'token'"):
            model.AdaptiveConfig(context="alive", halting="batch", lengths=lengths)


def test_hard_weights_need_tokens_that_finish():
    stored = presets.tiny().to_json()
    del stored["adaptive"]["weights"]
    assert ModelConfig.from_json(stored).adaptive.weights == "soft"
    assert presets.tiny().adaptive.hard.threshold == 0.5
    with pytest.raises(Refused, match="weights 'hard' needs halting 'token'"):
        model.AdaptiveConfig(weights="hard", halting="batch")


def test_full_attention_says_what_does_not_fit_and_older_configs_have_none():
    with pytest.raises(Refused, match=r"(?s)multiple of kv_heads 3.*window is 0.*rope_share is 0\.3; .*it is 2\.4"):
        AttentionConfig(heads=4, kv_heads=3, head_width=8, rope_share=0.3, window=0)
    with pytest.raises(Refused, match="'all heads' is not one of 'none', 'head', 'all'"):
        AttentionConfig.from_json({"heads": 4, "kv_heads": 2, "head_width": 8, "qk_norm": "all heads"})
    assert AttentionConfig(4, 2, 256, rope_share=0.25).rope_width == 64
    assert AttentionConfig(4, 2, 7, rope="none").rope_width == 0
    with pytest.raises(Refused, match="null experts need the bias"):
        model.MoEConfig(experts=4, expert_width=8, router_bias=False)
    stored = presets.tiny_3b().to_json()
    del stored["attention"], stored["deltanet"]["head_gate_bias"], stored["deltanet"]["output_epsilon"]
    for name in ("normalise", "shared_gate", "router_bias"):
        del stored["moe"][name]
    assert ModelConfig.from_json(stored) == presets.tiny_3b()


@pytest.mark.parametrize("base", [1, 4, 40])
def test_the_factor_of_the_budget_is_no_bound(base):
    config = presets.tiny().gsa.replace(k_base=base, k_min=4, k_max=12)
    assert ModelConfig.from_json(presets.tiny().replace(gsa=config).to_json()).gsa == config
    with pytest.raises(Refused, match="k_min is 13; it must be at most k_max 12"):
        config.replace(k_min=13)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(Refused, match="small, tiny"):
        presets.preset("huge")
