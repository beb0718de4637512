"""What the names and shapes of an origin checkpoint say about its model: layer types, components, sizes.

A size is the most frequent one over all layers, so that one misshaped tensor is the one found to be wrong.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from gt_jax.errors import Refused
from gt_jax.interop.tensor_files import Info
from gt_jax.interop.tensor_names import DELTANET, GSA

Key = tuple[str, ...]

_BYTES = 256
_MOST_LAYERS = 10_000
_MIXER, _MOE = "attn_block.sublayer.", "mlp_block.sublayer.moe."
_D, _G = ({_MIXER + name for name, _, _ in table} for table in (DELTANET, GSA))
_PREFIX = re.compile(r"(layers\.(\d+)|mtp_block)\.")
_FLOAT32 = ("b_proj.weight", "gk_proj.weight", "conv.weight", "gate.gate.weight", "net.0.weight", "b_res")


def layer_types(names: Iterable[str]) -> tuple[str, list[str]]:
    """The layer types, and the layers without any tensor of a mixer; raises `Refused` when that is all of them."""
    votes: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for name in names:
        match = _PREFIX.match(name)
        if match and match[2]:
            within = name[match.end() :]
            votes[int(match[2])][0] += within in _D - _G
            votes[int(match[2])][1] += within in _G - _D
    if not any(map(any, votes.values())):
        first = ", ".join(list(names)[:4]) or "none"
        hybrid = any(".self_attn." in name or ".linear_attn." in name for name in names)
        hint = "; these are names of transformers, whose folder is known by the model_type in its config.json" * hybrid
        raise Refused(f"no layer has tensors of a mixer, such as layers.0.{_MIXER}q_proj.weight; is this a checkpoint "
                      f"of the origin system? Its first tensors are {first}{hint}")
    last = max(votes)
    if last >= _MOST_LAYERS:
        raise Refused(f"layers.{last} cannot be a layer; at most {_MOST_LAYERS} are read")
    problems = [f"layers.{layer} has no tensor of a mixer, and the last layer is {last}" for layer in range(last + 1)
                if layer not in votes or not any(votes[layer])]
    return "".join("G" if votes[layer][1] > votes[layer][0] else "D" for layer in range(last + 1)), problems


class Sizes:
    """The tensors of a checkpoint by their name within a layer."""

    def __init__(self, tensors: Mapping[str, Info]) -> None:
        self._within: dict[str, list[Info]] = defaultdict(list)
        for name, info in tensors.items():
            match = _PREFIX.match(name)
            self._within[name[match.end() :] if match else name].append(info)
        self.mtp = any(name.startswith("mtp_block.") for name in tensors)

    def any(self, *starts: str) -> bool:
        """Whether a tensor's name within its layer begins in one of these ways."""
        return any(name.startswith(starts) for name in self._within)

    def axis(self, axis: int, *names: str) -> int | None:
        """The length of an axis of these tensors."""
        return _most([info.shape[axis] for info in self._named(names) if len(info.shape) > axis])

    def elements(self, *names: str) -> int | None:
        """How many elements these tensors have."""
        return _most([math.prod(info.shape) for info in self._named(names)])

    def param_dtype(self) -> str:
        """What holds every weight matrix exactly."""
        matrices = {info.dtype for name, infos in self._within.items() if not name.endswith(_FLOAT32)
                    for info in infos if sum(size > 1 for size in info.shape) > 1}
        return "bfloat16" if matrices == {np.dtype(ml_dtypes.bfloat16)} else "float32"

    def components(self, types: str) -> dict[str, bool]:
        """Which optional parts of a config have tensors."""
        return {
            "deltanet": "D" in types, "gsa": "G" in types or self.mtp, "moe": True, "mtp": self.mtp,
            "hyper": self.any("attn_block.coeffs.", "mlp_block.coeffs."),
            "adaptive": self.any("continue_head.", "layer_emb"),
            "memory": self.any("lambda_r_raw", "memory_"), "sliding": False, "exit": False,
        }  # fmt: skip

    def key_rows(self) -> int | None:
        """heads * key_width of the D layers."""
        return self.axis(0, *_mixer("q_proj.weight", "k_proj.weight"))

    def value_heads(self) -> int | None:
        """How many value heads the D layers have."""
        return self.elements(*_mixer("A_log", "dt_bias", "D", "b_proj.bias", "gk_proj.bias"))

    def fields(self) -> dict[Key, Any]:
        """Every other size, by its path in the config; what the tensors do not say is not there."""
        heads = self.elements(*_mixer("head_importance_bias"))
        indexer_heads = self.elements(*_mixer("gate_bias")) or self.axis(0, *_mixer("W_Iw.weight"))
        convolutions = _mixer("q_conv1d.conv.weight", "k_conv1d.conv.weight", "v_conv1d.conv.weight")
        found: dict[Key, Any] = {
            ("width",): self.elements("norm.weight", "attn_block.norm.weight", "mlp_block.norm.weight"),
            ("vocab",): self.axis(0, "lm_head.weight") or self.axis(0, "tok_embed.weight"),
            ("mlp_width",): self.axis(0, _MOE + "shared_gate.weight", _MOE + "shared_up.weight"),
            ("deltanet", "value_heads"): self.value_heads(),
            ("deltanet", "value_width"): self.elements(*_mixer("o_norm.norm.weight")),
            ("deltanet", "conv_width"): self.axis(2, *convolutions),
            ("gsa", "heads"): heads,
            ("gsa", "head_width"): _quotient(self.axis(0, *_mixer("W_q.weight", "W_k.weight", "W_v.weight")), heads),
            ("gsa", "indexer_heads"): indexer_heads,
            ("gsa", "indexer_width"): _quotient(self.axis(0, *_mixer("W_Iq.weight", "W_Ik.weight")), indexer_heads),
            ("moe", "experts"): self.axis(0, _MOE + "W_gate", _MOE + "W_up", _MOE + "W_down"),
            ("moe", "expert_width"): self.axis(1, _MOE + "W_down") or self.axis(2, _MOE + "W_gate", _MOE + "W_up"),
            ("hyper", "streams"): self.elements(*(f"{at}.coeffs.b_{which}" for at in ("attn_block", "mlp_block")
                                                  for which in ("pre", "post"))),
            ("adaptive", "hidden"): self.elements("continue_head.net.0.bias"),
            ("adaptive", "embedding"): self.elements("layer_emb"),
            ("embedding", "token_bytes"): _quotient(self.axis(1, "pf_to_model.weight"), _BYTES),
        }  # fmt: skip
        table, kronecker = self.any("tok_embed."), self.any("pf_to_model.")
        if table or kronecker:
            found["embedding", "kind"] = ("kronecker" if kronecker else "") + "+" * (table and kronecker) + (
                "table" if table else "")
        if self.value_heads():
            found["deltanet", "conv_bias"] = any(self._named([name.replace("weight", "bias") for name in convolutions]))
            found["deltanet", "skip"] = any(self._named(_mixer("D")))
        return {key: value for key, value in found.items() if value is not None}

    def _named(self, names: Sequence[str]) -> list[Info]:
        return [info for name in names for info in self._within.get(name, ())]


def _mixer(*names: str) -> tuple[str, ...]:
    return tuple(_MIXER + name for name in names)


def _most(sizes: Sequence[int]) -> int | None:
    return Counter(sizes).most_common(1)[0][0] if sizes else None


def _quotient(size: int | None, parts: int | None) -> int | None:
    return max(1, size // parts) if size and parts else None
