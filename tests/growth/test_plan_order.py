"""First passes stand in the source's order in every plan made from counts, whatever the layout."""

import dataclasses
import math
from itertools import groupby, pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gt_jax.configs.layout import Layout, Segment, parse
from gt_jax.errors import Refused
from gt_jax.growth import plan as plans
from gt_jax.growth.blocks import blocks, cut
from gt_jax.growth.coefficients import COEFFICIENTS, CORRECTIONS
from gt_jax.growth.plan import PASSES_FROM, make_plan, refuse_disorder
from gt_jax.growth.repetition import LayerRepetition, Repetition
from gt_jax.growth.rounding import ROUNDS

FROM_COUNTS = ("block", "dealt", "layer", "split", "stack")
patterns = st.text("DGS", min_size=1, max_size=8)


def measured(counts, decays=(0.8,), alpha=(1.0, 0.7, 0.5, 0.35)):
    layers = []
    for index, k in enumerate(counts):
        survival = [decays[index % len(decays)] ** j if j < k else 0.0 for j in range(max(k, len(alpha)))]
        weight = math.fsum(survival)
        layers.append(LayerRepetition(k, tuple(survival), weight, passes_run=(weight + k) / 2))
    return Repetition(tuple(layers), alpha)


@st.composite
def cases(draw):
    """A layout's text, counts with their decays and alpha, a kind and its options; `made` makes objects of them."""
    segments = draw(st.lists(st.tuples(patterns, st.integers(1, 3)), min_size=1, max_size=3))
    depth = sum(len(pattern) * repeats for pattern, repeats in segments)
    counts = draw(st.lists(st.integers(1, 6), min_size=depth, max_size=depth))
    decays = draw(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4))
    alpha = draw(st.lists(st.floats(0.01, 2.0), min_size=1, max_size=5))
    layout = ",".join(f"{pattern}*{repeats}" for pattern, repeats in segments)
    return layout, (counts, decays, tuple(alpha)), draw(st.sampled_from(FROM_COUNTS)), {
        "round": draw(st.sampled_from(ROUNDS)), "coefficient": draw(st.sampled_from(COEFFICIENTS)),
        "correct": draw(st.sampled_from(CORRECTIONS)), "passes_from": draw(st.sampled_from(PASSES_FROM[:2]))}


def of(layout, counts, kind):
    return layout, (counts,), kind, {}


def firsts(plan):
    return [entry.source for entry in plan.entries if entry.copy == 1]


@settings(max_examples=200, deadline=None)
@given(cases())
@example(of("DDDGDDDG", [2, 1, 2, 3, 2, 3, 4, 3], "dealt"))
@example(of("DDDGDDDG", [2, 1, 2, 3, 2, 3, 4, 3], "split"))
@example(of("DDGG", [2, 2, 2, 2], "dealt"))
@example(of("DDGG", [1, 3, 1, 3], "split"))
@example(of("DDGDDG", [2, 1, 2, 1, 2, 2], "dealt"))
@example(of("DSG", [2, 2, 2], "dealt"))
@example(of("SSDDDGG*2", [3, 2] * 7, "split"))
def test_first_passes_stand_in_the_order_of_the_source(case):
    text, counts, kind, options = case
    layout, counts = parse(text), measured(*counts)
    try:
        plan = make_plan(kind, counts, layout, **options)
    except Refused as error:
        assert options.get("round") == "balance", error  # with blocks of several lengths, and with split
        return
    assert firsts(plan) == list(range(len(layout)))
    assert plan.target_layout.types == "".join(layout.types[entry.source] for entry in plan.entries)
    for layer, copies in enumerate(plan.copies):  # every pass once, 1 to the number of copies
        assert sorted(e.copy for e in plan.entries if e.source == layer and e.copy) == list(range(1, copies + 1))


@settings(max_examples=20, deadline=None)
@given(patterns, st.integers(2, 3), st.integers(1, 2), st.lists(st.integers(1, 5), min_size=48, max_size=48))
def test_a_pattern_grows_alike_however_often_it_is_written(pattern, times, repeats, counts):
    once, restacked = Layout((Segment(pattern, times * repeats),)), Layout((Segment(pattern * times, repeats),))
    counts = measured(counts[:len(once)])
    if cut(pattern) * times == cut(pattern * times):  # not DGD: DGDDGD has a run of two
        for kind in ("block", "dealt", "split"):
            assert make_plan(kind, counts, restacked).entries == make_plan(kind, counts, once).entries


