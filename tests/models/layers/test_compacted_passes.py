"""Passes on living tokens alone: as if the finished ones were deleted, in any bucket, forward, backward, decoding."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs.model import AdaptiveConfig
from gt_jax.devices.sharding import Rules
from gt_jax.models.language_model import LanguageModel, apply_network, empty_cache
from gt_jax.models.layers import adaptive_depth, compacted_passes
from gt_jax.models.layers.adaptive_depth import PassControl
from gt_jax.models.layers.mixer import Place, place_rows
from gt_jax.models.layers.residual import Layer
from tests.models.layers import test_adaptive_depth
from tests.rarely import rarely
from tests.support import assert_rounded_alike, perturbed, segments, small_model, tokens

ALIVE = AdaptiveConfig(context="alive", lengths=(1.0, 0.4))  # fewer lengths compile sooner
CONFIG = small_model().replace(adaptive=ALIVE)
FREE = PassControl(jnp.zeros((), jnp.int32), jnp.ones(()))
IDS = jnp.concatenate(
    [segments(20), segments(3, 9, 8), jnp.concatenate([segments(7, 5), jnp.zeros((1, 8), jnp.int32)], 1)]
)
ROWS, TOKENS = IDS.shape


def inputs(seed: int = 6) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (ROWS, TOKENS, 32))


@functools.cache
def variables(kind: str):
    """Those of the test of adaptive depth, with gates further apart."""
    found = test_adaptive_depth.variables(kind)
    halting = jax.tree.map(lambda leaf: leaf, found["params"]["halting"])
    halting["output"] = {"w": halting["output"]["w"] * 3, "b": jnp.full(1, {"D": 2.0, "G": 1.5}[kind])}
    return {**found, "params": {**found["params"], "halting": halting}}


@functools.cache
def run(kind: str):
    return jax.jit(lambda v, x, ids: Layer(kind, CONFIG, Rules()).apply(v, x, place_rows(ids), FREE))


@functools.cache
def one_pass(kind: str):
    """(Delta, what the halting head then says) of one row of tokens at `positions`."""
    layer = Layer(kind, CONFIG, Rules())

    def both(layer, x, previous, ids, positions):
        step, seen = layer.delta(x, Place(ids, positions))
        return step, layer.halting(adaptive_depth.halting_features(x, step, previous, seen.mixer))

    return jax.jit(lambda v, *args: layer.apply(v, *args, method=both))


def by_hand(kind: str, x, ids):
    """Every row a list of the tokens that are left, each pass on that list alone."""
    v, x, ids = variables(kind), np.array(x), np.asarray(ids)
    counts, weights = np.zeros(ids.shape, int), np.zeros((4, *ids.shape))
    for row in range(len(ids)):
        left, s, previous = np.flatnonzero(ids[row]), np.ones(ids.shape[1]), np.zeros_like(x[row])
        for k, alpha in enumerate(CONFIG.adaptive.alpha):
            left = left[s[left] >= 0.1]
            if not len(left):
                break
            given = x[row, left], previous[left], ids[row, left], left.astype(np.int32)
            step, p = (np.asarray(a)[0] for a in one_pass(kind)(v, *(a[None] for a in given)))
            weights[k, row, left] = s[left]
            x[row, left] += float(v["params"]["gain"]) * alpha * s[left, None] * step
            previous[left], s[left] = step, s[left] * p.clip(0.01, 1.0)
            counts[row, left] += 1
    return x, counts, weights


@pytest.mark.parametrize("kind", ["D", rarely("G")])
def test_equals_the_rows_with_finished_tokens_deleted(kind):
    x, real = inputs(), np.asarray(IDS) > 0
    got, _, seen, *_ = run(kind)(variables(kind), x, IDS)
    wanted, counts, weights = by_hand(kind, x, IDS)
    assert set(counts[real]) >= {1, 2, 4} and (counts > 1).sum(1).max() < TOKENS, "or the test is empty"
    np.testing.assert_allclose(got[real], wanted[real], atol=2e-5)
    np.testing.assert_allclose(seen.alive, [(counts[real] > k).mean() for k in range(4)], atol=1e-6)
    np.testing.assert_allclose(seen.survival, weights[:, real].mean(1), atol=1e-5)


def loss(kind: str, lengths, x, v):
    """A loss of what comes out of a layer; its extras are the values and the share of each pass that was computed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptive_depth, "pass_lengths", lambda *_: lengths)
        layer = Layer(kind, CONFIG, Rules())
        (out, _, seen, *_), moved = layer.apply(v, x, place_rows(IDS), FREE, mutable=["statistics"])  # as in training
    assert kind == "D" or moved["statistics"]["mixer"]["variance_ema"].shape == ()
    real = (IDS > 0).astype(jnp.float32)[..., None]
    return jnp.sum(jnp.sin(out) * real) + jnp.sum(seen.survival) + jnp.sum(seen.auxiliary_loss), (out * real, seen)


