"""The models by name. `3b` and `8b` follow the origin (PyTorch) system, so that its checkpoints can be loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from gt_jax.configs.attention import AttentionConfig
from gt_jax.configs.model import (
    AdaptiveConfig,
    DeltaNetConfig,
    EmbeddingConfig,
    GSAConfig,
    HyperConfig,
    MemoryConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    SlidingConfig,
)
from gt_jax.errors import Refused

ORIGIN_DECAY_FLOOR = math.log(1e-6)
ORIGIN_ADAPTIVE = AdaptiveConfig(halting="batch", features="stream_mean")


def tiny() -> ModelConfig:
    """The demo's source: bytes, 8 layers, 1.6 million parameters; so narrow that it starts from a larger deviation."""
    return ModelConfig(
        layout="DDDG*2",
        width=128,
        init_std=0.08,
        vocab=264,
        mlp_width=256,
        deltanet=DeltaNetConfig(heads=4, value_heads=4, key_width=32, value_width=32, chunk_size=32),
        gsa=GSAConfig(heads=4, head_width=32, indexer_heads=2, indexer_width=16, k_base=64, k_min=16, k_max=128),
        adaptive=AdaptiveConfig(),
    )


def one_layer() -> ModelConfig:
    """One D layer of width 64 that may run four times at full strength: it learns tasks of up to four look-ups.

    Embeddings have unit size, its gates see the state and start open, passes count whole or not at all (docs/depth.md).
    """
    return ModelConfig(
        layout="D",
        width=64,
        init_std=0.125,
        vocab=264,
        mlp_width=128,
        deltanet=DeltaNetConfig(heads=1, value_heads=1, key_width=64, value_width=64, chunk_size=32),
        embedding=EmbeddingConfig(normed=True),
        adaptive=AdaptiveConfig(alpha=(1.0, 1.0, 1.0, 1.0), initial_bias=2.0).seeing_state.hard,
        remat="none",
    )


def small() -> ModelConfig:
    """A first model for one accelerator: 8 layers of width 768, about 113 million parameters, vocabulary 32768."""
    return ModelConfig(
        layout="DDDG*2",
        width=768,
        vocab=32768,
        mlp_width=2048,
        deltanet=DeltaNetConfig(heads=6, value_heads=6, key_width=128, value_width=128),
        gsa=GSAConfig(heads=6, head_width=128, indexer_heads=2),
        adaptive=AdaptiveConfig(),
        compute_dtype="bfloat16",
    )


def _origin(layout: str, width: int, vocab: int, mlp_width: int, deltanet: DeltaNetConfig, gsa: GSAConfig,
            moe: MoEConfig, chunk: int, **other: object) -> ModelConfig:
    """Every component on, each in the origin's variant."""
    return ModelConfig(
        layout=layout, width=width, vocab=vocab, mlp_width=mlp_width, moe=moe,
        deltanet=deltanet.replace(
            rope="origin", conv_bias=True, read_scale=1.0, skip=True, activation_on="output",
            decay_floor=ORIGIN_DECAY_FLOOR,
        ),
        gsa=gsa.replace(rope="origin", score_scale=1.0, variance="row"),
        hyper=HyperConfig(), embedding=EmbeddingConfig("kronecker"), mtp=MTPConfig(), memory=MemoryConfig(chunk=chunk),
    ).replace(**other)  # fmt: skip


def origin_3b() -> ModelConfig:
    """The adaptive source of the growth: 8 layers, 3,914,051,889 parameters."""
    return _origin(
        "DDDG*2", 4096, 131072, 2048,
        DeltaNetConfig(heads=32, value_heads=32, key_width=128, value_width=128),
        GSAConfig(heads=16, head_width=256),
        MoEConfig(experts=20, expert_width=1024), 2048,
        adaptive=ORIGIN_ADAPTIVE, param_dtype="bfloat16", compute_dtype="bfloat16",
    )  # fmt: skip


def origin_3b_table() -> ModelConfig:
    """`3b` with a plain token table instead of the Kronecker code: 4,417,364,273 parameters."""
    return origin_3b().replace(embedding=EmbeddingConfig("table"))


def origin_8b() -> ModelConfig:
    """What `3b` grows into: 20 layers, each run once, 8,309,921,685 parameters."""
    return origin_3b().plain.replace(layout="DDDG*5")


def tiny_3b() -> ModelConfig:
    """`3b` with every component on, so small that it trains on two cores: bytes, width 64."""
    return _origin(
        "DDDG*2", 64, 264, 64,
        DeltaNetConfig(heads=4, value_heads=4, key_width=16, value_width=16, chunk_size=32),
        GSAConfig(heads=4, head_width=16, indexer_heads=2, indexer_width=8, k_base=32, k_min=8, k_max=64),
        MoEConfig(experts=8, expert_width=32), 128,
        adaptive=ORIGIN_ADAPTIVE, init_std=0.08,
    )  # fmt: skip


def tiny_8b() -> ModelConfig:
    """What `tiny_3b` grows into by the reference counts: 20 layers, each run once."""
    return tiny_3b().plain.replace(layout="DDDG*5")


