"""Nothing is lost: bad steps change nothing and end a run in time, saves go on beside it, SIGTERM is heard."""

import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax import checkpoint
from gt_jax.model import initialise
from gt_jax.training.config import TrainConfig
from gt_jax.training.loop import Diverged, Patience, fit, make_trainer
from gt_jax.training.stopping import Termination
from tests.support import small_model

CONFIG = small_model("D", adaptive=False)
BATCH = {name: np.ones((2, 8), np.int32) for name in ("tokens", "targets", "segment_ids")}


@functools.cache
def trainer():
    return make_trainer(CONFIG, TrainConfig(steps=10))


def start(poison=None):
    variables = initialise(CONFIG, seed=0)
    if poison is not None:
        variables["params"]["final_norm"]["scale"] = variables["params"]["final_norm"]["scale"].at[0].set(poison)
    return trainer().new_state(variables)


@pytest.mark.parametrize("poison", [np.inf, np.nan])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(poison):
    state = start(poison)
    before = jax.device_get(state)
    after, metrics = trainer().step(state, BATCH)
    assert metrics["bad"] == 1 and after.step == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after._replace(step=jnp.zeros((), jnp.int32))), before)


def test_a_good_step_is_applied():
    state = start()
    before = jax.device_get(state.params)
    after, metrics = trainer().step(state, BATCH)
    assert metrics["bad"] == 0
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(before), strict=True))


def test_bad_steps_are_told_with_their_place_and_end_the_run_in_a_row():
    told = []
    patience = Patience(2, told.append, {1: {"row": 8}, 2: None, 3: {"row": 24}, 4: {"row": 32}}.pop)
    bad = {"bad": 1.0, "total_loss": np.float32(np.nan), "gradient_norm": np.float32(1)}
    patience.see(1, bad)
    patience.see(2, {"bad": 0.0})
    patience.see(3, bad)
    with pytest.raises(Diverged, match=r"step 4: total_loss nan, .* the text is at \{'row': 32\} \(2 in a row\)"):
        patience.see(4, bad)
    assert len(told) == 2 and "after which the text is at {'row': 8}" in told[0]


def test_a_loop_without_patience_ends_at_the_first_bad_step():
    seen = []
    with pytest.raises(Diverged, match="step 1: "):
        fit(trainer(), start(np.nan), iter([BATCH] * 3), 3, record=lambda step, metrics: seen.append(step))
    assert seen == [1]


def test_a_save_beside_the_caller_holds_the_values_of_its_moment(tmp_path):
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.device_put(np.zeros((256, 256), np.float32))
    waits = []
    for step in range(3):
        waits.append(checkpoint.save_async(tmp_path / str(step), {"x": x}, {"config": {}}))
        x = add(x)
    for step, wait in enumerate(waits):
        wait()
        assert np.all(checkpoint.load(tmp_path / str(step))["x"] == step)


def test_sigterm_is_a_wish_while_it_is_awaited_and_what_it_was_after():
    before = signal.getsignal(signal.SIGTERM)
    with Termination() as termination:
        assert not termination.asked(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert termination.asked(2)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_loop_that_is_asked_to_stop_hands_its_state_over_once():
    calls = []
    state = fit(
        trainer(), start(), iter([BATCH] * 9), 9, record=lambda *_: None, stop=lambda step: step == 2,
        after=lambda step, state, last: calls.append((step, int(state.step), last)),
    )  # fmt: skip
    assert calls == [(2, 2, True)] and int(state.step) == 2
