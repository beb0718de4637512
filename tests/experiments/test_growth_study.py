"""The comparison study in miniature: toy models, one seed, a few steps; killed, gone on with, and refused."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import growth_operators
from experiments.growth_study import findings, flops, inference, operators, results, run, tables
from experiments.growth_study import report as reports
from experiments.growth_study.engine import NO_LOSS, Engine, Losses, pace, paced
from experiments.growth_study.operators import BLOCK, CALIBRATED, DEALT, ONCE, OPERATORS, README
from experiments.growth_study.study import StudyConfig, Watched, open_material, separation
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.devices.sharding import mesh_for_rows
from gt_jax.errors import Failed, Refused
from gt_jax.growth import calibration, repetition
from gt_jax.models.language_model import abstract
from gt_jax.text.batches import open_text
from gt_jax.training.optimizer import learning_rate, make_optimizer
from tests.support import perturbed

TOY = {"layout": "D*2", "target_layers": 4, "width": 16, "sequence_length": 16, "rows": 2, "source_steps": 4,
       "further_steps": 2, "measuring_batches": 1, "evaluation_batches": 3, "calibration_batches": 1,
       "tuning_batches": 2, "calibration_iterations": 1, "scratch_rates": (1e-3, 3e-3),
       "longer_rates": (1e-3,)}  # fmt: skip
FULL = StudyConfig(text=("any.txt",))
RESULTS = Path(growth_operators.__file__).parent / "results"


@pytest.fixture
def text(tmp_path):
    """Sixty stories, no two alike."""
    random = np.random.default_rng(0)
    words = [bytes(random.integers(97, 123, 5).tolist()) for _ in range(60)]
    stories = [b" ".join(random.choice(words, 40)) for _ in range(60)]
    file = tmp_path / "stories.txt"
    file.write_bytes(b"\n<|endoftext|>\n".join(stories))
    return str(file)


@pytest.mark.exhaustive  # what a kill leaves is tests/experiments/test_units.py's
def test_the_whole_study_killed_and_gone_on_with(tmp_path, text, monkeypatch):
    shapes, signature = [], inspect.signature(calibration.calibrate_gains)

    def pretended(*arguments, **how):
        bound = signature.bind(*arguments, **how).arguments
        shapes.append((bound["source_config"].adaptive is None, bound["target_config"].adaptive is None,
                       [batch["tokens"].shape for batch in bound["batches"]]))  # fmt: skip
        assert bound["iterations"] == 1
        return calibration.Calibration(bound["target_variables"], {"iterations": 1})

    few = (README, BLOCK, DEALT, "random new layers", CALIBRATED)
    chosen = tuple(one for one in OPERATORS if one.name in few)
    for module in (operators, run, results, tables, findings, reports):
        monkeypatch.setattr(module, "OPERATORS", chosen)
    from experiments.growth_study import picture

    monkeypatch.setattr(picture, "OPERATORS", chosen)
    monkeypatch.setattr(picture, "_SHOWN", {BLOCK: "#0072B2"})
    monkeypatch.setattr(findings, "ONCE", README)  # every layer once is a program of its own
    monkeypatch.setattr(Engine, "fresh", lambda self, config, seed: perturbed(config))  # compiles nothing
    monkeypatch.setattr(StudyConfig, "settled_price", StudyConfig.price)  # and so is the source that is trained on
    study = StudyConfig(text=(text,), seeds=(3,), **TOY)
    work, output = tmp_path / "work", tmp_path / "results"

    def go() -> str:
        with jax.set_mesh(mesh_for_rows(1)):
            return growth_operators.study_and_report(study, work, output, ["--text", text])

    def killed(*arguments, **how):
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr("gt_jax.growth.calibration.calibrate_gains", killed)
        with pytest.raises(KeyboardInterrupt):
            go()
    done = {file.name: file.stat().st_mtime_ns for file in (work / "seed3").iterdir()}
    assert {"source", "readme.json", "dealt-expected-gain.json"} <= set(done) and not output.exists()
    monkeypatch.setattr("gt_jax.growth.calibration.calibrate_gains", pretended)
    report = go()
    assert shapes == [(False, True, [(2, 16)])]
    assert {name: (work / "seed3" / name).stat().st_mtime_ns for name in done} == done
    assert {file.name for file in output.iterdir()} == {f"growth_operators.{kind}" for kind in ("json", "md", "png")}
    assert (output / "growth_operators.md").read_text() == report

    found = json.loads((output / "growth_operators.json").read_text())
    assert str(tmp_path) not in json.dumps(found) + report and found["config"]["text"] == ["stories.txt"]
    units, figures = found["units"]["3"], found["figures"]
    assert all(f"| {name} |" in report for name in few) and all(f"**{name}**" in report for name in run.CONTROLS)
    # the calibrated one is the dealt one here, so all that is random or unpaired would show
    assert units[DEALT]["curve"] == units[CALIBRATED]["curve"]
    assert units[README]["batches"] == units[BLOCK]["batches"] == units[run.ON_TOKENS]["batches"]
    gap = Losses(**units[BLOCK]["losses"]["0"]).mean / units["source"]["loss"] - 1
    assert figures[BLOCK]["seeds"]["gap"] == [pytest.approx(100 * gap)]
    assert abs(gap) < 0.02 < abs(figures["random new layers"]["seeds"]["gap"][0]) / 100 + 0.02
    parts = units["analysis"]
    own = parts["models"][BLOCK]
    assert parts["spread"] + own["tail"] + own["order"] == pytest.approx(100 * gap, abs=1e-6)
    assert parts["check"] < 1e-5  # all passes at alpha are the source with passes fixed, to rounding
    equal = figures[run.SCRATCH_FLOPS]["seeds"]["flops"][0]
    assert equal == pytest.approx(figures[BLOCK]["seeds"]["flops"][0], rel=0.1)
    assert figures[run.SCRATCH_TOKENS]["seeds"]["final"] == [units[run.SCRATCH_TOKENS]["final"]]

    tried = [json.loads((work / "seed3" / f"scratch-at-{rate:g}.json").read_text()) for rate in study.scratch_rates]
    assert units["tuning"][run.SCRATCH_FLOPS] == {str(one["rate"]): one["tuning_loss"] for one in tried}
    assert all(one["tuning_loss"] != one["final"] for one in tried), "rates are not tuned on what they are judged by"
    assert units[run.SCRATCH_FLOPS]["tuning_loss"] == min(one["tuning_loss"] for one in tried)
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    (output / "growth_operators.md").unlink()
    assert reports.render(output) == before["growth_operators.md"].decode()
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before, "the same run, the same results"

    other = study.replace(further_steps=3, width=24)
    for place in (work, tmp_path / "new"):  # the work directory refuses; with a new one, the results do
        with pytest.raises(Refused, match="further_steps: 2 and 3"), jax.set_mesh(mesh_for_rows(1)):
            growth_operators.study_and_report(other, place, output, [])
    assert not (tmp_path / "new").exists()


def test_held_out_text_is_apart(text):
    study = StudyConfig(text=(text,), **TOY)
    material = open_material(study, 5)
    same = open_material(study, 6)
    assert all((a["tokens"] == b["tokens"]).all() for a, b in zip(material.evaluation, same.evaluation, strict=True))
    found = material.separation
    assert found["shared_tokens"] == 0 and found["windows_seen"] == 0 and found["windows"] > 5
    spans = material.text.training_spans
    for changed in ({"held_out_spans": spans[:1]}, {"tuning_spans": spans[:1]}):
        with pytest.raises(Failed, match="in two of the training, tuning and held-out parts"):
            separation(dataclasses.replace(material.text, **changed))
    with pytest.raises(Refused, match=r"(?s)tuning rows, the study needs.*held-out rows, the study needs"):
        open_material(study.replace(evaluation_batches=999, tuning_batches=999), 0)
    with pytest.raises(Refused, match="tuned on the text that they are judged by"):
        open_material(study.replace(tuning_batches=0), 0)


def test_what_is_chosen_is_chosen_on_text_of_its_own_at_every_scale(text):
    """However long the study trains, no batch of measuring, calibration, tuning or evaluation is of training text."""
    study = StudyConfig(text=(text,), **{**TOY, "tuning_batches": 3, "calibration_batches": 2})
    material = open_material(study, 0)
    groups = (material.measuring, material.calibration, material.tuning, material.evaluation)
    assert [len(batches) for batches in groups] == [1, 2, 3, 3]
    numbers = np.arange(len(material.text.tokens)).astype(np.uint16)  # each token the number of its place
    numbered = open_numbered(material.text, numbers, study)
    seen = [set(np.concatenate([batch["tokens"][batch["segment_ids"] > 0] for batch in batches]).tolist())
            for batches in numbered]  # fmt: skip
    trained = set()
    stream = dataclasses.replace(material.text, tokens=numbers).train()
    while len(trained) < np.diff(material.text.training_spans).sum():  # to the end of the text and beyond
        trained |= set(next(stream)["tokens"].ravel().tolist())
    assert not any(a & b for i, a in enumerate([*seen, trained]) for b in [*seen, trained][:i])


def open_numbered(text, numbers, study):
    """The four groups of batches of `open_material`, their tokens replaced by `numbers`."""
    other = dataclasses.replace(text, tokens=numbers)
    first, second = study.measuring_batches, study.measuring_batches + study.calibration_batches
    tuning = other.tuning(second + study.tuning_batches)
    return tuning[:first], tuning[first:second], tuning[second:], other.held_out(study.evaluation_batches)


def test_text_that_repeats_itself_is_refused(tmp_path):
    """Stories that differ in a few bytes are no copies of one another to the split, and no unseen text either."""
    random = np.random.default_rng(0)
    body = bytes(random.integers(97, 123, 200).tolist())
    file = tmp_path / "copies.txt"
    file.write_bytes(b"\n<|endoftext|>\n".join(b"%d " % i + body for i in range(100)))
    with pytest.raises(Refused, match=r"repeats itself: .* of .* held-out windows of 64 bytes stand in the text"):
        open_material(StudyConfig(text=(str(file),), **TOY), 0)


def test_results_of_an_earlier_study_say_that_rates_were_tuned_on_what_judges_them():
    stored = {key: value for key, value in FULL.to_json().items() if key != "tuning_batches"}
    assert StudyConfig.from_json(stored).tuning_batches == 0 < FULL.tuning_batches
    assert StudyConfig.from_json(FULL.to_json()) == FULL


def test_watched_batches_hash_what_was_handed_out(text):
    data = open_text(StudyConfig(text=(text,), **TOY).data(0))
    one, two, other = Watched(data.train()), Watched(data.train()), Watched(data.train())
    for _ in range(3):
        next(one), next(two), next(other)
    next(other)
    assert one.digest == two.digest != other.digest


def test_the_paced_optimizer_is_the_one_of_training():
    steps, peak = 30, 2e-3
    config = OptimizerConfig(learning_rate=peak, schedule="cosine", warmup=0.1, final=0.1)
    rate = learning_rate(config, steps)
    got = [peak * float(pace(jnp.float32(step), jnp.float32(steps))) for step in range(steps)]
    np.testing.assert_allclose(got, [float(rate(step)) for step in range(steps)], rtol=1e-5)
    params = {"w": jnp.linspace(-1, 1, 5), "gain": jnp.ones(2)}
    wanted = make_optimizer(config, steps)
    mine = paced(make_optimizer(OptimizerConfig(learning_rate=1.0, schedule="wsd", warmup=0.0, final=1.0), 1))
    a, b = params, params
    first, second = wanted.init(params), mine.init(params)
    second = second._replace(steps=jnp.float32(steps), peak=jnp.float32(peak))
    for step in range(6):
        grads = jax.tree.map(lambda p, step=step: jnp.cos(3 * p + step), params)
        update, first = wanted.update(grads, first, a)
        a = optax.apply_updates(a, update)
        update, second = mine.update(grads, second, b)
        b = optax.apply_updates(b, update)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5), a, b)


def measured(*counts: int) -> repetition.Repetition:
    """Counts with a survival that falls by half each pass."""
    layers = {f"layer{i}": {"k_exec": k, "survival": [0.5**j if j < k else 0.0 for j in range(4)]}
              for i, k in enumerate(counts)}  # fmt: skip
    return repetition.from_json(layers)


def test_every_operator_has_the_plan_it_names():
    counts = measured(2, 1, 2, 3, 2, 3, 4, 3)
    plans = {one.name: operators.plan_of(one, counts, FULL) for one in OPERATORS}
    depth = {name: len(plan.entries) for name, plan in plans.items()}
    assert depth.pop(ONCE) == 8 and depth.pop("stack, plain") == 24 and depth.pop("split + expected + gain") >= 20
    assert set(depth.values()) == {20}
    strengths = {name: [(entry.copy, entry.coefficient) for entry in plan.entries] for name, plan in plans.items()}
    assert all(c == 1.0 for name in ("block, plain", "stack, plain", ONCE) for _, c in strengths[name])
    assert all(c == (1.0 if copy == 1 else 0.0) for copy, c in strengths["identity copies"])
    assert [entry.source for entry in plans["re-entry map"].entries] == [*range(8), *range(4), *range(8)]
    assert [e.coefficient for e in plans[BLOCK].entries[:8]] == [1, 1, 1, 1, 0.35, 0, 0.35, 0.35]
    # eight slots for the eight passes of 2,1,2,3: two of G, its first pass last; D gives its spare slots to D
    assert [e.source for e in plans[DEALT].entries if e.copy and e.source < 4].count(3) == 2
    assert [e.copy for e in plans[DEALT].entries if e.copy and e.source == 3] == [2, 1]
    assert [e.source for e in plans["layer + expected + gain"].entries[:5]] == [0, 0, 1, 2, 2]


def test_random_new_layers_keep_the_first_copies(text):
    study = StudyConfig(text=(text,), **TOY)
    operator = next(one for one in OPERATORS if one.new == "random")
    plan = operators.plan_of(operator, measured(2, 2), study)
    config = study.source.plain.replace(layout="D*4")
    layer = {"gain": np.zeros(4), "mixer": {"w": np.zeros((4, 3))}}
    old = {"params": {"embedding": {"table": np.zeros(2)}, "segment0": {"layer0": layer}}}
    new = jax.tree.map(np.ones_like, old)
    got = operators.with_random_layers(config, old, plan, new)["params"]
    added = [float(entry.copy > 1) for entry in plan.entries]
    assert sum(added) == 2 and (got["embedding"]["table"] == 0).all()
    assert got["segment0"]["layer0"]["gain"].tolist() == added
    assert got["segment0"]["layer0"]["mixer"]["w"].tolist() == [[one] * 3 for one in added]


def test_flops_follow_the_parameters():
    source = FULL.source
    matrices = {}
    shapes = abstract(source.plain)["params"]["segment0"]
    for slot, kind in enumerate("DDDG"):
        leaves = jax.tree_util.tree_leaves_with_path(shapes[f"layer{slot}"])
        names = ((jax.tree_util.keystr(path), leaf) for path, leaf in leaves)
        matrices[kind] = sum(leaf.size // 2 for name, leaf in names if name.endswith("['w']") and "_conv" not in name)
    once = flops.pass_flops(source, 128)
    # what is beyond two FLOPs a parameter is the recurrence or the attention over the row
    for layer, kind in enumerate(source.depth.types):
        assert 1.0 < once[layer] / (2 * matrices[kind]) < 1.8, kind
    unembedding = 2 * source.width * source.vocab
    assert flops.forward_flops(source, 128, [2.0] * 8) == pytest.approx(2 * once.sum() + unembedding)
    kept = source.replace(remat="none")
    plain, first = flops.training_flops(kept.plain, 128), flops.training_flops(kept, 128, reads_first=True)
    assert plain == pytest.approx(3 * (once.sum() + unembedding)) and first - plain == unembedding
    # computed again: under remat, and every pass under context "alive"
    alive = kept.replace(adaptive=kept.adaptive.replace(context="alive"))
    for config in (alive, source.replace(remat="layer")):
        assert flops.training_flops(config, 128) - plain == pytest.approx(once.sum())
    rows = flops.passes_by_step({2: [1.0, 2.0], 4: [3.0, 2.0]}, 5, lambda step: 2 if step == 1 else 0)
    assert rows.tolist() == [[2, 2], [1, 2], [2, 2], [3, 2], [3, 2]]


def test_reaching_a_level():
    points = {"0": 2.0, "10": 1.8, "20": 1.6}
    unit = {"losses": {step: Losses([loss * 4], [4.0], [])._asdict() for step, loss in points.items()}}
    assert results.reached(unit, 2.1) == 0 and results.reached(unit, 1.7) == pytest.approx(15)
    assert results.reached(unit, 1.5) is None
    rng = np.random.default_rng(0)
    one, other = rng.normal(2, 0.5, 50), rng.normal(0, 0.01, 50)
    error = results.paired_error(Losses(list(one), [1.0] * 50, []), Losses(list(one + other), [1.0] * 50, []))
    assert error == pytest.approx(0.01 / np.sqrt(50), rel=0.3)


def test_three_seeds_of_one_sign_are_no_difference():
    """Without a difference an interval leaves out 0 one time in twenty; three signs agree one time in four."""
    rng = np.random.default_rng(0)
    differences = rng.normal(0, 1, (2000, 3))
    called = [inference.interval(row).sign != 0 for row in differences]
    agreed = (np.abs(np.sign(differences).sum(axis=1)) == 3).mean()
    assert 0.035 < np.mean(called) < 0.065 and 0.22 < agreed < 0.28
    three = inference.interval([-1.0, -2.0, -3.0])
    assert three == (-2.0, pytest.approx(-2 - 4.302653 / 3**0.5), pytest.approx(-2 + 4.302653 / 3**0.5), 3)
    assert three.sign == 0
    assert inference.verdict("a", "b", three) == "a and b cannot be told apart (-2.0000 (-4.4841 to +0.4841), 3 seeds)"
    clear = inference.interval([-1.0, -1.1, -1.2])
    assert "a ends below b (-1.1000 (" in inference.verdict("a", "b", clear)
    assert inference.interval([-1.0]).sign == 0 and "1 seed)" in inference.verdict("a", "b", inference.interval([-1.0]))
    assert inference.within(clear, 2.0) == "yes" and inference.within(clear, 0.5) == "no"
    assert inference.within(clear, 1.1) == inference.within(inference.interval([1.0]), 2) == "cannot be said"


def test_times_that_were_not_reached_are_longer_than_the_run_and_in_no_mean():
    times = inference.Times((28.0, None, 23.0), (31.0, 31.0, 31.0))
    assert times.text() == "28, > 31, 23" and times.reached == 2 and times.median == 28  # by seed, as headings say
    never = inference.Times((None, 23.0, None), (31.0, 31.0, 33.0))
    assert never.text() == "> 31, 23, > 33" and never.median is None and never.median_text() == "> 31"
    # one that ended early says nothing of later times: of the two that ran on one is done at 20, a half
    assert inference.Times((None, 20.0, None), (10.0, 31.0, 31.0)).median == 20
    assert inference.Times((5.0, 6.0, None, None), (9.0,) * 4).median == 6


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The stored results, rendered by the command that they name."""
    place = tmp_path_factory.mktemp("results")
    shutil.copy(RESULTS / "growth_operators.json", place)
    assert growth_operators.main(["--render", "--output", str(place)]) == 0
    return place


