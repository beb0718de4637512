"""Adaptive depth: the recurrence as written, nothing changed by skipping, no token bound to its batch."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.devices.sharding import Rules
from gt_jax.models.layers.adaptive_depth import HaltingHead, PassControl, halting_features
from gt_jax.models.layers.mixer import place_rows
from gt_jax.models.layers.residual import Layer
from tests.support import drawn, small_model

CONFIG = small_model()
IDS = jnp.ones((2, 10), jnp.int32)
PLACE = place_rows(IDS)
SMALL = jnp.asarray(0.004)
FREE = PassControl(jnp.zeros((), jnp.int32), jnp.ones(()))


def layer(kind: str, config=CONFIG) -> Layer:
    return Layer(kind, config, Rules())


@functools.cache
def variables(kind: str):
    x = jnp.zeros((2, 10, 32))
    shapes = jax.eval_shape(layer(kind).init, jax.random.key(0), x, PLACE, FREE)
    params = drawn(shapes["params"], 0.2, middle={"scale": 1.0, "gain": 1.0, "a_log": 1.0, "dt_bias": -2.0})
    params["halting"]["output"]["b"] = jnp.zeros(1)  # p spread around a half, so that tokens differ in depth
    params["halting"]["output"]["w"] *= 6
    return {"params": params} if kind == "D" else {"params": params, "statistics": {"mixer": {"variance_ema": SMALL}}}


@functools.cache
def run(kind: str):
    return jax.jit(lambda v, x, control: layer(kind).apply(v, x, PLACE, control))


@functools.cache
def one_pass(kind: str):
    """(the layer's update, what its halting head then says)."""

    def both(v, x, previous):
        step, seen = layer(kind).apply(v, x, PLACE, method=Layer.delta)
        features = halting_features(x, step, previous, seen.mixer)
        return step, HaltingHead(CONFIG.adaptive, Rules()).apply({"params": v["params"]["halting"]}, features)

    return jax.jit(both)


def inputs(seed: int = 6) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (2, 10, 32))


def by_hand(kind: str, x: jax.Array):
    """The recurrence as an unrolled loop over passes that all run."""
    v = variables(kind)
    s, previous, weights = np.ones((2, 10), np.float32), jnp.zeros_like(x), []
    for alpha in CONFIG.adaptive.alpha:
        step, p = (np.asarray(a) for a in one_pass(kind)(v, x, previous))
        p = p.clip(0.01, 1.0)
        weight = np.where(s >= 0.1, s, 0.0)
        x = x + v["params"]["gain"] * alpha * weight[..., None] * step
        s, previous = np.where(s >= 0.1, s * p, s), step
        weights.append(weight)
    return x, np.stack(weights)


