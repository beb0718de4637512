"""Plans: depth, order and types for any counts; every rounding and correction against arithmetic done here."""

import dataclasses
import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gt_jax.configs import layout
from gt_jax.errors import Refused
from gt_jax.growth import repetition
from gt_jax.growth.plan import (
    COEFFICIENTS,
    CORRECTIONS,
    ROUNDS,
    Entry,
    Plan,
    block_plan,
    default_layout,
    identity_plan,
    make_plan,
)
from gt_jax.growth.repetition import MOST_PASSES, LayerRepetition, Repetition, reference

ALPHA = (1.0, 0.7, 0.5, 0.35)


def measured(counts, survival=None):
    """Counts with a survival by layer (by default all tokens alive for k_exec passes)."""
    return Repetition(tuple(
        LayerRepetition(k, survival or (*[1.0] * k, *[0.0] * (4 - k)), float(k)) for k in counts))


def plan_of(counts, pattern="DDDG", **options):
    """A block plan at alpha_j, where every copy runs; so its depth is that of the rounding alone."""
    made = measured(counts)
    return block_plan(made, default_layout(made, pattern), **{"coefficient": "schedule"} | options)


def copies(plan):
    return plan.copies[::len(plan.source_layout.segments[0].pattern)]


patterns = st.sampled_from(["DDDG", "DG", "D", "DDG"])


@st.composite
def cases(draw):
    pattern = draw(patterns)
    blocks = draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(1, 9), min_size=blocks * len(pattern), max_size=blocks * len(pattern)))
    return pattern, counts


