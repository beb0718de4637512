"""Qwen3-Next: as `qwen3_5_moe`, but query, key, value and gate of the D layers are interleaved by key head."""

from __future__ import annotations

from collections.abc import Collection

from gt_jax.configs.model import ModelConfig
from gt_jax.interop.families import qwen
from gt_jax.interop.families.family import Family, Fields, Json
from gt_jax.interop.families.rows import LINEAR, Row, Table

DEFAULTS: Json = {**qwen.MOE_DEFAULTS, "vocab_size": 151936, "num_hidden_layers": 48, "num_experts": 512,
                  "num_experts_per_tok": 10, "norm_topk_prob": True}  # fmt: skip


def table(config: ModelConfig, variants: Collection[str] = ()) -> Table:
    """The rows of a model: for each key head its query, key, values and gates; likewise beta and decay."""
    assert config.deltanet is not None
    heads = config.deltanet.heads
    projections = (
        Row("linear_attn.in_proj_qkvz.weight", (("mixer/query/w", LINEAR), ("mixer/key/w", LINEAR),
                                                ("mixer/value/w", LINEAR), ("mixer/gate/w", LINEAR)), heads),
        Row("linear_attn.in_proj_ba.weight", (("mixer/beta/w", LINEAR), ("mixer/decay/w", LINEAR)), heads),
    )  # fmt: skip
    return qwen.table(config, projections, qwen.experts(variants))


def read(fields: Fields) -> ModelConfig:
    """Our config of theirs."""
    return qwen.read(fields, **qwen.read_moe(fields, normalise=fields.flag("norm_topk_prob")))


def write(config: ModelConfig) -> Json:
    """Their fields of our config."""
    weights = {} if config.moe is None else {"norm_topk_prob": config.moe.normalise}
    return {**qwen.write(config), **qwen.write_moe(config), **weights, "decoder_sparse_step": 1, "mlp_only_layers": []}


FAMILY = Family("qwen3_next", None, "Qwen3NextForCausalLM", DEFAULTS, read, write, table,
                qwen.variants)  # fmt: skip