@pytest.mark.parametrize("kind", ["D", "G"])
def test_equals_the_recurrence_written_out(kind):
    x = inputs()
    got, _, seen, *_ = run(kind)(variables(kind), x, FREE)
    wanted, weights = by_hand(kind, x)
    np.testing.assert_allclose(got, wanted, atol=2e-5)
    np.testing.assert_allclose(seen.survival, weights.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(seen.alive, (weights > 0).mean((1, 2)), atol=1e-6)
    assert 0 < seen.alive[1] < 1 or 0 < seen.alive[2] < 1, "tokens should differ in depth, or the test is empty"


def test_weight_passes_run_and_passes_computed_are_three_figures():
    """A pass with one living token is computed for the batch, run by that token, and weighs what its gate says."""
    x = inputs()
    seen = run("D")(variables("D"), x, FREE)[2]
    _, weights = by_hand("D", x)
    mean_weight, passes_run, passes_computed = (
        float(jnp.sum(each)) for each in (seen.survival, seen.alive, seen.computed)
    )
    assert mean_weight == pytest.approx(weights.sum(0).mean(), abs=1e-5)
    assert passes_run == pytest.approx((weights > 0).sum(0).mean(), abs=1e-5)
    assert passes_computed == (weights > 0).any((1, 2)).sum()
    assert mean_weight + 0.1 < passes_run < passes_computed - 0.1, "they should differ, or the test is empty"


@pytest.mark.parametrize("gain", [1.0, -0.5, 0.0])
def test_the_update_ratio_is_what_the_pass_adds(gain):
    """|dh|/|h| is the layer's own, whatever its gain; what is added has gain, strength and weight in it."""
    given = {**variables("D"), "params": {**variables("D")["params"], "gain": jnp.float32(gain)}}
    seen = run("D")(given, inputs(), FREE._replace(forced=jnp.asarray(2, jnp.int32)))[2]
    np.testing.assert_allclose(seen.update_ratio, abs(gain) * np.asarray(CONFIG.adaptive.alpha) * seen.delta_ratio,
                               rtol=1e-6)  # fmt: skip
    assert seen.delta_ratio[0] > 0.01
    plain = jax.jit(lambda v, x: layer("D", CONFIG.plain).apply(v, x, PLACE, FREE)[2])
    params = {name: part for name, part in given["params"].items() if name != "halting"}
    once = plain({"params": params}, inputs())
    np.testing.assert_allclose(once.update_ratio, abs(gain) * once.delta_ratio, rtol=1e-6)


@pytest.mark.parametrize("kind", ["D", "G"])
def test_a_token_does_not_depend_on_its_batch(kind):
    x = inputs()
    together = run(kind)(variables(kind), x, FREE)[0]
    other = x.at[1].set(jax.random.normal(jax.random.key(7), (10, 32)) * 5)
    assert np.array_equal(run(kind)(variables(kind), other, FREE)[0][0], together[0])


def test_padding_is_in_no_statistic():
    x = inputs()
    ids = IDS.at[1].set(0)
    padded = jax.jit(lambda x: layer("D").apply(variables("D"), x, place_rows(ids), FREE)[2])(x)
    alone = jax.jit(lambda x: layer("D").apply(variables("D"), x, place_rows(IDS[:1]), FREE)[2])(x[:1])
    chex.assert_trees_all_close(padded, alone, atol=1e-6)


def test_forced_passes_run_at_full_strength_and_no_further():
    x = inputs()
    for passes in (1, 2, 4):
        _, _, seen, *_ = run("D")(variables("D"), x, FREE._replace(forced=jnp.asarray(passes, jnp.int32)))
        np.testing.assert_array_equal(seen.survival, [1.0] * passes + [0.0] * (4 - passes))
    once = run("D")(variables("D"), x, FREE._replace(forced=jnp.ones((), jnp.int32)))
    plain = {"params": {k: v for k, v in variables("D")["params"].items() if k != "halting"}}
    same = jax.jit(lambda v, x: layer("D", CONFIG.plain).apply(v, x, PLACE, FREE)[0])(plain, x)
    np.testing.assert_allclose(once[0], same, atol=1e-6 * np.abs(same).max())  # two programs round differently
    np.testing.assert_allclose(once[1], once[0], atol=0)  # after the first pass = after all of them


def test_the_price_reaches_the_halting_head_and_only_through_survival():
    def mean_weight(params):
        seen = run("D")({**variables("D"), "params": params}, inputs(), FREE)[2]
        return jnp.sum(seen.survival)

    gradient = jax.jit(jax.grad(mean_weight))(variables("D")["params"])
    assert float(jnp.abs(gradient["halting"]["output"]["b"]).sum()) > 0
    rest = [g for name, part in gradient.items() if name != "halting" for g in jax.tree.leaves(part)]
    assert all(float(jnp.abs(g).max()) == 0 for g in rest)


def test_hard_weights_are_whole_or_nothing_and_learn_as_s_does():
    """Against the loop written out: w_k = [s_k >= 0.4] with the gradient of s_k, of finished tokens too."""
    config = CONFIG.replace(adaptive=CONFIG.adaptive.hard.replace(threshold=0.4))
    control = FREE._replace(uncut=jnp.ones(()))  # all passes run, so that those of finished tokens have a gradient

    def loss(params, control):
        x, _, seen, *_ = layer("D", config).apply({"params": params}, inputs(), PLACE, control)
        return jnp.sum(x**2), (x, seen)

    def reference(params):
        x, previous, s = inputs(), jnp.zeros_like(inputs()), jnp.ones((2, 10))
        for alpha in config.adaptive.alpha:
            step, p = one_pass("D")({"params": params}, x, previous)
            weight = jnp.where(s >= 0.4, 1.0, 0.0) + s - jax.lax.stop_gradient(s)
            x = x + (params["gain"] * alpha * weight)[..., None] * step
            s, previous = s * p.clip(0.01, 1.0), jax.lax.stop_gradient(step)
        return jnp.sum(x**2), x

    params = variables("D")["params"]
    got, (moved, seen) = jax.jit(jax.grad(loss, has_aux=True))(params, control)
    wanted, by_hand = jax.jit(jax.grad(reference, has_aux=True))(params)
    np.testing.assert_allclose(moved, by_hand, atol=2e-5)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        # sums of terms as large as the leaf: compiled or not, the loop itself differs by 2.4e-6 of that
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    assert (jnp.abs(got["halting"]["output"]["b"]) > 0).all() and 0 < seen.alive[1] < 1
    np.testing.assert_array_equal(seen.survival, seen.alive)
    skipped, (same, _) = jax.jit(jax.grad(loss, has_aux=True))(params, FREE)
    np.testing.assert_allclose(same, moved, atol=2e-5)  # what nobody lives in changes nothing
    assert skipped["halting"]["output"]["b"] != got["halting"]["output"]["b"]


@pytest.mark.slow
def test_gradients_do_not_depend_on_rematerialisation_or_skipping():
    """Against the loop without `cond`: a skipped pass contributes exactly nothing, forward and backward."""
    config = CONFIG
    control = FREE._replace(p_max=jnp.asarray(0.4))

    def loss(params):
        out = layer("D", config).apply({"params": params}, inputs(), PLACE, control)
        return jnp.sum(out[0] ** 2)

    def reference(params):
        x, previous, s = inputs(), jnp.zeros_like(inputs()), jnp.ones((2, 10))
        for alpha in config.adaptive.alpha:
            step, p = one_pass("D")({"params": params}, x, previous)
            p = p.clip(0.01, 0.4)
            alive = s >= 0.1
            x = x + (params["gain"] * alpha * jnp.where(alive, s, 0.0))[..., None] * step
            s, previous = jnp.where(alive, s * p, s), jax.lax.stop_gradient(step)
        return jnp.sum(x**2)

    params = variables("D")["params"]
    got, wanted = jax.jit(jax.grad(loss))(params), jax.jit(jax.grad(reference))(params)
    for path, gradient in flatten(wanted).items():
        error = jnp.sqrt(jnp.mean((flatten(got)[path] - gradient) ** 2) / (jnp.mean(gradient**2) + 1e-12))
        assert float(error) < 1e-5, path
