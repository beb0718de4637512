"""A batch in parts has the step of the whole batch, on one device and on a mesh; a step has one clock.

The rows are two chunks each, with a G layer in the stack and one that looks a token ahead.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gt_jax.configs.model import MemoryConfig, MTPConfig
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.run import RunConfig, TrainConfig
from gt_jax.devices.sharding import make_mesh, put_like
from gt_jax.errors import Refused
from gt_jax.models.language_model import LanguageModel, abstract, free_passes
from gt_jax.models.memory_chunks import floats, forward_rows
from gt_jax.training.loop import make_trainer
from gt_jax.training.optimizer import learning_rate
from gt_jax.training.running_means import moved_once
from tests.support import GSA, perturbed, small_model

ROWS, TOKENS, EMA = 8, 12, 0.002
CONFIG = small_model("G", adaptive=False, remat="layer", mtp=MTPConfig(), memory=MemoryConfig(chunk=6, stream=0),
                     gsa=GSA.replace(implementation="reference"))  # fmt: skip
PLAIN = small_model("D", adaptive=False, init_std=0.1)
TRAIN = TrainConfig(steps=10, optimizer=OptimizerConfig(warmup=0.5, weight_decay=0.0))


@functools.cache
def start():
    """Weights, and running variances that have seen something."""
    variables = jax.tree.map(np.array, perturbed(CONFIG))
    for layer in (variables["statistics"]["segment0"]["layer0"], variables["statistics"]["mtp"]["layer"]):
        layer["mixer"]["variance_ema"][...] = EMA
    return variables


def batch():
    """Rows with very different numbers of targets, and of real tokens."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 256, (ROWS, TOKENS)).astype(np.int32)
    targets = np.where(random.random((ROWS, TOKENS)) < np.linspace(0.05, 1, ROWS)[:, None], tokens, -1)
    real = (np.arange(TOKENS)[None] < np.linspace(4, TOKENS, ROWS).astype(int)[:, None]).astype(np.int32)
    return {"tokens": tokens * real, "targets": np.where(real, targets, -1).astype(np.int32), "segment_ids": real}


@functools.cache
def trainer():
    return make_trainer(CONFIG, TRAIN)


def after_one_step(accumulate):
    one = trainer() if accumulate == 1 else make_trainer(CONFIG, dataclasses.replace(TRAIN, accumulate=accumulate))
    state, metrics = one.step(one.new_state(put_like(start(), abstract(CONFIG))), batch())
    return jax.device_get((state.optimizer, state.statistics, metrics))


@functools.cache
def whole():
    return after_one_step(1)


def assert_same_step(found, wanted):
    for name in ("loss", "total_loss", "mtp_loss", "indexer_loss", "delta_ratio", "mean_weight", "gradient_norm"):
        np.testing.assert_allclose(found[2][name], wanted[2][name], rtol=2e-5, err_msg=name)
    # the moments, which are the gradient: Adam's first step is of one size for every gradient, so also for rounding
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted[0]) if leaf.dtype == np.float32)
    for got, want in zip(jax.tree.leaves(found[0]), jax.tree.leaves(wanted[0]), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max() + 1e-7 * largest)
    chex.assert_trees_all_close(found[1], wanted[1], rtol=1e-5)


@pytest.mark.exhaustive  # in the suite on a mesh
@pytest.mark.parametrize("parts", [4])
def test_parts_give_the_step_of_the_whole_batch(parts):
    assert_same_step(after_one_step(parts), whole())


