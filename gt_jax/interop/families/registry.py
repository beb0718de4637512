"""The families by name; which one a config.json or a checkpoint of ours is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gt_jax.configs.model import ModelConfig
from gt_jax.errors import Refused, refuse_all
from gt_jax.interop.families import olmo_hybrid, qwen3_5, qwen3_5_moe, qwen3_next
from gt_jax.interop.families.family import Family, Json

FAMILIES: Mapping[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in (qwen3_5, qwen3_5_moe, qwen3_next, olmo_hybrid)
}
MODEL_TYPES: Mapping[str, Family] = {
    **FAMILIES, **{one.wrapper: one for one in FAMILIES.values() if one.wrapper is not None}}  # fmt: skip


def recognised(data: Mapping[str, Any], where: object) -> tuple[Family, Json]:
    """The family and the text model's config of a config.json; raises `Refused` for what is not implemented."""
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise Refused(f"{where} has model_type {kind!r}; known are {', '.join(sorted(MODEL_TYPES))}")
    family, text = MODEL_TYPES[kind], dict(data)
    problems = []
    if kind == family.wrapper:
        if isinstance(inner := data.get("text_config"), Mapping):
            text = {"tie_word_embeddings": data.get("tie_word_embeddings", False), **inner}
            if "tie_word_embeddings" in data:
                text["tie_word_embeddings"] = data["tie_word_embeddings"]
        else:
            problems.append("text_config is not there, in which the text model's fields are")
    for part, name in ((data, ""), *(((text, "text_config."),) if kind == family.wrapper else ())):
        if "auto_map" in part:
            problems.append(f"{name}auto_map names code of the model's own ({_short(part['auto_map'])}); nothing in a "
                            "checkpoint is run, and what such code computes is not known")
        if (quantised := part.get("quantization_config")) is not None:
            method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
            problems.append(f"{name}quantization_config: quantised weights ({method}) are not read; take the release "
                            "in bfloat16")
    refuse_all(list(dict.fromkeys(problems)), f"{where} cannot be converted:")
    return family, text


def family_for(config: ModelConfig, named: str | None) -> Family:
    """The family that a model goes out as: the one it came from, else the first that has such models.

    Raises `Refused` with the reasons.
    """
    own = FAMILIES.get(named or "")
    candidates = list(FAMILIES.values()) if own is None else [own]
    reasons = {family.model_type: family.cannot_express(config) for family in candidates}
    for family in candidates:
        if not reasons[family.model_type]:
            return family
    nearest = min(reasons, key=lambda name: len(reasons[name]))
    refuse_all(reasons[nearest], f"no family has such a model; what keeps it from being {nearest}:")
    raise AssertionError


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Mapping) else str(value)
