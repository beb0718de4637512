"""The models that are compared, as a config of ours and as one of transformers' Qwen3-Next, and what they train on.

- `plain_form` is the mathematics that both have: gated delta net and gated attention 3:1, SwiGLU or experts beside a
  shared SwiGLU, RMSNorm, rotary attention, untied embeddings, every layer once, nothing computed again.
- Only ours has the gate on the values, the indexer of the sparse attention with its loss, a gain a layer and biases of
  the head gates; only theirs has norms on q and k and a gate on the shared expert. Rows are at most as long as the
  indexer's budget, so that all keys are attended to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gt_jax.configs import presets
from gt_jax.configs.model import ModelConfig, MoEConfig
from gt_jax.errors import Refused

TOP_K = 2
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0


def narrow() -> ModelConfig:
    """`small` at a third of its width: 4 heads of 64, vocabulary 4096."""
    small = presets.small()
    assert small.deltanet is not None and small.gsa is not None
    return small.replace(
        width=256, vocab=4096, mlp_width=640,
        deltanet=small.deltanet.replace(heads=4, value_heads=4, key_width=64, value_width=64),
        gsa=small.gsa.replace(heads=4, head_width=64),
    )  # fmt: skip


def toy() -> ModelConfig:
    """What the tests train."""
    small = presets.small()
    assert small.deltanet is not None and small.gsa is not None
    return small.replace(
        layout="DG", width=16, vocab=64, mlp_width=32,
        deltanet=small.deltanet.replace(heads=2, value_heads=2, key_width=8, value_width=8, chunk_size=8),
        gsa=small.gsa.replace(heads=2, head_width=8, indexer_width=4),
    )  # fmt: skip


SIZES: Mapping[str, Callable[[], ModelConfig]] = {"small": presets.small, "narrow": narrow, "toy": toy}


def plain_form(size: str, experts: int) -> ModelConfig:
    """The size's model as Qwen3-Next has it too, in float32; with experts, top-2, each as wide as the shared half."""
    config = SIZES[size]().plain.replace(remat="none", compute_dtype="float32")
    if not experts:
        return config
    if experts < TOP_K:
        raise Refused(f"--experts {experts}: a token picks {TOP_K}, so there must be at least as many, or 0")
    half = config.mlp_width // 2
    # no null experts: Qwen3-Next has none
    return config.replace(mlp_width=half, moe=MoEConfig(experts, half, TOP_K, real_share=1.0))


def as_it_is(size: str) -> ModelConfig:
    """The size's own model, adaptive and rematerialised, in float32."""
    return SIZES[size]().replace(compute_dtype="float32")


def qwen3_next(config: ModelConfig, tokens: int) -> dict[str, Any]:
    """The arguments of transformers' Qwen3NextConfig for the same dimensions."""
    delta, attention, moe = config.deltanet, config.gsa, config.moe
    assert delta is not None and attention is not None
    kinds = {"D": "linear_attention", "G": "full_attention"}
    experts = {} if moe is None else {
        "num_experts_per_tok": moe.top_k, "moe_intermediate_size": moe.expert_width,
        "shared_expert_intermediate_size": config.mlp_width,
    }  # fmt: skip
    return {
        "vocab_size": config.vocab, "hidden_size": config.width, "intermediate_size": config.mlp_width,
        "num_hidden_layers": len(config.depth), "layer_types": [kinds[kind] for kind in config.depth.types],
        "num_attention_heads": attention.heads, "num_key_value_heads": attention.heads,
        "head_dim": attention.head_width, "partial_rotary_factor": 1.0,
        "linear_num_key_heads": delta.heads, "linear_num_value_heads": delta.value_heads,
        "linear_key_head_dim": delta.key_width, "linear_value_head_dim": delta.value_width,
        "linear_conv_kernel_dim": delta.conv_width, "rms_norm_eps": config.norm_epsilon,
        "initializer_range": config.init_std, "max_position_embeddings": tokens, "use_cache": False,
        "num_experts": 0 if moe is None else moe.experts, **experts,
    }  # fmt: skip


def rows_of_tokens(vocab: int, rows: int, tokens: int, step: int) -> np.ndarray:
    """Tokens [rows, tokens + 1] of one step, int32, the same for all; by Zipf's law, so that there is much to learn."""
    share = 1.0 / np.arange(1, vocab + 1)
    return np.random.default_rng(step).choice(vocab, (rows, tokens + 1), p=share / share.sum()).astype(np.int32)