def groundthink(layout: str, vocab: int, width: int, heads: int, key_width: int = 64) -> ModelConfig:
    """One of the GroundThink hybrids: tied, normed table, D layers of shifted pairs, S layers with a window of 64."""
    return ModelConfig(
        layout=layout, width=width, vocab=vocab, mlp_width=-(-(8 * width // 3) // 64) * 64,
        deltanet=DeltaNetConfig(heads, heads, key_width, key_width, variant="groundthink"),
        sliding=SlidingConfig(heads=heads, head_width=width // heads, window=65),  # theirs excludes the token itself
        embedding=EmbeddingConfig("table", normed=True, tied=True),
    )  # fmt: skip


def _hybrid(layout: str, width: int, vocab: int, mlp_width: int, deltanet: DeltaNetConfig, attention: AttentionConfig,
            moe: MoEConfig | None = None) -> ModelConfig:
    """A public hybrid: projections to beta and decay without bias, bfloat16, each layer computed again."""
    return ModelConfig(
        layout=layout, width=width, vocab=vocab, mlp_width=mlp_width, deltanet=deltanet.replace(head_gate_bias=False),
        attention=attention, moe=moe, param_dtype="bfloat16", compute_dtype="bfloat16", remat="layer",
    )  # fmt: skip


def _qwen(layout: str, width: int, vocab: int, mlp_width: int, kv_heads: int, moe: MoEConfig | None = None
          ) -> ModelConfig:
    """Qwen's hybrids: 16 key and 32 value heads of 128 in D layers, 16 heads of 256 with a gate in A layers."""
    attention = AttentionConfig(
        heads=16, kv_heads=kv_heads, head_width=256, gate=True, qk_norm="head", rope_base=1e7, rope_share=0.25)
    deltanet = DeltaNetConfig(heads=16, value_heads=32, key_width=128, value_width=128)
    return _hybrid(layout, width, vocab, mlp_width, deltanet, attention, moe)


def _qwen_experts(experts: int, top_k: int) -> MoEConfig:
    """Experts of width 512 without null slots, beside a gated shared one."""
    return MoEConfig(experts=experts, expert_width=512, top_k=top_k, real_share=1.0, balance_loss=1e-3,
                     router_z_loss=0.0, null_loss=0.0, shared_gate=True, router_bias=False)  # fmt: skip


def qwen3_5_9b() -> ModelConfig:
    """Qwen3.5 9B: 32 layers, 8,953,803,264 parameters and our 32 gains."""
    return _qwen("DDDA*8", 4096, 248320, 12288, 4)


def qwen3_5_35b_a3b() -> ModelConfig:
    """Qwen3.5 35B-A3B: 40 layers of 256 experts, 34,660,610,688 parameters and our 40 gains."""
    return _qwen("DDDA*10", 2048, 248320, 512, 2, _qwen_experts(256, 8))


def qwen3_next_80b_a3b() -> ModelConfig:
    """Qwen3-Next 80B-A3B: 48 layers of 512 experts, 79,674,391,296 parameters and our 48 gains."""
    return _qwen("DDDA*12", 2048, 151936, 512, 2, _qwen_experts(512, 10))


def olmo_hybrid_7b() -> ModelConfig:
    """Olmo Hybrid 7B: 32 layers, 7,430,870,688 parameters and our 32 gains."""
    return _hybrid(
        "DDDA*8", 3840, 100352, 11008,
        DeltaNetConfig(heads=30, value_heads=30, key_width=96, value_width=192, beta_max=2.0, output_epsilon=1e-5),
        AttentionConfig(heads=30, kv_heads=30, head_width=128, qk_norm="all", post_norm=True),
    )  # fmt: skip


PRESETS: Mapping[str, Callable[[], ModelConfig]] = {
    "tiny": tiny, "one_layer": one_layer, "small": small, "3b": origin_3b, "3b_table": origin_3b_table, "8b": origin_8b,
    "tiny_3b": tiny_3b, "tiny_8b": tiny_8b,
    "qwen3_5_9b": qwen3_5_9b, "qwen3_5_35b_a3b": qwen3_5_35b_a3b, "qwen3_next_80b_a3b": qwen3_next_80b_a3b,
    "olmo_hybrid_7b": olmo_hybrid_7b,
    "groundthink_d": lambda: groundthink("D", 50257, 128, 2),
    "groundthink_dd": lambda: groundthink("DD", 50257, 256, 4),
    "groundthink_dddd": lambda: groundthink("DDDD", 50257, 512, 8),
    "groundthink_ddddds": lambda: groundthink("DDDDDS", 50257, 256, 4),
    "groundthink_dsds": lambda: groundthink("DS*2", 32000, 128, 4, 32),
}  # fmt: skip


def preset(name: str) -> ModelConfig:
    """The named preset; raises `Refused` with the names there are.

    >>> import gt_jax
    >>> gt_jax.preset("tiny").layout
    'DDDG*2'
    """
    if name not in PRESETS:
        raise Refused(f"unknown preset {name!r}; known are {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()
