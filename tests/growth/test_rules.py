"""The rule table: every tensor of the model has one rule, and nothing else has any."""

import math

import pytest

from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs import presets
from gt_jax.errors import Refused
from gt_jax.growth import rules
from gt_jax.models import language_model

LAYER = "params/segment0/layer3"
SCALED = [
    *[f"mixer/{name}/w" for name in (
        "query", "key", "value", "gate", "beta", "decay", "query_conv", "key_conv", "value_conv", "value_gate",
        "output_gate", "indexer_query", "indexer_key", "indexer_weight")],
    "mixer/beta/b", "mixer/decay/b", "mixer/a_log", "mixer/dt_bias", "mixer/indexer_bias", "mixer/head_importance",
    "mlp/gate/w", "mlp/up/w",
    "mixer/potential/w", "mixer/broadening", "mixer/coupling", "mixer/scale",
]
HALTING = ["halting/hidden/w", "halting/hidden/b", "halting/output/w", "halting/output/b", "halting/embedding"]


@pytest.mark.parametrize(("names", "rule"), [
    (SCALED, "scaled"), (["mixer/output/w", "mlp/down/w"], "output"), (["gain"], "gain"), (HALTING, "dropped"),
    (["mixer_norm/scale", "mlp_norm/scale", "mixer/output_norm/scale", "mixer/query_norm/scale"], "copied per layer"),
    (["mixer_post_norm/scale", "mlp_post_norm/scale"], "last norm"), (["mlp/shared_gate/w"], "scaled"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_layer_tensors(names, rule):
    assert {rules.rule(f"{LAYER}/{name}") for name in names} == {rule}


def test_tensors_of_the_whole_model_and_statistics():
    for path in ("params/embedding/table", "params/final_norm/scale", "params/unembedding/w"):
        assert rules.rule(path) == "global" and rules.stacked_path(path) is None
    assert rules.rule("statistics/segment0/layer3/mixer/variance_ema") == "statistics"


@pytest.mark.parametrize("path", [
    "params/segment0/layer3/mixer/unheard_of/w", "params/segment0/layer3/moe/router/w", "params/new/w", "gain",
    "params/segment0/layer3", "params/segmentX/layer3/gain", "params/segment0/layer3/gain/w", "optimizer/count",
    "params/segment0/layer3/mixer/query/w/extra", "x/params/embedding/table", "params/embedding/table\n",
])
def test_what_is_unknown_has_no_rule(path):
    assert rules.rule(path) is None


def test_every_tensor_of_the_model_has_a_rule_and_a_place():
    paths = flatten(language_model.abstract(presets.tiny()))
    assert [path for path in paths if rules.rule(path) is None] == []
    for path in paths:
        place = rules.stacked_path(path)
        assert (place is None) == (rules.rule(path) == "global")
        assert place is None or str(place) == path


def test_treatment_table():
    kinds = ("scaled", "output", "last norm", "gain", "copied per layer", "statistics", "global")
    scaled = {(rule, carry) for rule in kinds
              for carry in rules.CARRIES if rules.treatment(rule, carry).scaled}
    assert scaled == {("scaled", "weights"), ("output", "weights"), ("output", "output"), ("gain", "gain"),
                      ("last norm", "weights"), ("last norm", "output")}
    noisy = {rule for rule in kinds
             for carry in rules.CARRIES if rules.treatment(rule, carry).noisy}
    assert noisy == {"scaled", "output"}


@pytest.mark.parametrize(("noise", "seed"), [(-1e-4, 0), (math.nan, 0), (math.inf, 0), (0.0, -1), (0.0, 2**32)])
def test_noise_that_is_none(noise, seed):
    with pytest.raises(Refused, match="is needed"):
        rules.check_noise(noise, seed)


def test_noise_and_seed_are_refused_together():
    with pytest.raises(Refused, match=r"(?s)noise-std.*seed"):
        rules.check_noise(-1.0, -1)
    rules.check_noise(0.0, 2**32 - 1)
