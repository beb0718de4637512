"""Layer, split, map and stack plans: order, layout, passes and strengths against a count done here, entry by entry."""

import dataclasses
import json
import math
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gt_jax.configs import layout
from gt_jax.errors import Refused
from gt_jax.growth.coefficients import COEFFICIENTS, CORRECTIONS
from gt_jax.growth.layer_map import read_map, spelled
from gt_jax.growth.plan import PASSES_FROM, PLANS, fitted, identity_plan, make_plan
from gt_jax.growth.plan_entries import Entry, Plan
from gt_jax.growth.plan_file import plan_json, read_plan_file
from gt_jax.growth.provenance import counts_record
from gt_jax.growth.repetition import LayerRepetition, Repetition, from_json, reference

ALPHA = (1.0, 0.7, 0.5, 0.35)
TWO = layout.parse("DDDG*2")


def measured(counts, decay=1.0):
    """Counts whose survival falls by `decay` a pass and ends after k_exec."""
    layers = []
    for k in counts:
        survival = [decay**j if j < k else 0.0 for j in range(max(4, k))]
        layers.append(LayerRepetition(k, tuple(survival), math.fsum(survival), passes_run=(k + 1) / 2))
    return Repetition(tuple(layers))


@st.composite
def cases(draw, kinds=PLANS):
    """A kind, counts with their decay, a layout, and options that go with the kind; `made` makes objects of them."""
    pattern = draw(st.sampled_from(["DDDG", "DG", "D", "DDG"]))
    blocks = draw(st.integers(1, 3))
    width = blocks * len(pattern)
    counts = draw(st.lists(st.integers(1, 6), min_size=width, max_size=width)), draw(st.floats(0.1, 1.0))
    kind = draw(st.sampled_from(kinds))
    options = {"coefficient": draw(st.sampled_from(COEFFICIENTS)), "correct": draw(st.sampled_from(CORRECTIONS)),
               "passes_from": draw(st.sampled_from(PASSES_FROM)),
               "round": draw(st.sampled_from(("up", "down", "nearest")))}
    if kind == "map":
        groups = draw(st.lists(st.integers(0, blocks - 1), min_size=1, max_size=5))
        options["layers"] = [block * len(pattern) + slot for block in groups for slot in range(len(pattern))]
    return kind, counts, f"{pattern}*{blocks}", options


def made(case):
    kind, (counts, decay), notation, options = case
    return kind, measured(counts, decay), layout.parse(notation), options


def weight(counts, layer, j, coefficient, asked):
    """alpha_j, times survival_j for `expected` (j from 1); for `schedule` nothing past the passes asked for."""
    survival = counts.layers[layer].survival
    alive = survival[j - 1] if j <= len(survival) else 0.0
    return ALPHA[min(j, 4) - 1] * (alive if coefficient == "expected" else float(j - 1 < round(asked, 6)))


def closes(kind, source, layer):
    """Whether the layer's first pass is its last copy: G of a dealt or split DDDG."""
    pattern = source.segments[0].pattern
    ends = layer % len(pattern) == len(pattern) - 1 > 0
    return kind in ("dealt", "split") and ends and pattern.count(pattern[-1]) == 1


@settings(deadline=None)
@given(cases())
def test_each_copy_is_the_next_pass_at_the_strength_of_the_equations(case):
    kind, counts, source, options = made(case)
    plan = make_plan(kind, counts, source, **options)
    width, seen = len(source.segments[0].pattern), [0] * len(source)
    asked = [getattr(layer, options["passes_from"]) for layer in counts.layers]
    for entry in plan.entries:
        if entry.copy == 0:
            assert kind == "split" and entry.coefficient == 0 and entry.dead
            continue
        layer, k = entry.source, counts.layers[entry.source].k_exec
        seen[layer] += 1
        assert entry.copy == (plan.copies[layer] - seen[layer] + 1 if closes(kind, source, layer) else seen[layer])
        first = layer // width * width
        ratio = asked[layer] / (sum(asked[first:first + width]) / width)
        limit = asked[layer] if kind in ("dealt", "layer", "split") else math.inf
        total = [sum(weight(counts, layer, j, options["coefficient"], most) for j in range(1, count + 1))
                 for count, most in ((k, math.inf), (plan.copies[layer], limit))]
        factor = {"none": 1.0, "ratio": ratio, "capped": min(ratio, 1.0), "mass": total[0] / total[1]}
        want = weight(counts, layer, entry.copy, options["coefficient"], limit) * factor[options["correct"]]
        assert entry.coefficient == pytest.approx(want, rel=1e-4)
        assert plan.demands[layer].mass == pytest.approx(total[0])
    assert plan.copies == tuple(seen) and plan.k_exec == counts.k_exec
    assert [demand.passes for demand in plan.demands] == pytest.approx(asked, abs=1e-6)
    runs = [[entry.coefficient for entry in plan.entries if entry.source == layer and entry.coefficient >= 0.02]
            for layer in range(len(source))]
    assert plan.granted == tuple(map(len, runs)) and plan.mass_granted == pytest.approx(list(map(math.fsum, runs)))
    assert len(plan.dead) + sum(plan.granted) == len(plan.entries)
    if options["correct"] == "mass":
        kept = [math.fsum(entry.coefficient for entry in plan.entries if entry.source == layer) / demand.mass
                for layer, demand in enumerate(plan.demands)]
        assert all(share == pytest.approx(1.0) for share, got in zip(kept, seen, strict=True) if got)


