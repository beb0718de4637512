"""One ordered table: the origin's tensor names, our paths, and the transform of each tensor.

- The origin names a tensor by layer, `layers.5.attn_block.sublayer.q_proj.weight`; ours is one stacked leaf a slot of
  the pattern, `params/segment0/layer1/mixer/query/w`, whose block 1 that is under DDDG*2.
- Several names may stand for one tensor there (`canonical`); rotary frequencies are no weights and are ignored.
- The names of a wrapped model (compiled, data parallel, sharded, inside another module) carry the wrapper's prefix.
- Ours alone: `gain`, and the bytes of the tokens. There alone: the buffer `alpha`, our `config.adaptive.alpha`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from gt_jax.configs.model import ModelConfig
from gt_jax.interop.tensor_transforms import Flat, Matrix, Row, Taps, Transform

SAME, FLAT, ROW, TAPS = Transform(), Flat(), Row(), Taps()
LINEAR, MERGED = Matrix(), Matrix(inputs=2)

Table = tuple[tuple[str, str, Transform], ...]

DELTANET: Table = (
    ("q_proj.weight", "query/w", LINEAR),
    ("k_proj.weight", "key/w", LINEAR),
    ("v_proj.weight", "value/w", LINEAR),
    ("g_proj.weight", "gate/w", LINEAR),
    ("o_proj.weight", "output/w", MERGED),
    ("b_proj.weight", "beta/w", LINEAR),
    ("b_proj.bias", "beta/b", SAME),
    ("gk_proj.weight", "decay/w", LINEAR),
    ("gk_proj.bias", "decay/b", SAME),
    ("q_conv1d.conv.weight", "query_conv/w", TAPS),
    ("q_conv1d.conv.bias", "query_conv/b", FLAT),
    ("k_conv1d.conv.weight", "key_conv/w", TAPS),
    ("k_conv1d.conv.bias", "key_conv/b", FLAT),
    ("v_conv1d.conv.weight", "value_conv/w", TAPS),
    ("v_conv1d.conv.bias", "value_conv/b", FLAT),
    ("A_log", "a_log", SAME),
    ("D", "skip", SAME),
    ("dt_bias", "dt_bias", SAME),
    ("o_norm.norm.weight", "output_norm/scale", SAME),
)
GSA: Table = (
    ("W_Iq.weight", "indexer_query/w", LINEAR),
    ("W_Ik.weight", "indexer_key/w", LINEAR),
    ("W_Iw.weight", "indexer_weight/w", LINEAR),
    ("W_q.weight", "query/w", LINEAR),
    ("W_k.weight", "key/w", LINEAR),
    ("W_v.weight", "value/w", LINEAR),
    ("o_proj.weight", "output/w", MERGED),
    ("W_gv.weight", "value_gate/w", LINEAR),
    ("W_go.weight", "output_gate/w", LINEAR),
    ("gate_bias", "indexer_bias", SAME),
    ("head_importance_bias", "head_importance", SAME),
    ("variance_ema", "variance_ema", SAME),
)
EXPERTS: Table = (
    ("W_gate", "experts/gate/w", SAME),
    ("W_up", "experts/up/w", SAME),
    ("W_down", "experts/down/w", SAME),
    ("gate.gate.weight", "router/w", LINEAR),
    ("gate.logit_bias", "router/b", SAME),
    ("gate.null_logit", "router/null_logit", SAME),
    ("shared_gate.weight", "shared/gate/w", LINEAR),
    ("shared_up.weight", "shared/up/w", LINEAR),
    ("shared_down.weight", "shared/down/w", LINEAR),
)
HYPER: Table = (
    ("coeffs.rms.weight", "norm/scale", SAME),
    ("coeffs.phi_pre.weight", "pre/w", MERGED),
    ("coeffs.b_pre", "pre/b", SAME),
    ("coeffs.alpha_pre", "pre/alpha", SAME),
    ("coeffs.phi_post.weight", "post/w", MERGED),
    ("coeffs.b_post", "post/b", SAME),
    ("coeffs.alpha_post", "post/alpha", SAME),
    ("coeffs.phi_res.weight", "res/w", MERGED),
    ("coeffs.b_res", "res/b", Transform(flat=True)),
    ("coeffs.alpha_res", "res/alpha", SAME),
)
HALTING: Table = (
    ("continue_head.net.0.weight", "hidden/w", LINEAR),
    ("continue_head.net.0.bias", "hidden/b", SAME),
    ("continue_head.net.2.weight", "output/w", LINEAR),
    ("continue_head.net.2.bias", "output/b", SAME),
    ("layer_emb", "embedding", SAME),
)
TOP: Table = (
    ("tok_embed.weight", "embedding/table", SAME),
    ("pf_to_model.weight", "embedding/kronecker/w", MERGED),
    ("embed_norm.weight", "embedding/norm/scale", SAME),
    ("norm.weight", "final_norm/scale", SAME),
    ("lm_head.weight", "unembedding/w", LINEAR),
    ("lambda_r_raw", "memory/strength", SAME),
    ("memory_ln.weight", "memory/norm/scale", SAME),
    ("memory_ln.bias", "memory/norm/bias", SAME),
    ("memory_gate_proj.weight", "memory/gate/w", ROW),
    ("memory_gate_proj.bias", "memory/gate/b", ROW),
    ("mtp_block.fusion_proj.weight", "mtp/fusion/w", MERGED),
)
ALPHA = "alpha"
_MTP = "mtp_block"

_LAYER_NAME = re.compile(
    r"(?:layers\.(?P<layer>\d+)|stack\.blocks\.(?P<block>\d+)|stack\.bootstrap_layer"
    r"|stack\.mid_layers\.(?P<middle>\d+)\.block)(?:\.wrapper\.layer)?\.(?P<rest>.+)"
)
_WRAPPED = re.compile(r"^(?:module\.|model\.|_orig_mod\.|_fsdp_wrapped_module\.)+|"
                      r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_MTP_ALIAS = re.compile(r"mtp_block\.(attn|mlp)\.")
_IGNORED = re.compile(r"(.+\.)?rotary_emb\.inv_freq")
_LAYER_PATH = re.compile(r"(?:params|statistics)/segment(\d+)/layer(\d+)/(.+)")
_MTP_PATH = re.compile(r"(?:params|statistics)/mtp/layer/(.+)")


class Leaf(NamedTuple):
    """A leaf of ours and the origin's names of its blocks in order; `stacked` if it has a block axis."""

    path: str
    transform: Transform
    origins: tuple[str, ...]
    stacked: bool


