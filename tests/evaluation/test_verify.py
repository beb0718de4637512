"""verify: the figures by layer equal their source's where growth is exact, and their own equations everywhere."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax import verify
from gt_jax.checkpoints import checkpoint
from gt_jax.configs.data import DataConfig
from gt_jax.configs.model import EmbeddingConfig, HyperConfig, MoEConfig
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.run import RunConfig
from gt_jax.devices.sharding import Rules, mesh_for_rows, place_like, reshard
from gt_jax.errors import Refused
from gt_jax.evaluation import verification
from gt_jax.evaluation.comparison import (
    agreement,
    compare_models,
    make_comparison,
    passes_stood_for,
    relative_entropy,
    routing,
)
from gt_jax.evaluation.model_files import open_checkpoint
from gt_jax.evaluation.pairs import plan_between
from gt_jax.evaluation.singular_values import largest_singular_value, layer_config, layer_variables, make_singular_value
from gt_jax.evaluation.verification_table import report_lines
from gt_jax.growth.plan import make_plan
from gt_jax.growth.repetition import from_json
from gt_jax.growth.stream import grow_checkpoint
from gt_jax.growth.transform import grow, target_config
from gt_jax.models.language_model import abstract
from gt_jax.models.layers.mixer import place_rows
from gt_jax.models.layers.residual import Layer
from gt_jax.monitoring.plots import plot_verification
from gt_jax.text.batches import open_text
from gt_jax.training.loop import Trainer
from gt_jax.training.state import TrainState
from tests.support import perturbed, small_model

K_EXEC = (2, 3)
SOURCE = small_model("DG", moe=MoEConfig(experts=4, expert_width=16))
ROUTED = ("router_entropy", "null_rate")
ROWS, LENGTH, ITERATIONS = 2, 8, 12  # one shape for all tests: compiling is what they cost


def counts():
    layers = {f"layer{i}": {"k_exec": k, "survival": [1.0] * k + [0.0] * (4 - k)} for i, k in enumerate(K_EXEC)}
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


def compared(source, source_variables, target, target_variables, plan, rows=ROWS):
    return compare_models(source, source_variables, target, target_variables, plan, BATCHES, Rules(),
                          jacobian_rows=rows, jacobian_iterations=ITERATIONS)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def mesh():
    """The command's own, so that it finds what is compiled here."""
    with jax.set_mesh(mesh_for_rows(1)):
        yield


@pytest.fixture(scope="module")
def grown(mesh):
    """(source variables, child variables, all figures of the two)."""
    variables = perturbed(SOURCE)
    child = grow(variables, PLAN, SOURCE, carry="gain", noise_std=0.0)
    variables, child = place_like(variables, abstract(SOURCE)), place_like(child, abstract(CHILD))
    return variables, child, compared(SOURCE, variables, CHILD, child, PLAN)


def test_every_column_of_an_exact_growth_equals_that_of_the_source(grown):
    _, _, result = grown
    assert CHILD.layout == "D*2,G*3" and len(result["layers"]) == 5
    assert result["target_loss"] == pytest.approx(result["source_fixed_loss"], abs=1e-5)
    assert result["source_loss"] != pytest.approx(result["source_fixed_loss"], abs=1e-3)
    for layer in result["layers"]:
        for name in ("delta_ratio", "jacobian", *ROUTED):
            assert layer[name] == pytest.approx(layer[f"source_{name}"], rel=1e-4), (layer["target"], name)
        assert abs(layer["router_kl"]) < 1e-6
    for name in ("delta_ratio", "jacobian", "router_entropy"):  # else the equalities above would say nothing
        assert len({round(layer[name], 5) for layer in result["layers"]}) == 5


def test_jacobians_are_of_implementations_that_can_be_differentiated_twice():
    tiled = SOURCE.replace(gsa=SOURCE.gsa.replace(implementation="xla"))
    assert layer_config(tiled) == layer_config(SOURCE) and layer_config(SOURCE).gsa.implementation == "reference"


