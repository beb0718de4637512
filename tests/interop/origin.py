"""A tiny checkpoint of the origin and the leaves it must become, both written out from the issue, not from the code.

`state` has every tensor the origin has, by its own name; `contract` every leaf of ours by path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from gt_jax.configs.model import ModelConfig
from gt_jax.configs.presets import preset
from gt_jax.interop.safetensors import Writer
from gt_jax.interop.tensor_files import Info

Shapes = dict[str, tuple[int, ...]]

BF16 = np.dtype(ml_dtypes.bfloat16)
CONFIG = preset("tiny_3b").replace(width=16, vocab=264, mlp_width=12)
CONFIG = CONFIG.replace(
    deltanet=CONFIG.deltanet.replace(heads=2, value_heads=2, key_width=4, value_width=8),
    gsa=CONFIG.gsa.replace(heads=4, head_width=4, indexer_heads=2, indexer_width=3),
    moe=CONFIG.moe.replace(experts=3, expert_width=5),
    memory=CONFIG.memory.replace(chunk=128),
)
OVERRIDES: dict[str, Any] = {
    "gsa": {"k_base": 32, "k_min": 8, "k_max": 64}, "deltanet": {"chunk_size": 32}, "memory": {"chunk": 128},
    "init_std": 0.08,
}  # fmt: skip


def layer_shapes(kind: str, config: ModelConfig, adaptive: bool) -> Shapes:
    c, d, s = config, config.width, "attn_block.sublayer."
    shapes: Shapes = {}
    if kind == "D":
        h, k, hv, v, taps = c.deltanet.heads, c.deltanet.key_width, c.deltanet.value_heads, c.deltanet.value_width, 4
        shapes |= {s + "q_proj.weight": (h * k, d), s + "k_proj.weight": (h * k, d), s + "v_proj.weight": (hv * v, d),
                   s + "g_proj.weight": (hv * v, d), s + "o_proj.weight": (d, hv * v),
                   s + "b_proj.weight": (hv, d), s + "b_proj.bias": (hv,),
                   s + "gk_proj.weight": (hv, d), s + "gk_proj.bias": (hv,),
                   s + "A_log": (hv,), s + "D": (hv,), s + "dt_bias": (hv,), s + "o_norm.norm.weight": (v,)}
        for name, channels in (("q", h * k), ("k", h * k), ("v", hv * v)):
            shapes |= {f"{s}{name}_conv1d.conv.weight": (channels, 1, taps), f"{s}{name}_conv1d.conv.bias": (channels,)}
    else:
        h, k, hi, i = c.gsa.heads, c.gsa.head_width, c.gsa.indexer_heads, c.gsa.indexer_width
        shapes |= {s + name + ".weight": (h * k, d) for name in ("W_q", "W_k", "W_v", "W_gv", "W_go")}
        shapes |= {s + "W_Iq.weight": (hi * i, d), s + "W_Ik.weight": (hi * i, d), s + "W_Iw.weight": (hi, d),
                   s + "o_proj.weight": (d, h * k), s + "gate_bias": (hi,), s + "head_importance_bias": (h,),
                   s + "variance_ema": ()}
    if c.hyper is not None:
        n = c.hyper.streams
        for at in ("attn_block.coeffs.", "mlp_block.coeffs."):
            shapes |= {at + "rms.weight": (n * d,)}
            for which, outputs in (("pre", n), ("post", n), ("res", n * n)):
                shapes |= {f"{at}phi_{which}.weight": (outputs, n * d), f"{at}alpha_{which}": ()}
            shapes |= {at + "b_pre": (n,), at + "b_post": (n,), at + "b_res": (n, n)}
    shapes |= {"attn_block.norm.weight": (d,), "mlp_block.norm.weight": (d,)}
    e, f, m = c.moe.experts, c.moe.expert_width, "mlp_block.sublayer.moe."
    shapes |= {m + "W_gate": (e, d, f), m + "W_up": (e, d, f), m + "W_down": (e, f, d), m + "gate.gate.weight": (e, d),
               m + "gate.logit_bias": (e,), m + "gate.null_logit": (), m + "shared_gate.weight": (c.mlp_width, d),
               m + "shared_up.weight": (c.mlp_width, d), m + "shared_down.weight": (d, c.mlp_width)}
    if adaptive and c.adaptive is not None:
        hidden, emb = c.adaptive.hidden, c.adaptive.embedding
        shapes |= {"continue_head.net.0.weight": (hidden, 5 + emb), "continue_head.net.0.bias": (hidden,),
                   "continue_head.net.2.weight": (1, hidden), "continue_head.net.2.bias": (1,), "layer_emb": (emb,),
                   "alpha": (4,)}
    return shapes


def shapes(config: ModelConfig) -> Shapes:
    c, d = config, config.width
    found = {f"layers.{i}.{name}": shape for i, kind in enumerate(c.depth.types)
             for name, shape in layer_shapes(kind, c, True).items()}
    if "table" in c.embedding.kind:
        found |= {"tok_embed.weight": (c.vocab, d)}
    if "kronecker" in c.embedding.kind:
        found |= {"pf_to_model.weight": (d, 8192), "embed_norm.weight": (d,)}
    found |= {"norm.weight": (d,), "lm_head.weight": (c.vocab, d)}
    if c.memory is not None:
        found |= {"lambda_r_raw": (), "memory_ln.weight": (d,), "memory_ln.bias": (d,),
                  "memory_gate_proj.weight": (1, d), "memory_gate_proj.bias": (1,)}
    if c.mtp is not None:
        found |= {f"mtp_block.{name}": shape for name, shape in layer_shapes("G", c, False).items()}
        found |= {"mtp_block.fusion_proj.weight": (d, 2 * d)}
    return found


def state(config: ModelConfig = CONFIG, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random values for every tensor; pass strengths as they are."""
    random = np.random.default_rng(seed)
    found = {name: random.normal(size=shape).astype(dtype) for name, shape in sorted(shapes(config).items())}
    for name in found:
        if name.endswith(".alpha"):
            found[name] = np.array(config.adaptive.alpha).astype(dtype)
    return found


