"""The study of whether growth pays: what contenders may cost, their schedules, and what figures decide. No training."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import contract, growth_pays
from experiments.growth_study.flops import training_flops
from experiments.pays_study import budget
from experiments.pays_study.budget import Spent
from experiments.pays_study.findings import comparisons, summary
from experiments.pays_study.picture import draw
from experiments.pays_study.recipes import EXPECTED, FULL, README, STACK_ONCE, plan_of
from experiments.pays_study.setting import runs
from experiments.pays_study.study import (
    AGAIN,
    CONTROL,
    DEEPER,
    GROWN,
    JUMPS,
    LONG,
    NARROW,
    ON,
    ON_FORCED,
    ONCE_SOURCE,
    SCALES,
    SCRATCH,
    SHALLOW,
    SOURCE,
    STACKED,
    TEXT,
    Study,
    Wanted,
    first_round,
    grown_tries,
    scaled,
    second_round,
    tries,
    unchanged,
)
from gt_jax.errors import Failed, Refused
from gt_jax.growth import repetition
from gt_jax.training.price import phase

SMALL = JUMPS.replace(of=JUMPS.of.replace(width=16, rows=8), budget=60, held_out_batches=6)
POINTS = (0.25, 0.5, 0.75)


def test_a_step_costs_the_passes_that_it_computed():
    cost, tokens = budget.cost_of(SMALL, SMALL.source), SMALL.batch * SMALL.length
    by_step = [[1.0], [4.0], [2.5]]
    wanted = sum(training_flops(SMALL.source, SMALL.length, one) for one in by_step) * tokens
    assert cost.computed(by_step) == pytest.approx(wanted, rel=1e-12)
    assert cost.model([[1.0]]) < cost.computed([[1.0]])  # without the second unembedding, and a recurrence by tokens
    assert budget.whole(SMALL) == pytest.approx(60 * training_flops(SMALL.deep, SMALL.length) * tokens, rel=1e-12)


def test_a_source_takes_its_share_of_the_budget_and_its_child_the_rest():
    for point in POINTS:
        steps = budget.source_steps(SMALL, point)
        share = point * budget.whole(SMALL)
        assert budget.planned_cost(SMALL, steps) <= share < budget.planned_cost(SMALL, steps + 1)
        made = budget.making(SMALL, [4.0], len(SMALL.recipes))
        spent = Spent(budget.planned_cost(SMALL, steps) + made)
        left = budget.whole(SMALL) - spent.flops - budget.child_steps(SMALL, spent) * budget.deep_step(SMALL)
        assert 0 <= left < budget.deep_step(SMALL)
    spent = Spent(budget.planned_cost(SMALL, steps))
    passes = budget.with_audits(SMALL, [3.0])
    assert passes == pytest.approx([3.1])  # one step of ten computes all four
    more = budget.further_steps(SMALL, spent, passes) * budget.cost_of(SMALL, SMALL.source).computed(passes)
    assert 0 <= budget.whole(SMALL) - spent.flops - more < budget.deep_step(SMALL)


def test_all_of_a_sources_phases_lie_within_its_own_part():
    steps = budget.source_steps(SMALL, 0.5)
    passes = budget.planned_passes(SMALL, steps)
    assert passes[0] == 1 and set(passes) == {1, 2, 3, 4} and np.all(np.diff(passes) >= 0)
    assert abs(np.argmax(passes == 4) - SMALL.of.curriculum * steps) <= 1
    assert SMALL.data(0, steps, ()).curriculum_rows == round(SMALL.of.curriculum * steps) * SMALL.batch
    train = SMALL.source_train(steps, 2e-3)
    assert train.optimizer.rate(steps - 1, train.steps) == train.optimizer.rate(steps, train.steps) == 2e-3
    for step in (0, steps // 3, steps // 2, steps - 1):  # the training's own count: forced, then 0 for free ones
        count = int(phase(train.price, jnp.asarray(step), train.steps, 4).control.forced)
        assert count == (passes[step] if step < SMALL.of.opened * steps else 0)
    opened = train.price.forced_until * train.steps
    assert opened == pytest.approx(SMALL.of.opened * steps) and train.price.clipped_until == train.price.forced_until


def test_every_rate_falls_once_over_the_same_part_of_the_budget():
    fell = {}
    for point in POINTS:
        source, steps = budget.source_steps(SMALL, point), round(SMALL.budget * (1 - point))
        train = SMALL.further(source, 2e-3, steps, SMALL.fall(point))
        rates = [train.optimizer.rate(step, steps) for step in range(steps)]
        assert max(rates) == rates[0] == pytest.approx(2e-3)  # no warm-up: it stood there
        fell[point] = sum(rate < 2e-3 for rate in rates)
        assert train.moments == "carried" and train.price.forced_until == train.price.forced_ramp == 0
    assert set(fell.values()) <= {11, 12}  # a fifth of 60 steps, of which the first has the old rate
    scratch = SMALL.scratch_train(2e-3, SMALL.budget)
    assert sum(scratch.optimizer.rate(step, 60) < 2e-3 for step in range(3, 60)) == 11
    flat = SMALL.further(source, 2e-3, 5, 0.0)
    assert [flat.optimizer.rate(step, 5) for step in range(5)] == pytest.approx([2e-3] * 5)


def measured(**layer):
    return repetition.from_json({"_meta": {"alpha": [1.0] * 4}, "layer0": {"k_exec": 4, "mean_weight": 2.2, **layer}})


def test_children_of_one_layer_have_it_as_often_as_the_deep_model_whatever_was_measured():
    counts = measured(survival=[1.0, 0.6, 0.4, 0.2])
    for setting, length in ((JUMPS, 4), (DEEPER, 8)):
        source, deep = setting.source.depth, setting.deep.depth
        full = plan_of(FULL, counts, source, deep)
        assert str(deep) == str(full.target_layout) == f"D*{length}"
        assert [entry.coefficient for entry in full.entries] == [1.0] * length
        weak = [entry.coefficient for entry in plan_of(EXPECTED, counts, source, deep).entries]
        assert weak == [1.0, 0.6, 0.4, 0.2, 0.0, 0.0, 0.0, 0.0][:length]
        # every alpha is 1: the readme's rule is the same child, so it is no control here
        assert plan_of(README, counts, source, deep).entries == full.entries
    assert runs("DDDDGGD") == "D*4,G*2,D" and DEEPER.harder == ("5", "6", "7", "8") and JUMPS.harder == ()
    assert JUMPS.source == DEEPER.replace(deeper="", of=JUMPS.of).source  # the same model, for other questions


def test_the_shallow_model_from_scratch_costs_what_all_others_do():
    setting = TEXT.replace(shallow=True)
    steps, cost = budget.shallow_steps(setting), budget.cost_of(setting, setting.source.plain)
    assert 0 <= budget.whole(setting) - steps * cost.computed([1.0] * 4) < cost.computed([1.0] * 4)
    best = {kind: found[-1][0] for kind, found in tries(setting, (0, 1)).items()}
    models = [one.model for one in first_round(setting, (0, 1), best)]
    assert models.count(SHALLOW) == 2 and SHALLOW not in tries(TEXT, (0, 1))
    # so does what is made of a source that ran once: its own rate, and that of what was stacked
    setting = setting.replace(points=(0.25, 0.5), child_rates=(1e-3, 4e-3))
    best |= {ONCE_SOURCE: best[ONCE_SOURCE]._replace(rate=2e-3)}
    tried = grown_tries(setting, (0, 1), best)
    assert [one.own for (one,) in tried[STACKED]] == [1e-3, 4e-3]
    assert [one.own for (one,) in tried[GROWN]] == [1e-3, None]
    best |= {kind: units[0][0] for kind, units in tried.items()}
    stacked = [one for one in second_round(setting, (0, 1), best) if one.kind == STACKED]
    sources = {one.name for one in first_round(setting, (0, 1), best) if one.kind == ONCE_SOURCE}
    assert {one.source.name for one in stacked} == sources and len(sources) == 4
    assert budget.shallow_steps(setting, 0.5) == budget.shallow_steps(setting) // 2
    # where nothing adapts, nothing else is trained
    plain = setting.replace(adapts=False)
    kinds = [{one.kind for one in units} for units in (
        [one for units in tries(plain, (0,)).values() for at in units for one in at], first_round(plain, (0, 1), best),
        second_round(plain, (0, 1), {kind: best[kind] for kind in (ONCE_SOURCE, STACKED, SCRATCH)}))]  # fmt: skip
    assert kinds[0] == {SCRATCH, SHALLOW, ONCE_SOURCE} and kinds[2] == {STACKED, AGAIN}
    assert abs(budget.left_steps(plain, 0.5) - plain.budget / 2) <= 1
    assert set(grown_tries(plain, (0, 1), {ONCE_SOURCE: best[ONCE_SOURCE]})) == {STACKED}
    with pytest.raises(Refused, match="adapts is false; shallow must be true then"):
        TEXT.replace(adapts=False)


def test_gates_that_are_let_go_late_cost_one_pass_until_then():
    setting = TEXT.replace(opened=0.85)
    steps = budget.source_steps(setting, 0.5)
    passes = budget.planned_passes(setting, steps)
    assert abs(int(np.argmax(passes == setting.planned)) - 0.85 * steps) <= 1 and passes[0] == 1
    assert steps > 1.5 * budget.source_steps(TEXT, 0.5)
    assert 1 / (1 + np.exp(-setting.source.adaptive.initial_bias)) < setting.source.adaptive.threshold
    with pytest.raises(Refused, match="opened is 1"):
        TEXT.replace(opened=1.0)


def test_text_grows_to_the_deep_model_by_each_recipe():
    layer = {"k_exec": 3, "mean_weight": 1.3, "survival": [1.0, 0.3, 0.1, 0.0]}
    counts = repetition.from_json({"_meta": {"alpha": [1.0, 0.7, 0.5, 0.35]}, **{f"layer{n}": layer for n in range(4)}})
    for one in (STACK_ONCE, *TEXT.recipes, *TEXT.controls):
        plan = plan_of(one, counts, TEXT.source.depth, TEXT.deep.depth)
        assert str(plan.target_layout) == ("DDDG" if one.kind == "once" else "DDDG*3")
        if one is STACK_ONCE:
            assert [(entry.source, entry.coefficient) for entry in plan.entries] == [(n, 1.0) for n in range(4)] * 3
    assert TEXT.deep.layout == "DDDG*3"
    assert plan.entries[4].coefficient == 0.7  # of a random copy, as of the readme's second
    assert TEXT.price(0.5).forced_until == 0 and set(budget.planned_passes(TEXT, 9)) == {TEXT.planned}


def test_units_have_names_of_their_own_and_the_config_reads_back():
    study = scaled("tries", (0, 1), (), ())
    tasks = {scale: scaled(scale, (0, 1), (), ()).tasks for scale in ("small", "hours", "tries")}
    assert tasks["small"] == tasks["hours"]
    alike = [[one.replace(rates=(1.0,), curricula=(1.0,), tuned_at=1) for one in tasks[scale]]
             for scale in ("small", "tries")]  # fmt: skip
    assert alike[0] == alike[1]  # but for what is tried, which the one takes from the other
    same = ("name", "budget", "adapts", "points", "rates", "child_rates")
    assert LONG.replace(**{field: getattr(NARROW, field) for field in same}) == NARROW
    best = {kind: units[0][0] for kind, units in tries(LONG, (3, 4)).items()}
    made = second_round(LONG, (3, 4), best)  # no adaptive source; started over is only what half of the budget leaves
    assert {(one.kind, one.point) for one in made} == {*((STACKED, point) for point in LONG.points), (AGAIN, 0.5)}
    assert Study.from_json(json.loads(json.dumps(study.to_json()))) == study
    tried = tries(JUMPS, study.seeds)[SCRATCH]
    assert [(one.rate, one.curriculum) for (one,) in tried] == [(2e-3, None), (4e-3, None), (2e-3, 0.3), (4e-3, 0.3)]
    assert JUMPS.scratch_data(0, (), None) == JUMPS.data(0, JUMPS.budget, (), deep=True)
    assert JUMPS.scratch_data(0, (), 0.3).curriculum_rows == 360 * JUMPS.batch
    units = []
    for setting in study.settings:
        best = {kind: found[-1][0] for kind, found in tries(setting, study.seeds).items()}
        units += [*first_round(setting, study.seeds, best), *second_round(setting, study.seeds, best)]
    assert len({one.name for one in units}) == len(units)
    assert len({one.source.name for one in units if one.kind == GROWN}) == sum(one.kind == GROWN for one in units)
    assert [one.name for one in scaled("minutes", (0,), (), ("text",)).settings] == ["text"]
    for words, said in ((("huge", (0,), (), ()), "the scales are"), (("small", (0,), (), ("sums",)), "settings are")):
        with pytest.raises(Refused, match=said):
            scaled(*words)
    with pytest.raises(Refused, match=r"(?s)points.*below 1.*deeper is"):
        DEEPER.replace(points=(0.5, 1.0), deeper="addition")
    assert {setting.name for tasks, texts in SCALES.values() for setting in (*tasks, *texts)} == {
        "pointer_jumps", "variable_chains", "deeper_jumps", "text", "text_narrow", "text_long"}  # fmt: skip


def row(kind, seed, nats, point=1.0, flops=8e12, right=None, curve=(), **more):
    """A made-up row, as the engine writes it."""

    def said(value, share):
        found = {"nats": value}
        return found if share is None else {**found, "accuracy_all": share, "accuracy": {"1": 1.0, "2": 2 * share - 1}}

    wanted = Wanted(JUMPS, kind, seed, 2e-3, point, more.get("recipe", ""))
    return {"task": "jumps", "model": wanted.model, "kind": kind, "seed": seed, "point": point, "rate": 2e-3,
            "layers": "D*4", "steps": 100, "tokens": 1000, "flops": flops, "model_flops": flops / 2, "seconds": 9.0,
            "parameters": 50, "tokens_a_parameter": 20.0, "diverged": None, "harder": ["2"],
            "curve": [{"step": 0, "flops": 1e12 * (1 + n), "tokens": tokens, "nats": value, "accuracy_all": 0.5}
                      for n, (tokens, value) in enumerate(curve)],
            "final": said(nats, right), **{name: said(*value) if isinstance(value, tuple) else value
                                           for name, value in more.items()}}  # fmt: skip


def rows_of(right, step0, finals, on_final=0.30, scratch=0.40):
    """Three seeds of one point: the child's curve is at scratch's loss after 300 of that one's 1000 tokens."""
    found = []
    for seed in range(3):
        shift = 0.01 * seed
        found += [
            row(SOURCE, seed, 0.5 + shift, 0.5, right=right and 0.9, curve=((400, 0.5),)),
            row(ON, seed, on_final + shift, 0.5, right=right and 0.95, step0=(0.5 + shift, right and 0.9),
                tenth=(0.45 + shift, right and 0.9), curve=((500, 0.5), (1000, 0.3))),
            row(GROWN, seed, finals[seed], 0.5, right=right and 0.97, step0=(step0 + shift, right and right),
                tenth=(0.44 + shift, right and 0.92), recipe="copies", curve=((500, 0.5), (800, 0.4), (900, 0.2))),
            row(CONTROL, seed, 0.6, 0.5, right=right and 0.5, step0=(2.0, right and 0.3), recipe="random",
                tenth=(1.0, right and 0.4)),
            row(SCRATCH, seed, scratch + shift, right=right and 0.8, curve=((500, 0.9), (1000, 0.4))),
        ]  # fmt: skip
    return found


