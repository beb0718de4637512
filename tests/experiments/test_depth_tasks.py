"""The study of depth on tasks: what its rows say, told from made-up ones; nothing is trained here."""

from __future__ import annotations

import json

import pytest

from experiments import contract, depth_gates, depth_tasks
from experiments.depth_study import report
from experiments.depth_study.findings import summary
from experiments.depth_study.study import (
    ADAPTIVE,
    JUMPS,
    MEAN,
    MODELS,
    MOST,
    SCALES,
    SHALLOW,
    Study,
    Wanted,
    scaled,
    unchanged,
)
from experiments.depth_study.variants import RECIPE, VARIANTS, GatesStudy
from experiments.depth_study.variants import Wanted as Variant
from experiments.pages import earlier_runs
from gt_jax.errors import Refused

STUDY = Study(settings=(JUMPS,), seeds=(0, 1, 2))


def row(model, seed, *right, forced=None, spearman=None):
    """A row as `depth_study.engine` makes it, of two difficulties."""
    figures = {str(d + 1): value for d, value in enumerate(right)}
    forced = {str(k + 1): one for k, one in enumerate(forced or ())}
    return {
        "task": "pointer_jumps", "model": model, "layers": "D", "seed": seed, "rate": 2e-3, "accuracy": figures,
        "accuracy_all": sum(right) / 2, "accuracy_hardest": right[1], "nats": 0.1, "seconds": 9.0,
        "passes": {"1": 1.0, "2": 2.0}, "spearman": spearman, "microseconds_a_token": 5.0 + seed,
        "accuracy_forced": {k: {"1": one[0], "2": one[1]} for k, one in forced.items()},
        "forced": {k: {"accuracy_hardest": one[1]} for k, one in forced.items()},
        "cuts": [{"layer": 0, "type": "D", "k_exec": 2, "passes_run": 1.5, "cost": {"value": 0.4}}] if forced else [],
    }  # fmt: skip


def rows():
    made = []
    for seed in STUDY.seeds:
        made.append(row(ADAPTIVE, seed, 1.0, 0.97 + 0.01 * seed, forced=((1.0, 0.2), (1.0, 0.98)), spearman=0.9))
        made += [row(SHALLOW, seed, 1.0, 0.3), row(MEAN, seed, 1.0, 0.9), row(MOST, seed, 1.0, 1.0)]
    return made


def test_claims_stand_beside_their_bounds():
    found = summary(rows())["pointer_jumps"]
    figures = found["figures"]
    assert figures["spearman"]["mean"] == pytest.approx(0.9) and figures["spearman"]["seeds"] == 3
    assert figures["one pass forced costs"]["mean"] == pytest.approx(78.0)
    assert figures["above the shallow"]["mean"] == pytest.approx(68.0)
    assert figures["against mean depth"]["mean"] == pytest.approx(4.0)
    assert figures["against most depth"]["mean"] == pytest.approx(-1.0)
    low, high = figures["above the shallow"]["low"], figures["above the shallow"]["high"]
    assert low < 68.0 < high and all(found["met"].values())
    assert found["models"][ADAPTIVE]["cuts"][0]["k_exec"] == [2, 2, 2]
    worse = [{**one, "spearman": None} if one["model"] == ADAPTIVE else one for one in rows()]
    assert not summary(worse)["pointer_jumps"]["met"]["spearman"], "gates that tell no tokens apart follow nothing"


