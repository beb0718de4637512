"""Depth is not bought for passes without strength; what is dead is named and not counted."""

import dataclasses
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gt_jax.configs.layout import parse
from gt_jax.growth.coefficients import pass_weights
from gt_jax.growth.dealing import strongest
from gt_jax.growth.plan import make_plan
from gt_jax.growth.plan_entries import DEAD, Plan
from gt_jax.growth.plan_table import dead_layers, plan_lines
from gt_jax.growth.repetition import LayerRepetition, Repetition, from_json, reference
from gt_jax.growth.under_served import under_served

ONE = parse("DDDG")
LOPSIDED = from_json({f"layer{index}": {"k_exec": k} for index, k in enumerate((1, 1, 1, 4))})
KINDS = ("block", "dealt", "stack")


def measured(counts, alpha, decay=1.0):
    layers = []
    for k in counts:
        survival = [decay**j if j < k else 0.0 for j in range(max(k, len(alpha)))]
        layers.append(LayerRepetition(k, tuple(survival), math.fsum(survival)))
    return Repetition(tuple(layers), tuple(alpha))


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_with_many_passes_buys_no_dead_layers_for_the_others(kind):
    plan = make_plan(kind, LOPSIDED, ONE)
    assert plan.target_layout == ONE and plan.dead == () and plan.granted == (1,) * 4


@pytest.mark.parametrize("coefficient", ["expected", "schedule"])
def test_a_depth_that_is_asked_for_wins_and_its_dead_layers_are_named(coefficient):
    for wanted in ({"target_layers": 8}, {"target_layout": parse("DDDG*2")}):
        plan = make_plan("dealt", LOPSIDED, ONE, coefficient=coefficient, **wanted)
        assert str(plan.target_layout) == "DDDG*2" and plan.dead == (1, 4, 6)
        assert plan.copies == (2,) * 4 and plan.granted == (1, 1, 1, 2)
        assert [plan.entries[target].coefficient for target in plan.dead] == [0.0] * 3, "not 0.7: nobody asked for them"
        assert dead_layers(plan) == [
            "dead layers: the coefficient is below 0.02 in 3 of 8 target layers: 1 (pass 2 of layer 0), "
            "4 (pass 2 of layer 1), 6 (pass 2 of layer 2)"]
        lines = plan_lines(plan)
        assert sum(line.endswith("  dead") for line in lines) == 3
        assert any("asked for 7 copies by k_exec, got 5 layers that run and 3 dead layers" in line for line in lines)
    assert make_plan("dealt", LOPSIDED, ONE, target_layers=4).target_layout == ONE


def test_the_reference_counts_give_twenty_layers_as_ever():
    for kind in KINDS[:2]:
        plan = make_plan(kind, reference(), parse("DDDG*2"))
        assert str(plan.target_layout) == "DDDG*5"
    for coefficient, second in (("expected", 0.7 * 0.1**0.5), ("schedule", 0.7)):
        plan = make_plan("dealt", reference(), parse("DDDG*2"), coefficient=coefficient)
        assert plan.entries[1].coefficient == pytest.approx(second)
        assert plan.dead == (4,) and plan.entries[4].coefficient == 0, "layer 1 asked for one pass"


def test_half_of_a_group_must_run():
    assert len(make_plan("dealt", measured([2, 1, 1, 2], (1.0, 0.7)), ONE).entries) == 8  # two of four
    assert len(make_plan("dealt", measured([2, 1, 1, 1], (1.0, 0.7)), ONE).entries) == 4  # one of four
    faint = from_json({"layer0": {"k_exec": 4, "survival": [1.0, 0.5, 0.03, 0.02]}})  # 1, 0.35, 0.015, 0.007
    for kind in KINDS:
        assert make_plan(kind, faint, parse("D")).granted == (2,)
    exact = make_plan("layer", faint, parse("D"))  # this kind grants all that is asked for, and says which are dead
    assert exact.copies == (4,) and exact.granted == (2,) and exact.dead == (2, 3)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=4, max_size=4), st.floats(0.05, 1.0), st.sampled_from(KINDS),
       st.sampled_from(("up", "down", "nearest", "balance")), st.sampled_from(("expected", "schedule")))
