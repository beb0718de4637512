"""A row's chunks run backward together: the gradient of one after the other, weights gathered once for all."""

from __future__ import annotations

from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.configs.model import ExitConfig, HyperConfig, MemoryConfig, MoEConfig, MTPConfig, StackConfig
from gt_jax.configs.price import PriceConfig
from gt_jax.devices.pods import hlo
from gt_jax.devices.sharding import Rules, make_mesh, put_like
from gt_jax.models.language_model import LanguageModel, abstract
from gt_jax.models.replayed_rows import runs_replayed
from gt_jax.training.price import phase
from gt_jax.training.step import make_loss
from gt_jax.training.step_parts import part_of, phase_of
from tests.support import perturbed, small_model, tokens

CHUNKS = 3


def gradient_of(config):
    """(loss, all that is worth reporting), gradients: of rows of three chunks, two documents and padding."""
    loss, price = make_loss(config, PriceConfig(), Rules()), PriceConfig()
    x, places = tokens(12 * CHUNKS, rows=8), jnp.arange(12 * CHUNKS)[None]
    ends = jnp.tile(jnp.asarray([[15, 36], [20, 30], [36, 36], [7, 29]]), (2, 1))
    ids = jnp.where(places < ends[:, :1], 1, jnp.where(places < ends[:, 1:], 2, 0))
    batch = {"tokens": x, "targets": jnp.where(ids > 0, (x + 1) % 257, -1), "segment_ids": ids}

    def gradient(params, statistics):
        now, zero = phase(price, jnp.asarray(0), 10, 1), jnp.asarray(0)
        return jax.value_and_grad(loss, has_aux=True)(params, statistics, batch, jnp.asarray(0.0), now, zero)

    return gradient


def test_the_step_is_that_of_chunk_after_chunk():
    components = {"hyper": HyperConfig(streams=2), "memory": MemoryConfig(chunk=12, stream=1), "mtp": MTPConfig()}
    replayed = small_model("DD,G", False, remat="layer", **components)
    v, found = perturbed(replayed), []
    for config in (replayed, replayed.replace(remat="none")):
        assert runs_replayed(LanguageModel(config), 12 * CHUNKS) == (config.remat == "layer")
        found.append(jax.device_get(jax.jit(gradient_of(config))(v["params"], v["statistics"])))
    (got, gradients), (wanted, gradients_wanted) = found
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-6)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradients_wanted))
    chex.assert_trees_all_close(gradients, gradients_wanted, rtol=1e-4, atol=1e-6 * largest)
    before = v["statistics"]["segment1"]["layer0"]["mixer"]["variance_ema"]
    assert np.all(got[1]["statistics"]["segment1"]["layer0"]["mixer"]["variance_ema"] != before)


def test_a_weight_is_gathered_once_a_chunk_forward_and_once_backward():
    config = small_model("DD", False, remat="layer", memory=MemoryConfig(chunk=12, stream=0))
    v, run = perturbed(config), gradient_of(config)
    wanted = jax.device_get(jax.jit(run)(v["params"], {})[1])
    with jax.set_mesh(make_mesh(fsdp=4, data=2)):
        placed = put_like(v, abstract(config))
        compiled = jax.jit(run).lower(placed["params"], {}).compile()
        got = compiled(placed["params"], {})[1]
        specs = jax.tree.map(lambda a: a.sharding.spec, placed["params"])
        assert jax.tree.map(lambda a: a.sharding.spec, got) == specs
    chex.assert_trees_all_close(jax.device_get(got), wanted, atol=5e-6, rtol=1e-3)
    layers, gathered = len(config.depth), Counter()
    for x, times in hlo.read(compiled.as_text()).executed():
        if "all-gather" in x.opcode:
            gathered[part_of(x.source), phase_of(x.source)] += times
    assert gathered["MLP", "forward"] == 3 * CHUNKS * layers  # gate, up and down
    assert gathered["MLP", "backward"] == 3 * layers and gathered["MLP", "again"] == 0
    assert gathered["D mixers", "forward"] == CHUNKS * gathered["D mixers", "backward"] > 0


def test_experts_are_lowered_on_a_mesh_of_one_device():
    """What `train` runs on one device: JAX lowers no share of a gradient there."""
    config = small_model("D", False, remat="layer", memory=MemoryConfig(chunk=12, stream=0),
                         moe=MoEConfig(experts=4, expert_width=16))  # fmt: skip
    v = perturbed(config)
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        placed = put_like(v, abstract(config))
        assert "while" in jax.jit(gradient_of(config)).lower(placed["params"], {}).as_text()


@pytest.mark.parametrize("changes", [
    {"remat": "block"}, {"memory": None}, {"stack": StackConfig("midpoint")}, {"exit": ExitConfig(threshold=0.5)},
], ids=str)  # fmt: skip
def test_where_layers_hand_on_more_than_the_stream_chunks_run_backward_as_they_ran(changes):
    config = small_model("D", False, remat="layer", memory=MemoryConfig(chunk=12, stream=0))
    assert runs_replayed(LanguageModel(config), 24) and not runs_replayed(LanguageModel(config), 12)
    assert not runs_replayed(LanguageModel(config.replace(**changes)), 24)