def _under(origin: str, ours: str, table: Table) -> Table:
    return tuple((origin + name, ours + path, transform) for name, path, transform in table)


def _layer(mixer: Table) -> Table:
    return (
        ("attn_block.norm.weight", "mixer_norm/scale", SAME),
        *_under("attn_block.sublayer.", "mixer/", mixer),
        *_under("attn_block.", "mixer_hyper/", HYPER),
        ("mlp_block.norm.weight", "mlp_norm/scale", SAME),
        *_under("mlp_block.sublayer.moe.", "mlp/", EXPERTS),
        *_under("mlp_block.", "mlp_hyper/", HYPER),
        *_under("", "halting/", HALTING),
    )


LAYERS = {"D": _layer(DELTANET), "G": _layer(GSA)}
_BY_PATH = {kind: {path: (name, form) for name, path, form in table} for kind, table in LAYERS.items()}
_TOP_BY_PATH = {f"params/{path}": (name, form) for name, path, form in TOP}


def unwrapped(name: str) -> str:
    """A tensor's name without what `torch.compile`, data parallelism and other modules around the model put into it."""
    return _WRAPPED.sub("", name)


def canonical(name: str) -> str | None:
    """The one name by which a tensor goes here, whatever alias it came under; None for what is ignored."""
    name = unwrapped(name)
    if _IGNORED.fullmatch(name):
        return None
    match = _LAYER_NAME.fullmatch(name)
    if match:
        layer = int(match["middle"]) + 1 if match["middle"] else int(match["layer"] or match["block"] or 0)
        return f"layers.{layer}.{match['rest']}"
    return _MTP_ALIAS.sub(r"mtp_block.\1_block.sublayer.", name) if _MTP_ALIAS.match(name) else name


def find(path: str, config: ModelConfig) -> Leaf | None:
    """What a leaf of ours is called in the origin; None where the origin has no such tensor."""
    match = _LAYER_PATH.fullmatch(path)
    if match:
        index, slot = int(match[1]), int(match[2])
        segment = config.depth.segments[index]
        found = _BY_PATH.get(segment.pattern[slot], {}).get(match[3])
        layers = [config.depth.layer(index, block, slot) for block in range(segment.repeats)]
        prefixes = [f"layers.{layer}." for layer in layers]
    elif match := _MTP_PATH.fullmatch(path):
        found = None if match[1].startswith("halting/") else _BY_PATH["G"].get(match[1])
        prefixes = [f"{_MTP}."]
    else:
        found, prefixes = _TOP_BY_PATH.get(path), [""]
    if found is None:
        return None
    name, form = found
    return Leaf(path, form, tuple(prefix + name for prefix in prefixes), path.split("/")[1].startswith("segment"))


def leaves(paths: Iterable[str], config: ModelConfig) -> tuple[list[Leaf], list[str]]:
    """The leaves that the origin has too, and the paths of those that it has not."""
    found = {path: find(path, config) for path in paths}
    return [leaf for leaf in found.values() if leaf], [path for path, leaf in found.items() if leaf is None]


def alpha_names(config: ModelConfig) -> list[str]:
    """The origin's buffers of pass strengths, one a layer; none without adaptive depth."""
    return [] if config.adaptive is None else [f"layers.{layer}.{ALPHA}" for layer in range(len(config.depth))]