@given(cases(), st.sampled_from(ROUNDS), st.sampled_from(COEFFICIENTS), st.sampled_from(CORRECTIONS))
def test_every_block_plan_is_whole_blocks_in_order_with_matching_types(case, round, coefficient, correct):
    pattern, counts = case
    plan = plan_of(counts, pattern, round=round, coefficient=coefficient, correct=correct)
    width = len(pattern)
    assert len(plan.entries) == len(plan.target_layout) == sum(plan.copies)
    assert plan.target_layout.types == pattern * (len(plan.entries) // width)
    rows = [plan.entries[at:at + width] for at in range(0, len(plan.entries), width)]
    for row in rows:  # one copy of one block, its layers in order
        first = row[0].source
        assert first % width == 0
        assert [entry.source for entry in row] == list(range(first, first + width))
        assert len({entry.copy for entry in row}) == 1
    for before, after in pairwise([row[0] for row in rows]):
        again = (after.source, after.copy) == (before.source, before.copy + 1)
        onward = (after.source, after.copy) == (before.source + width, 1)
        assert again or onward
    assert {row[0].source for row in rows} == set(range(0, len(counts), width))
    assert all(math.isfinite(entry.coefficient) and entry.coefficient >= 0 for entry in plan.entries)
    assert plan.k_exec == tuple(counts)


@given(cases())
def test_roundings_bracket_the_sum(case):
    pattern, counts = case
    depth = {round: len(plan_of(counts, pattern, round=round).entries) for round in ROUNDS}
    assert depth["down"] <= depth["nearest"] <= depth["up"]
    assert sum(counts) <= depth["up"] < sum(counts) + len(counts)
    assert abs(depth["balance"] - sum(counts)) <= len(pattern) / 2 or depth["balance"] == len(counts)
    if all(sum(counts[at:at + len(pattern)]) % len(pattern) == 0 for at in range(0, len(counts), len(pattern))):
        assert set(depth.values()) == {sum(counts)}


@given(cases(), st.integers(0, 12))
def test_balance_reaches_any_whole_depth_and_gives_more_to_who_asks_more(case, extra):
    pattern, counts = case
    target = len(counts) + extra * len(pattern)
    plan = plan_of(counts, pattern, round="balance", target_layers=target)
    assert len(plan.entries) == target
    sums = [sum(counts[at:at + len(pattern)]) for at in range(0, len(counts), len(pattern))]
    assert min(copies(plan)) >= 1
    for asked, got in zip(sums, copies(plan), strict=True):
        for other_asked, other_got in zip(sums, copies(plan), strict=True):
            assert got >= other_got or asked <= other_asked


@given(cases(), st.sampled_from(COEFFICIENTS), st.sampled_from(CORRECTIONS))
def test_json_round_trip(case, coefficient, correct):
    plan = plan_of(case[1], case[0], coefficient=coefficient, correct=correct)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_reference_example():
    source = default_layout(reference())
    plan = block_plan(reference(), source, coefficient="schedule")
    assert str(source) == "DDDG*2" and str(plan.target_layout) == "DDDG*5"
    assert plan.k_exec == (2, 1, 2, 3, 2, 3, 4, 3) and plan.granted == (2, 2, 2, 2, 3, 3, 3, 3)
    assert plan.entries[0] == Entry(0, 1, 1.0) and plan.entries[4] == Entry(0, 2, 0.7)
    assert plan.entries[18] == Entry(6, 3, 0.5)
    found = plan.to_json()
    assert found["layout"] == "DDDG*5" and len(found["layers"]) == 20
    assert found["layers"][0] == {"target": 0, "type": "D", "source": 0, "copy": 1, "coefficient": 1.0}


def test_mass_kept_is_170_of_255_for_four_passes_in_two_copies():
    plan = plan_of([1, 1, 2, 4])
    assert copies(plan) == (2,)
    assert plan.demands[3].mass == pytest.approx(2.55) and plan.mass_granted[3] == pytest.approx(1.70)
    assert plan.mass_kept[3] == pytest.approx(0.6667, abs=1e-4)
    assert plan.total_mass_kept == pytest.approx(4 * 1.7 / (1 + 1 + 1.7 + 2.55))


@pytest.mark.parametrize(("round", "want"),
                         [("up", (3, 4)), ("down", (2, 3)), ("nearest", (2, 4)), ("balance", (2, 4))])
def test_roundings_of_9_and_14_passes(round, want):
    assert copies(plan_of([2, 1, 2, 4, 3, 3, 4, 4], round=round)) == want


def test_nearest_sends_a_half_up_and_down_keeps_one_copy():
    assert copies(plan_of([1, 1, 2, 2], round="nearest")) == (2,)
    assert copies(plan_of([1, 2, 2, 2], round="down")) == (1,)


def test_balance_by_hand():
    # shares of 6 copies: 9/23, 14/23 -> 2.348, 3.652: floors 2, 3, the sixth to the larger remainder
    assert copies(plan_of([2, 1, 2, 4, 3, 3, 4, 4], round="balance", target_layers=24)) == (2, 4)
    # a block that asks for nearly nothing still stands once, at the cost of the one most above its share
    assert copies(plan_of([1, 1, 1, 1, 9, 9, 9, 9, 9, 9, 9, 9], round="balance", target_layers=16)) == (1, 2, 1)
    # ties go to the earlier block
    assert copies(plan_of([1] * 8, round="balance", target_layers=12)) == (2, 1)


@pytest.mark.parametrize("correct", CORRECTIONS)
@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_corrections_by_independent_arithmetic(correct, coefficient):
    survival = {1: (1.0, 0.05, 0.0, 0.0), 2: (1.0, 0.6, 0.02, 0.0), 3: (1.0, 0.7, 0.4, 0.01), 4: (1.0, 0.9, 0.7, 0.3)}
    counts = [2, 1, 3, 4]  # 10 passes, 3 copies with up, mean 2.5
    made = Repetition(tuple(LayerRepetition(k, survival[k], 1.0) for k in counts))
    plan = block_plan(made, default_layout(made), coefficient=coefficient, correct=correct, target_layers=12)
    for layer, k in enumerate(counts):
        weight = [a * (s if coefficient == "expected" else 1) for a, s in zip(ALPHA, survival[k], strict=True)]
        factor = {"none": 1.0, "ratio": k / 2.5, "capped": min(k / 2.5, 1.0),
                  "mass": sum(weight[:k]) / sum(weight[:3])}[correct]
        got = [entry.coefficient for entry in plan.entries if entry.source == layer]
        assert got == pytest.approx([w * factor for w in weight[:3]])
        if correct == "mass":
            assert sum(got) == pytest.approx(sum(weight[:k]))
        running = sum(one for one in got if one >= 0.02)
        assert plan.mass_kept[layer] == pytest.approx(running / sum(weight[:k]))


def test_passes_beyond_the_schedule_keep_its_last_strength_and_beyond_survival_have_none():
    schedule = plan_of([6, 6], "DG")
    assert [entry.coefficient for entry in schedule.entries[::2]] == [1.0, 0.7, 0.5, 0.35, 0.35, 0.35]
    assert schedule.demands[0].mass == pytest.approx(3.25)
    short = Repetition((LayerRepetition(1, (1.0, 0.0, 0.0, 0.0), 1.0), LayerRepetition(5, (1.0,) * 5, 5.0)))
    expected = block_plan(short, default_layout(short, "DG"), coefficient="expected")  # one of two runs to the end
    assert [entry.coefficient for entry in expected.entries if entry.source == 0] == [1.0, 0.0, 0.0]


def test_identity_plan_runs_every_layer_once():
    plan = identity_plan(layout.parse("DDDG*2"))
    assert plan.target_layout == plan.source_layout
    assert plan.entries == tuple(Entry(layer, 1, 1.0) for layer in range(8))
    assert Plan.from_json(plan.to_json()) == plan


def test_segments_grow_each_by_its_own_blocks():
    made = measured([2, 2, 1, 3, 4])
    plan = block_plan(made, layout.parse("DG*2,D"), coefficient="schedule")
    assert str(plan.target_layout) == "DG*4,D*4"
    assert [entry.source for entry in plan.entries] == [0, 1, 0, 1, 2, 3, 2, 3, 4, 4, 4, 4]
    with pytest.raises(Refused, match="blocks of one length"):
        block_plan(made, layout.parse("DG*2,D"), round="balance")


@pytest.mark.parametrize("kind", ["block", "dealt", "layer"])
def test_balance_gives_no_unit_more_passes_than_there_can_be(kind):
    """In proportion the second block would get 77 of the 128 copies; every depth up to 64 copies of all is reached."""
    for depth in (8 * MOST_PASSES, 8 * MOST_PASSES - 4, 480):
        plan = make_plan(kind, reference(), layout.parse("DDDG*2"), round="balance", target_layers=depth)
        assert len(plan.entries) == depth and max(entry.copy for entry in plan.entries) <= MOST_PASSES


def test_unreachable_depth_says_what_can_be_reached():
    with pytest.raises(Refused) as caught:
        plan_of([2, 1, 2, 4, 2, 3, 4, 3], target_layers=20)
    for part in ("up gives 24", "down gives 20", "nearest gives 20", "balance gives 20"):
        assert part in str(caught.value)
    with pytest.raises(Refused, match="any multiple of 4 from 8"):
        plan_of([2, 1, 2, 4, 2, 3, 4, 3], target_layers=21)
    for depth in (4, 22, 0, 10**9):
        with pytest.raises(Refused, match="cannot be reached"):
            plan_of([2] * 8, round="balance", target_layers=depth)


def test_counts_of_another_depth_are_refused():
    with pytest.raises(Refused, match=r"6 layers are not a multiple of the pattern DDDG"):
        default_layout(measured([1] * 6))
    with pytest.raises(Refused, match=r"counts 8 layers, the source layout DDDG\*3 has 12"):
        block_plan(reference(), layout.parse("DDDG*3"))


def test_a_measured_layout_is_used_where_the_file_has_it():
    def layout_of(text, count):
        return default_layout(dataclasses.replace(measured([1] * count), meta={"layout": text}))

    assert str(layout_of("DG*2,D", 5)) == "DG*2,D"
    with pytest.raises(Refused, match=r"8 layers, but _meta\.layout DG has 2"):
        layout_of("DG", 8)
    with pytest.raises(Refused, match=r"_meta\.layout: .*X"):
        layout_of("DDXG*2", 8)


def test_unknown_options_are_refused_together():
    with pytest.raises(Refused) as caught:
        block_plan(reference(), layout.parse("DDDG*2"), round="sideways", coefficient="some", correct="much")
    assert all(word in str(caught.value) for word in ("sideways", "some", "much"))


def test_a_plan_that_does_not_fit_names_every_entry():
    plan = identity_plan(layout.parse("DG"))
    bad = (Entry(1, 1, 1.0), Entry(5, 1, math.nan))
    with pytest.raises(Refused) as caught:
        dataclasses.replace(plan, entries=bad)
    for part in ("target layer 0 is D, its source layer 1 is G", "source layer 5 is not in 0..1", "coefficient nan"):
        assert part in str(caught.value)
    with pytest.raises(Refused, match="1 entries for the 2 layers"):
        dataclasses.replace(plan, entries=(Entry(0, 1, 1.0),))
    identity_slot = dataclasses.replace(plan, entries=(Entry(0, 0, 0.0), Entry(1, 1, 1.0)))
    assert identity_slot.granted == identity_slot.copies == (0, 1) and identity_slot.dead == (0,)
    with pytest.raises(Refused, match="1 demands for the 2 layers"):
        dataclasses.replace(plan, demands=plan.demands[:1])


@pytest.mark.parametrize(("path", "value", "what"), [
    (("layers", 0, "source"), "zero", "layers[0].source"),
    (("layers", 1, "coefficient"), None, "layers[1].coefficient"),
    (("layers", 1, "target"), 7, "layers[1].target"), (("layers",), 3, "'layers'"), (("kind",), None, "'kind'"),
    (("requested",), [1.5], "'requested'"), (("mass",), [], "'mass.requested'"), (("options",), 1, "'options'"),
    (("options",), {"from": 3}, "'options.from' is 3; a text"), (("options",), {"alpha": [1.0, "x"]}, "list of finite"),
    (("layers", 1, "copy"), 10**12, "copy 1000000000000; there are 2 layers"),
    (("layout",), "DG*3", "2 entries for the 6 layers"), (("source_layout",), "DXG", "unknown layer type"),
], ids=str)
def test_json_that_is_no_plan(path, value, what):
    data = identity_plan(layout.parse("DG")).to_json()
    node = data
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(Refused) as caught:
        Plan.from_json(data)
    assert what in str(caught.value)


def test_sixty_four_passes_are_the_most():
    plan = plan_of([repetition.MOST_PASSES] * 2, "DG")
    assert len(plan.entries) == 128
