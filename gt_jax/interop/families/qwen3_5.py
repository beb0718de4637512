"""Qwen3.5, dense: D layers whose query, key and value are one projection, gated attention, SwiGLU."""

from __future__ import annotations

from collections.abc import Collection

from gt_jax.configs.model import ModelConfig
from gt_jax.interop.families import qwen
from gt_jax.interop.families.family import Family, Fields, Json
from gt_jax.interop.families.rows import LINEAR, Row, Table, row

PROJECTIONS = (
    Row("linear_attn.in_proj_qkv.weight", (("mixer/query/w", LINEAR), ("mixer/key/w", LINEAR),
                                           ("mixer/value/w", LINEAR))),
    row("linear_attn.in_proj_z.weight", "mixer/gate/w"),
    row("linear_attn.in_proj_b.weight", "mixer/beta/w"),
    row("linear_attn.in_proj_a.weight", "mixer/decay/w"),
)  # fmt: skip


def table(config: ModelConfig, variants: Collection[str] = ()) -> Table:
    """The rows of a model."""
    return qwen.table(config, PROJECTIONS, qwen.DENSE)


def read(fields: Fields) -> ModelConfig:
    """Our config of theirs."""
    return qwen.read(fields, mlp_width=fields.whole("intermediate_size"))


def write(config: ModelConfig) -> Json:
    """Their fields of our config."""
    return {**qwen.write(config), "intermediate_size": config.mlp_width}


FAMILY = Family("qwen3_5_text", "qwen3_5", "Qwen3_5ForCausalLM", qwen.DEFAULTS, read, write, table)
