"""The study of early exit on made-up figures: who is called faster, what is compared, what is written and refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments import contract, early_exit
from experiments.exit_study import figures, findings, report, run
from experiments.exit_study.study import SCALES, ExitStudy, Model, at_scale
from experiments.exit_study.train import content, keep_weights, read_weights
from experiments.units import Units
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.errors import Failed, Refused
from gt_jax.models.language_model import abstract

STUDY = ExitStudy(scale="minutes", text=("stories.txt",), seeds=(0, 1, 2), layers=4, cuts=(1, 2), ponders=(0.01, 0.1),
                  thresholds=(0.5, 0.9), own=((0.1, 0.5),), rates=(1e-3, 2e-3), width=16, heads=2)  # fmt: skip
TUNED = {model.name: {"0.001": 1.0, "0.002": 2.0} for model in STUDY.models}


def losses(model: Model, threshold: float | None) -> tuple[float, float]:
    """(loss, layers used): dense ones gain 0.1 a layer; exits at 0.9 are as good as 4 layers in 2, at 0.5 worse."""
    if model.ponder is None:
        return 2.0 - 0.1 * model.layers, model.layers
    return (1.6, 2.0) if threshold == 0.9 else (1.85, 1.0 + model.ponder)


def measured(source: str, seed: int, slowness: float = 1.0) -> dict[str, object]:
    """A unit: a layer takes 10 ms, the rest 5 ms; an exit model's layer `slowness` times as long; rounds vary alike."""
    models = []
    for model in STUDY.models:
        for at in STUDY.measured_at(model):
            loss, used = losses(model, at)
            each = 0.01 * (slowness if model.ponder is not None else 1.0)
            times = [(0.005 + each * used) * load for load in (1.0, 3.0, 1.5)]
            models.append({"name": model.at(at), **model._asdict(), "threshold": at, "rate": 1e-3,
                           "loss": loss + 0.001 * seed, "tuning_loss": loss, "layers_used": used,
                           "layers_used_decoding": used, "seconds_decoding": times, "seconds_prefill": times,
                           "accuracy": {"1": 0.9, "2": 0.5} if source != "text" else {},
                           "passes": {"1": used, "2": used} if source != "text" else {}, "spearman": None})  # fmt: skip
    return {"source": source, "seed": seed, "tokens": {"decoding": 90, "prefill": 900}, "models": models}


def stored(slowness: float = 1.0, order: int = 1) -> dict[str, object]:
    units = [measured(source, seed, slowness) for source in STUDY.sources for seed in STUDY.seeds][::order]
    rows = figures.rows_of(units)
    tuning = {source: TUNED for source in STUDY.sources}
    return contract.stored(command="python -m experiments.early_exit", config=STUDY, machine={"cores": 2}, seconds=60.0,
                           rows=rows, summary=figures.summary(STUDY, rows, tuning), content="hash")  # fmt: skip


def test_times_are_the_dense_models_whatever_the_machine_did_in_a_round():
    row = next(row for row in stored()["rows"] if row["model"] == "dense, 2 layers")
    assert row["time_decoding"] == pytest.approx(25 / 45) and row["seconds_decoding"] == pytest.approx(0.0375)
    assert row["tokens_a_second_prefill"] == pytest.approx(900 / 0.0375)


def test_equal_loss_is_read_off_the_curve_of_dense_models():
    points = [(1.0, 1.6), (0.25, 1.9), (0.5, 1.95), (0.6, 1.8)]  # the one of 1.95 is slower than one that is better
    assert figures.curve(points) == [(0.25, 1.9), (0.6, 1.8), (1.0, 1.6)]
    assert figures.time_at(points, 1.7) == (pytest.approx(0.8), "")
    assert figures.time_at(points, 1.6) == (1.0, "") and figures.time_at(points, 1.9) == (0.25, "")
    assert figures.time_at(points, 1.5) == (1.0, ">") and figures.time_at(points, 2.0) == (0.25, "<")
    # as fast as the fastest dense model and worse: no claim that it is faster, however the ratio stands
    dense = [[{"time_prefill": time, "loss": loss} for time, loss in points]] * 3
    worse = [{"time_prefill": 0.2 + 0.001 * seed, "loss": 2.0} for seed in range(3)]
    found = figures.equal(dense, worse, "prefill")
    assert found.bound == "<" and found.interval.low > 1 and found.sign == 0
    better = [{**row, "loss": 1.5} for row in worse]
    assert figures.equal(dense, better, "prefill")[1] == ">" and figures.equal(dense, better, "prefill").sign == 1
    mixed = [worse[0], *better[1:]]
    assert figures.equal(dense, mixed, "prefill").bound == "<>" and figures.equal(dense, mixed, "prefill").sign == 0