def test_running_means_move_once_by_the_mean_over_the_batch():
    model, rows = LanguageModel(CONFIG), {name: jnp.asarray(value) for name, value in batch().items()}
    run = jax.jit(lambda v: forward_rows(model, v, rows["tokens"], rows["segment_ids"], free_passes())[1])
    seen = run(jax.tree.map(jnp.asarray, start())).score_variance[0, 0]
    moved = whole()[1]["segment0"]["layer0"]["mixer"]["variance_ema"]
    np.testing.assert_allclose(moved, CONFIG.gsa.ema_decay * EMA + (1 - CONFIG.gsa.ema_decay) * seen, rtol=1e-5)
    assert abs(seen / EMA - 1) > 0.1  # or a second move would not be seen


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0.1, 9)), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
def test_the_order_and_the_cut_of_pieces_do_not_matter(pieces):
    tokens, seen = (np.asarray(column, np.float32) for column in zip(*pieces, strict=True))
    old, keep = {"ema": jnp.asarray([2.0]), "bytes": jnp.asarray([7], jnp.int32)}, 0.9
    moved = floats({"ema": jnp.asarray(keep * 2.0 + (1 - keep) * seen)[:, None], "bytes": jnp.zeros((1,), jnp.int32)})
    got = moved_once(old, moved, jnp.asarray(tokens))
    mean = (tokens * seen).sum() / tokens.sum() if tokens.sum() else 2.0
    np.testing.assert_allclose(got["ema"], keep * 2.0 + (1 - keep) * mean, rtol=1e-5)
    assert got["bytes"].tolist() == [7]


def test_learning_rate_and_phases_go_on_together_after_a_step_that_was_not_applied():
    state = trainer().new_state(put_like(start(), abstract(CONFIG)))
    bad = state._replace(params=jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), state.params))
    skipped, metrics = trainer().step(bad, batch())
    assert metrics["bad"] == 1 and int(skipped.step) == 1
    good = skipped._replace(params=put_like(start(), abstract(CONFIG))["params"])
    after, metrics = trainer().step(good, batch())
    assert metrics["bad"] == 0 and int(after.step) == 2
    before = start()["params"]["unembedding"]["w"]
    largest = np.abs(np.asarray(after.params["unembedding"]["w"]) - before).max()
    # Adam's first update is the learning rate, up to its epsilon: that of the second step and not of the first
    rates = [float(learning_rate(TRAIN.optimizer, TRAIN.steps)(step)) for step in (0, 1)]
    assert rates[1] > 1.5 * rates[0] and largest == pytest.approx(rates[1], rel=1e-2)


@pytest.mark.exhaustive  # the step runs on meshes in other tests, and in parts in this file
def test_on_a_mesh_too():
    wanted = whole()
    with jax.set_mesh(make_mesh(data=2, tensor=2, devices=jax.devices()[:4])):
        assert_same_step(after_one_step(4), wanted)


def test_held_out_batches_run_in_the_parts_of_the_step():
    """A run that fits by its parts alone ended where it was evaluated, since that took whole batches."""
    variables, rows = perturbed(PLAIN), batch()
    evaluate, in_parts = (make_trainer(PLAIN, dataclasses.replace(TRAIN, accumulate=n)).evaluation for n in (1, 4))
    want = jax.device_get(evaluate(variables, rows, None))
    with jax.set_mesh(make_mesh(data=2, devices=jax.devices()[:2])):
        got = jax.device_get(in_parts(put_like(variables, abstract(PLAIN)), rows, None))
    assert got[1] == want[1] == (rows["targets"] >= 0).sum()
    np.testing.assert_allclose(got[0], want[0], rtol=2e-5)
    for name in ("alive", "delta_ratio", "update_ratio"):
        np.testing.assert_allclose(getattr(got[2], name), getattr(want[2], name), rtol=2e-5, atol=1e-6, err_msg=name)
    states = [f"[{count},{TOKENS},{PLAIN.width}]" for count in (ROWS, ROWS // 4)]
    programs = [str(jax.make_jaxpr(one)(variables, rows, None)) for one in (evaluate, in_parts)]
    assert [[state in program for state in states] for program in programs] == [[True, False], [False, True]]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(Refused, match=r"data.batch_size is 8; train.accumulate 3 does not divide it"):
        RunConfig(model=CONFIG, train=TrainConfig(accumulate=3))
