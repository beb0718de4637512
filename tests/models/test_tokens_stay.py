"""Gradients of what all tokens share: summed where the tokens lie; no device collects the tokens of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.configs.model import AdaptiveConfig, MoEConfig
from gt_jax.devices.pods import hlo
from gt_jax.devices.pods.collectives import Links
from gt_jax.devices.sharding import Rules, make_mesh, reshard
from gt_jax.models.layers.adaptive_depth import FEATURES, HaltingHead
from gt_jax.models.layers.moe import Router
from gt_jax.models.layers.primitives import WeightSpec

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