def test_the_cut_model_lies_between_the_trained_depths():
    dense = [{"layers": layers, "loss": 2 - 0.1 * layers} for layers in (4, 1, 2)]
    assert figures.cut(dense, {"layers_used": 3.0}, "loss") == pytest.approx(1.7)
    assert figures.cut(dense, {"layers_used": 1.25}, "loss") == pytest.approx(1.875)


def test_pairs_are_chosen_on_the_tuning_part_and_judged_on_the_held_out_one():
    found = stored()["summary"]["text"]
    pick = found["chosen"]["decoding"]
    assert pick["as_good"] == 2 and pick["of"] == 5 and pick["fastest"] == "exit, ponder 0.01, threshold 0.9"
    one = found["models"][pick["fastest"]]
    assert one["speed_decoding"]["mean"] == pytest.approx(45 / 25) and one["loss_minus_dense"]["mean"] == 0
    assert one["speed_against_cut_decoding"]["mean"] == pytest.approx(1) and one["loss_minus_cut"]["mean"] < -0.19
    assert one["equal_decoding"]["mean"] == pytest.approx(45 / 25) and one["equal_decoding"]["sign"] == 1
    # were the held-out part as bad as it can be, the same pairs would be taken
    rows = [{**row, "loss": 9 - row["loss"]} for row in stored()["rows"]]
    other = figures.summary(STUDY, rows, {source: TUNED for source in STUDY.sources})
    assert other["text"]["chosen"] == found["chosen"]
    assert found["own"][0]["other"] == "exit, ponder 0.1, threshold 0.5" and found["own"][0]["loss"]["mean"] == 0


@pytest.mark.parametrize(("slowness", "wanted", "cut", "along"), [
    (1.0, "1.3 times as fast: yes; a held-out loss at most 0.5 % above: yes", "told from it in speed (times 1.00",
     "the exit model is faster"),
    (3.0, "1.3 times as fast: no; a held-out loss at most 0.5 % above: yes", "is slower (times 0.38",
     "a dense model is faster"),
])  # fmt: skip
def test_the_report_says_who_wins(slowness, wanted, cut, along):
    said = "\n".join(findings.findings(STUDY, stored(slowness)["summary"]))
    assert wanted in said and cut in said and along in said
    assert said.count(wanted) == len(STUDY.sources) * len(figures.MODES)
    assert "*exit, ponder 0.1, trained at 0.5* and *exit, ponder 0.1, threshold 0.5* cannot be told apart" in said
    assert "the best rate was at the end" in said


def test_a_model_that_diverged_is_in_no_figure_and_named(tmp_path):
    units = [measured(source, seed) for source in STUDY.sources for seed in STUDY.seeds]
    gone = "exit, ponder 0.01, threshold 0.9"
    units[1]["models"] = [one for one in units[1]["models"] if one["name"] != gone]
    found = figures.summary(STUDY, figures.rows_of(units), {source: TUNED for source in STUDY.sources})
    assert gone not in found["text"]["models"] and gone in found["variable_chains"]["models"]
    assert any(f"diverged: {gone}." in line for line in findings.findings(STUDY, found))


def test_the_same_units_give_the_same_files_and_render_makes_them_anew(tmp_path):
    assert stored(order=-1) == stored()  # whatever the order in which they were made
    text = report.write(tmp_path / "one", stored())
    names = [f"early_exit.{kind}" for kind in ("json", "md", "png")]
    before = {name: (tmp_path / "one" / name).read_bytes() for name in names}
    assert before["early_exit.md"].decode() == text and "| dense, 4 layers | 0.001 | 4.00 (4.00 to 4.00) |" in text
    (tmp_path / "one" / "early_exit.md").unlink()
    assert early_exit.main(["--render", "--output", str(tmp_path / "one")]) == 0
    assert {name: (tmp_path / "one" / name).read_bytes() for name in names} == before
    found = json.loads(before["early_exit.json"])
    found["rows"] = [row for row in found["rows"] if row["model"] != "dense, 4 layers" or row["seed"] != 1]
    (tmp_path / "one" / "early_exit.json").write_text(json.dumps(found))
    with pytest.raises(Refused, match="text has no dense, 4 layers at seed 1"):
        report.render(tmp_path / "one")
    with pytest.raises(Refused, match="--jobs is of a study that is run"):
        early_exit.main(["--render", "--output", str(tmp_path), "--jobs", "2"])


