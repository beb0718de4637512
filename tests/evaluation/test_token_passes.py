"""Passes of each token: those counted from p by hand, the means that training shows, nothing run for the asking."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.configs.model import AdaptiveConfig, ExitConfig
from gt_jax.devices.sharding import Rules
from gt_jax.evaluation.intermediates import hidden_rows
from gt_jax.evaluation.measurement import repetition
from gt_jax.evaluation.token_passes import hidden_and_passes, passes_by_layer
from gt_jax.models.language_model import LanguageModel, abstract, fixed_passes, free_passes
from gt_jax.models.layers.adaptive_depth import HaltingHead, halting_features
from gt_jax.models.layers.mixer import place_rows
from gt_jax.models.layers.residual import Layer
from gt_jax.models.layers.sow import PASSES
from tests.support import assert_rounded_alike, perturbed, small_model, tokens

IDS = jnp.array([[1] * 7 + [2] * 6 + [0] * 3, [1] * 16])
REAL = np.asarray(IDS) > 0
TOKENS = tokens(16)
ADAPTIVE = small_model("D*2,G")
FREE = fixed_passes([0, 0, 0])


@functools.cache
def uneven(config):
    """Variables whose gates differ from token to token, around a half."""

    def louder(path, leaf):
        name = jax.tree_util.keystr(path)
        if "halting" not in name:
            return leaf
        return leaf * (0 if "'b'" in name or "embedding" in name else 3 if "output" in name else 1)

    return jax.tree_util.tree_map_with_path(louder, perturbed(config, 0.3))


@functools.cache
def program():
    return jax.jit(functools.partial(hidden_and_passes, LanguageModel(ADAPTIVE)))


def by_token(variables, control):
    """(states, passes of each token by layer) of the one program for all."""
    return program()(variables, TOKENS, IDS, control)


def by_hand(config, variables):
    """Passes [l, b, t] layer after layer, each a loop over passes that all run; how near the threshold s comes."""
    network, place = LanguageModel(config), place_rows(IDS)
    x = network.apply(variables, TOKENS, method=lambda model, ids: model.embedding(ids))
    found, nearest = [], 1.0

    @functools.partial(jax.jit, static_argnums=0)
    def one_pass(kind, own, x, previous):
        step, seen = Layer(kind, config, Rules()).apply(own, x, place, method=Layer.delta)
        features = halting_features(x, step, previous, seen.mixer)
        return step, HaltingHead(config.adaptive, Rules()).apply({"params": own["params"]["halting"]}, features)

    for number, kind in enumerate(config.depth.types):
        segment, block, slot = config.depth.position(number)
        own = {name: jax.tree.map(lambda a, block=block: a[block], tree[f"segment{segment}"][f"layer{slot}"])
               for name, tree in variables.items() if f"layer{slot}" in tree.get(f"segment{segment}", {})}
        s, previous, count = np.ones(TOKENS.shape), jnp.zeros_like(x), np.zeros(TOKENS.shape, int)
        for alpha in config.adaptive.alpha:
            step, p = one_pass(kind, own, x, previous)
            alive = s >= config.adaptive.threshold
            weight = jnp.asarray(np.where(alive, s, 0.0), jnp.float32)
            x, previous = x + own["params"]["gain"] * alpha * weight[..., None] * step, step
            count += alive
            s = np.where(alive, s * np.clip(np.asarray(p, np.float64), config.adaptive.p_floor, 1.0), s)
            nearest = min(nearest, np.abs(s - config.adaptive.threshold)[REAL].min())
        found.append(count * REAL)
    return np.stack(found), nearest


def test_passes_are_those_counted_from_p_by_hand():
    """In packed rows of a model of two segments, the first of them scanned; padding runs none."""
    variables = uneven(ADAPTIVE)
    wanted, nearest = by_hand(ADAPTIVE, variables)
    _, passes = by_token(variables, FREE)
    assert nearest > 1e-5, "rounding must not decide whether a token runs"
    np.testing.assert_array_equal(passes, wanted)
    spread = sorted(len(np.unique(of[REAL])) for of in wanted)
    assert spread[-1] > 2 and spread[-2] > 1, "tokens should differ, or the test is empty"


def test_asking_changes_nothing_of_what_runs():
    """The states are those of who does not ask, and the mean is what that one is told."""
    network, variables = LanguageModel(ADAPTIVE), uneven(ADAPTIVE)
    hidden, passes = by_token(variables, FREE)
    same, seen = jax.jit(functools.partial(hidden_rows, network))(variables, TOKENS, IDS, FREE)
    np.testing.assert_allclose(np.asarray(passes)[:, REAL].mean(axis=1), seen.alive.sum(axis=1), rtol=1e-5)
    assert_rounded_alike({"hidden": hidden}, {"hidden": same}, terms=64, chain=40)


def test_forced_passes_are_what_was_forced():
    forced = np.array([1, 3, 2])
    _, passes = by_token(uneven(ADAPTIVE), fixed_passes(forced.tolist()))
    np.testing.assert_array_equal(passes, forced[:, None, None] * REAL)


@pytest.mark.parametrize("config", [
    small_model("D", remat="pass").replace(adaptive=AdaptiveConfig(halting="batch")),
    small_model("DD", remat="layer"),
    small_model("D*2", False, exit=ExitConfig(threshold=0.5)),
    small_model("D", False),
], ids=["batch", "alike", "leaving", "plain"])  # fmt: skip
def test_of_every_kind_of_model_their_mean_is_passes_run(config):
    """With gates of 0.2 at most a token runs one or two passes, and no other is computed for the asking."""
    network, low = LanguageModel(config), free_passes()._replace(p_max=jnp.float32(0.2))
    output, shown = jax.jit(lambda v: network.apply(v, TOKENS, IDS, control=low, mutable=[PASSES]))(uneven(config))
    passes, seen = np.asarray(passes_by_layer(config, shown, IDS)), output.statistics
    np.testing.assert_allclose(passes[:, REAL].mean(axis=1), seen.ran.sum(axis=1), rtol=1e-5)
    assert not passes[:, ~REAL].any()
    if config.adaptive is None and config.exit is None:
        assert (passes[:, REAL] == 1).all()
    elif config.adaptive is not None and config.adaptive.halting == "batch":
        assert (passes[:, REAL] == 2).all() and (seen.alive.sum(axis=1) < 2).all(), "below the threshold they move too"
        counts = repetition(seen, config.depth.types, {})
        assert [counts[f"layer{i}"]["passes_run"] for i in range(len(config.depth))] == [2.0] * len(config.depth)
    else:
        assert len(np.unique(passes[:, REAL])) > 1
    if config.adaptive is not None:
        np.testing.assert_array_equal(seen.computed.sum(axis=1), [2] * len(config.depth))


def test_they_are_no_variables_of_a_model():
    assert set(abstract(small_model("D", False, exit=ExitConfig()))) == {"params"}
