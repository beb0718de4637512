"""Olmo Hybrid: D layers with separate projections and beta up to 2; attention normed over all heads, norms after it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from gt_jax.configs.attention import AttentionConfig
from gt_jax.configs.model import DeltaNetConfig, EmbeddingConfig, ModelConfig
from gt_jax.interop.families.family import Family, Fields, Json, layout_of
from gt_jax.interop.families.qwen import DENSE
from gt_jax.interop.families.rows import FLAT, MERGED, SAME, TAPS, Row, Table, biases, row
from gt_jax.interop.tensor_transforms import Shape

READ_EPSILON = 1e-5  # of the norm of the read, whatever rms_norm_eps is
DEFAULTS: Json = {
    "hidden_size": 3840, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 30,
    "vocab_size": 100352, "rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False,
    "attention_bias": False, "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_allow_neg_eigval": True,
    "rope_parameters": {"rope_theta": 10000.0},
}  # fmt: skip
# Shards call the norms of D layers by names of their own; models in memory have the names of other families.
PLAIN_NORMS, PLAIN_POST_NORM = "input_layernorm", "post_attention_layernorm"
# In memory there is one convolution; transformers saves it in equal parts, whatever the widths of q, k and v are.
ONE_CONVOLUTION, EQUAL_PARTS = "one convolution", "convolution in equal parts"
_CONVOLUTIONS = (("mixer/query_conv/w", TAPS), ("mixer/key_conv/w", TAPS), ("mixer/value_conv/w", TAPS))
_DELTANET = (
    row("linear_attn.q_proj.weight", "mixer/query/w"),
    row("linear_attn.k_proj.weight", "mixer/key/w"),
    row("linear_attn.v_proj.weight", "mixer/value/w"),
    row("linear_attn.a_proj.weight", "mixer/decay/w"),
    row("linear_attn.b_proj.weight", "mixer/beta/w"),
    row("linear_attn.g_proj.weight", "mixer/gate/w"),
    row("linear_attn.A_log", "mixer/a_log", SAME),
    row("linear_attn.dt_bias", "mixer/dt_bias", SAME),
    row("linear_attn.o_norm.weight", "mixer/output_norm/scale", SAME),
    row("linear_attn.o_proj.weight", "mixer/output/w", MERGED),
)
_PROJECTIONS = (
    row("self_attn.q_proj.weight", "mixer/query/w"),
    row("self_attn.k_proj.weight", "mixer/key/w"),
    row("self_attn.v_proj.weight", "mixer/value/w"),
    row("self_attn.o_proj.weight", "mixer/output/w", MERGED),
)
_NORMS = (
    row("post_feedforward_layernorm.weight", "mlp_post_norm/scale", SAME),
    row("self_attn.q_norm.weight", "mixer/query_norm/scale", FLAT),
    row("self_attn.k_norm.weight", "mixer/key_norm/scale", FLAT),
)


def table(config: ModelConfig, variants: Collection[str] = ()) -> Table:
    """The rows of a model."""
    top = [row("model.embed_tokens.weight", "embedding/table", SAME),
           row("model.norm.weight", "final_norm/scale", SAME)]  # fmt: skip
    if not config.embedding.tied:
        top.append(row("lm_head.weight", "unembedding/w"))
    before, middle = (("input_layernorm", "post_attention_layernorm") if PLAIN_NORMS in variants else
                      ("attention_layer_norm", "feedforward_layer_norm"))  # fmt: skip
    after = "post_attention_layernorm" if PLAIN_POST_NORM in variants else "feedforward_layer_norm"
    names = tuple(f"linear_attn.{letter}_conv1d.weight" for letter in "qkv")
    if ONE_CONVOLUTION in variants or EQUAL_PARTS in variants:
        cut = names if EQUAL_PARTS in variants else ()
        taps: tuple[Row, ...] = (Row("linear_attn.conv1d.weight", _CONVOLUTIONS, 1, cut),)
    else:
        taps = tuple(row(name, *tensor) for name, tensor in zip(names, _CONVOLUTIONS, strict=True))
    assert config.attention is not None
    attention = (*_PROJECTIONS, *(biases(*_PROJECTIONS) if config.attention.bias else ()))
    norms = (row(f"{before}.weight", "mixer_norm/scale", SAME), row(f"{middle}.weight", "mlp_norm/scale", SAME))
    return Table(tuple(top), {
        "D": (*norms, *taps, *_DELTANET, *DENSE),
        "A": (row(f"{after}.weight", "mixer_post_norm/scale", SAME), *_NORMS, *attention, *DENSE)})  # fmt: skip


def variants(shapes: Mapping[str, Shape]) -> list[str]:
    """What these tensors are called, and how their convolutions lie."""
    made = [name for name in (PLAIN_NORMS, PLAIN_POST_NORM) if any(one.endswith(f".{name}.weight") for one in shapes)]
    if any(name.endswith(".linear_attn.conv1d.weight") for name in shapes):
        made.append(ONE_CONVOLUTION)
    if any(name.endswith(".q_conv1d.weight") and shape[:1] != shapes.get(name.replace("conv1d", "proj"), shape)[:1]
           for name, shape in shapes.items()):  # fmt: skip
        made.append(EQUAL_PARTS)
    return made


def read(fields: Fields) -> ModelConfig:
    """Our config of theirs; what transformers derives from the width is derived here too."""
    width, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    key_heads = fields.whole_or("linear_num_key_heads", heads)
    key_width = fields.whole_or("linear_key_head_dim", int(0.75 * width / key_heads))
    turned = fields.rope(partial=False)
    if fields.is_null("rope_parameters"):
        fields.problems.append("rope_parameters is null, which transformers reads as theta 10000 and the models' "
                               'authors as no rotary embedding; write {"rope_theta": 10000.0} or {"rope_theta": null}')
    return ModelConfig(
        layout=layout_of(fields.types()), width=width, vocab=fields.whole("vocab_size"),
        mlp_width=fields.whole("intermediate_size"),
        deltanet=DeltaNetConfig(
            heads=key_heads, value_heads=fields.whole_or("linear_num_value_heads", heads), key_width=key_width,
            value_width=fields.whole_or("linear_value_head_dim", 2 * key_width),
            conv_width=fields.whole("linear_conv_kernel_dim"), head_gate_bias=False, output_epsilon=READ_EPSILON,
            beta_max=2.0 if fields.flag("linear_allow_neg_eigval") else 1.0),
        attention=AttentionConfig(
            heads=heads, kv_heads=fields.whole_or("num_key_value_heads", heads),
            head_width=fields.whole_or("head_dim", width // heads), qk_norm="all", post_norm=True,
            bias=fields.flag("attention_bias"), **turned),
        embedding=EmbeddingConfig(tied=fields.flag("tie_word_embeddings")), norm_epsilon=fields.number("rms_norm_eps"),
        init_std=fields.number("initializer_range"), remat="layer",
    )  # fmt: skip


def write(config: ModelConfig) -> Json:
    """Their fields of our config."""
    d, a = config.deltanet, config.attention
    assert d is not None and a is not None
    own_width = {} if a.head_width == config.width // a.heads else {"head_dim": a.head_width}
    return {
        "hidden_size": config.width, "vocab_size": config.vocab, "intermediate_size": config.mlp_width,
        "num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads, "rms_norm_eps": config.norm_epsilon,
        "initializer_range": config.init_std, "tie_word_embeddings": config.embedding.tied, "hidden_act": "silu",
        "attention_bias": a.bias, **own_width,
        "linear_num_key_heads": d.heads, "linear_num_value_heads": d.value_heads, "linear_key_head_dim": d.key_width,
        "linear_value_head_dim": d.value_width, "linear_conv_kernel_dim": d.conv_width,
        "linear_allow_neg_eigval": d.beta_max == 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": None if a.rope == "none" else a.rope_base},
    }  # fmt: skip


FAMILY = Family("olmo_hybrid", None, "OlmoHybridForCausalLM", DEFAULTS, read, write, table,
                variants)  # fmt: skip
