"""verify: the figures by layer equal their source's where growth is exact, and their own equations everywhere."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax import verify
from gt_jax.checkpoints import checkpoint
from gt_jax.configs.data import DataConfig
from gt_jax.configs.model import AdaptiveConfig, EmbeddingConfig, MoEConfig
from gt_jax.configs.run import RunConfig, TrainConfig
from gt_jax.devices.sharding import Rules, mesh_for_rows, put_like
from gt_jax.errors import Refused
from gt_jax.evaluation import pieces, verification
from gt_jax.evaluation.comparison import compare_models, make_comparison, passes_stood_for
from gt_jax.evaluation.held_out_rows import HeldOutRows
from gt_jax.evaluation.intermediates import hidden_rows
from gt_jax.evaluation.model_files import Checkpoint, open_checkpoint
from gt_jax.evaluation.pairs import plan_between
from gt_jax.evaluation.predictions import compare_predictions, make_predictions
from gt_jax.evaluation.verification_table import report_lines
from gt_jax.growth.plan import make_plan
from gt_jax.growth.repetition import from_json
from gt_jax.growth.stream import grow_checkpoint
from gt_jax.growth.transform import grow, target_config
from gt_jax.models.language_model import LanguageModel, abstract, free_passes
from gt_jax.monitoring.metrics import json_values
from gt_jax.monitoring.plots import plot_verification
from gt_jax.text.batches import open_text
from gt_jax.training.loop import Trainer
from gt_jax.training.state import TrainState
from tests.support import perturbed, small_model

K_EXEC = (2, 2)
EXPERTS = MoEConfig(experts=4, expert_width=16)
SOURCE = small_model("DG", moe=EXPERTS).replace(adaptive=AdaptiveConfig(alpha=(1.0, 0.7)))
ROUTED = ("router_entropy", "null_rate")
ROWS, LENGTH, ITERATIONS = 2, 8, 12  # one shape for all tests: compiling is what they cost


def counts():
    layers = {f"layer{i}": {"k_exec": k, "survival": [1.0] * k} for i, k in enumerate(K_EXEC)}
    return from_json(layers, "test", SOURCE.adaptive.alpha)


PLAN = make_plan("layer", counts(), SOURCE.depth, coefficient="schedule")
CHILD = target_config(SOURCE, PLAN)


def batch(seed: int):
    """Random bytes, padding at the end of the last row."""
    tokens = np.random.default_rng(seed).integers(0, 257, (ROWS, LENGTH + 1)).astype(np.int32)
    segment_ids = np.ones((ROWS, LENGTH), np.int32)
    segment_ids[-1, -3:] = 0
    targets = np.where(segment_ids > 0, tokens[:, 1:], -1).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": targets, "segment_ids": segment_ids}


BATCHES = [batch(3), batch(4)]
UNITS = [np.repeat([[2 * n], [2 * n + 1]], LENGTH, axis=1).astype(np.int32) for n in range(len(BATCHES))]
HELD_OUT = HeldOutRows(BATCHES, UNITS, "document")


def never_halting(variables):
    """The source whose every token runs every pass at weight 1: then its free passes are those of k_exec."""
    changed = jax.tree.map(jnp.copy, variables)
    for slot in ("layer0", "layer1"):
        output = changed["params"]["segment0"][slot]["halting"]["output"]
        output["b"] = output["b"] + 200.0
    return changed


def compared(source, source_variables, target, target_variables, plan, rows=ROWS):
    return compare_models(source, source_variables, target, target_variables, plan, HELD_OUT, Rules(),
                          jacobian_rows=rows, jacobian_iterations=ITERATIONS)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def mesh():
    """The command's own, so that it finds what is compiled here."""
    with jax.set_mesh(mesh_for_rows(1)):
        yield


@pytest.fixture(scope="module")
def grown(mesh):
    """(source variables, child variables, all figures of the two)."""
    variables = never_halting(perturbed(SOURCE))
    child = grow(variables, PLAN, SOURCE, carry="gain", noise_std=0.0)
    variables, child = put_like(variables, abstract(SOURCE)), put_like(child, abstract(CHILD))
    return variables, child, compared(SOURCE, variables, CHILD, child, PLAN)


