"""The whole model: causal, the same on every mesh, decoding equals the forward pass, plain and adaptive share names."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.checkpoints.tree_paths import flatten, nest
from gt_jax.configs import presets
from gt_jax.devices.sharding import Rules, make_mesh, put_like
from gt_jax.models.language_model import LanguageModel, abstract, empty_cache, fixed_passes, free_passes
from tests.rarely import rarely
from tests.support import decoded, perturbed, small_model, tokens

ADAPTIVE = small_model()


def variables(config=ADAPTIVE):
    return perturbed(config)


@functools.cache
def forward(config=ADAPTIVE):
    return jax.jit(lambda v, tokens, ids, control: LanguageModel(config).apply(v, tokens, ids, control=control))


def test_no_logit_depends_on_a_later_token():
    x = tokens(24)
    changed = x.at[:, 15].set((x[:, 15] + 1) % 257)
    a, b = (forward()(variables(), t, None, free_passes()).logits for t in (x, changed))
    assert np.array_equal(a[:, :15], b[:, :15]) and not np.allclose(a[:, 15:], b[:, 15:])


# the adaptive form: test_components.py, with every component; layers/test_compacted_passes.py
@pytest.mark.exhaustive  # test_components.py decodes every kind of model
@pytest.mark.parametrize("adaptive", [rarely(True), False])
def test_decoding_one_token_at_a_time_equals_the_forward_pass(adaptive):
    config = ADAPTIVE if adaptive else ADAPTIVE.plain
    v, x = variables(config), tokens(24)
    whole = forward(config)(v, x, None, free_passes()).logits
    logits, cache = decoded(config, v, x, 19)
    np.testing.assert_allclose(logits, whole, atol=3e-5)
    assert cache["position"].tolist() == [24, 24]


def test_plain_and_adaptive_share_every_weight_name():
    adaptive, plain = (set(flatten(abstract(c)["params"])) for c in (ADAPTIVE, ADAPTIVE.plain))
    assert plain < adaptive
    assert all("/halting/" in path for path in adaptive - plain)


def test_one_forced_pass_is_the_plain_model():
    v, x = variables(), tokens(24)
    kept = {path: leaf for path, leaf in flatten(v).items() if "/halting/" not in path}
    wanted = forward(ADAPTIVE.plain)(nest(kept), x, None, free_passes()).logits
    np.testing.assert_allclose(forward()(v, x, None, fixed_passes(1)).logits, wanted, atol=1e-5)


@pytest.mark.exhaustive  # in the suite: test_components.py, with every component but the halting heads
@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}])
def test_every_mesh_gives_the_same_loss_and_gradients(axes):
    x = tokens(16, rows=8)

    def loss(params, statistics):
        output, moved = LanguageModel(ADAPTIVE).apply(
            {"params": params, "statistics": statistics}, x, mutable=["statistics"]
        )
        return jnp.mean(output.logits**2) + jnp.sum(output.statistics.auxiliary_loss), moved

    step = jax.value_and_grad(loss, has_aux=True)
    v = variables()
    (wanted, moved), gradient = _alone(step, v)
    with jax.set_mesh(make_mesh(**axes)):
        placed = put_like(v, abstract(ADAPTIVE))
        (got, moved_there), gradient_there = jax.jit(step)(placed["params"], placed["statistics"])
        specs = jax.tree.map(lambda a: a.sharding.spec, placed["params"])
        assert jax.tree.map(lambda g: g.sharding.spec, gradient_there) == specs
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    chex.assert_trees_all_close(jax.device_get(gradient_there), gradient, atol=2e-5, rtol=2e-4)
    chex.assert_trees_all_close(jax.device_get(moved_there), moved, atol=2e-5, rtol=2e-4)


_cached: dict = {}


def _alone(step, v):
    if not _cached:
        _cached["result"] = jax.device_get(jax.jit(step)(v["params"], v["statistics"]))
    return _cached["result"]


def test_a_model_computes_in_bfloat16_and_keeps_float32_states():
    config = ADAPTIVE.replace(compute_dtype="bfloat16")
    x = tokens(16)
    low = forward(config)(variables(), x, None, fixed_passes(2))
    exact = forward()(variables(), x, None, fixed_passes(2))
    assert low.logits.dtype == jnp.float32 and low.first_pass_hidden.dtype == jnp.bfloat16
    assert float(jnp.sqrt(jnp.mean((low.logits - exact.logits) ** 2) / jnp.mean(exact.logits**2))) < 0.2
    cache = empty_cache(config, 1, 4)
    assert cache["segment0"]["layer0"]["state"].dtype == jnp.float32


def test_rows_are_counted_by_the_mesh():
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        assert Rules().shards("batch") == 4
    assert Rules().shards("batch") == 1


def test_tiny_has_the_parameters_it_says():
    shapes = flatten(abstract(presets.tiny())["params"])
    assert sum(int(np.prod(s.shape)) for s in shapes.values()) == 1_582_908
