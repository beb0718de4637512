"""Does a mesh divide a model and a batch evenly? Which field of the config it does not, which tensor, on which axis."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import jax

from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules, make_mesh
from gt_jax.errors import refuse_all
from gt_jax.models.language_model import abstract

_SHOWN = 12  # lines of tensors
_NUMBERED = re.compile(r"\b(segment|layer)\d+\b")


def refuse_indivisible(model: ModelConfig, rows: int, sizes: dict[str, int], heading: str, rules: Rules) -> None:
    """Raise `Refused` that lists what a mesh of these sizes cannot cut evenly: `rows` of a batch, fields, tensors."""
    wrong = indivisible_fields(model, rows, sizes, rules)
    refuse_all(wrong and [*wrong, *indivisible_tensors(model, sizes, rules)], heading)


def indivisible_fields(model: ModelConfig, rows: int, sizes: Mapping[str, int], rules: Rules) -> list[str]:
    """What a mesh of these `sizes` cannot cut evenly, a line each: rows at a time, heads, MLP width, vocabulary."""
    model = model.without_unused_mixers
    heads = {"deltanet": model.deltanet, "gsa": model.gsa, "sliding": model.sliding, "attention": model.attention,
             "resolvent": model.resolvent}  # fmt: skip
    named_heads = {f"{name}.heads": layer.heads for name, layer in heads.items() if layer is not None}
    if model.gsa is not None:
        named_heads["gsa.indexer_heads"] = model.gsa.indexer_heads
    if model.attention is not None:
        named_heads["attention.kv_heads"] = model.attention.kv_heads
    mlp, experts = {"mlp_width": model.mlp_width}, {}
    if model.moe is not None:
        mlp["moe.expert_width"] = model.moe.expert_width
        experts["moe.experts"] = model.moe.experts
    cut = {
        "batch": {"batch (rows that run together)": rows}, "heads": named_heads, "mlp": mlp, "experts": experts,
        "vocab": {"vocab": model.vocab}, "embed": {"width": model.width},
    }  # fmt: skip
    lines = []
    for axis, named in cut.items():
        pieces = math.prod(sizes.get(name, 1) for name in rules.mesh_axes(axis))
        for name, size in named.items():
            if size % pieces:
                over = " x ".join(rules.mesh_axes(axis))
                lines.append(f"{name} is {size}; the mesh cuts it in {pieces} ({over})")
    return lines


def indivisible_tensors(model: ModelConfig, sizes: dict[str, int], rules: Rules) -> list[str]:
    """The parameters with an axis that a mesh of these sizes cannot cut evenly, a line for all layers with the same."""
    found: dict[tuple[str, int], list[str]] = {}
    words: dict[tuple[str, int], str] = {}
    with jax.set_mesh(make_mesh(devices=jax.local_devices()[:1])):  # which cuts nothing, so that shapes can be had
        shapes = abstract(model, rules)
    for path, leaf in flatten(shapes).items():
        for axis, (size, names) in enumerate(zip(leaf.shape, leaf.sharding.spec, strict=False)):
            names = (names,) if isinstance(names, str) else names or ()
            pieces = math.prod(sizes.get(name, 1) for name in names)
            if size % pieces:
                key = _NUMBERED.sub(r"\1", path), axis
                found.setdefault(key, []).append(path)
                words[key] = f"axis {axis} of {list(leaf.shape)} is {size}; the mesh cuts it in {pieces} " \
                             f"({' x '.join(names)})"  # fmt: skip
    lines = [f"{paths[0]}{f' and {len(paths) - 1} like it' if len(paths) > 1 else ''}: {words[key]}"
             for key, paths in found.items()]  # fmt: skip
    return lines[:_SHOWN] + ([f"and {len(lines) - _SHOWN} kinds of tensors more"] if len(lines) > _SHOWN else [])
