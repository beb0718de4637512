"""Qwen3.5 with experts: the layers of `qwen3_5`, and a mixture beside a gated shared expert."""

from __future__ import annotations

from collections.abc import Collection

from gt_jax.configs.model import ModelConfig
from gt_jax.interop.families import qwen
from gt_jax.interop.families.family import Family, Fields, Json
from gt_jax.interop.families.qwen3_5 import PROJECTIONS
from gt_jax.interop.families.rows import Table


def table(config: ModelConfig, variants: Collection[str] = ()) -> Table:
    """The rows of a model."""
    return qwen.table(config, PROJECTIONS, qwen.experts(variants))


def read(fields: Fields) -> ModelConfig:
    """Our config of theirs; the weights of the picks always sum to 1."""
    fields.must("norm_topk_prob", True, "the weights of this family's picks always sum to 1")
    return qwen.read(fields, **qwen.read_moe(fields, normalise=True))


def write(config: ModelConfig) -> Json:
    """Their fields of our config."""
    return {**qwen.write(config), **qwen.write_moe(config)}


FAMILY = Family("qwen3_5_moe_text", "qwen3_5_moe", "Qwen3_5MoeForCausalLM", qwen.MOE_DEFAULTS, read, write, table,
                qwen.variants)  # fmt: skip