@settings(deadline=None)
@given(cases())
def test_types_layouts_and_json_hold_for_every_kind(case):
    kind, counts, source, options = made(case)
    plan = make_plan(kind, counts, source, **options)
    types = "".join(source.types[entry.source] for entry in plan.entries)
    assert plan.target_layout.types == types
    assert layout.parse(str(plan.target_layout)) == plan.target_layout
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    again = make_plan(kind, counts, source, **options, target_layout=plan.target_layout)
    assert again == plan
    runs = ",".join(f"{one}*{len(list(run))}" for one, run in groupby(types))  # the same types written otherwise
    assert fitted(plan, layout.parse(runs)).entries == plan.entries
    if kind in ("block", "dealt", "split", "stack"):
        assert {segment.pattern for segment in plan.target_layout.segments} == {source.segments[0].pattern}


@settings(deadline=None)
@given(cases(kinds=("layer",)))
def test_a_layer_plan_is_the_order_of_the_recurrence(case):
    _, counts, source, options = made(case)
    plan = make_plan("layer", counts, source, **options | {"passes_from": "k_exec"})
    assert [(entry.source, entry.copy) for entry in plan.entries] == [
        (layer, j + 1) for layer, k in enumerate(counts.k_exec) for j in range(k)]
    if options["correct"] == "none":
        dead = math.fsum(plan.entries[target].coefficient for target in plan.dead)
        asked = math.fsum(demand.mass for demand in plan.demands)
        assert math.fsum(plan.mass_granted) == pytest.approx(asked - dead)
        assert plan.total_mass_kept == pytest.approx(1 - dead / asked)


def in_order(kind, source, entries):
    """Whether the copies of one type come in the recurrence's order, those of a closing layer last pass first."""
    order = [(entry.source, -entry.copy if closes(kind, source, entry.source) else entry.copy)
             for entry in entries if entry.copy]
    return order == sorted(order)


@settings(deadline=None)
@given(cases(kinds=("dealt",)))
def test_a_dealt_plan_is_a_block_plan_of_the_strongest_passes_in_the_order_of_the_recurrence(case):
    _, counts, source, options = made(case)
    options |= {"passes_from": "k_exec", "correct": "none"}
    depth = len(make_plan("block", counts, source, **options | {"coefficient": "schedule"}).entries)
    plan, block = (make_plan(kind, counts, source, **options, target_layers=depth) for kind in ("dealt", "block"))
    assert plan.target_layout == block.target_layout and min(plan.copies) >= 1
    pattern = source.segments[0].pattern
    for kind in set(pattern):
        assert in_order("dealt", source, [e for e in plan.entries if source.types[e.source] == kind])
    for first in range(0, len(source), len(pattern)):
        for kind in set(pattern):
            own = [first + slot for slot, other in enumerate(pattern) if other == kind]
            dealt, copied = (sum(p.copies[layer] for layer in own) for p in (plan, block))
            assert dealt == copied  # every slot of the block plan is used
            if options["coefficient"] == "expected":  # here no pass beyond k_exec has any strength
                assert sum(plan.mass_granted[layer] for layer in own) >= sum(
                    block.mass_granted[layer] for layer in own) - 1e-9


def test_dealt_by_hand():
    plan = make_plan("dealt", reference(), TWO)
    assert str(plan.target_layout) == "DDDG*5" and plan.copies == (2, 2, 2, 2, 2, 3, 4, 3)
    assert plan.granted == (2, 1, 2, 2, 2, 3, 4, 3) and plan.dead == (4,)
    assert "".join(f" {entry.source}.{entry.copy}" for entry in plan.entries) == (
        " 0.1 0.2 1.1 3.2 1.2 2.1 2.2 3.1 4.1 4.2 5.1 7.3 5.2 5.3 6.1 7.2 6.2 6.3 6.4 7.1")


