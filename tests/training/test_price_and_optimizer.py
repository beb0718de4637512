"""The compute price keeps mean depth at its target; the optimizer's groups and schedules are what they say."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gt_jax import train
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs import presets
from gt_jax.configs.data import DataConfig
from gt_jax.configs.model import ExitConfig
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.price import PriceConfig, budget
from gt_jax.configs.run import RunConfig
from gt_jax.errors import Refused
from gt_jax.models.language_model import abstract
from gt_jax.models.layers.pass_statistics import PassStatistics
from gt_jax.training.optimizer import Float32State, groups, in_float32, learning_rate, make_optimizer
from gt_jax.training.price import initial_price, move_price, phase, price_loss
from tests.support import full_model, small_model

PRICE = PriceConfig()
STEPS = 300
move = jax.jit(lambda state, k, moves: move_price(PRICE, state, k, moves, STEPS))


def statistics(survival, alive=None):
    survival = jnp.asarray(survival, jnp.float32)
    zero = jnp.zeros_like(survival)
    alive = (survival > 0).astype(jnp.float32) if alive is None else jnp.asarray(alive, jnp.float32)
    return PassStatistics(survival, alive, *[zero] * (len(PassStatistics._fields) - 2))


def test_a_short_run_has_every_phase():
    phases = [phase(PRICE, jnp.asarray(step), STEPS, 4) for step in range(STEPS)]
    forced = np.array([int(p.control.forced) for p in phases])
    charged = np.array([bool(p.charged) for p in phases])
    p_max = np.array([float(p.control.p_max) for p in phases])
    assert np.all(forced[:90] == 2) and np.all(forced[90:99] == 0)
    audits = np.flatnonzero(forced[90:]) + 90
    assert audits.tolist() == list(range(99, STEPS, 20))
    assert not charged[:105].any() and charged[105] and not charged[audits].any()
    assert p_max[119] == pytest.approx(0.95) and p_max[120] == 1.0


def test_lambda_rises_above_the_target_falls_below_it_and_stays_in_bounds():
    yes, state = jnp.asarray(True), initial_price(PRICE)
    rising = []
    for _ in range(200):
        state = move(state, jnp.asarray(2.0), yes)
        rising.append(float(state.value))
    assert np.all(np.diff(rising) >= 0) and rising[-1] == pytest.approx(PRICE.highest)
    held = move(state, jnp.asarray(PRICE.target * 1.03), yes)
    assert held.value == state.value, "settled: inside the dead band it does not move"
    for _ in range(600):
        state = move(state, jnp.asarray(1.0), yes)
    assert float(state.value) == pytest.approx(PRICE.lowest)


def test_audit_steps_do_not_move_lambda():
    state = initial_price(PRICE)
    assert move(state, jnp.asarray(3.0), jnp.asarray(False)).value == state.value


def test_what_the_target_is_of_is_the_weight_where_nothing_is_said():
    stored = {name: value for name, value in PriceConfig(target=1.5).to_json().items() if name != "target_of"}
    assert PriceConfig.from_json(stored) == PriceConfig(target=1.5, target_of="mean_weight")
    with pytest.raises(Refused, match=r"target_of.*mean_weight.*passes_run"):
        PriceConfig.from_json({"target_of": "expected_k"})
    base = RunConfig(model=small_model())
    for words, wanted in (((), "mean_weight"), (("--target-of", "passes_run", "--target", "2"), "passes_run")):
        made = train.run_config(train.parser().parse_args(["run", *words]), base).train.price
        assert made == PriceConfig(target_of=wanted, target=2.0 if words else 1.3)


def test_price_loss_by_hand():
    seen = statistics([[1.0, 0.5, 0.1, 0.0], [1.0, 0.0, 0.0, 0.0]])
    no_gain = price_loss(PRICE, jnp.asarray(0.02), seen, jnp.asarray(2.0), jnp.asarray(1.9))
    assert float(no_gain) == pytest.approx(0.02 * (0.85 * 0.6 / 3 + 0.15 * 2 / 3))
    with_coupon = price_loss(PRICE, jnp.asarray(0.02), seen, jnp.asarray(2.0), jnp.asarray(2.05))
    assert float(with_coupon) == pytest.approx(0.02 * (0.85 * 0.6 / 3 + 0.15 * 2 / 3 - 0.1), abs=1e-7)
    assert float(price_loss(PRICE, jnp.asarray(0.02), seen, jnp.asarray(2.0), jnp.asarray(9.0))) == 0


def test_every_matrix_is_decayed_and_no_scalar_is():
    params = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), abstract(small_model())["params"])
    labels = flatten(groups(params))
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5), steps=10)
    zeros = jax.tree.map(np.zeros_like, params)
    updates = jax.jit(lambda zeros, params: optimizer.update(zeros, optimizer.init(params), params)[0])(zeros, params)
    for path, update in flatten(updates).items():
        decayed = bool(np.any(update != 0))
        assert decayed == (labels[path] == "matrix"), path
    assert labels["segment0/layer0/gain"] == labels["segment0/layer0/mixer/a_log"] == "scalar"
    assert labels["segment0/layer0/mixer/query_conv/w"] == labels["segment0/layer1/halting/hidden/w"] == "scalar"
    assert labels["segment0/layer0/mixer/query/w"] == labels["embedding/table"] == "matrix"


def test_a_matrix_is_what_is_neither_gate_nor_convolution():
    """Every module of the library that has a `w`, by its path within a layer or the model: a new one fails here."""
    halting = {"halting/hidden", "halting/output", "exit/hidden", "exit/output", "memory/gate"}
    gates = halting | {"mixer/beta", "mixer/decay", "mixer/state_gate"}
    gates |= {f"mixer/{name}_conv" for name in ("query", "key", "value")}
    mixers = ("query", "key", "value", "gate", "value_gate", "output_gate", "output", "state_output", "indexer_query",
              "indexer_key", "indexer_weight")  # fmt: skip
    dense = ("gate", "up", "down")
    mlps = {"router", *dense, *(f"{of}/{name}" for of in ("shared", "experts") for name in dense)}
    streams = {f"{of}_hyper/{name}" for of in ("mixer", "mlp") for name in ("pre", "post", "res")}
    matrices = {f"mixer/{name}" for name in mixers} | {f"mlp/{name}" for name in mlps} | streams
    matrices |= {"mtp/fusion", "embedding/kronecker", "unembedding"}
    hybrid = presets.preset("groundthink_dsds").replace(width=32, vocab=64, mlp_width=32)
    models = (full_model(), small_model("DG", False, exit=ExitConfig()), hybrid)
    found = {"matrix": set(), "scalar": set()}
    for config in models:
        labels = flatten(groups(abstract(config)["params"]))
        for path, label in labels.items():
            if path.endswith("/w"):
                found[label].add(re.sub(r"^(segment\d+/layer\d+|mtp/layer)/", "", path.removesuffix("/w")))
    assert found == {"matrix": matrices, "scalar": gates}


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedules_warm_up_and_come_down(schedule):
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup=0.1, final=0.1), 100)
    values = np.array([float(rate(step)) for step in range(100)])
    assert values[0] == pytest.approx(0.1) and values[10] == pytest.approx(1.0)
    assert np.all(np.diff(values[10:]) <= 1e-7) and values[-1] == pytest.approx(0.1, abs=0.05)
    if schedule == "wsd":
        assert np.all(values[10:80] == 1.0)


@pytest.mark.parametrize("steps", [1, 7, 100])
@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_config_says_the_rate_of_every_step(schedule, steps):
    config = OptimizerConfig(learning_rate=2e-3, schedule=schedule, warmup=0.1, final=0.2)
    rate = jax.jit(jax.vmap(learning_rate(config, steps)))(jnp.arange(steps + 3))
    np.testing.assert_allclose(rate, [config.rate(step, steps) for step in range(steps + 3)], rtol=1e-5)


def test_impossible_configs_are_refused():
    with pytest.raises(Refused, match="target"):
        PriceConfig(target=0.5)
    with pytest.raises(Refused, match="clipped_until"):
        PriceConfig(clipped_until=0.01)
    with pytest.raises(Refused, match="learning_rate"):
        OptimizerConfig(learning_rate=0.0)


def test_bfloat16_weights_move_as_their_float32_copies_do():
    """Steps of 1e-4 are lost on a bfloat16 number near 1; here every one of them counts."""
    start = {"narrow": jnp.asarray([1.0, -2.0, 3e-3]), "wide": jnp.asarray([0.5, -0.1])}
    params = start | {"narrow": start["narrow"].astype(jnp.bfloat16)}
    optimizer = optax.adamw(1e-4)
    mixed, plain = in_float32(optimizer), optimizer.init(start | {"narrow": params["narrow"].astype(jnp.float32)})
    whole = start | {"narrow": params["narrow"].astype(jnp.float32)}
    state = mixed.init(params)

    @jax.jit
    def step(params, state, whole, plain):
        gradients = jax.tree.map(lambda p: p.astype(jnp.bfloat16), whole)
        moved, state = mixed.update(gradients, state, params)
        updates, plain = optimizer.update(jax.tree.map(lambda g: g.astype(jnp.float32), gradients), plain, whole)
        return optax.apply_updates(params, moved), state, optax.apply_updates(whole, updates), plain

    for _ in range(60):
        params, state, whole, plain = step(params, state, whole, plain)
    assert isinstance(state, Float32State) and state.copies["narrow"].dtype == jnp.float32
    assert isinstance(state.copies["wide"], optax.MaskedNode)
    np.testing.assert_array_equal(state.copies["narrow"], whole["narrow"])
    np.testing.assert_array_equal(params["narrow"], whole["narrow"].astype(jnp.bfloat16))
    np.testing.assert_array_equal(params["wide"], whole["wide"])
    assert abs(float(params["narrow"][0]) - 1.0) > 4e-3


def test_float32_weights_have_no_copies():
    params = {"w": jnp.ones(3)}
    assert not isinstance(in_float32(optax.adamw(1e-3)).init(params), Float32State)


JUMPS = "pointer_jumps:hardest=2,symbols=4"


def price_of(*words, base=None):
    made = train.run_config(train.parser().parse_args(["run", *words]), base or RunConfig(model=small_model()))
    return made.train.price, made.train.optimizer.halting_scale


def test_the_rule_of_the_price_brings_its_own_fields():
    assert price_of("--price-rule", "budget", "--target", "2") == (budget(2.0), 10.0)
    assert price_of("--price-rule", "budget", "--target", "2", "--halting-scale", "3") == (budget(2.0), 3.0)
    assert price_of("--price-rule", "budget")[0].target == PriceConfig().target
    assert price_of("--price-rule", "budget", "--pass-price", "0.002") == (budget(None, value=0.002), 10.0)
    before = RunConfig(model=small_model())
    before = before.replace(train=before.train.replace(price=budget(2.0, rate=3.0)))
    assert price_of("--target", "1.5", base=before)[0] == budget(1.5, rate=3.0), "a run's own rule stays"
    assert price_of("--price-rule", "ouro", base=before) == (PriceConfig(target=2.0), 1.0), "its target too"
    by_passes = before.replace(train=before.train.replace(price=PriceConfig(target=1.5, target_of="passes_run")))
    assert price_of("--price-rule", "budget", base=by_passes)[0] == budget(1.5, target_of="passes_run")
    with pytest.raises(Refused, match="target-of passes_run says what a target is the mean of; a pass price has none"):
        price_of("--price-rule", "budget", "--pass-price", "0.1", "--target-of", "passes_run")
    assert PriceConfig.from_json(budget(None, value=0.1).to_json()) == budget(None, value=0.1)
    with pytest.raises(Refused, match="needs price rule 'budget'"):
        price_of("--pass-price", "0.1")
    with pytest.raises(Refused, match="both given"):
        price_of("--price-rule", "budget", "--pass-price", "0.1", "--target", "2")
    with pytest.raises(Refused, match="aims at a depth"):
        PriceConfig(target=None)


def test_forced_passes_may_be_drawn_for_each_step():
    drawn = PriceConfig(forced_passes=0)
    counts = [int(phase(drawn, jnp.asarray(step), STEPS, 4).control.forced) for step in range(80)]
    assert set(counts) == {1, 2, 3, 4}


def test_forced_passes_rise_with_the_curriculum_and_hold_until_the_gates_are_free():
    ramp = budget(None, forced_passes=4, forced_ramp=0.6, forced_until=0.7, price_from=0.7, clipped_until=0.7)
    counts = [int(phase(ramp, jnp.asarray(step), STEPS, 4).control.forced) for step in range(STEPS)]
    assert [counts.index(count) for count in (1, 2, 3, 4, 0)] == [0, 60, 120, 180, 210] and counts[-1] == 0
    assert ramp.after(0, STEPS, 2 * STEPS).forced_ramp == pytest.approx(0.3)
    assert ramp.after(10, STEPS, STEPS).forced_ramp == 0.0, "a ramp that had begun does not begin again"
    with pytest.raises(Refused, match=r"forced_ramp 0\.8 <= forced_until 0\.7"):
        ramp.replace(forced_ramp=0.8)
    drawn = ramp.replace(forced_passes=0)  # the highest number that is drawn rises
    counts = [int(phase(drawn, jnp.asarray(step), STEPS, 4).control.forced) for step in range(210)]
    assert [max(counts[at : at + 60]) for at in (0, 60, 120)] == [1, 2, 3] and set(counts[180:]) == {1, 2, 3, 4}


@pytest.mark.parametrize(("words", "said"), [
    (("--plain", "--target", "2", "--forced-passes", "3"), r"--target 2.0: .*once(.|\n)*--forced-passes 3: .*once"),
    (("--target", "40"), "--target is 40.0; a layer runs 4 times at most"),
    (("--forced-passes", "5"), "--forced-passes is 5; a layer runs 4 times at most"),
    (("--weight-decay", "-5"), "weight_decay is -5.0; it must be at least 0"), (("--preset", ""), "preset"),
])  # fmt: skip
def test_what_a_model_cannot_be_steered_to_is_refused(words, said):
    with pytest.raises(Refused, match=said):
        arguments = train.parser().parse_args(["run", *words])
        train.run_config(arguments, train.default_config(arguments))
    with pytest.raises(Refused, match=r"b1 is 1.0; it must lie in \[0, 1\)"):
        OptimizerConfig(b1=1.0)


def test_the_options_of_forced_passes():
    words = ("--price-rule", "budget", "--forced-passes", "4")
    jumps = ("--task", JUMPS, "--curriculum", "0.6")
    made = price_of(*words, "--forced-until", "0.7", "--pass-price", "0.02", *jumps)[0]
    assert made == budget(None, value=0.02, forced_passes=4, forced_ramp=0.6, forced_until=0.7, price_from=0.7,
                          clipped_until=0.7)  # fmt: skip
    assert price_of(*words, "--forced-until", "0.5")[0].forced_ramp == 0.0, "no curriculum, no ramp"
    ouro = price_of("--forced-passes", "3", "--forced-until", "0.38")[0]
    assert ouro == PriceConfig(forced_passes=3, forced_until=0.38, price_from=0.38)
    again = RunConfig(model=small_model())
    again = again.replace(train=again.train.replace(price=made))
    assert price_of("--forced-passes", "4", base=again)[0] == made, "to resume: what a left-out --curriculum was stays"
    with pytest.raises(Refused, match="free from the first step on"):
        price_of(*words)
    with pytest.raises(Refused, match="difficulty rises for longer"):
        price_of(*words, "--forced-until", "0.5", *jumps)


def test_a_curriculum_is_not_begun_in_rows_that_had_one():
    """A start goes on in the rows of its source, where difficulty has risen: the flag would do nothing."""
    base = RunConfig(model=small_model(), data=DataConfig(tasks=(JUMPS,), curriculum_rows=48, batch_size=8))
    words = ["run", "--start", "there/6", "--steps", "10", "--curriculum"]
    with pytest.raises(Refused, match=r"--curriculum 0\.6: that is over the 48 rows of the training of --start"):
        train.run_config(train.parser().parse_args([*words, "0.6"]), base)
    with pytest.raises(Refused, match="that is over the 48 rows"):
        train.run_config(train.parser().parse_args([*words, "0.3", "--batch-size", "16"]), base)
    assert train.run_config(train.parser().parse_args([*words, "0.6", "--resume"]), base).data == base.data
    assert train.run_config(train.parser().parse_args([*words, "0.5"]), base).data.curriculum_rows == 40
    assert train.run_config(train.parser().parse_args([*words, "0.6", "--seed", "7"]), base).data.curriculum_rows == 48


def test_an_audit_of_the_budget_finishes_no_token_and_is_charged():
    now = [phase(budget(2.0), jnp.asarray(step), STEPS, 4) for step in (8, 9)]
    assert [float(one.control.uncut) for one in now] == [0.0, 1.0] and not any(int(one.control.forced) for one in now)
    assert all(bool(one.charged) for one in now) and [bool(one.moves) for one in now] == [True, False]


def test_halting_heads_have_a_rate_of_their_own():
    params = {"layer0": {"halting": {"output": {"b": jnp.ones(1)}}, "gain": jnp.ones(1)}}
    optimizer = make_optimizer(OptimizerConfig(halting_scale=10.0, clip=100.0), steps=10)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    found = flatten(updates)
    assert float(found["layer0/halting/output/b"][0]) == pytest.approx(10 * float(found["layer0/gain"][0]))
    plain = make_optimizer(OptimizerConfig(), steps=10)
    assert jax.tree.structure(plain.init(params)) == jax.tree.structure(optimizer.init(params)), "runs resume"
