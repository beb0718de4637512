"""What the Qwen families share: rows of their layers, and the parts of their configs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from gt_jax.configs.attention import AttentionConfig
from gt_jax.configs.model import DeltaNetConfig, EmbeddingConfig, ModelConfig
from gt_jax.configs.moe import MoEConfig
from gt_jax.interop.families.family import Fields, Json, layout_of
from gt_jax.interop.families.rows import LINEAR, MERGED, PLUS_ONE, SAME, TAPS, Row, Table, biases, row
from gt_jax.interop.tensor_transforms import Shape

DEFAULTS: Json = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 248320, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
    "tie_word_embeddings": False, "attention_bias": False, "full_attention_interval": 4, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}  # fmt: skip
MOE_DEFAULTS: Json = {
    **DEFAULTS, "hidden_size": 2048, "num_hidden_layers": 40, "num_key_value_heads": 2, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512, "num_experts_per_tok": 8, "num_experts": 256, "router_aux_loss_coef": 0.001,
}  # fmt: skip

NORMS = (
    row("input_layernorm.weight", "mixer_norm/scale", PLUS_ONE),
    row("post_attention_layernorm.weight", "mlp_norm/scale", PLUS_ONE),
)
DENSE = (
    row("mlp.gate_proj.weight", "mlp/gate/w"),
    row("mlp.up_proj.weight", "mlp/up/w"),
    row("mlp.down_proj.weight", "mlp/down/w"),
)
DELTANET = (
    Row("linear_attn.conv1d.weight",
        (("mixer/query_conv/w", TAPS), ("mixer/key_conv/w", TAPS), ("mixer/value_conv/w", TAPS))),
    row("linear_attn.A_log", "mixer/a_log", SAME),
    row("linear_attn.dt_bias", "mixer/dt_bias", SAME),
    row("linear_attn.norm.weight", "mixer/output_norm/scale", SAME),
    row("linear_attn.out_proj.weight", "mixer/output/w", MERGED),
)  # fmt: skip
_SHARED = (
    row("mlp.gate.weight", "mlp/router/w"),
    row("mlp.shared_expert.gate_proj.weight", "mlp/shared/gate/w"),
    row("mlp.shared_expert.up_proj.weight", "mlp/shared/up/w"),
    row("mlp.shared_expert.down_proj.weight", "mlp/shared/down/w"),
    row("mlp.shared_expert_gate.weight", "mlp/shared_gate/w"),
)
_SEPARATE = (
    row("mlp.experts.{expert}.gate_proj.weight", "mlp/experts/gate/w"),
    row("mlp.experts.{expert}.up_proj.weight", "mlp/experts/up/w"),
    row("mlp.experts.{expert}.down_proj.weight", "mlp/experts/down/w"),
)
_FUSED = (
    Row("mlp.experts.gate_up_proj", (("mlp/experts/gate/w", LINEAR), ("mlp/experts/up/w", LINEAR))),
    row("mlp.experts.down_proj", "mlp/experts/down/w"),
)


FUSED = "experts in one tensor"


def variants(shapes: Mapping[str, Shape]) -> list[str]:
    """Whether experts lie in one tensor a projection."""
    return [FUSED] if any(name.endswith(".mlp.experts.gate_up_proj") for name in shapes) else []


def experts(found: Collection[str]) -> tuple[Row, ...]:
    """A mixture of experts, in one tensor a projection or one a projection and expert."""
    return (*_SHARED, *(_FUSED if FUSED in found else _SEPARATE))


def attention(config: AttentionConfig) -> tuple[Row, ...]:
    """A layer's full attention; each head's queries are followed by its output gate."""
    projections = (
        Row("self_attn.q_proj.weight", (("mixer/query/w", LINEAR), ("mixer/output_gate/w", LINEAR)), config.heads),
        row("self_attn.k_proj.weight", "mixer/key/w"),
        row("self_attn.v_proj.weight", "mixer/value/w"),
        row("self_attn.o_proj.weight", "mixer/output/w", MERGED),
    )
    return (
        *projections, *(biases(*projections) if config.bias else ()),
        row("self_attn.q_norm.weight", "mixer/query_norm/scale", PLUS_ONE),
        row("self_attn.k_norm.weight", "mixer/key_norm/scale", PLUS_ONE),
    )  # fmt: skip


def table(config: ModelConfig, projections: tuple[Row, ...], mlp: tuple[Row, ...]) -> Table:
    """The rows of a model with these projections of the delta rule and this MLP."""
    assert config.attention is not None
    top = [row("model.embed_tokens.weight", "embedding/table", SAME),
           row("model.norm.weight", "final_norm/scale", PLUS_ONE)]  # fmt: skip
    if not config.embedding.tied:
        top.append(row("lm_head.weight", "unembedding/w"))
    return Table(tuple(top), {"D": (*NORMS, *projections, *DELTANET, *mlp),
                              "A": (*NORMS, *attention(config.attention), *mlp)})  # fmt: skip


def read(fields: Fields, **more: Any) -> ModelConfig:
    """The config of a Qwen hybrid; `more` is its MLP."""
    fields.must("attn_output_gate", True, "attention without an output gate is not a model of this family")
    turned = fields.rope(partial=True)
    return ModelConfig(
        layout=layout_of(fields.types()), width=fields.whole("hidden_size"), vocab=fields.whole("vocab_size"),
        deltanet=DeltaNetConfig(
            heads=fields.whole("linear_num_key_heads"), value_heads=fields.whole("linear_num_value_heads"),
            key_width=fields.whole("linear_key_head_dim"), value_width=fields.whole("linear_value_head_dim"),
            conv_width=fields.whole("linear_conv_kernel_dim"), head_gate_bias=False),
        attention=AttentionConfig(
            heads=fields.whole("num_attention_heads"), kv_heads=fields.whole("num_key_value_heads"),
            head_width=fields.whole("head_dim"), gate=True, qk_norm="head", bias=fields.flag("attention_bias"),
            **turned),
        embedding=EmbeddingConfig(tied=fields.flag("tie_word_embeddings")), norm_epsilon=fields.number("rms_norm_eps"),
        init_std=fields.number("initializer_range"), remat="layer", **more,
    )  # fmt: skip


def write(config: ModelConfig) -> Json:
    """The fields of config.json that `read` reads, but for the layers and the MLP."""
    d, a = config.deltanet, config.attention
    assert d is not None and a is not None
    return {
        "hidden_size": config.width, "vocab_size": config.vocab, "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads, "head_dim": a.head_width, "rms_norm_eps": config.norm_epsilon,
        "initializer_range": config.init_std, "tie_word_embeddings": config.embedding.tied, "hidden_act": "silu",
        "attention_bias": a.bias,
        "linear_num_key_heads": d.heads, "linear_num_value_heads": d.value_heads, "linear_key_head_dim": d.key_width,
        "linear_value_head_dim": d.value_width, "linear_conv_kernel_dim": d.conv_width,
        "rope_parameters": {"rope_type": "default", "rope_theta": None if a.rope == "none" else a.rope_base,
                            "partial_rotary_factor": a.rope_share},
    }  # fmt: skip


def read_moe(fields: Fields, normalise: bool) -> Json:
    """The MLP of a mixture: experts without null slots beside a gated shared one."""
    fields.must("mlp_only_layers", [], "layers without experts in a model with experts are not implemented")
    fields.must("decoder_sparse_step", 1, "layers without experts in a model with experts are not implemented")
    return {
        "mlp_width": fields.whole("shared_expert_intermediate_size"),
        "moe": MoEConfig(
            experts=fields.whole("num_experts"), expert_width=fields.whole("moe_intermediate_size"),
            top_k=fields.whole("num_experts_per_tok"), real_share=1.0, normalise=normalise, shared_gate=True,
            router_bias=False, router_z_loss=0.0, null_loss=0.0,
            balance_loss=fields.number("router_aux_loss_coef", zero=True)),
    }  # fmt: skip


def write_moe(config: ModelConfig) -> Json:
    """The inverse of `read_moe`."""
    if config.moe is None:
        return {}
    return {"shared_expert_intermediate_size": config.mlp_width, "num_experts": config.moe.experts,
            "moe_intermediate_size": config.moe.expert_width, "num_experts_per_tok": config.moe.top_k,
            "router_aux_loss_coef": config.moe.balance_loss}  # fmt: skip