@settings(deadline=None)
@given(cases(kinds=("split",)))
def test_a_split_plan_grants_every_pass_and_fills_the_least_number_of_groups(case):
    _, counts, source, options = made(case)
    plan = make_plan("split", counts, source, **options | {"passes_from": "k_exec"})
    pattern = source.segments[0].pattern
    width = len(pattern)
    assert plan.copies == counts.k_exec
    groups = sum(max(math.ceil(sum(k for k, own in zip(counts.k_exec[at:at + width], pattern, strict=True)
                                   if own == kind) / pattern.count(kind)) for kind in pattern)
                 for at in range(0, len(source), width))
    assert len(plan.entries) == groups * width
    for kind in set(pattern):  # within a type the order of the recurrence; identities at one end of a block's run
        own = [entry for entry in plan.entries if source.types[entry.source] == kind]
        assert in_order("split", source, own)
        for block in range(0, len(source), width):
            filled = [entry.copy > 0 for entry in own if block <= entry.source < block + width]
            assert filled == sorted(filled, reverse=kind != pattern[-1])


def test_split_by_hand():
    plan = make_plan("split", measured([2, 1, 2, 3]), layout.parse("DDDG"), coefficient="schedule")
    assert str(plan.target_layout) == "DDDG*3" and plan.mass_kept == (1.0,) * 4
    assert [(entry.source, entry.copy) for entry in plan.entries] == [
        (0, 1), (0, 2), (1, 1), (3, 3), (2, 1), (2, 2), (2, 0), (3, 2), (0, 0), (1, 0), (2, 0), (3, 1)]
    late = make_plan("split", measured([3, 1, 2, 1]), layout.parse("DDDG"), coefficient="schedule")
    assert [(entry.source, entry.copy) for entry in late.entries] == [
        (0, 1), (0, 2), (0, 3), (3, 0), (1, 1), (2, 1), (2, 2), (3, 1)]  # G after the D layers, as in the source
    assert late.entries[3] == Entry(3, 0, 0.0)


def test_layer_by_hand():
    plan = make_plan("layer", reference(), TWO, coefficient="schedule")
    assert str(plan.target_layout) == "D*5,G*3,D*9,G*3" and plan.granted == (2, 1, 2, 3, 2, 3, 4, 3)
    assert [entry.coefficient for entry in plan.entries[5:8]] == [1.0, 0.7, 0.5]
    once = make_plan("layer", measured([1] * 8), TWO)
    assert once.target_layout == TWO and once.entries == identity_plan(TWO).entries
    more = make_plan("layer", reference(), TWO, round="balance", target_layers=40)
    assert more.copies == (4, 2, 4, 6, 4, 6, 8, 6) and sum(more.granted) == 20


def test_stack_by_hand():
    sizes = {way: len(make_plan("stack", reference(), TWO, round=way).entries) for way in ("up", "down", "nearest")}
    assert sizes == {"up": 24, "down": 16, "nearest": 24}  # 20 passes of 8 layers are 2.5 stacks
    plan = make_plan("stack", reference(), TWO, round="balance", target_layers=32, coefficient="schedule")
    assert str(plan.target_layout) == "DDDG*8" and plan.granted == (4,) * 8
    assert [entry.source for entry in plan.entries] == [*range(8)] * 4
    mixed = make_plan("stack", measured([2] * 8), layout.parse("D*5,G*3"))
    assert str(mixed.target_layout) == "D*5,G*3,D*5,G*3"
    with pytest.raises(Refused, match="any multiple of 8 from 8"):
        make_plan("stack", reference(), TWO, target_layers=20)


def test_the_re_entry_map_keeps_the_last_layer_last():
    layers = read_map("1-8,1-4,1-8", 8)
    plan = make_plan("map", reference(), TWO, layers=layers, coefficient="schedule")
    assert str(plan.target_layout) == "DDDG*5" and plan.granted == (3,) * 4 + (2,) * 4
    assert [entry.source for entry in plan.entries] == [*range(8), *range(4), *range(8)]
    assert [entry.coefficient for entry in plan.entries] == [1.0] * 8 + [0.7] * 4 + [0.5] * 4 + [0.7] * 4
    assert plan.entries[-1] == Entry(7, 2, 0.7)
    assert plan.mass_kept[6] == pytest.approx(1.7 / 2.55)
    part = make_plan("map", reference(), TWO, layers=(4, 5, 6, 7))
    assert part.granted == (0,) * 4 + (1,) * 4 and part.mass_kept[0] == 0