def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A .safetensors file that says nothing of a config."""
    infos = {name: Info(value.shape, value.dtype) for name, value in tensors.items()}
    with Writer(path, infos) as writer:
        for name, value in tensors.items():
            writer.put(name, value)
    return path


def layer_leaves(kind: str, config: ModelConfig, whole: bool) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, dtype) of a layer's leaves; `whole` with gain and halting. "w" stands for the dtype of the weights."""
    c, d = config, config.width
    made: dict[str, tuple[tuple[int, ...], str]] = {}
    if kind == "D":
        h, k, hv, v = c.deltanet.heads, c.deltanet.key_width, c.deltanet.value_heads, c.deltanet.value_width
        made |= {f"mixer/{n}/w": ((d, h, k), "w") for n in ("query", "key")}
        made |= {f"mixer/{n}/w": ((d, hv, v), "w") for n in ("value", "gate")}
        for n in ("beta", "decay"):
            made |= {f"mixer/{n}/w": ((d, hv), "f"), f"mixer/{n}/b": ((hv,), "f")}
        for n, heads in (("query", (h, k)), ("key", (h, k)), ("value", (hv, v))):
            made |= {f"mixer/{n}_conv/w": ((4, *heads), "f"), f"mixer/{n}_conv/b": (heads, "f")}
        made |= {f"mixer/{n}": ((hv,), "f") for n in ("a_log", "dt_bias", "skip")}
        made |= {"mixer/output_norm/scale": ((v,), "f"), "mixer/output/w": ((hv, v, d), "w")}
    else:
        h, k, hi, i = c.gsa.heads, c.gsa.head_width, c.gsa.indexer_heads, c.gsa.indexer_width
        made |= {f"mixer/{n}/w": ((d, h, k), "w") for n in ("query", "key", "value", "value_gate", "output_gate")}
        made |= {f"mixer/indexer_{n}/w": ((d, hi, i), "w") for n in ("query", "key")}
        made |= {"mixer/indexer_weight/w": ((d, hi), "w"), "mixer/indexer_bias": ((hi,), "f"),
                 "mixer/head_importance": ((h,), "f"), "mixer/output/w": ((h, k, d), "w"),
                 "mixer/variance_ema": ((), "f")}
    if c.hyper is not None:
        n = c.hyper.streams
        for at in ("mixer_hyper", "mlp_hyper"):
            made |= {f"{at}/norm/scale": ((n * d,), "f")}
            for which, outputs, b in (("pre", n, (n,)), ("post", n, (n,)), ("res", n * n, (n, n))):
                made |= {f"{at}/{which}/w": ((n, d, outputs), "w"), f"{at}/{which}/b": (b, "f"),
                         f"{at}/{which}/alpha": ((), "f")}
    e, f = c.moe.experts, c.moe.expert_width
    made |= {"mixer_norm/scale": ((d,), "f"), "mlp_norm/scale": ((d,), "f")}
    made |= {f"mlp/experts/{n}/w": ((e, d, f), "w") for n in ("gate", "up")} | {"mlp/experts/down/w": ((e, f, d), "w")}
    made |= {f"mlp/shared/{n}/w": ((d, c.mlp_width), "w") for n in ("gate", "up")}
    made |= {"mlp/shared/down/w": ((c.mlp_width, d), "w"), "mlp/router/w": ((d, e), "f"), "mlp/router/b": ((e,), "f"),
             "mlp/router/null_logit": ((), "f")}
    if whole:
        made |= {"gain": ((), "f")}
        if c.adaptive is not None:
            hidden, emb = c.adaptive.hidden, c.adaptive.embedding
            made |= {"halting/embedding": ((emb,), "f"), "halting/hidden/w": ((5 + emb, hidden), "f"),
                     "halting/hidden/b": ((hidden,), "f"), "halting/output/w": ((hidden, 1), "f"),
                     "halting/output/b": ((1,), "f")}
    return made