def test_every_group_after_the_first_runs_by_half(counts, decay, kind, round, coefficient):
    made = measured(counts, (1.0, 0.7, 0.5, 0.35), decay)
    plan = make_plan(kind, made, ONE, round=round, coefficient=coefficient)
    running = len(plan.entries) - len(plan.dead)
    assert running >= 4 + (len(plan.entries) - 4) / 2
    full = make_plan(kind, made, ONE, round=round, coefficient=coefficient, target_layers=len(plan.entries))
    assert full.entries == plan.entries


def test_the_report_counts_only_what_runs():
    plan = make_plan("dealt", LOPSIDED, ONE, target_layers=8)
    faint = dataclasses.replace(plan.entries[3], coefficient=0.019)
    plan = dataclasses.replace(plan, entries=(*plan.entries[:3], faint, *plan.entries[4:]))
    assert plan.granted == (1,) * 4 and plan.mass_granted == (1.0,) * 4 and plan.dead == (1, 3, 4, 6)
    found = plan.to_json()
    assert found["granted"] == [1] * 4 and found["dead"] == [1, 3, 4, 6] and found["mass"]["granted"] == [1.0] * 4
    assert Plan.from_json(found) == plan
    assert [one.source for one in under_served(plan)] == [3], "nothing is missing where the pass itself is dead"
    negative = dataclasses.replace(plan, entries=(*plan.entries[:3], dataclasses.replace(faint, coefficient=-0.5),
                                                  *plan.entries[4:]))
    assert 3 not in negative.dead


def test_a_slot_goes_to_the_layer_whose_next_pass_is_strong():
    """At a rising alpha a third pass is strong, but a third copy alone would stand for pass 2."""
    alpha = (0.5, 0.1, 1.0)
    counts = dataclasses.replace(measured([3, 2, 1, 1], alpha), layers=(
        LayerRepetition(3, (1.0, 0.9, 0.9), 2.8), LayerRepetition(2, (1.0, 1.0, 0.0), 2.0),
        LayerRepetition(1, (1.0, 0.0, 0.0), 1.0), LayerRepetition(1, (1.0, 0.0, 0.0), 1.0)))
    weights = [pass_weights(layer, alpha, 64, "expected") for layer in counts.layers]
    asked = tuple(map(Fraction, counts.k_exec))
    # pass 3 of layer 0 is the strongest of all (0.9), its pass 2 (0.09) weaker than that of layer 1 (0.1)
    assert strongest([0, 1, 2], asked, weights, 4)[3] == (1, 2)
    assert strongest([0, 1, 2], asked, weights, 6)[3:] == [(1, 2), (0, 2), (0, 3)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=3, max_size=3), st.lists(st.floats(0.1, 2.0), min_size=1, max_size=5),
       st.floats(0.3, 1.0), st.integers(3, 12))
def test_each_slot_is_the_best_that_could_stand_there(counts, alpha, decay, slots):
    made = measured(counts, alpha, decay)
    weights = [pass_weights(layer, alpha, 64, "expected") for layer in made.layers]
    found = strongest([0, 1, 2], tuple(map(Fraction, counts)), weights, slots)
    for at in range(3, slots):
        taken = [sum(layer == one for layer, _ in found[:at]) for one in range(3)]
        layer, copy = found[at]
        assert copy == taken[layer] + 1
        best = max((taken[one] < counts[one], weights[one][taken[one]]) for one in range(3))
        assert (taken[layer] < counts[layer], weights[layer][copy - 1]) == best


def test_an_alpha_that_does_not_fall_grants_the_passes_that_are_there():
    plan = make_plan("dealt", measured([2, 1, 2, 3], (1.0,) * 4), ONE)
    assert "".join(f" {e.source}.{e.copy}" for e in plan.entries) == " 0.1 0.2 1.1 3.2 1.2 2.1 2.2 3.1"
    assert plan.granted == (2, 1, 2, 2) and DEAD == 0.02