def test_mean_weight_counts_means_to_six_decimals():
    layers = tuple(LayerRepetition(4, (1.0, *[0.0] * 3), mean) for mean in (1.1, 1.2, 0.7 + 0.3, 0.7 + 1e-9))
    counts = dataclasses.replace(measured([1]), layers=layers)
    four = layout.parse("DDDG")
    plan = make_plan("block", counts, four, passes_from="mean_weight")
    assert plan.copies == (1,) * 4, "the means add up to 4 but for rounding"
    assert [demand.passes for demand in plan.demands] == pytest.approx((1.1, 1.2, 1.0, 0.7))
    assert plan.k_exec == (4,) * 4
    assert plan.options["from"] == "mean_weight"
    assert make_plan("layer", counts, four, passes_from="mean_weight").copies == (2, 2, 1, 1)
    for mean in (0.0, -1.0, 65.0):
        broken = dataclasses.replace(counts, layers=(dataclasses.replace(layers[0], mean_weight=mean), *layers[1:]))
        with pytest.raises(Refused, match=r"layer0\.mean_weight is"):
            make_plan("block", broken, four, passes_from="mean_weight")


def test_a_plan_from_the_passes_run_needs_counts_that_have_them():
    """The same layer weighs 1.29 and runs 2.15 passes: plans from the one and from the other differ."""
    layers = tuple(LayerRepetition(3, (1.0, 0.27, 0.02, 0.0), 1.29, passes_run=2.15) for _ in range(4))
    counts, four = dataclasses.replace(measured([1]), layers=layers), layout.parse("DDDG")
    depth = {name: make_plan("layer", counts, four, round="nearest", passes_from=name).copies for name in PASSES_FROM}
    assert depth == {"k_exec": (3,) * 4, "mean_weight": (1,) * 4, "passes_run": (2,) * 4}
    some = dataclasses.replace(counts, layers=(*layers[:2], dataclasses.replace(layers[2], passes_run=None), layers[3]))
    with pytest.raises(Refused, match=r"no passes_run of layer2.* --from k_exec or --from mean_weight"):
        make_plan("layer", some, four, passes_from="passes_run")


def refusal(kind, **options):
    with pytest.raises(Refused) as caught:
        make_plan(kind, reference(), TWO, **options)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "options", "parts"), [
    ("sideways", {}, ["kind 'sideways'"]), ("block", {"passes_from": "p_mu"}, ["from 'p_mu'"]),
    ("split", {"round": "balance"}, ["--round balance does not go with the split plan"]),
    ("split", {"target_layers": 20}, ["the split plan gives: 24 layers", "DDDG*6", "--round up gives 24"]),
    ("map", {"layers": (0, 1, 2, 3), "target_layers": 20}, ["the map plan gives: 4 layers"]),
    ("map", {}, ["names no layer"]), ("map", {"layers": (0, 8, -1)}, ["source layers [8, -1]; layers are 0 to 7"]),
    ("map", {"layers": (0, 1, 2, 4)}, ["mixes types", "entry 4 must be of type G", "is layer 5, of type D",
                                       "D: 1-3,5-7; G: 4,8", "--target-layout D*4"]),
    ("map", {"layers": (0, 1, 2, 3, 4)}, ["entry 6 must be of type D", "is missing", "--target-layout D*3,G,D"]),
    ("layer", {"target_layout": layout.parse("DDDG*5")},
     ["target layer 3 is G in DDDG*5, the plan puts source layer 2 there, a D layer", "more",
      "--target-layout D*5,G*3,D*9,G*3 is what this plan gives", "--plan block"]),
    ("block", {"target_layout": layout.parse("DDDG*65536")}, ["has 262144 layers"]),
    ("map", {"layers": (0, 1, 2, 4), "target_layout": layout.parse("DDDG")}, ["target layer 3 is G", "G: 4,8"]),
], ids=str)
def test_refusals_say_what_would_be_right(kind, options, parts):
    message = refusal(kind, **options)
    assert all(part in message for part in parts), message


def test_a_map_of_other_types_is_taken_where_the_layout_says_so():
    plan = make_plan("map", reference(), TWO, layers=(0, 1, 2, 4), target_layout=layout.parse("D*4"))
    assert str(plan.target_layout) == "D*4"
    free = make_plan("map", measured([1, 1]), layout.parse("D,G"), layers=(0, 0, 1))  # this source has no one pattern
    assert str(free.target_layout) == "D*2,G"


@settings(deadline=None)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=30))
def test_maps_read_back_what_is_spelled(layers):
    assert read_map(spelled(layers), 12) == tuple(layers)