@pytest.mark.parametrize("kind", [rarely("D"), "G"])  # a G layer has statistics too
def test_buckets_change_what_is_computed_and_nothing_else(kind):
    """Values, statistics and gradients: those of a bucket are those of whole rows."""
    ladder = compacted_passes.pass_lengths(TOKENS, ALIVE.lengths)
    assert ladder == (0, 8, 20) and compacted_passes.pass_lengths(1, ALIVE.lengths) == (0, 1)
    assert compacted_passes.pass_lengths(675, AdaptiveConfig().lengths) == (0, 112, 208, 384, 675)
    results = []
    for lengths in (ladder, (TOKENS,)):
        gradient = jax.jit(jax.grad(functools.partial(loss, kind, lengths), (0, 1), has_aux=True))
        results.append(gradient(inputs(), variables(kind)))
    (gradients, (out, seen)), (wanted, (whole, all_seen)) = results
    assert seen.computed[0] == 1 and 0 < seen.computed[3] < 0.5, "a short bucket should run, or the test is empty"
    np.testing.assert_array_equal(all_seen.computed, 1.0)
    both = (each._replace(computed=0)._asdict() for each in (seen, all_seen))
    assert_rounded_alike(*both, terms=64, chain=16)
    np.testing.assert_allclose(out, whole, atol=1e-5)
    for path, gradient in flatten(wanted[1]["params"]).items():
        error = jnp.sqrt(jnp.mean((flatten(gradients[1]["params"])[path] - gradient) ** 2))
        assert float(error) <= 1e-5 * float(jnp.sqrt(jnp.mean(gradient**2))) + 1e-7, path
    np.testing.assert_allclose(gradients[0], wanted[0], atol=1e-5 * float(jnp.abs(wanted[0]).max()))


@pytest.mark.parametrize("kind", ["D", rarely("G")])
def test_no_token_sees_a_later_one_or_another_row(kind):
    """The gradient of every token by every token before, none by those after, of other documents or rows."""
    layer, given = Layer(kind, CONFIG, Rules()), variables(kind)

    @jax.jit
    def gradients(x):
        out, back = jax.vjp(lambda x: jnp.sum(layer.apply(given, x, place_rows(IDS), FREE)[0], axis=-1), x)
        one_each = jnp.eye(out.size).reshape(-1, *out.shape)
        return jax.lax.map(lambda one: jnp.any(back(one)[0] != 0, axis=-1), one_each).reshape(*out.shape, *out.shape)

    reach, row, at = np.asarray(gradients(inputs())), np.arange(ROWS), np.arange(TOKENS)  # [row, token, of input …]
    ids = np.asarray(IDS)
    same = (ids[:, :, None] == ids[:, None]) & (ids[:, None] > 0) & (at[:, None] >= at[None])[None]
    allowed = np.zeros(reach.shape, bool)
    allowed[row, :, row] = same
    allowed |= np.eye(ROWS * TOKENS, dtype=bool).reshape(reach.shape)  # padding stays as it is
    assert not np.any(reach & ~allowed)
    assert np.mean(reach[allowed]) > 0.3