def test_every_column_of_an_exact_growth_equals_that_of_the_source(grown):
    _, _, result = grown
    assert CHILD.layout == "D*2,G*2" and len(result["layers"]) == 4
    assert result["target_loss"] == pytest.approx(result["source_fixed_loss"], abs=1e-5)
    assert result["source_loss"] == pytest.approx(result["source_fixed_loss"], abs=1e-5)
    for layer in result["layers"]:
        for name in ("delta_ratio", "jacobian", *ROUTED):
            assert layer[name] == pytest.approx(layer[f"source_{name}"], rel=1e-4), (layer["target"], name)
        assert layer["delta_ratio"] == pytest.approx(layer["source_fixed_delta_ratio"], rel=1e-4)
        assert abs(layer["router_kl"]) < 1e-6
    for name in ("delta_ratio", "jacobian", "router_entropy"):  # else the equalities above would say nothing
        assert len({round(layer[name], 5) for layer in result["layers"]}) == 4


def test_a_layer_that_makes_the_stream_is_marked_as_standing_at_the_cut(grown):
    """Before the first pass there is hardly a stream, after it there is one."""
    def faint(variables):
        embedding = jax.tree.map(lambda leaf: leaf * 1e-3, variables["params"]["embedding"])
        return {**variables, "params": {**variables["params"], "embedding": embedding}}

    source, child = map(faint, grown[:2])
    layers = compared(SOURCE, source, CHILD, child, PLAN)["layers"]
    for name in ("delta_ratio_cut", "source_delta_ratio_cut"):
        assert [one[name] for one in layers] == [True, False, False, False]
    assert not any(one["delta_ratio_cut"] for one in grown[2]["layers"])


def test_the_source_is_shown_as_it_runs_of_itself_and_with_fixed_passes(grown):
    """Tokens that halt: a child by mean weights is like the free source, where one at full strength is like k_exec.

    By hand: the mean over tokens of alpha w |Delta|/|h|, of the first layer, whose passes start from known states.
    """
    _, child, _ = grown
    source = put_like(perturbed(SOURCE), abstract(SOURCE))
    result = compared(SOURCE, source, CHILD, child, PLAN)
    assert result["source_loss"] != pytest.approx(result["source_fixed_loss"], abs=1e-3)
    free, fixed, own = ([layer[name] for layer in result["layers"]]
                        for name in ("source_delta_ratio", "source_fixed_delta_ratio", "delta_ratio"))  # fmt: skip
    np.testing.assert_allclose(own, fixed, rtol=1e-4)
    assert free[0] == pytest.approx(fixed[0], rel=1e-4)  # a first pass is run by everyone
    ran = hidden_statistics(source)
    weight = np.asarray(ran.survival[0, 1])
    assert free[1] < 0.9 * fixed[1] and free[1] / fixed[1] == pytest.approx(weight, rel=0.2)
    expected = jax.tree.map(jnp.copy, child)
    for segment in range(2):
        layer = expected["params"][f"segment{segment}"]["layer0"]
        layer["gain"] = layer["gain"].at[1].multiply(np.float32(ran.survival[segment, 1]))
    layers = compared(SOURCE, source, CHILD, expected, PLAN)["layers"]
    for layer in layers:
        assert layer["delta_ratio"] == pytest.approx(layer["source_delta_ratio"], rel=0.2)
        assert layer["jacobian"] == pytest.approx(layer["source_jacobian"], rel=0.2)


@pytest.mark.exhaustive  # test_whole_model.py has batch halting by the oracle
def test_under_batch_halting_tokens_below_the_threshold_count_too():
    """They add w Delta like all others: what a pass adds does not depend on where the threshold lies, if it runs."""
    one = BATCHES[0]

    def ran(threshold):
        depth = dataclasses.replace(SOURCE.adaptive, halting="batch", threshold=threshold, p_floor=0.0, batch_share=0.0)
        config = SOURCE.replace(adaptive=depth)
        run = jax.jit(functools.partial(hidden_rows, LanguageModel(config)))
        variables = put_like(perturbed(config), abstract(config))
        return run(variables, one["tokens"], one["segment_ids"], free_passes())[1]

    low = ran(0.05)
    high = ran(float(low.survival[:, 1].min()))  # the mean of one layer: some of its tokens are above, some below
    np.testing.assert_allclose(low.survival, high.survival, rtol=1e-5)
    assert (high.alive[:, 1] > 0).all() and (high.alive[:, 1] < low.alive[:, 1]).any()
    np.testing.assert_allclose(low.update_ratio, high.update_ratio, rtol=1e-5)


def hidden_statistics(variables):
    """Mean pass statistics [l, p] of the source over the batches."""
    ran = [hidden_of(variables, one)[1] for one in BATCHES]
    return jax.tree.map(lambda *a: np.mean(a, axis=0), *ran)


@jax.jit
def hidden_of(variables, one):
    return hidden_rows(LanguageModel(SOURCE), variables, one["tokens"], one["segment_ids"], free_passes())