@pytest.mark.parametrize("text", [
    "1-8\n1-4\n1-8\n", "1-8,1-4,1-8", "\ufeffTarget, Source ,note\n0,1-8,\n8,1-4,again\n\n12,1-8,",
    "source\n1-8\n1-4\n1-8",
], ids=repr)
def test_maps_from_csv(tmp_path, text):
    path = tmp_path / "map.csv"
    path.write_text(text, encoding="utf-8")
    assert read_map(str(path), 8) == read_map("1-8, 1-4 ,1 - 8", 8)


@pytest.mark.parametrize(("text", "parts"), [
    ("", ["item 1 is ''"]), ("1-9", ["'1-9'", "from 1 to 8"]), ("0", ["'0'"]), ("4-1", ["'4-1'", "rising range"]),
    ("1-8,,x,9999999999", ["item 2 is ''", "item 3 is 'x'", "item 4 is '9999999999'"]), ("1.5", ["'1.5'"]),
    ("nowhere.csv", ["nowhere.csv does not exist"]),
], ids=repr)
def test_maps_that_are_none(text, parts):
    with pytest.raises(Refused) as caught:
        read_map(text, 8)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(("content", "what"), [
    (b"", "names no layer"), (b"source\n", "names no layer"), (b"source,x\n1,2\n0,1\n", "line 3 is '0'"),
    (b"note,source\n1\n", "line 2 is ''"), (b"\xff\xfe\x00", "cannot be read"),
    (b'"' + b"1" * 200_000, "cannot be read"),
], ids=["empty", "head", "zero", "short", "binary", "long"])
def test_csv_files_that_are_none(tmp_path, content, what):
    path = tmp_path / "map.csv"
    path.write_bytes(content)
    with pytest.raises(Refused, match=what) as caught:
        read_map(str(path), 8)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("change", "what"), [
    ({"asked": [1.0]}, "asked has 1 values"), ({"asked": [-1.0] * 8}, r"asked\[0\] is -1.0"), ({"asked": 1}, "'asked'"),
    ({"mass": {"requested": [1.0]}}, r"mass\.requested has 1 values"),
    ({"requested": [10**400] * 8}, "'requested'"), ({"requested": [-1] * 8}, r"requested\[0\] is -1"),
    ({"layout": "DDDG*99999999999999999999"}, "at most 65536"),
    ({"source_layout": "DDDG*99999999999999999999"}, "at most 65536"),
    ({"options": {"alpha": math.inf}}, r"options\.alpha"), ({"layers": [1]}, r"layers\[0\]\.source"),
    ({"options": {"mine": {"a": [0, math.nan]}}}, r"options\.mine\.a\.1' is nan"),
    ({"options": {"coefficient": "gates", "alpha": None}}, r"options\.alpha' is None; of a plan that keeps gates"),
], ids=str)
def test_plan_files_that_are_none(tmp_path, change, what):
    plan = make_plan("block", reference(), TWO)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json()))
    assert read_plan_file(path)[0] == plan
    path.write_text(json.dumps(plan.to_json() | change))
    with pytest.raises(Refused, match=what) as caught:
        read_plan_file(path)
    assert str(path) in str(caught.value)


def test_counts_with_numbers_that_are_none_are_written_as_texts():
    counts = from_json({"_meta": {"note": [1.0, {"loss": math.nan}]}} | {f"layer{i}": {"k_exec": 1} for i in range(8)})
    found = plan_json(make_plan("block", counts, TWO), counts)
    assert json.loads(json.dumps(found, allow_nan=False))["counts"]["values"]["_meta"]["note"] == [1.0, {"loss": "nan"}]
    assert json.loads(json.dumps(counts_record(counts), allow_nan=False))["counts"]["measured"]["note"][1] == {
        "loss": "nan"}, "so does what a grown checkpoint keeps of them, and --json shows"


def test_plan_files_of_before_asked_was_written_are_read(tmp_path):
    data = make_plan("block", reference(), TWO).to_json()
    del data["asked"], data["dead"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    assert [demand.passes for demand in read_plan_file(path)[0].demands] == [2.0, 1.0, 2.0, 3.0, 2.0, 3.0, 4.0, 3.0]
    for text, what in (("[1]", "not an object"), ("{", "is not JSON"), ("[" * 100_000, "is not JSON")):
        path.write_text(text)
        with pytest.raises(Refused, match=what):
            read_plan_file(path)
    path.write_bytes(b"\xff")
    for bad, what in ((path, "cannot be read"), (tmp_path, "is a directory"), (tmp_path / "x.json", "does not exist")):
        with pytest.raises(Refused, match=what):
            read_plan_file(bad)