def test_what_is_shown_inside_lies_at_its_tokens():
    """`state` of each pass in the collection `intermediates`, whoever lives."""
    x, layer, given = inputs(), Layer("D", CONFIG, Rules()), variables("D")
    apply = jax.jit(lambda v, x: layer.apply(v, x, place_rows(IDS), FREE, mutable=["intermediates", "passes"]))
    (out, *_), shown = apply(given, x)
    states = shown["intermediates"]["state"]
    np.testing.assert_array_equal(states[0], x)
    _, counts, _ = by_hand("D", x, IDS)
    np.testing.assert_array_equal(np.asarray(shown["passes"]["runs"]).sum(0), counts)
    for k in range(1, 4):
        np.testing.assert_allclose(states[k][counts <= k], out[counts <= k], atol=1e-5)
        assert np.abs(states[k] - states[k - 1])[counts >= k].max(axis=-1).min() > 1e-4


# Decoding

MODEL = small_model("DG").replace(adaptive=ALIVE)


@functools.cache
def model_variables():
    """Gates apart, so that about half of the tokens run more than one pass of a layer."""
    found = perturbed(MODEL)
    for layer, bias in (("layer0", -3.5), ("layer1", -1.8)):
        head = found["params"]["segment0"][layer]["halting"]
        head["hidden"]["w"], head["output"]["w"] = head["hidden"]["w"] * 6, head["output"]["w"] * 12
        head["output"]["b"] = jnp.full((1, 1), bias)
    return found


@functools.cache
def step():
    return jax.jit(lambda v, x, cache: apply_network(LanguageModel(MODEL), v, x, cache=cache))


def test_decoding_equals_the_whole():
    """Each row goes on for as many passes as it asks for; prompts in one call, also behind what was read before."""
    x = tokens(20, rows=3)
    whole = jax.jit(lambda v, x: apply_network(LanguageModel(MODEL), v, x))(model_variables(), x)
    alive = np.asarray(whole.statistics.alive)
    assert ((alive[:, 1] > 0.2) & (alive[:, 1] < 0.9)).all() and alive[0, 3] > 0.1, "or the test is empty"
    for parts in ((1,) * 20, (13, *(1,) * 7), (*(1,) * 4, 13, 1, 1, 1)):
        begin, cache, logits = 0, empty_cache(MODEL, 3, 20), []
        for size in parts:
            output = step()(model_variables(), x[:, begin : begin + size], cache)
            begin, cache = begin + size, output.cache
            logits.append(output.logits)
        np.testing.assert_allclose(
            jnp.concatenate(logits, 1), whole.logits, atol=3e-5 * float(jnp.abs(whole.logits).max())
        )


def test_decoding_runs_and_writes_for_living_rows_alone():
    """With three equal rows a pass runs for all or for none; each pass's cache holds the tokens that lived in it."""
    x, cache, lived = jnp.repeat(tokens(20, rows=1), 3, axis=0), empty_cache(MODEL, 3, 20), []
    for at in range(20):
        output = step()(model_variables(), x[:, at : at + 1], cache)
        np.testing.assert_array_equal(output.statistics.computed, output.statistics.alive)
        ran = np.asarray(output.statistics.computed) > 0  # [layer, pass]
        state, before = (np.asarray(c["segment0"]["layer0"]["state"][0]) for c in (output.cache, cache))
        np.testing.assert_array_equal((state != before).any((1, 2, 3, 4)), ran[0])
        cache = output.cache
        lived.append(ran[1])
    written = np.asarray(cache["segment0"]["layer1"]["segments"][0]) == 1  # [pass, row, token]
    np.testing.assert_array_equal(written, np.stack(lived, 1)[:, None].repeat(3, 1))
    assert 0 < written[1].mean() < 1