def test_rates_are_chosen_by_as_many_seeds_as_the_setting_says_and_kept_rows_are_not_trained_again():
    losses = {(0, 2e-3): 0.2, (1, 2e-3): 0.3, (0, 4e-3): 0.1, (1, 4e-3): 0.9}
    asked: list[Wanted] = []

    class Made:
        def all(self, wanted):
            asked.extend(wanted.values())
            return {name: {"tuning_nats": losses.get((one.seed, one.rate), 0.0), "task": one.setting.name,
                           "rate": one.rate, "kind": one.kind} for name, one in wanted.items()}  # fmt: skip

    other = SMALL.replace(name="other")
    study = Study(tasks=(SMALL.replace(tuned_at=2, curricula=(0.6,)), other), texts=())
    assert {one["rate"] for one in growth_pays.all_rows(study, Made()) if one["task"] == SMALL.name} == {2e-3}
    assert {one.rate for one in asked if one.setting is other and one.kind == GROWN} == {4e-3}, "first seed"
    asked.clear()
    stored = contract.stored(command="python -m x", config=study.replace(tasks=(other,)), machine={}, seconds=60.0,
                             rows=[{"task": "other"}], summary={}, content="")  # fmt: skip
    kept = unchanged(study, stored, "")
    assert [one["task"] for one in kept] == ["other"] and not unchanged(study.replace(tasks=(SMALL,)), stored, "")
    rows = growth_pays.all_rows(study, Made(), kept)
    assert {**kept[0], **contract.ANSWERS} in rows and all(row.keys() >= contract.ANSWERS.keys() for row in rows)
    assert not any(one.setting is other for one in asked)
    with_text = study.replace(texts=(TEXT,))
    text = {**stored, "config": with_text.to_json()}
    with pytest.raises(Refused, match=r"(?s)of seeds \[0, 1, 2\].*of another text"):
        unchanged(with_text.replace(seeds=(0,)), text, "else")


