"""Growth covers every tensor of every preset, by each recipe; the identity of growth holds with every component on."""

from __future__ import annotations

import numpy as np
import pytest

from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs import presets
from gt_jax.configs.model import ExitConfig, MoEConfig, StackConfig
from gt_jax.errors import Refused
from gt_jax.growth import rules
from gt_jax.growth.plan import block_plan
from gt_jax.growth.repetition import reference
from gt_jax.growth.transform import abstract as shapes_of
from gt_jax.growth.transform import child_abstract, grow, match, target_config
from gt_jax.models.language_model import abstract
from tests.rarely import rarely
from tests.support import ATTENTION, RESOLVENT, perturbed, small_model

RECIPES = [("gain", "expected"), rarely("weights", "schedule"), rarely("output", "schedule")]
# small has the tensors of tiny, tiny_3b those of 3b (configs/test_presets.py), 3b_table the embedding of tiny
SOURCES = ("tiny", "3b", rarely("3b_table"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_every_tensor_of_every_preset_has_a_place_in_its_child(name):
    source = presets.preset(name)
    plan = block_plan(reference(), source.depth)
    child, shapes = child_abstract(source, plan), shapes_of(abstract(source))
    for carry in rules.CARRIES:
        matched = match(shapes, child, plan, carry)
        assert {leaf.path for leaf in matched.leaves} == set(child)
        assert all("/halting/" in path for path in matched.dropped)


def test_the_tensors_of_the_hybrids_have_a_rule_each():
    paths = flatten(abstract(presets.preset("groundthink_dsds")))  # both of their layer types
    attention = ATTENTION.replace(qk_norm="all", post_norm=True)
    moe = MoEConfig(2, 8, real_share=1.0, shared_gate=True)
    resolvent = RESOLVENT.replace(coupling="learned")
    paths |= flatten(abstract(small_model("DAB", attention=attention, moe=moe, resolvent=resolvent)))
    assert [path for path in paths if rules.rule(path) is None] == []


def test_the_large_preset_grows_into_the_larger_one():
    for source, child in (("3b", "8b"), ("tiny_3b", "tiny_8b")):
        plan = block_plan(reference(), presets.preset(source).depth)
        assert target_config(presets.preset(source), plan) == presets.preset(child)


@pytest.mark.slow
@pytest.mark.parametrize(("carry", "coefficient"), RECIPES)
def test_each_recipe_grows_the_tiny_preset(carry, coefficient):
    config = presets.tiny_3b()
    variables = perturbed(config)
    plan = block_plan(reference(), config.depth, coefficient=coefficient)
    grown = flatten(grow(variables, plan, config, carry=carry))
    wanted = flatten(abstract(presets.tiny_8b()))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in grown.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in wanted.items()
    }
    gains = np.concatenate([np.asarray(leaf) for path, leaf in grown.items() if path.endswith("/gain")])
    before = np.concatenate([np.asarray(leaf) for path, leaf in flatten(variables).items() if path.endswith("/gain")])
    assert (carry == "gain") != bool(set(gains) <= set(before))
    source = flatten(variables)
    for path in grown:
        if not path.startswith(("params/segment", "statistics/segment")):
            np.testing.assert_array_equal(grown[path], source[path], err_msg=path)


@pytest.mark.parametrize(("change", "word"), [
    ({"adaptive": None, "stack": StackConfig("midpoint")}, "midpoint"),
    ({"adaptive": None, "exit": ExitConfig()}, "exit"),
])
def test_stacks_that_growth_is_not_defined_for_are_refused(change, word):
    source = presets.tiny().replace(**change)
    with pytest.raises(Refused, match=word):
        target_config(source, block_plan(reference(), source.depth))