def contract(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Every leaf of the model of `config`: what `language_model.abstract` must say, in a moment instead of many."""
    c, d = config, config.width
    made: dict[str, tuple[tuple[int, ...], str]] = {}
    for index, segment in enumerate(c.depth.segments):
        for slot, kind in enumerate(segment.pattern):
            made |= {f"{_top(path)}/segment{index}/layer{slot}/{path}": ((segment.repeats, *shape), dtype)
                     for path, (shape, dtype) in layer_leaves(kind, c, True).items()}
    if c.mtp is not None:
        made |= {f"{_top(path)}/mtp/layer/{path}": leaf for path, leaf in layer_leaves("G", c, False).items()}
        made |= {"params/mtp/fusion/w": ((2, d, d), "w")}
    if "table" in c.embedding.kind:
        made |= {"params/embedding/table": ((c.vocab, d), "w")}
    if "kronecker" in c.embedding.kind:
        made |= {"params/embedding/kronecker/w": ((256, 32, d), "w"), "params/embedding/norm/scale": ((d,), "f"),
                 "statistics/embedding/token_bytes": ((c.vocab, 32), "uint8"),
                 "statistics/embedding/token_length": ((c.vocab,), "int32")}
    if c.memory is not None:
        made |= {"params/memory/strength": ((), "f"), "params/memory/norm/scale": ((d,), "f"),
                 "params/memory/norm/bias": ((d,), "f"), "params/memory/gate/w": ((d,), "f"),
                 "params/memory/gate/b": ((), "f")}
    made |= {"params/final_norm/scale": ((d,), "f"), "params/unembedding/w": ((d, c.vocab), "w")}
    names = {"w": c.param_dtype, "f": "float32"}
    return {path: jax.ShapeDtypeStruct(shape, names.get(dtype, dtype)) for path, (shape, dtype) in sorted(made.items())}


def _top(path: str) -> str:
    return "statistics" if path.endswith("variance_ema") else "params"
