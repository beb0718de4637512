"""Alerts on what real training steps say of a model with one sick layer: the weights are made sick, not the records."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.price import PriceConfig
from gt_jax.configs.run import RunConfig, TrainConfig
from gt_jax.devices.sharding import Rules
from gt_jax.monitoring import alerts
from gt_jax.monitoring.metrics import to_json
from gt_jax.training.optimizer import make_optimizer
from gt_jax.training.price import initial_price, move_price
from gt_jax.training.state import new_state
from gt_jax.training.step import make_step
from tests.support import perturbed, small_model, tokens

MODEL, STEPS, FREE = small_model("DG", remat="none"), 400, 300  # FREE: a step in which the gates decide
PRICE = PriceConfig(target=1.7, target_of="passes_run")
RUN = RunConfig(model=MODEL, train=TrainConfig(steps=STEPS))
LETTERS = "DG"


@functools.cache
def program():
    """The compiled step that all of these share, and its optimizer."""
    optimizer = make_optimizer(OptimizerConfig(), STEPS)
    return make_step(MODEL, PRICE, optimizer, STEPS, Rules()), optimizer


def one_step(**changes):
    """(state before, state after, metrics) of a real step; `changes`: path of a parameter -> what it is made."""
    step, optimizer = program()
    variables = jax.tree.map(jnp.copy, perturbed(MODEL))
    everywhere = {f"layer{n}/halting/output/b": lambda b: b - 1.0 for n in range(2)}  # as fresh gates begin
    for path, change in (everywhere | changes).items():
        *folders, name = ["params", "segment0", *path.split("/")]
        place = functools.reduce(lambda tree, key: tree[key], folders, variables)
        place[name] = change(place[name])
    state = new_state(variables, optimizer, PRICE)
    start = initial_price(PRICE)._replace(value=jnp.float32(0.02))
    state = state._replace(step=jnp.asarray(FREE, jnp.int32), price=jax.tree.map(jnp.copy, start))
    ids = tokens(16)
    after, metrics = step(state, {"tokens": ids, "targets": ids, "segment_ids": jnp.ones_like(ids)})
    return start, after, jax.device_get(metrics)


def found_by(metrics, config=RUN):
    """(sickness, place) of the alerts where a run says this at every step with free passes."""
    course = alerts.Course(config)
    values = {name: np.asarray(value) for name, value in metrics.items()}
    records = [{"step": step, **values} for step in range(FREE, FREE + 60) if not course.forced(step)]
    found = alerts.alerts(records, config)
    assert all(alert.last is None and alert.where in alert.words for alert in found)
    return {(alert.sickness, alert.where) for alert in found}


def zero(value):
    return jnp.zeros_like(value)


def broken(value):
    return value.at[(0,) * value.ndim].set(jnp.nan)


def test_a_healthy_step_raises_none_and_says_what_the_price_steers():
    """The compiled step steers the passes; the weight that it reports is what the other price would have steered."""
    start, after, metrics = one_step()
    assert found_by(metrics) == set()
    weight, run, computed = (float(np.mean(metrics[name])) for name in ("mean_weight", "passes_run", "passes_computed"))
    assert weight < 1.6 and 1.75 < run <= computed
    assert float(metrics["passes_run_excess"]) == pytest.approx(run - 1.7) and "mean_weight_excess" not in metrics
    weighed = move_price(PRICE.replace(target_of="mean_weight"), start, jnp.float32(weight), jnp.asarray(True), STEPS)
    assert float(after.price.value) > 0.02 > float(weighed.value), "lambda rises; at that weight it falls"
    assert to_json(metrics["passes_computed"]) == [float(round(x)) for x in metrics["passes_computed"]]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("what", ["gain", "output"])
def test_a_dead_layer_is_named(layer, what):
    """All that it adds is nothing: by its gain, which |dh|/|h| does not see, or by its output projections."""
    dead = ("gain",) if what == "gain" else ("mixer/output/w", "mlp/down/w")
    metrics = one_step(**{f"layer{layer}/{path}": zero for path in dead})[2]
    assert ("an update vanishes", f"layer {layer}") in found_by(metrics)
    assert {place for sickness, place in found_by(metrics) if sickness == "an update vanishes"} == {f"layer {layer}"}
    if what == "gain":
        assert metrics["delta_ratio"][layer] > alerts.layer_alerts.RATIO_LOW > metrics["update_ratio"][layer]
    other = 1 - layer
    assert metrics["update_ratio"][other] > 0.01, "the mean over layers is healthy"


@pytest.mark.parametrize(("bias", "sickness"), [(-20.0, "a gate saturates"), (-3.5, "all tokens halt at once"),
                                                (20.0, "a gate saturates"), (5.0, "no token halts")])  # fmt: skip
def test_a_gate_that_never_opens_or_never_closes_is_named(bias, sickness):
    """Of one layer of two; the gates of the other are as they begin."""
    metrics = one_step(**{"layer1/halting/output/b": lambda b: jnp.full_like(b, bias)})[2]
    assert found_by(metrics) == {(sickness, "layer 1")}
    assert 1.5 < metrics["passes_run"][0] < 3 and round(float(metrics["passes_run"][1]), 3) == (1 if bias < 0 else 4)


@pytest.mark.parametrize(("path", "place"), [("layer0/mlp/down/w", "layer 0"), ("layer1/gain", "layer 1"),
                                             ("layer1/halting/output/w", "layer 1")])  # fmt: skip
def test_a_layer_that_is_not_finite_is_named(path, place):
    """The first of them, though all that come after read what it wrote."""
    change = broken if path.endswith("w") else lambda gain: gain * jnp.nan
    metrics = one_step(**{path: change})[2]
    assert metrics["bad"] == 1
    assert {(sickness, where) for sickness, where in found_by(metrics) if where} == {("a layer is not finite", place)}