def test_a_wrong_layer_is_seen_in_its_own_columns(grown):
    variables, child, _ = grown
    broken = jax.tree.map(jnp.copy, child)
    layer = broken["params"]["segment0"]["layer0"]
    layer["gain"] = layer["gain"].at[1].multiply(1.5)
    router = broken["params"]["segment1"]["layer0"]["mlp"]["router"]
    router["null_logit"] = router["null_logit"].at[2].add(2.0)
    layers = compared(SOURCE, variables, CHILD, broken, PLAN)["layers"]
    ratio, stretch = ([one[name] / one[f"source_{name}"] for one in layers] for name in ("delta_ratio", "jacobian"))
    assert ratio[0] == pytest.approx(1, rel=1e-4) and ratio[1] == pytest.approx(1.5, rel=1e-4)
    assert stretch[0] == pytest.approx(1, rel=1e-4) and stretch[1] > 1.05
    kl = [one["router_kl"] for one in layers]
    assert max(kl[:2]) < 1e-6 < min(kl[2:]) and kl[4] > 0.1
    assert layers[4]["null_rate"] > layers[4]["source_null_rate"] + 0.1


def test_figures_by_layer_are_means_over_all_real_tokens(grown):
    """Against a walk through the layers one by one, with the sums written out in numpy float64."""
    variables, child, result = grown
    compare = make_comparison(SOURCE, CHILD, PLAN, Rules(), ROWS)
    sums, real = np.zeros((5, 4)), 0.0
    for one in BATCHES:
        before, after = (jax.tree.map(lambda a: np.asarray(a, np.float64), side)
                         for side in compare(variables, child, one)[1:])  # fmt: skip
        mask = one["segment_ids"] > 0
        real += mask.sum()
        walk = [before.states[at] for at in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3))]  # the last: after pass 3
        for target, (layer, number) in passes_stood_for(PLAN, SOURCE).items():
            (p, entropy), (q, _) = (softmax(slots) for slots in (before.slots[layer, number], after.slots[target, 0]))
            null = (np.argsort(-before.slots[layer, number], axis=-1, kind="stable")[..., :2] >= 4).mean(-1)
            h, dh = walk[target], walk[target + 1] - walk[target]
            ratio = np.linalg.norm(dh, axis=-1) / np.linalg.norm(h, axis=-1)
            kl = (p * np.log(p / q)).sum(-1)
            sums[target] += [(figure * mask).sum() for figure in (ratio, entropy, null, kl)]
    for target, wanted in enumerate(sums / real):
        layer = result["layers"][target]
        found = [*(layer[f"source_{name}"] for name in ("delta_ratio", *ROUTED)), layer["router_kl"]]
        np.testing.assert_allclose(found, wanted, rtol=5e-5, atol=1e-6)


