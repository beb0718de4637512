"""What a growth costs, as the command says before it writes."""

import math

import pytest

from gt_jax.configs import presets
from gt_jax.growth.cost import growth_cost
from gt_jax.growth.plan import identity_plan, make_plan
from gt_jax.growth.repetition import from_json, reference
from gt_jax.growth.transform import abstract
from gt_jax.models import language_model
from gt_jax.models.flops import model_flops

SOURCE = presets.tiny().replace(width=32, mlp_width=32)
TENSORS = abstract(language_model.abstract(SOURCE))
PLAN = make_plan("dealt", reference(), SOURCE.depth)


def test_a_plain_model_grown_by_every_layer_once_costs_what_it_did():
    cost = growth_cost(SOURCE.plain, TENSORS, identity_plan(SOURCE.depth), None, 64)
    assert (cost.ratio, cost.counted, cost.dead) == (1.0, "passes_run", ())


def test_the_source_is_charged_the_passes_that_it_runs():
    """Not their weight: twice the passes cost the layers twice, the unembedding once."""
    once, twice = (growth_cost(SOURCE, TENSORS, PLAN, [passes] * 8, 64) for passes in (1.0, 2.0))
    layers = sum(model_flops(SOURCE, 64).layers)
    assert twice.source_flops - once.source_flops == pytest.approx(layers)
    assert twice.ratio < once.ratio
    assert (once.flops, once.layers, once.passes) == (twice.flops, 20, 8.0)
    assert "1.00 times" not in once.line() and "at the 8.0 passes that it runs" in once.line()


def test_counts_that_do_not_say_the_passes_give_a_bound():
    cost = growth_cost(SOURCE, TENSORS, PLAN, None, 64)
    assert (cost.passes, cost.counted) == (20.0, "k_exec")
    assert "at the 20.0 passes that it may run (k_exec)" in cost.line()


def test_parameters_are_the_childs_own():
    import jax

    from gt_jax.growth.transform import target_config

    child = language_model.abstract(target_config(SOURCE, PLAN))["params"]
    assert growth_cost(SOURCE, TENSORS, PLAN, None, 64).parameters == sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(child))


def test_dead_layers_are_named():
    counts = from_json({f"layer{index}": {"k_exec": k, "survival": [1.0, *[1.0 if k > 1 else 0.0] * 3]}
                        for index, k in enumerate([1, 1, 1, 4] * 2)})
    plan = make_plan("dealt", counts, SOURCE.depth, round="balance", target_layers=16)
    cost = growth_cost(SOURCE, TENSORS, plan, None, 64)
    assert cost.dead == plan.dead != ()
    assert f"{len(plan.dead)} of them dead" in cost.line()
