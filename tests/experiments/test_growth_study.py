"""The comparison study in miniature: toy models, one seed, a few steps; killed, gone on with, and refused."""

from __future__ import annotations

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import growth_operators
from experiments.growth_study import flops, operators, results, run, tables
from experiments.growth_study.engine import Engine, Losses, pace, paced
from experiments.growth_study.operators import BLOCK, CALIBRATED, DEALT, ONCE, OPERATORS, README
from experiments.growth_study.study import StudyConfig, Watched, open_material, separation
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.devices.sharding import mesh_for_rows
from gt_jax.errors import Refused
from gt_jax.growth import calibration, repetition
from gt_jax.models.language_model import abstract
from gt_jax.text.batches import open_text
from gt_jax.training.optimizer import learning_rate, make_optimizer
from tests.support import perturbed

TOY = {"layout": "D*2", "target_layers": 4, "width": 16, "sequence_length": 16, "rows": 2, "source_steps": 4,
       "further_steps": 2, "measuring_batches": 1, "evaluation_batches": 3, "calibration_batches": 1,
       "calibration_iterations": 1, "scratch_rates": (1e-3, 3e-3), "longer_rates": (1e-3,)}  # fmt: skip
FULL = StudyConfig(text=("any.txt",))


@pytest.fixture
def text(tmp_path):
    """Sixty stories, no two alike."""
    random = np.random.default_rng(0)
    words = [bytes(random.integers(97, 123, 5).tolist()) for _ in range(60)]
    stories = [b" ".join(random.choice(words, 40)) for _ in range(60)]
    file = tmp_path / "stories.txt"
    file.write_bytes(b"\n<|endoftext|>\n".join(stories))
    return str(file)


@pytest.mark.slow
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
    for module in (operators, run, results, tables):
        monkeypatch.setattr(module, "OPERATORS", chosen)
    from experiments.growth_study import picture

    monkeypatch.setattr(picture, "OPERATORS", chosen)
    monkeypatch.setattr(picture, "_SHOWN", {BLOCK: "#0072B2"})
    monkeypatch.setattr(tables, "ONCE", README)  # every layer once is a program of its own
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
    found = separation(material.text)
    assert found["shared_tokens"] == 0 and found["windows_seen"] == 0 and found["windows"] > 5
    spans = material.text.training_spans
    both = dataclasses.replace(material.text, held_out_spans=spans[:1])
    with pytest.raises(Exception, match="both in the training and the held-out part"):
        separation(both)
    with pytest.raises(Refused, match="held-out batches"):
        open_material(study.replace(evaluation_batches=999), 0)


def test_watched_batches_hash_what_was_handed_out(text):
    data = open_text(StudyConfig(text=(text,), **TOY).data(0))
    one, two, other = Watched(data.train()), Watched(data.train()), Watched(data.train())
    for _ in range(3):
        next(one), next(two), next(other)
    next(other)
    assert one.digest == two.digest != other.digest


def test_the_paced_optimizer_is_the_one_of_training():
    steps, peak = 30, 2e-3
    config = OptimizerConfig(learning_rate=peak, warmup=0.1, final=0.1)
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
    assert flops.training_flops(source.plain, 128) == pytest.approx(3 * (once.sum() + unembedding))
    assert flops.training_flops(source, 128) - 3 * flops.forward_flops(source, 128) == unembedding
    rows = flops.passes_by_step({2: [1.0, 2.0], 4: [3.0, 2.0]}, 5, lambda step: 2 if step == 1 else 0)
    assert rows.tolist() == [[2, 2], [1, 2], [2, 2], [3, 2], [3, 2]]


def test_reaching_a_level_and_being_clear():
    points = {"0": 2.0, "10": 1.8, "20": 1.6}
    unit = {"losses": {step: Losses([loss * 4], [4.0], [])._asdict() for step, loss in points.items()}}
    assert results.reached(unit, 2.1) == 0 and results.reached(unit, 1.7) == pytest.approx(15)
    assert results.reached(unit, 1.5) is None
    assert not tables.clear(results.spread([-0.1])) and tables.clear(results.spread([-0.1, -0.3]))
    assert not tables.clear(results.spread([-0.1, 0.1])) and not tables.clear(results.spread([-0.1, None]))
    assert "cannot be told apart" in tables.verdict("a", "b", results.spread([-1.0, 2.0]))
    assert "a ends below b at every seed" in tables.verdict("a", "b", results.spread([-1.0, -2.0]))
    rng = np.random.default_rng(0)
    one, other = rng.normal(2, 0.5, 50), rng.normal(0, 0.01, 50)
    error = results.paired_error(Losses(list(one), [1.0] * 50, []), Losses(list(one + other), [1.0] * 50, []))
    assert error == pytest.approx(0.01 / np.sqrt(50), rel=0.3)


def test_words_that_make_no_study():
    def study(*words: str) -> StudyConfig:
        return growth_operators.configured(growth_operators.parser().parse_args(["--text", "a.txt", *words]))

    assert study("--scale", "2", "--seeds", "4,1").further_steps == 2 * FULL.further_steps
    for words, message in ((("--seeds", "one"), "list of whole numbers"), (("--seeds", "1,1"), "different"),
                           (("--scale", "0"), "--scale"), (("--width", "30"), "multiple of 8")):  # fmt: skip
        with pytest.raises(Refused, match=message):
            study(*words)