def test_the_stored_report_is_what_its_command_renders(stored):
    assert (stored / "growth_operators.md").read_text() == (RESULTS / "growth_operators.md").read_text()
    assert json.loads((stored / "growth_operators.json").read_text())["units"] == json.loads(
        (RESULTS / "growth_operators.json").read_text())["units"]  # fmt: skip


def test_every_claim_of_the_stored_report_has_its_seeds_and_every_table_of_models_its_compute(stored):
    report_text = (stored / "growth_operators.md").read_text()
    claims = report_text.split("## What the figures say")[1].split("## What they cannot tell")[0]
    for line in claims.splitlines():
        assert not line.startswith("- ") or "3 seeds" in line or "The standard error of one seed" in line, line
    for heading in ("## The sources", "## Operators", "## Against the controls", "## What the gaps"):
        assert "FLOPs, 1e12" in report_text.split(heading)[1].split("\n| ---")[0], heading
    assert "cannot be told apart (-0.0015 (-0.0035 to +0.0006), 3 seeds)" in claims, "one sign at three seeds"
    assert "2 of 3 seeds (thousand bytes after growth: 107, > 138, 125; median 125" in claims
    assert "by losses on the text that they are judged by" in report_text
    sources = report_text.split("## The sources")[1]
    for row in ("| 1.29 | 2.15 | 2.50 |", "| 1.28 | 2.04 | 2.38 |", "| 1.29 | 2.10 | 2.31 |"):
        assert row in sources  # mean weight, passes a token runs, passes computed for the batch