def test_every_scale_is_a_study_and_other_words_are_refused(tmp_path):
    for scale in SCALES:
        study = at_scale(scale, [], ["pointer_jumps:symbols=6,queries=4,hardest=3"])
        assert study.scale == scale and ExitStudy.from_json(study.to_json()) == study
        assert study.sources == ["text", "pointer_jumps"] and study.length("pointer_jumps") % 34 == 0
        assert study.data("pointer_jumps", 0).text == () and study.data("text", 0).tasks == ()
        assert all(study.config(model, at) for model in study.models for at in study.measured_at(model))

    def words(*given: str) -> ExitStudy:
        return early_exit.configured(early_exit.parser().parse_args(list(given)))

    assert words("--seeds", "4,1", "--task").seeds == (4, 1)
    for given, message in ((("--scale", "huge"), "one of minutes, small, accelerator"), (("--seeds", "a"), "--seeds"),
                           (("--jobs", "0"), "--jobs 0 must lie"), (("--task", "chess"), "'chess' is not known"),
                           (("--seeds", "1,1"), "different"),
                           (("--task", "addition", "addition"), "two sources are named addition")):  # fmt: skip
        with pytest.raises(Refused, match=message):
            words(*given)
    with pytest.raises(Refused, match="every mean depth lies between two dense models"):
        STUDY.replace(cuts=(2,))
    with pytest.raises(Refused, match="cannot be read"):
        content(STUDY.replace(text=(str(tmp_path / "missing.txt"),)))
    (tmp_path / "short.txt").write_text("a story\n" * 200)
    with pytest.raises(Refused, match=r"(?s)tuning rows.*held-out rows"):
        content(STUDY.replace(text=(str(tmp_path / "short.txt"),)))


def test_rates_are_tuned_at_the_first_seed_by_each_model_and_all_are_measured(tmp_path, monkeypatch):
    asked = []

    def make(units, study, argument):
        what, source, seed, *rest = argument
        asked.append(argument)
        if what == "measure":
            return measured(source, seed) | {"rates": rest[0]}
        model, rate = rest
        loss = abs(rate - (2e-3 if model.ponder else 1e-3))
        return {"source": source, "seed": seed, "name": model.name, "rate": rate, "tuning_loss": loss, "diverged": None}

    monkeypatch.setattr(run, "make", make)
    units, tuning = run.everything(Units(tmp_path / "work", STUDY, "hash"), STUDY, 1, lambda line: None)
    assert len(units) == 6 and tuning["text"]["dense, 1 layer"] == {"0.001": 0.0, "0.002": 0.001}
    rates = units[0]["rates"]
    assert rates["dense, 4 layers"] == 1e-3 and rates["exit, ponder 0.1, trained at 0.5"] == 2e-3
    later = [one for one in asked if one[0] == "train" and one[2] > 0]
    assert len(later) == 2 * 2 * len(STUDY.models) and all(one[4] == rates[one[3].name] for one in later)

    def lost(units, study, argument):
        made = make(units, study, argument)
        return made | {"diverged": "step 3"} if argument[1:4] == ("text", 1, Model(4)) else made

    monkeypatch.setattr(run, "make", lost)
    with pytest.raises(Failed, match=r"dense, 4 layers diverged at text, seed 1, .* rates \(0.001, 0.002\) by seed 0"):
        run.everything(Units(tmp_path / "new", STUDY, "hash"), STUDY, 1, lambda line: None)


def test_weights_are_read_as_they_were_kept(tmp_path):
    config = STUDY.config(Model(1, 0.0, 0.9), 0.9)
    random, shapes = np.random.default_rng(0), abstract(config)
    values = {name: random.normal(size=leaf.shape).astype(leaf.dtype) for name, leaf in flatten(shapes).items()}
    import jax

    kept = jax.tree.unflatten(jax.tree.structure(shapes), [values[name] for name in flatten(shapes)])
    for _ in range(2):  # an earlier try is replaced
        keep_weights(tmp_path / "seed0" / "weights.npz", kept)
    jax.tree.map(np.testing.assert_array_equal, read_weights(tmp_path / "seed0" / "weights.npz", config), kept)
