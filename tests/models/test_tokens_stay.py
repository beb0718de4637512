"""Gradients of what all tokens share are summed where the tokens lie, and scattered to where the weights lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.configs.model import AdaptiveConfig, MoEConfig
from gt_jax.devices.pods import hlo
from gt_jax.devices.pods.collectives import Links
from gt_jax.devices.sharding import Rules, make_mesh, put_like, reshard, with_mesh_devices
from gt_jax.models.layers.adaptive_depth import FEATURES, HaltingHead
from gt_jax.models.layers.moe import Experts, Router, Routing
from gt_jax.models.layers.primitives import Einsum, WeightSpec

ROWS, TOKENS, WIDTH = 8, 32, 16


def router():
    module = Router(MoEConfig(experts=4, expert_width=8), WIDTH, Rules(), WeightSpec())
    return module, (ROWS, TOKENS, WIDTH), lambda params, x: module.apply({"params": params}, x)


def halting_head():
    module = HaltingHead(AdaptiveConfig(), Rules())
    return module, (ROWS, TOKENS, FEATURES), lambda params, x: module.apply({"params": params}, x)


@pytest.mark.parametrize("made", [router, halting_head])
def test_no_device_receives_the_tokens_of_the_batch(made):
    module, shape, apply = made()
    random = np.random.default_rng(0)
    x = random.standard_normal(shape).astype("float32")
    drawn = module.init(jax.random.key(0), jnp.asarray(x))["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * random.standard_normal(leaf.shape), leaf.dtype), drawn)

    def loss(params, x):
        place = Rules().spec("batch", None, None)
        return jnp.sum(jnp.sin(3 * apply(params, reshard(x, place))))

    alone = jax.jit(jax.grad(loss))(params, x)
    with jax.set_mesh(make_mesh(data=2, fsdp=4)):
        compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
        together = compiled(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), together, alone)
    sent = [one for all_of_it in Links(hlo.read(compiled.as_text())).sent.values() for one in all_of_it]
    assert sent and all(one.bytes < 4 * ROWS * TOKENS for one in sent), sent


def by_rows(tree):
    return jax.tree.map(lambda leaf: reshard(jnp.asarray(leaf), Rules().spec("batch", None, None)), tree)


def product():
    module = Einsum((WIDTH, 64), ("embed", "mlp"), Rules(), WeightSpec())
    return module, lambda run, x: run("btd,df->btf", by_rows(x), ("batch", None, "mlp"))


def experts():
    module = Experts(MoEConfig(experts=4, expert_width=16), WIDTH, Rules(), WeightSpec())
    picks = np.arange(ROWS * TOKENS).reshape(ROWS, TOKENS, 1) % 4
    return module, lambda run, x: run(by_rows(x), by_rows(Routing(picks, np.ones(picks.shape, np.float32))))


@pytest.mark.parametrize("made", [product, experts])
def test_a_gradient_is_added_up_over_the_devices_that_hold_the_weight_and_only_its_pieces_over_the_others(made):
    module, called = made()
    x = np.random.default_rng(0).standard_normal((ROWS, TOKENS, WIDTH)).astype("float32")

    def init():
        return called(functools.partial(module.init, jax.random.key(0)), x)

    def loss(params, x):
        return jnp.sum(jnp.sin(called(functools.partial(module.apply, params), x)))

    params = jax.jit(init)()
    alone = jax.jit(jax.grad(loss))(params, x)
    with jax.set_mesh(make_mesh(data=2, fsdp=4)):
        placed = put_like(params, jax.tree.map(with_mesh_devices, jax.eval_shape(init)))
        compiled = jax.jit(jax.grad(loss)).lower(placed, x).compile()
        together = compiled(placed, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), together, alone)
    whole = min(leaf.nbytes for leaf in jax.tree.leaves(params))
    sent = [one for all_of_it in Links(hlo.read(compiled.as_text())).sent.values() for one in all_of_it]
    summed = [one for one in sent if one.kind in ("all-reduce", "reduce-scatter") and len(one.group) > 1]
    assert {len(one.group) for one in summed} == {2, 4}, summed
    assert all(one.bytes <= whole // 4 for one in summed if len(one.group) == 2), summed