def test_the_pattern_twice_as_one_segment_grows_as_the_pattern():
    counts = measured([2, 1, 2, 3, 2, 3, 4, 3])
    for kind in FROM_COUNTS:
        one, other = (make_plan(kind, counts, parse(layout)) for layout in ("DDDG*2", "DDDGDDDG"))
        assert one.entries == other.entries and one.target_layout.types == other.target_layout.types
    assert str(make_plan("dealt", counts, parse("DDDGDDDG")).target_layout) == "DDDG*5"


@settings(deadline=None)
@given(patterns)
def test_a_pattern_is_cut_where_a_type_comes_again(pattern):
    parts = cut(pattern)
    assert "".join(parts) == pattern
    for part in parts:
        runs = [kind for kind, _ in groupby(part)]
        assert len(runs) == len(set(runs))
    for part, after in pairwise(parts):
        assert after[0] in part[:-1] and after[0] != part[-1]
    layers = [layer for block in blocks(Layout((Segment(pattern, 2), Segment("D", 1)))) for layer in block.layers]
    assert layers == list(range(2 * len(pattern) + 1))


def test_patterns_by_hand():
    wanted = {"DDDG": 1, "DDDGDDDG": 2, "DDGDDG": 2, "DGDG": 2, "DDGG": 1, "GDDD": 1, "D": 1}
    for pattern, parts in wanted.items():
        assert cut(pattern) == (pattern[: len(pattern) // parts],) * parts
    assert cut("DDGD") == ("DDG", "D") and cut("DSGDS") == ("DSG", "DS")


@pytest.mark.parametrize(("layout", "counts", "target"), [
    ("DDGD", [2, 2, 2, 3], "DDG*2,D*3"), ("DDGD*2", [2] * 8, "DDG*2,D*2,DDG*2,D*2"), ("DDGD*2", [1] * 8, "DDGD*2"),
    ("DGDG,D", [2, 2, 3, 3, 2], "DG*5,D*2"), ("DDGG", [2] * 4, "DDGG*2"),
])
def test_the_target_layout_of_a_cut_pattern(layout, counts, target):
    assert str(make_plan("dealt", measured(counts), parse(layout)).target_layout) == target


def entries(layout, counts, kind="dealt"):
    return "".join(f" {e.source}.{e.copy}" for e in make_plan(kind, measured(counts), parse(layout)).entries)


def test_orders_by_hand():
    assert entries("DDGG", [2] * 4) == " 0.1 0.2 2.2 3.2 1.1 1.2 2.1 3.1"
    assert entries("GDDD", [2] * 4) == " 0.1 1.1 1.2 2.1 0.2 2.2 3.1 3.2"
    assert entries("DSG", [2] * 3) == " 0.1 1.2 2.2 0.2 1.1 2.1"
    assert entries("GGDDDSS", [2] * 7) == " 0.1 1.1 2.1 2.2 3.1 5.2 6.2 0.2 1.2 3.2 4.1 4.2 5.1 6.1"
    assert entries("DDGG", [1, 1, 2, 3], "split") == " 0.1 1.1 2.0 3.3 0.0 1.0 2.2 3.2 0.0 1.0 2.1 3.1"


def test_a_plan_that_loses_the_order_is_refused_by_name(monkeypatch):
    plan = make_plan("dealt", measured([2, 1, 2, 3]), parse("DDDG"))
    swapped = (plan.entries[2], *plan.entries[1:2], plan.entries[0], *plan.entries[3:])
    with pytest.raises(Refused) as caught:
        refuse_disorder(dataclasses.replace(plan, entries=swapped))
    assert "the dealt plan from DDDG to DDDG*2 loses the source's order" in str(caught.value)
    assert "target layer 2 is pass 1 of source layer 0, target layer 0 before it that of source layer 1" in str(
        caught.value)

    def forwards(block, hands, groups):  # every type dealt from the first group on, as if no pattern had a G
        dealt = {kind: iter(sorted(hand)) for kind, hand in hands.items()}
        return [next(dealt[kind]) for _ in range(groups) for kind in block.pattern]

    monkeypatch.setattr(plans, "deal", forwards)
    with pytest.raises(Refused, match="loses the source's order"):
        make_plan("dealt", measured([2, 2, 2, 2]), parse("DDDG"))
