"""Copies that keep their gates: the child is the adaptive source, token by token; what cannot keep them is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.opened import open_checkpoint
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs.model import AdaptiveConfig, GatedCopiesConfig, ModelConfig
from gt_jax.configs.price import budget
from gt_jax.configs.run import TrainConfig
from gt_jax.errors import Refused
from gt_jax.grow import main
from gt_jax.growth.calibration import mismatches
from gt_jax.growth.kept_gates import keeping_gates, wrong_order
from gt_jax.growth.plan import default_layout, identity_plan, make_plan
from gt_jax.growth.plan_entries import Plan
from gt_jax.growth.repetition import from_json, reference
from gt_jax.growth.transform import grow, match, target_config
from gt_jax.models.language_model import LanguageModel, abstract, apply_network, empty_cache
from gt_jax.models.layers.gated_copies import NOWHERE, slots
from gt_jax.training import step
from gt_jax.training.loop import make_trainer
from tests.growth import stream_case
from tests.support import assert_rounded_alike, perturbed, small_model, tokens

ALPHA = AdaptiveConfig().alpha
SOURCE = small_model("DG", adaptive=AdaptiveConfig(initial_bias=0.5).seeing_state)
TOKENS = tokens(16)
ALIKE = {"terms": 64, "chain": 60}  # eight layers, each some sums of at most 64 values one after the other


def planned(config, kind="layer", passes=4, alpha=ALPHA) -> Plan:
    """A plan that keeps gates, of a source whose every layer uses `passes`."""
    one = {"k_exec": passes, "survival": [1.0, 0.6, 0.4, 0.3][: len(alpha)]}
    counts = from_json({f"layer{layer}": one for layer in range(len(config.depth))}, "test", alpha)
    return keeping_gates(make_plan(kind, counts, config.depth), alpha)


@functools.cache
def forward(config):
    network = LanguageModel(config)
    return jax.jit(lambda v, tokens, cache=None: apply_network(network, v, tokens, cache=cache))


@pytest.fixture(scope="module")
def source():
    """Variables whose gates differ from token to token."""
    return perturbed(SOURCE, 0.3)


def test_the_child_is_the_adaptive_source_and_its_gates_learn(source):
    plan = planned(SOURCE)
    child, tree = target_config(SOURCE, plan), grow(source, plan, SOURCE)
    assert child.adaptive is None and child.layout == "D*4,G*4"

    def loss(params):
        output = apply_network(LanguageModel(child), {**tree, "params": params}, TOKENS)
        return jnp.mean(jnp.square(output.logits)), output

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, output), gradient = run(tree["params"])
    wanted = forward(SOURCE)(source, TOKENS)
    assert_rounded_alike({"logits": output.logits}, {"logits": wanted.logits}, **ALIKE)
    alive = np.asarray(wanted.statistics.alive)
    assert ((alive > 0.02) & (alive < 0.98)).any(), "tokens differ, or the test would say nothing"
    for name in ("survival", "alive", "s_after", "delta_ratio", "weight_moments"):
        np.testing.assert_allclose(np.ravel(getattr(output.statistics, name)),
                                   np.ravel(getattr(wanted.statistics, name)), rtol=1e-4, atol=1e-5, err_msg=name)
    (_, other), _ = run(jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 0.5 if "halting" in jax.tree_util.keystr(path) else leaf, tree["params"]))
    assert np.abs(other.logits - wanted.logits).max() > 1e-3, "the gates matter"
    for segment in ("segment0", "segment1"):
        moved = np.abs(gradient[segment]["layer0"]["halting"]["output"]["b"]).max(axis=-1)
        assert (moved[:-1] > 0).any() and moved[-1] == 0, "every gate but the last of a chain has a weight behind it"


def test_the_weight_of_a_token_waits_for_the_next_copy_whatever_stands_between(source):
    """Copies in turns, D G D G …, of a source whose G layer adds nothing: the order of the two does not matter."""
    still = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0 if jax.tree_util.keystr(path).endswith("['layer1']['gain']") else leaf, source)
    plan = planned(SOURCE, "block")
    child = target_config(SOURCE, plan)
    assert [(one.source, one.copy) for one in plan.entries[:4]] == [(0, 1), (1, 1), (0, 2), (1, 2)]
    tree, wanted = grow(still, plan, SOURCE), forward(SOURCE)(still, TOKENS).logits
    cache, pieces = empty_cache(child, len(TOKENS), 16), []
    for piece in (TOKENS[:, :8], TOKENS[:, 8:]):  # decoding: a copy's state is that of its pass
        output = forward(child)(tree, piece, cache)
        cache, pieces = output.cache, [*pieces, output.logits]
    assert_rounded_alike({"logits": jnp.concatenate(pieces, axis=1)}, {"logits": wanted}, **ALIKE)


@pytest.mark.parametrize("order", ["001122", "012012", "0120211", "0", "01"])
def test_no_register_is_written_while_its_chain_waits(order):
    copies = tuple((int(layer), order[: at + 1].count(layer)) for at, layer in enumerate(order))
    reads, writes, passes = slots(GatedCopiesConfig(copies))
    held: dict[int, tuple[int, int]] = {}
    for (layer, copy), read, write, k in zip(copies, reads, writes, passes, strict=True):
        assert k == copy - 1 and (read == NOWHERE) == (copy == 1)
        assert copy == 1 or held.pop(read) == (layer, copy - 1)
        assert write not in held, "another chain waits there"
        if write != NOWHERE:
            held[write] = (layer, copy)
    assert not held, "what is written is read"
    assert max(writes) == {"001122": 0, "012012": 2, "0120211": 2}.get(order, NOWHERE)


def test_a_checkpoint_keeps_a_copy_of_the_gates_and_their_moments_for_every_layer(case, small_and_once, tmp_path):
    plan = planned(stream_case.CONFIG, passes=2)
    report = stream_case.grow(case.source, tmp_path / "grown", plan=plan)
    opened = open_checkpoint(tmp_path / "grown")
    assert opened.config == target_config(stream_case.CONFIG, Plan.from_json(json.loads(json.dumps(plan.to_json()))))
    assert not [path for path in report["dropped"] if "halting" in path]
    names = [path for path in opened.model if "/halting/" in path]
    stored = checkpoint.load_paths(tmp_path / "grown", set(names))
    before = flatten(case.tree)
    for target, entry in enumerate(plan.entries):
        (segment, block, slot), origin = (layout.position(at) for layout, at in (
            (plan.target_layout, target), (plan.source_layout, entry.source)))
        own = f"params/segment{segment}/layer{slot}/halting/"
        for path in (path for path in names if path.startswith(own)):
            old = before[f"params/segment{origin[0]}/layer{origin[2]}/halting/{path.removeprefix(own)}"]
            np.testing.assert_array_equal(stored[path][block], old[origin[1]], err_msg=path)
    assert report["moments"] > 0 or not any(path.startswith("optimizer") for path in before)
    with pytest.raises(Refused, match="grown already"):  # though the reference repetition is of another depth
        main([str(tmp_path / "grown"), "--dry-run", "--plan", "stack"])


def test_configs_there_and_back_and_those_from_before():
    child = target_config(SOURCE, planned(SOURCE))
    assert ModelConfig.from_json(json.loads(json.dumps(child.to_json()))) == child
    before = SOURCE.to_json()
    del before["gated_copies"]
    assert ModelConfig.from_json(before) == SOURCE
    assert child.plain.gated_copies is None and child.halting == SOURCE.adaptive


@pytest.mark.parametrize(
    ("copies", "gate", "said"),
    [
        (((0, 2),), {}, "copy 1 of it must come first"),
        (((0, 1), (0, 1)), {}, "copy 2 of it must come first"),
        (((0, 1), (0,)), {}, "copies[1] is [0]"),
        (((0, 1), (0, 2)), {"alpha": (1.0,)}, "gate.alpha has 1 passes"),
        (((0, 1),), {"halting": "batch"}, "gate.halting is 'batch'"),
        (((0, 1),), {"context": "alive"}, "gate.context is 'alive'"),
    ],
)
def test_copies_that_no_chain_of_gates_has_are_refused(copies, gate, said):
    with pytest.raises(Refused) as caught:
        GatedCopiesConfig(copies, AdaptiveConfig(**gate))
    assert said in str(caught.value)


def test_all_that_a_model_of_gated_copies_excludes_is_said_at_once():
    child = target_config(SOURCE, planned(SOURCE))
    with pytest.raises(Refused) as caught:
        child.replace(adaptive=AdaptiveConfig(), stack=child.stack.replace(kind="midpoint"), layout="D*4,G*3")
    for said in ("adaptive depth", "stack 'midpoint'", "8 entries; the layout has 7"):
        assert said in str(caught.value), said


def test_sources_and_plans_that_cannot_keep_gates_are_refused_with_all_reasons():
    batch = SOURCE.replace(adaptive=AdaptiveConfig(halting="batch"), stack=SOURCE.stack.replace(kind="lambda"))
    few = keeping_gates(identity_plan(SOURCE.depth), batch.adaptive.alpha)
    few = Plan(few.kind, few.source_layout, few.target_layout, few.entries, planned(SOURCE).demands, few.options)
    with pytest.raises(Refused) as caught:
        target_config(batch, few)
    for said in ("stack is 'lambda'", "halting is 'batch'", "layer 0 uses 4 passes, the plan holds 1",
                 "layer 1 uses 4 passes", "--plan layer"):
        assert said in str(caught.value), said
    for config, said in ((SOURCE.plain, "not adaptive"), (target_config(SOURCE, planned(SOURCE)), "grown already"),
                         (SOURCE.replace(adaptive=AdaptiveConfig(context="alive")), "context is 'alive'")):
        with pytest.raises(Refused) as caught:
            target_config(config, planned(config))
        assert said in str(caught.value)
    plan, tensors = planned(SOURCE), {}
    with pytest.raises(Refused, match="carry 'output' is not exact"):
        match(tensors, tensors, plan, "output")
    assert "keeps its gates" in mismatches(SOURCE, target_config(SOURCE, plan), plan)[0]


def test_a_dealt_plan_whose_attention_counts_from_the_last_copy_is_refused_and_layer_is_the_way():
    layout = from_json({f"layer{i}": {"k_exec": k} for i, k in enumerate((2, 2, 2, 2))}), reference()
    dealt = make_plan("dealt", layout[0], small_model("DDDG").depth)
    wrong = wrong_order(keeping_gates(dealt, reference().alpha), 4)
    assert any("is pass 2 of source layer 3, where pass 1 would be in order" in line for line in wrong)
    assert wrong_order(keeping_gates(make_plan("layer", layout[0], small_model("DDDG").depth), (1.0, 0.7)), 2) == []
    assert "source runs at most 1" in wrong_order(keeping_gates(planned(SOURCE), (1.0,)), 1)[0]


def test_the_command_plans_by_layer_and_refuses_what_has_no_meaning(capsys):
    assert main(["--dry-run", "--json", "--keep-gates"]) == 0
    plan = Plan.from_json(json.loads(capsys.readouterr().out))
    assert plan.kind == "layer" and plan.keeps_gates and plan.copies == (2, 1, 2, 3, 2, 3, 4, 3)
    assert [one.coefficient for one in plan.entries if one.source == 6] == [1.0, 0.7, 0.5, 0.35]
    with pytest.raises(Refused) as caught:
        main(["--dry-run", "--keep-gates", "--coefficient", "expected", "--correct", "mass", "--carry", "output"])
    for said in ("--coefficient", "--correct", "--carry output"):
        assert said in str(caught.value), said
    with pytest.raises(Refused, match=r"(?s)would be in order.*--plan layer: that is every pass in order"):
        main(["--dry-run", "--keep-gates", "--plan", "dealt"])
    layered = make_plan("layer", reference(), default_layout(reference()))
    short = dataclasses.replace(layered, demands=tuple(one._replace(k_exec=4) for one in layered.demands))
    assert wrong_order(short, 4)[-1] == "--plan layer, --from k_exec and --round up: that is every pass in order"


def test_a_budget_moves_no_gates_of_a_child_that_keeps_them(monkeypatch):
    """A child goes on with its source's price; its layers all run, so there is no depth to hold."""

    def moved(*_):
        raise AssertionError("moved")

    monkeypatch.setattr(step, "with_gates_moved", moved)
    price = budget(2.0, target_of="passes_run")
    batch = {name: jnp.zeros((1, 16), jnp.int32) for name in ("tokens", "targets", "segment_ids")}
    for config, held in ((target_config(SOURCE, planned(SOURCE)), False), (SOURCE, True)):
        trainer = make_trainer(config, TrainConfig(steps=4, price=price))
        state = jax.eval_shape(trainer.new_state, abstract(config))
        with pytest.raises(AssertionError, match="moved") if held else contextlib.nullcontext():
            jax.eval_shape(trainer.step, state, batch)
