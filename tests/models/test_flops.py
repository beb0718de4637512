"""Model FLOPs against XLA's own count and against the number of weights; utilisation by hand."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs.attention import AttentionConfig
from gt_jax.configs.model import DeltaNetConfig, ExitConfig, GSAConfig, ModelConfig, MTPConfig
from gt_jax.configs.presets import preset
from gt_jax.configs.resolvent import ResolventConfig
from gt_jax.models.flops import PEAKS, model_flops, peak_flops, utilisation
from gt_jax.models.language_model import LanguageModel, abstract, apply_network
from tests.rarely import rarely

ROWS, TOKENS = 2, 16
DENSE = ModelConfig(
    layout="DGAB", width=256, vocab=1024, mlp_width=512, remat="none",
    deltanet=DeltaNetConfig(heads=4, value_heads=8, key_width=32, value_width=32, chunk_size=16),
    gsa=GSAConfig(heads=8, head_width=32, indexer_heads=4, indexer_width=16, k_base=TOKENS, k_min=8, k_max=TOKENS),
    attention=AttentionConfig(heads=8, kv_heads=2, head_width=32, gate=True), resolvent=ResolventConfig(heads=32),
)  # fmt: skip


def counted(function, *arguments) -> float:
    """FLOPs a token by XLA's cost analysis of the program as it is lowered, before any optimisation."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"] / (ROWS * TOKENS)


def test_xla_counts_the_same():
    """Within 4 % forward: XLA also counts elementwise work, and keys of the future. Backward is twice that, within 6 %:
    nothing is propagated through the indexer, whose input has no gradient."""
    shapes, rows = abstract(DENSE), jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32)
    network, flops = LanguageModel(DENSE), model_flops(DENSE, TOKENS)

    def total(params, statistics, tokens):
        return jnp.sum(apply_network(network, {"params": params, "statistics": statistics}, tokens).logits)

    arguments = (shapes["params"], shapes["statistics"], rows)
    assert counted(total, *arguments) == pytest.approx(flops.forward(), rel=0.04)
    assert counted(jax.grad(total), *arguments) == pytest.approx(flops.training(), rel=0.06)


@pytest.mark.parametrize("name", [
    "small", rarely("8b"), "groundthink_dsds",
])  # fmt: skip
def test_a_product_is_two_flops_a_weight(name):
    """On rows of one token; what is left are recurrences, convolutions and the mixing of streams."""
    config = preset(name).plain
    flops = model_flops(config.replace(mtp=None), 1)
    weights = 0.0
    for path, leaf in flatten(abstract(config.replace(mtp=None))["params"]).items():
        kept = not path.startswith("embedding/") or config.embedding.tied
        if kept and path.rsplit("/", 1)[-1] in ("w", "table") and "state_query" not in path:
            share = 1.0
            if config.moe is not None and "/experts/" in path:
                share = config.moe.top_k * config.moe.real_share / config.moe.experts
            weights += share * math.prod(leaf.shape)
    assert flops.forward() == pytest.approx(2 * weights, rel=0.06)


def test_passes_and_longer_rows_add_up():
    config = preset("tiny")
    flops = model_flops(config, 128)
    passes = np.linspace(1, 4, len(config.depth))
    assert flops.forward(passes) == pytest.approx(flops.outside + np.dot(passes, flops.layers))
    assert flops.forward() == flops.forward([1.0] * 8) and flops.training() == 3 * flops.forward()
    longer, kinds = model_flops(config, 512), config.depth.types
    assert all((b > a) == (kind == "G") for a, b, kind in zip(flops.layers, longer.layers, kinds, strict=True))
    # every key up to k_base 64, then 64: by brute force
    keys = [sum(min(p + 1, 64) for p in range(t)) / t for t in (128, 512)]
    scored = [(t + 1) / 2 for t in (128, 512)]
    grown = 4 * 128 * (keys[1] - keys[0]) + 2 * 2 * 16 * (scored[1] - scored[0])
    assert longer.layers[3] - flops.layers[3] == pytest.approx(grown)
    factor = config.replace(gsa=config.gsa.replace(k_base=500, k_max=64))  # a factor, not a number of keys
    assert model_flops(factor, 512).layers[3] == longer.layers[3]
    raw = model_flops(config.replace(adaptive=config.adaptive.replace(features="stream_mean")), 128)
    again = [2 * 128 * (2 * 4 * 32 + (2 if kind == "G" else 4)) for kind in kinds]  # W_q, output gate, a gate a head
    assert [b - a for a, b in zip(flops.layers, raw.layers, strict=True)] == pytest.approx(again)
    ahead = model_flops(config.replace(mtp=MTPConfig()), 128).outside - flops.outside
    assert ahead > flops.layers[3] and ahead < flops.layers[3] + 2 * flops.outside
    leaving = config.plain.replace(exit=ExitConfig())  # the layer of multi-token prediction is left by nobody
    both = (model_flops(one.replace(mtp=MTPConfig()), 128).outside for one in (config.plain, leaving))
    assert len(set(both)) == 1


def test_the_device_kinds_of_jax_are_known():
    kinds = {"TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12, "TPU7x": 1153.5e12,
             "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200 NVL": 835e12,
             "NVIDIA H200": 989e12, "cpu": None, "NVIDIA A100-SXM4-40GB": None}  # fmt: skip
    assert {kind: peak_flops(kind) for kind in kinds} == kinds


def test_utilisation_is_the_share_of_all_devices():
    config, passes = preset("tiny"), np.asarray([1.0, 2.0] * 4, np.float32)
    share = utilisation(config, 128, ["TPU v5 lite"] * 3 + ["TPU v6 lite"])
    assert share is not None
    rate, peak = 1e6, 3 * PEAKS["TPU v5 lite"] + PEAKS["TPU v6 lite"]
    flops = model_flops(config, 128)
    by_hand = rate * 3 * (flops.outside + sum(n * one for n, one in zip(passes, flops.layers, strict=True))) / peak
    assert share(rate, {"passes_run": passes, "passes_computed": 4 * passes, "loss": 2.0}) == pytest.approx(by_hand)
    assert share(rate, {"held_out_loss": 2.0}) is None
    assert utilisation(config, 128, ["TPU v5 lite", "cpu"]) is None
    assert utilisation(config, 128) is None  # the devices of this machine