def test_a_wrong_layer_is_seen_in_its_own_columns(grown):
    variables, child, _ = grown
    broken = jax.tree.map(jnp.copy, child)
    layer = broken["params"]["segment0"]["layer0"]
    layer["gain"] = layer["gain"].at[1].multiply(1.5)
    router = broken["params"]["segment1"]["layer0"]["mlp"]["router"]
    router["null_logit"] = router["null_logit"].at[1].add(2.0)
    layers = compared(SOURCE, variables, CHILD, broken, PLAN)["layers"]
    ratio, stretch = ([one[name] / one[f"source_{name}"] for one in layers] for name in ("delta_ratio", "jacobian"))
    assert ratio[0] == pytest.approx(1, rel=1e-4) and ratio[1] == pytest.approx(1.5, rel=1e-4)
    assert stretch[0] == pytest.approx(1, rel=1e-4) and stretch[1] > 1.05
    kl = [one["router_kl"] for one in layers]
    assert kl[0] < 1e-6 and kl[3] > 0.1
    assert layers[3]["null_rate"] > layers[3]["source_null_rate"] + 0.1


def test_figures_by_layer_are_means_over_all_real_tokens(grown):
    """Against a walk through the layers one by one, with the sums written out in numpy float64."""
    variables, child, result = grown
    compare = make_comparison(SOURCE, CHILD, PLAN, Rules(), ROWS)
    sums, real = np.zeros((4, 4)), 0.0
    for one in BATCHES:
        before, after = (jax.tree.map(lambda a: np.asarray(a, np.float64), side)
                         for side in compare(variables, child, one)[2:])  # fmt: skip
        mask = one["segment_ids"] > 0
        real += mask.sum()
        walk = [before.states[at] for at in ((0, 0), (0, 1), (1, 0), (1, 1))]
        for target, (layer, number) in passes_stood_for(PLAN, SOURCE).items():
            (p, entropy), (q, _) = (softmax(slots) for slots in (before.slots[layer, number], after.slots[target, 0]))
            null = (np.argsort(-before.slots[layer, number], axis=-1, kind="stable")[..., :2] >= 4).mean(-1)
            h, dh = walk[target], walk[min(target + 1, 3)] - walk[target]
            ratio = np.linalg.norm(dh, axis=-1) / np.linalg.norm(h, axis=-1)
            kl = (p * np.log(p / q)).sum(-1)
            sums[target] += [(figure * mask).sum() for figure in (ratio, entropy, null, kl)]
    for target, wanted in enumerate(sums / real):
        layer = result["layers"][target]
        found = [*(layer[f"source_{name}"] for name in ("delta_ratio", *ROUTED)), layer["router_kl"]]
        first = 0 if target < 3 else 1  # the state after the last pass is not shown
        np.testing.assert_allclose(found[first:], wanted[first:], rtol=5e-5, atol=1e-6)