def test_what_is_grown_has_a_rate_of_its_own_where_several_are_tried():
    """By the loss on the tuning part at the first seed; its source, and the source trained on, keep theirs."""

    class Made:
        def all(self, wanted):
            return {name: {"tuning_nats": one.own or one.rate, "task": one.setting.name, "kind": one.kind,
                           "rate": one.own or one.rate, "source": one.source.name} for name, one in wanted.items()}

    setting = SMALL.replace(curricula=(0.6,), child_rates=(1e-3, 2e-3, 4e-3))
    rows = growth_pays.all_rows(Study(tasks=(setting,), texts=()), Made())
    rates = {kind: {row["rate"] for row in rows if row["kind"] == kind} for kind in (SOURCE, ON, GROWN, CONTROL)}
    assert rates == {SOURCE: {2e-3}, ON: {2e-3}, GROWN: {1e-3}, CONTROL: {1e-3}}
    sources = {row["source"] for row in rows if row["kind"] == GROWN}
    assert sources == {row["source"] for row in rows if row["kind"] == SOURCE}
    with pytest.raises(Refused, match=r"child_rates are \[0.0\]"):
        SMALL.replace(child_rates=(0.0,))


def test_a_rate_at_which_a_seed_diverges_is_not_taken_for_any():
    class Made:
        broken: tuple[tuple[int, float], ...] = ((1, 4e-3),)

        def all(self, wanted):
            return {name: {"tuning_nats": -one.rate, "task": one.setting.name, "rate": one.rate, "kind": one.kind,
                           "diverged": one.kind == SOURCE and (one.seed, one.rate) in self.broken}
                    for name, one in wanted.items()}  # fmt: skip

    study = Study(tasks=(SMALL.replace(curricula=(0.6,)),), texts=())
    rates = {kind: {row["rate"] for row in growth_pays.all_rows(study, Made()) if row["kind"] == kind}
             for kind in (SOURCE, GROWN, SCRATCH)}  # fmt: skip
    assert rates == {SOURCE: {2e-3}, GROWN: {2e-3}, SCRATCH: {4e-3}}
    Made.broken += ((2, 2e-3),)
    with pytest.raises(Failed, match=r"pointer_jumps: source diverged at every rate that was tried \(0.002, 0.004\)"):
        growth_pays.all_rows(study, Made())