def test_page_and_picture_come_from_the_stored_file_alone(tmp_path, capsys):
    stored = contract.stored(command="python -m x", config=STUDY, machine={"cores": 2}, seconds=60.0, rows=rows(),
                             summary=summary(rows()), content="")  # fmt: skip
    contract.write(tmp_path / "depth_tasks.json", stored)
    assert Study.from_json(json.loads((tmp_path / "depth_tasks.json").read_text())["config"]) == STUDY
    assert depth_tasks.main(["--render", "--output", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert page == (tmp_path / "depth_tasks.md").read_text() + "\n"
    assert "| what one pass forced costs on the hardest third, points | +78.0" in page and "| yes |" in page
    assert f"| {ADAPTIVE} | D | 0.002 | 100 | 98 |" in page and "| 1 | 100 | 20 |" in page
    assert (tmp_path / "depth_tasks.png").read_bytes().startswith(b"\x89PNG")
    other = scaled("minutes", (0,))
    with pytest.raises(Refused, match=r"of another study(.|\n)*seeds: \(0, 1, 2\) and \(0,\)"):
        contract.check_output(tmp_path, report.NAME, other, "")


def test_rates_are_tuned_at_the_first_seed_and_the_mean_depth_is_the_adaptive_models():
    asked: list[list[str]] = []

    class Made:
        def all(self, wanted):
            asked.append(list(wanted))
            return {name: {"tuning_nats": abs(one.rate - (4e-3 if one.model == ADAPTIVE else 2e-3)),
                           "passes": {"1": 1.0, "2": 2.9}, "name": name, "times": one.times}
                    for name, one in wanted.items()}  # fmt: skip

    found = depth_tasks.all_rows(STUDY, Made())
    first, mean, last = asked
    assert len(first) == 6 and all("seed0" in name for name in first + mean) and len(mean) == 2 and len(last) == 12
    assert {one["times"] for one in found if MEAN in one["name"]} == {2}, "(1 + 2.9) / 2, rounded"
    assert {name for name in last if ADAPTIVE in name} == {Wanted(JUMPS, ADAPTIVE, 1, seed, 4e-3).name
                                                           for seed in STUDY.seeds}  # fmt: skip
    assert {one.partition(" at ")[2] for one in last if MOST in one} == {"0.002"}


def test_a_rate_may_be_chosen_by_the_mean_over_several_seeds():
    losses = {(0, 2e-3): 0.2, (1, 2e-3): 0.3, (0, 3e-3): 0.1, (1, 3e-3): 0.9, (0, 4e-3): 1.0}
    setting = JUMPS.replace(adaptive_rates=(2e-3, 3e-3), adaptive_tuned_at=2)

    class Made:
        def all(self, wanted):
            return {name: {"tuning_nats": losses.get((one.seed if one.model == ADAPTIVE else 0, one.rate), 0.0),
                           "name": name, "passes": {"1": 2.0}} for name, one in wanted.items()}  # fmt: skip

    found = depth_tasks.all_rows(STUDY.replace(settings=(setting,)), Made())
    rates = {name: {one["name"].partition(" at ")[2] for one in found if f"/{name} at" in one["name"]}
             for name in MODELS}  # fmt: skip
    assert rates[ADAPTIVE] == {"0.002"}, "0.25 and 0.5 in the mean, though the first seed says otherwise"
    told = " ".join(report._rates(setting.to_json(), 3))
    assert "the better of 0.002, 0.003 by its mean loss" in told and "first 2 seeds" in told


def test_rows_are_kept_whose_models_are_trained_and_asked_as_they_were(tmp_path):
    stored = contract.stored(command="python -m x", config=STUDY, machine={"cores": 2, "processor": "P"}, seconds=60.0,
                             rows=rows(), summary={}, content="")  # fmt: skip
    dearer = STUDY.replace(settings=(JUMPS.replace(pass_price=0.1, adaptive_rates=(3e-3,)),))
    kept = unchanged(dearer, stored)
    assert {row["model"] for row in kept} == {SHALLOW, MEAN, MOST}, "a plain model has no passes to pay for"
    assert len(unchanged(STUDY, stored)) == len(stored["rows"])
    assert not unchanged(STUDY.replace(settings=(JUMPS.replace(steps=JUMPS.steps + 1),)), stored)
    assert not unchanged(STUDY.replace(rates=(3e-3,)), stored)
    with pytest.raises(Refused, match="of seeds"):
        unchanged(STUDY.replace(seeds=(0,)), stored)
    for row in kept:
        row["layers"] = "D*2"

    def made(deepest):
        asked: list[str] = []

        class Made:
            def all(self, wanted):
                asked.extend(wanted)
                return {name: {"tuning_nats": 0.0, "passes": {"1": deepest}, "task": "pointer_jumps",
                               "model": one.model, "seed": one.seed} for name, one in wanted.items()}  # fmt: skip

        return depth_tasks.all_rows(dearer, Made(), kept), {name.partition("/")[2].partition("/")[2] for name in asked}

    found, asked = made(2.0)
    assert asked == {f"{ADAPTIVE} at 0.003"} and len(found) == 12
    found, asked = made(3.0)
    assert asked == {f"{ADAPTIVE} at 0.003", *(f"{MEAN} at {rate:g}" for rate in STUDY.rates)} and len(found) == 12
    told = "\n".join(earlier_runs([*kept, *contract.lent({**stored, "rows": kept})], "pointer_jumps"))
    assert told.count("earlier run") == 1 and "`python -m x`, 1 minutes on 2 cores (P)" in told


@pytest.mark.parametrize(("words", "said"), [
    (["--scale", "minutes"], "none of its rows would be the same"), (["--seeds", "0"], "are of seeds"),
])
def test_rows_that_would_not_be_kept_are_not_written_over(tmp_path, words, said):
    """Nothing is trained either."""
    contract.write(tmp_path / "depth_tasks.json", contract.stored(
        command="python -m x", config=scaled("small", (0, 1, 2)), machine={}, seconds=60.0, rows=rows(), summary={},
        content=""))  # fmt: skip
    there = (tmp_path / "depth_tasks.json").read_bytes()
    with pytest.raises(Refused, match=said):
        depth_tasks.main(["--keep", *words, "--output", str(tmp_path), "--work", str(tmp_path / "work")])
    assert [path.name for path in tmp_path.iterdir()] == ["depth_tasks.json"]
    assert (tmp_path / "depth_tasks.json").read_bytes() == there
    with pytest.raises(Refused, match="rows of pointer_jumps, which this study leaves out"):
        contract.check_kept(tmp_path / "depth_tasks.json", {"rows": rows()}, rows()[:1], ["variable_chains"])


def test_every_scale_and_every_variant_is_valid():
    for settings in SCALES.values():
        for setting in settings:
            models = [Wanted(setting, model, 2, 0, 1e-3).config for model in MODELS]
            assert models[1].adaptive is not None and len(models[2].depth) == 2 * len(models[1].depth)
            assert setting.data(0).sequence_length == setting.length
    for name in VARIANTS:
        variant = Variant(JUMPS, name, 0, 1e-3)
        assert variant.model().adaptive is not None and variant.train().steps == JUMPS.steps
    with pytest.raises(Refused, match="the scales are minutes, small, accelerator"):
        scaled("large", (0,))
    with pytest.raises(Refused, match="no list of whole numbers"):
        depth_tasks.configured(depth_tasks.parser().parse_args(["--seeds", "a"]))


def test_a_line_a_variant():
    made = [{**one, "model": name} for name in (RECIPE, "price 0") for one in rows() if one["model"] == ADAPTIVE]
    stored = contract.stored(command="x", config=GatesStudy(), machine={"cores": 2}, seconds=60.0, rows=made,
                             summary=depth_gates.summary(made), content="")  # fmt: skip
    page = depth_gates.markdown(stored)
    assert f"| {RECIPE} | 100 | 98 | 1.00 | 2.00 | 0.90 | +78 |" in page and page.index(RECIPE) < page.index("price 0")