def test_nobody_reaches_a_model_from_scratch_that_diverged(tmp_path):
    """Its "final loss" is a mark, 1e9, that every model is below from its first step."""
    stored = json.loads((RESULTS / "growth_operators.json").read_text())
    stored["units"]["1"][run.SCRATCH_TOKENS] |= {"diverged": "three steps", "final": NO_LOSS,
                                                 "losses": {"0": {"sums": [NO_LOSS], "counts": [1.0], "passes": []}}}
    (tmp_path / "growth_operators.json").write_text(json.dumps(stored))
    text = reports.render(tmp_path)
    assert "diverged at 1 of 3 seeds" in text and "reaches the final loss of the model from scratch" not in text
    row = next(line for line in text.splitlines() if line.startswith("| **source trained on, equal tokens**"))
    assert row.endswith("| - | - |")


def test_what_is_no_study_is_not_rendered(tmp_path):
    (tmp_path / "growth_operators.json").write_text("{}")
    with pytest.raises(Refused, match="no result of this study: it has no config, content"):
        reports.render(tmp_path)
    with pytest.raises(Refused, match="cannot be read"):
        reports.render(tmp_path / "nowhere")
    stored = json.loads((RESULTS / "growth_operators.json").read_text())
    del stored["units"]["0"][run.SCRATCH_FLOPS]
    stored["units"]["5"] = stored["units"].pop("1")
    (tmp_path / "growth_operators.json").write_text(json.dumps(stored))
    with pytest.raises(Refused, match=r"seed 0 has no from scratch, equal FLOPs[^0]*seed 1 has no [^0]*seed 5 is none"):
        reports.render(tmp_path)
    with pytest.raises(Refused, match="--scale is of a study that is run"):
        growth_operators.main(["--render", "--output", str(RESULTS), "--scale", "2"])


def test_words_that_make_no_study():
    def study(*words: str) -> StudyConfig:
        return growth_operators.configured(growth_operators.parser().parse_args(["--text", "a.txt", *words]))

    assert study("--scale", "2", "--seeds", "4,1").further_steps == 2 * FULL.further_steps
    for words, message in ((("--seeds", "one"), "list of whole numbers"), (("--seeds", "1,1"), "different"),
                           (("--scale", "0"), "--scale"), (("--width", "30"), "multiple of 8")):  # fmt: skip
        with pytest.raises(Refused, match=message):
            study(*words)