def test_claims_are_made_where_every_seed_says_so():
    rows = rows_of(0.895, 0.5, (0.28, 0.29, 0.29))
    others = [row(kind, seed, nats, point, right=0.9, step0=(1.0, 0.5), source=(0.8, 0.5),
                  curve=((500, 0.9), (900, 0.3)))
              for kind, point, nats in ((SHALLOW, 1.0, 0.35), (STACKED, 0.5, 0.3), (ON_FORCED, 0.5, 0.3),
                                        (AGAIN, 0.5, 0.5))
              for seed in range(3)]  # fmt: skip
    found = summary([*rows, *others])["jumps"]
    one = found["grown"]["0.5"]
    assert found["claims"] == {name: ["0.5"] for name in found["claims"]}
    alone = summary(rows)
    none: dict[str, list[str]] = {name: [] for name in found["claims"] if "stacked" in name or "it with" in name
                                  or "shallow" in name}  # fmt: skip
    assert alone["jumps"]["claims"] == {**found["claims"], **none} and len(none) == 6
    assert comparisons(alone) == 4 and comparisons({"jumps": found}) == 12
    pairs = {(one["mine"], one["other"]): (one["mean"], one["every_seed"]) for one in found["others"]}
    assert pairs[SHALLOW, SCRATCH] == (pytest.approx(0.35 - 0.41), True) and (ON_FORCED, SCRATCH) in pairs
    stacked = found["stacked"]["0.5"]
    assert stacked["scratch"]["mean"] == pytest.approx(0.3 - 0.41) and stacked["step0_percent"]["mean"] == 25
    assert stacked["tokens"]["shares"] == pytest.approx([0.4] * 3) and stacked[SHALLOW]["every_seed"]
    level = summary([*rows, *({**one, "final": {**one["final"], "nats": 0.35}} for one in others)])["jumps"]
    assert level["claims"]["stacked below both"] == level["claims"]["stacked, its source at hand"] == []
    assert level["stacked"]["0.5"]["scratch"]["every_seed"] and stacked[AGAIN]["mean"] == pytest.approx(-0.2)
    assert one["step0_points"]["mean"] == pytest.approx(-0.5) and one["on"]["every_seed"]
    assert one["scratch"]["mean"] == pytest.approx(np.mean([0.28 - 0.40, 0.29 - 0.41, 0.29 - 0.42]))
    assert one["tokens"]["shares"] == pytest.approx([0.3] * 3) and found["deeper"] == ["2"]
    assert found["controls"]["random"]["tenth"]["mean"] == pytest.approx(0.45 - 1.0)
    worse = summary(rows_of(0.88, 0.5, (0.28, 0.29, 0.33)))["jumps"]  # the last seed ends above the source trained on
    assert worse["claims"]["below both at equal FLOPs"] == worse["claims"]["as good at growth"] == []
    assert worse["claims"]["better after a tenth"] == ["0.5"] and not worse["grown"]["0.5"]["on"]["every_seed"]
    late = summary(rows_of(0.9, 0.5, (0.28, 0.29, 0.29), scratch=0.1))["jumps"]
    assert late["grown"]["0.5"]["tokens"]["shares"] == [None] * 3 and late["claims"]["half of scratch's tokens"] == []