def softmax(slots):
    """Probabilities over the last axis, and their entropy over log of the slots."""
    p = np.exp(slots - slots.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return p, -(p * np.log(p)).sum(-1) / np.log(p.shape[-1])


def test_pieces_of_the_rows_give_what_whole_rows_do(grown, monkeypatch):
    """And `compare_predictions` says of two models what `verify` says; its intervals are those of the units."""
    variables, child, result = grown
    monkeypatch.setattr(pieces, "LOGITS", 3 * ROWS * SOURCE.vocab)  # three tokens of each row at a time
    make_predictions.cache_clear()
    found = compare_predictions((SOURCE, variables), (CHILD, child), HELD_OUT)
    make_predictions.cache_clear()
    for name in ("source_loss", "target_loss", "kl", "same_top1", "cosine", "gap"):
        assert found[name] == pytest.approx(result[name], abs=2e-6), name
    assert found["source_fixed_loss"] is None and found["units"] == {"kind": "document", "count": 4}
    limits = found["intervals"]["gap"]
    assert limits["low"] <= found["gap"] <= limits["high"] and found["verdict"] == "good"
    share = found["intervals"]["same_top1"]
    assert 0 <= share["low"] <= found["same_top1"] <= share["high"] <= 1
    assert found["tokens"] == sum(int((one["targets"] >= 0).sum()) for one in BATCHES)


def test_an_adaptive_target_seen_inside_runs_as_it_does_unseen(grown):
    """Any pair: the figures of the target alone; a model that is looked into has the losses of one that is not."""
    variables, child, result = grown
    other = compared(CHILD, child, SOURCE, variables, None)
    assert other["target_loss"] == pytest.approx(result["source_loss"], abs=1e-5)
    assert other["source_loss"] == pytest.approx(result["target_loss"], abs=1e-5)
    assert other["source_fixed_loss"] is None
    for layer in other["layers"]:
        assert all(value is None for name, value in layer.items() if name.startswith("source") or name == "router_kl")
    for name in ("jacobian", "delta_ratio", *ROUTED):  # pass 1 of the first layer: the same state, whatever comes after
        assert other["layers"][0][name] == pytest.approx(result["layers"][0][name], rel=1e-4)


def test_a_curve_of_training_on(monkeypatch, tmp_path):
    """`fit` on the training part from the position on, then the held-out loss of what came out; the model is a sum."""
    (tmp_path / "story.txt").write_bytes(STORY)
    text = open_text(DataConfig(text=(str(tmp_path / "story.txt"),), sequence_length=16, batch_size=2))

    def step(state, batch):
        total = state.params + int(batch["tokens"].sum())
        return state._replace(params=total, step=state.step + 1), {
            "loss": 1 / total, "total_loss": 1 / total, "gradient_norm": 1.0, "bad": 0.0}  # fmt: skip

    trainer = Trainer(step, lambda variables, batch, control: (variables["params"], 1, None),
                      lambda variables: TrainState(variables["params"], {}, None, None, 0))  # fmt: skip
    monkeypatch.setattr(verification, "make_trainer", lambda config, train: trainer)
    stream, said = text.train(), []
    next(stream)
    found = verification.train_curve(
        SOURCE, {"params": 0}, text, stream.state(), text.held_out(1), TrainConfig(steps=12), said.append,
    )  # fmt: skip
    sums = np.cumsum([next(stream)["tokens"].sum() for _ in range(12)])
    assert found["loss"] == [[number, 1 / total] for number, total in enumerate(sums.tolist(), 1)]
    assert found["held_out_loss"] == sums[-1] and len(said) == 12


def test_a_curve_goes_on_after_what_the_target_has_read(tmp_path):
    """A child that was trained on read more than its source; one without a record of its own goes on after that."""
    (tmp_path / "story.txt").write_bytes(STORY)
    text = open_text(DataConfig(text=(str(tmp_path / "story.txt"),), sequence_length=16, batch_size=2))
    trained = [Checkpoint(tmp_path, tmp_path, SOURCE, {"kind": "train", "run": {}, "data": place}, {})
               for place in ({**text.train().state(), "batches": 3}, {**text.train().state(), "batches": 7}, None)]
    assert [verification.position_of(text, trained[0], target)["batches"] for target in trained] == [3, 7, 3]


STORY = b"Once a small net grew deep and was glad of it.\n" * 60


@pytest.fixture(scope="module")
def pair(tmp_path_factory, grown):
    """A source and its child on disk, and text."""
    place = tmp_path_factory.mktemp("verify")
    data = DataConfig(text=(str(place / "story.txt"),), sequence_length=LENGTH, batch_size=ROWS)
    run = RunConfig(model=SOURCE, data=data).to_json()
    checkpoint.save(place / "source", grown[0], {"config": SOURCE.to_json(), "kind": "train", "step": 1, "run": run})
    (place / "story.txt").write_bytes(STORY)
    grow_checkpoint(place / "source", place / "child", plan=PLAN, carry="gain")
    checkpoint.save(place / "plain", grown[1], {"config": CHILD.to_json(), "kind": "train", "step": 1, "run": run})
    return place


def run(capsys, *words):
    words = [*words, "--batches", "2", "--jacobian-rows", ROWS, "--jacobian-iterations", ITERATIONS]
    assert verify.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_the_command_reports_draws_and_repeats_itself(pair, capsys):
    picture = pair / "picture.png"
    result = json.loads(run(capsys, pair / "source", pair / "child", "--json", "--picture", picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert result["notes"] == [] and result["jacobian"]["rows"] == ROWS and result["jacobian"]["tokens"] == LENGTH
    assert all(one["jacobian"] == pytest.approx(one["source_jacobian"], rel=1e-4) for one in result["layers"])
    lines = "\n".join(report_lines(result)).splitlines()
    assert run(capsys, pair / "source", pair / "child").splitlines() == lines
    said = "\n".join(lines)
    assert f"gap {100 * result['gap']:+.2f} %" in said and f"({result['verdict']}; below" in said
    assert all(name in lines[-6] for name in ("|dh|/|h|", "singular v.", "entropy", "KL", "nulls"))
    assert "0, pass 1" in lines[-4] and "1, pass 2" in lines[-1]
    shown = {**result, "layers": [
        {**one, "delta_ratio": ratio, "source_delta_ratio": ratio, "source_fixed_delta_ratio": ratio,
         "delta_ratio_cut": at, "source_delta_ratio_cut": at}
        for one, ratio, at in zip(result["layers"], (10.0, 9.0, 8.0, 0.5), (True, False, False, False), strict=True)]}
    *above, _, _, _, first, second, third, last = "\n".join(report_lines(shown)).splitlines()
    assert first.count(">=10.000") == 3 and ">=" not in second + third + last and ">= before |dh|/|h|" in above[-1]


def test_a_pair_without_a_plan_says_why(pair, capsys, grown):
    """Not grown; grown from another source, by its values or by its layout."""
    result = json.loads(run(capsys, pair / "plain", pair / "source", "--json"))
    assert "was not grown" in result["notes"][0] and "loss of the target" in "\n".join(report_lines(result))
    norm = {"scale": grown[0]["params"]["final_norm"]["scale"] * 1.01}
    other = {**grown[0], "params": {**grown[0]["params"], "final_norm": norm}}
    checkpoint.save(pair / "other", other, checkpoint.describe(pair / "source")[1])
    another, child, source = (open_checkpoint(pair / name) for name in ("other", "child", "source"))
    plan, reason = plan_between(another, child)
    assert plan is None and "another source" in reason and "values are others" in reason
    assert plan_between(source, child) == (PLAN, None)
    assert "DG*2" in plan_between(source._replace(config=SOURCE.replace(layout="DG*2")), child)[1]


def test_numbers_that_are_not_finite_are_reported_as_such(grown, tmp_path):
    curve = {"steps": 2, "loss": [[1, 2.0], [2, 1.0]], "held_out_loss": 1.5}
    result = {**grown[2], "notes": [], "gap": math.nan, "target_loss": math.inf, "verdict": "poor", "curve": curve}
    shown = json_values(result)
    assert json.loads(json.dumps(shown, allow_nan=False))["gap"] == "NaN"
    assert "gap +nan %" in "\n".join(report_lines(shown))
    for name in ("a.png", "b.png"):
        plot_verification(shown, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_picture_marks_the_pass_at_k_exec_and_says_so(grown, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("gt_jax.monitoring.plots.save_png", lambda figure, path: drawn.append(figure))
    plot_verification({**grown[2], "notes": []}, tmp_path / "a.png")
    (ratios, *_), layers = drawn[0].axes, grown[2]["layers"]
    marks = {line.get_label(): list(line.get_ydata()) for line in ratios.get_lines()}
    for label, name in (("the source's pass", "source_delta_ratio"), ("at k_exec", "source_fixed_delta_ratio")):
        assert marks[label] == pytest.approx([one[name] for one in layers if one[name] is not None])
    legend = next(axes.get_legend() for axes in drawn[0].axes if axes.get_legend() is not None)
    assert [text.get_text() for text in legend.get_texts()] == ["the source's pass", "at k_exec"]


def test_refused_before_any_work(pair, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", lambda *a: pytest.fail("values were read"))
    names = [pair / "source", pair / "child"]

    def refused(*words):
        with pytest.raises(Refused) as error:
            verify.main([str(word) for word in (*words, "--text", pair / "story.txt")])
        assert capsys.readouterr().out == ""
        return str(error.value)

    (pair / "there.png").write_bytes(b"")
    assert "exists" in refused(*names, "--picture", pair / "there.png")
    assert "name it plot.png" in refused(*names, "--picture", pair / "plot.pdf")
    assert "not a folder" in refused(*names, "--picture", pair / "no" / "plot.png")
    assert "--batches is 0" in refused(*names, "--batches", "0")
    both = refused(*names, "--jacobian-rows", "3", "--jacobian-iterations", "1")
    assert "2 rows" in both and "at least 2" in both
    assert "--curve is -1" in refused(*names, "--curve", "-1")
    wide = small_model("D", vocab=300)
    checkpoint.save(pair / "wide", perturbed(wide), {"config": wide.to_json(), "kind": "train"})
    assert "vocab is 264" in refused(names[0], pair / "wide")


def test_tokens_that_stand_for_other_bytes_are_refused(tmp_path):
    config = small_model("D", embedding=EmbeddingConfig("kronecker"))
    variables = perturbed(config)
    coded = variables["statistics"]["embedding"]
    other = {"embedding": {**coded, "token_bytes": coded["token_bytes"].at[5, 0].set(7)}}
    for name, statistics in (("one", variables["statistics"]), ("two", other)):
        checkpoint.save(tmp_path / name, {**variables, "statistics": statistics},
                        {"config": config.to_json(), "kind": "train"})  # fmt: skip
    with pytest.raises(Refused, match=r"1 of 264 tokens stand for other bytes.*token 5"):
        verification.verify(tmp_path / "one", tmp_path / "two")