def softmax(slots):
    """Probabilities over the last axis, and their entropy over log of the slots."""
    p = np.exp(slots - slots.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return p, -(p * np.log(p)).sum(-1) / np.log(p.shape[-1])


STREAMS = SOURCE.replace(hyper=HyperConfig(streams=2), moe=None)


@pytest.mark.parametrize(("kind", "config"), [("D", SOURCE), ("G", STREAMS)])
def test_the_singular_value_is_that_of_the_dense_jacobian(kind, config):
    """Experts, streams, padding: the same as so many iterations in numpy on the whole matrix, and below its SVD."""
    one, own = BATCHES[0], layer_variables(config, place_like(perturbed(config), abstract(config)), "DG".index(kind))
    shape = (ROWS, LENGTH, 32) if config.hyper is None else (ROWS, LENGTH, 2, 32)
    x = reshard(2 * jax.random.normal(jax.random.key(1), shape), Rules().spec("batch", *[None] * (len(shape) - 1)))
    segment_ids, size = jnp.asarray(one["segment_ids"]), x[0].size
    module = Layer(kind, layer_config(config), Rules(), parent=None)

    @jax.jit
    def rows_of_the_jacobian(x, own):
        def moved(x):
            return x + 0.7 * module.apply(own, x, place_rows(segment_ids), method=Layer.delta)[0]

        pull = jax.vjp(moved, x)[1]
        basis = jnp.eye(size).reshape(size, 1, *x.shape[1:])
        return jax.lax.map(lambda u: pull(u + 0 * x)[0], basis)  # rows of text know nothing of each other

    dense = np.asarray(rows_of_the_jacobian(x, own), np.float64).reshape(size, ROWS, size)
    stretch = make_singular_value(kind, layer_config(config), Rules(), ITERATIONS, 0)
    found = stretch(own, x, jnp.float32(0.7), segment_ids, None)
    start = np.asarray(jax.random.normal(jax.random.key(0), x.shape), np.float64).reshape(ROWS, size)
    for row in range(ROWS):
        real = np.repeat(one["segment_ids"][row] > 0, x[0, 0].size)
        matrix = dense[:, row][real][:, real]
        v = start[row][real]
        for _ in range(ITERATIONS):
            u = matrix @ v
            v = matrix.T @ (u / np.linalg.norm(u))
            value, v = np.linalg.norm(v), v / np.linalg.norm(v)
        assert found.value[row] == pytest.approx(value, rel=1e-4)
        largest = np.linalg.svd(matrix, compute_uv=False)[0]
        assert 0.9 * largest < found.value[row] < largest * (1 + 1e-5)


def test_power_iteration_on_a_known_matrix_leaves_padding_out():
    random = np.random.default_rng(0)
    matrix = random.standard_normal((2, 12, 12)).astype(np.float32)
    real = jnp.asarray([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])

    def function(x):
        return jnp.einsum("rij,rj->ri", matrix, x.reshape(2, 12)).reshape(x.shape)

    largest = jax.jit(largest_singular_value, static_argnums=(0, 3))
    found = largest(function, jnp.ones((2, 3, 4)), real, 200)
    wanted = [np.linalg.svd(matrix[0])[1][0], np.linalg.svd(matrix[1, :8, :8])[1][0]]
    np.testing.assert_allclose(found.value, wanted, rtol=1e-4)
    few = largest(function, jnp.ones((2, 3, 4)), real, 3)
    assert np.all(few.value <= found.value) and np.all(few.change > found.change)
    nothing = largest(lambda x: 0 * x, jnp.ones((1, 3, 4)), real[:1], 2)
    assert nothing.value[0] == 0 and nothing.change[0] == 0


def test_agreement_and_routing_are_their_equations():
    random = np.random.default_rng(2)
    logits = random.standard_normal((3, 1, 4, 6)).astype(np.float32)
    targets = np.asarray([[2, -1, 5, 0]], np.int32)
    found = jax.jit(agreement)(*logits, targets)
    wide, at = logits.astype(np.float64), targets[0] >= 0
    log_p = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    losses = [-log_p[i, 0, at, targets[0, at]].sum() for i in range(3)]
    np.testing.assert_allclose(found[:3], losses, rtol=1e-5)
    assert found.kl == pytest.approx((np.exp(log_p[0]) * (log_p[0] - log_p[2])).sum(-1)[0, at].sum(), rel=1e-5)
    centred = wide - wide.mean(-1, keepdims=True)
    cosines = (centred[0] * centred[2]).sum(-1) / np.sqrt((centred[0] ** 2).sum(-1) * (centred[2] ** 2).sum(-1))
    assert found.cosine == pytest.approx(cosines[0, at].sum(), rel=1e-5) and found.tokens == 3
    without = jax.jit(agreement)(logits[0], None, logits[2], targets)
    assert without.source_fixed_loss is None and without.target_loss == found.target_loss
    np.testing.assert_allclose(jax.jit(relative_entropy)(logits[0], logits[0]), 0, atol=1e-6)
    even = jax.jit(routing, static_argnums=(1, 2))(jnp.zeros((1, 1, 4, 6)), 3, 2, jnp.asarray([[1.0, 1.0, 0.0, 0.0]]))
    assert even.entropy[0] == pytest.approx(2) and even.null_rate[0] == 0  # ties go to the smaller slot


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
        SOURCE, {"params": 0}, text, stream.state(), 12, text.held_out(1), OptimizerConfig(), said.append,
    )  # fmt: skip
    sums = np.cumsum([next(stream)["tokens"].sum() for _ in range(12)])
    assert found["loss"] == [[number, 1 / total] for number, total in enumerate(sums.tolist(), 1)]
    assert found["held_out_loss"] == sums[-1] and len(said) == 12


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
    assert f"gap {100 * result['gap']:+.2f} % ({result['verdict']}" in "\n".join(lines)
    assert all(name in lines[-7] for name in ("|dh|/|h|", "singular v.", "entropy", "KL", "nulls"))
    assert "0, pass 1" in lines[-5] and "1, pass 3" in lines[-1]


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
    shown = verification._finite(result)
    assert json.loads(json.dumps(shown, allow_nan=False))["gap"] == "NaN"
    assert "gap +nan %" in "\n".join(report_lines(shown))
    for name in ("a.png", "b.png"):
        plot_verification(shown, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


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