def test_text_is_judged_by_its_loss_at_growth():
    assert summary(rows_of(None, 0.501, (0.28,) * 3))["jumps"]["claims"]["as good at growth"] == ["0.5"]
    found = summary(rows_of(None, 0.503, (0.28,) * 3))["jumps"]
    assert found["claims"]["as good at growth"] == [] and not found["task"]
    assert found["grown"]["0.5"]["step0_percent"]["mean"] == pytest.approx(0.59, abs=0.02)


def test_the_page_says_what_the_figures_decide(tmp_path):
    rows = rows_of(0.895, 0.5, (0.28, 0.29, 0.33))
    # beside it a text of which nothing adapts
    losses = {SHALLOW: 0.35, STACKED: 0.3, SCRATCH: 0.4, ONCE_SOURCE: 0.5, AGAIN: 0.6}
    rows += [{**row(kind, seed, nats + 0.01 * seed, 1.0 if kind in (SHALLOW, SCRATCH) else 0.5, step0=(2.0, None),
                    source=(1.6, None), curve=((500, 0.9), (900, 0.3))), "task": "plain"}
             for kind, nats in losses.items() for seed in range(3)]  # fmt: skip
    stored = {"command": "…", "config": {"seeds": [0, 1, 2]}, "machine": {"cores": 2, "device": "cpu"},
              "seconds": 60.0, "rows": rows, "summary": summary(rows), "content": ""}  # fmt: skip
    stored["config"]["texts"] = [TEXT.replace(name="jumps", child_rates=(1e-3, 2e-3)).to_json()]
    (tmp_path / "growth_pays.json").write_text(json.dumps(stored))
    assert growth_pays.main(["--render", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "growth_pays.md").read_text()
    below = "at equal FLOPs below the source trained on and the model from scratch"
    assert f"| {below} | at no point | not trained |" in text
    assert "once each, and the model from scratch | not trained | 0.5 |" in text
    assert "started then, with the FLOPs that are left | not trained | 0.5 |" in text
    assert "stacked at 0.5, ends below the deep model from scratch with the FLOPs that were left then (-0.3" in text
    assert "stacked at 0.5, at step 0: +25.00 % of its source's loss" in text.replace("(+25.00 to +25.00) ", "")
    assert "stacked at 0.5: from growth to the loss of the model from scratch, in tokens" in text
    assert "grown at 0.5 and the source trained on, at equal FLOPs cannot be told apart" in text
    assert "grown at 0.5 ends below the model from scratch, at equal FLOPs" in text and "d = 2 (new)" in text
    assert "rate of its own, of 0.001 and 0.002. All seeds are judged by the same 6,144 bytes" in text
    assert f"{comparisons(stored['summary'])} differences are judged" in text
    assert (tmp_path / "growth_pays.png").stat().st_size > 10_000
    draw(stored, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "growth_pays.png").read_bytes()
