"""The tensors that a config's model has, beside the names that the origin has for them, and what differs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs.model import ModelConfig
from gt_jax.interop.shards import Source
from gt_jax.interop.tensor_files import Info
from gt_jax.interop.tensor_names import ALPHA, Leaf, alpha_names, leaves

TOKENS = ("statistics/embedding/token_bytes", "statistics/embedding/token_length")
_GAIN = "/gain"

Abstract = Mapping[str, jax.ShapeDtypeStruct]


class Expected(NamedTuple):
    """Every leaf of a model by path: those that the origin has too, the gains, the token bytes, and the `foreign` rest.

    The rest has no place in the origin's names.
    """

    tensors: Abstract
    leaves: list[Leaf]
    gains: list[str]
    tokens: list[str]
    foreign: list[str]


def model_leaves(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every leaf of a model of this config, by path."""
    from gt_jax.models.language_model import abstract  # the whole model's code is asked for it

    return flatten(abstract(config))


def expect(config: ModelConfig) -> Expected:
    """What a checkpoint of this config has to hold."""
    tensors = model_leaves(config)
    named, without = leaves(tensors, config)
    gains = [path for path in without if path.endswith(_GAIN)]
    tokens = [path for path in without if path in TOKENS]
    return Expected(tensors, named, gains, tokens, [path for path in without if path not in (*gains, *tokens)])


def block_shape(leaf: Leaf, tensor: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The shape of one block of a leaf."""
    return tuple(tensor.shape[1:] if leaf.stacked else tensor.shape)


def origin_infos(expected: Expected, config: ModelConfig) -> dict[str, Info]:
    """Shape and dtype of every tensor of the origin as we write it, the buffers of pass strengths included."""
    found = {name: Info(leaf.transform.origin_shape(block_shape(leaf, tensor)), np.dtype(tensor.dtype))
             for leaf in expected.leaves for tensor in [expected.tensors[leaf.path]] for name in leaf.origins}
    passes = () if config.adaptive is None else (config.adaptive.max_passes,)
    return found | {name: Info(passes, np.dtype(np.float32)) for name in alpha_names(config)}


def mismatches(source: Source, expected: Expected, config: ModelConfig) -> list[str]:
    """One line for every tensor that is missing, left over, of another shape, or would be rounded."""
    found, wanted = source.tensors, origin_infos(expected, config)
    lines = [f"{name} is missing; {list(wanted[name].shape)} is expected" for name in wanted if name not in found]
    lines += [f"{place} is not a tensor of this model" for name, places in source.places.items() if name not in wanted
              for place in places]
    for leaf in expected.leaves:
        tensor = expected.tensors[leaf.path]
        for name in leaf.origins:
            if name in found and (problem := _misfit(leaf, tensor, found[name])):
                lines.append(f"{source.places[name][0]} {problem}")
    return lines


def _misfit(leaf: Leaf, tensor: jax.ShapeDtypeStruct, found: Info) -> str | None:
    shape = block_shape(leaf, tensor)
    if not leaf.transform.fits(found.shape, shape):
        return f"has shape {list(found.shape)}; {list(leaf.transform.origin_shape(shape))} is expected"
    if not exact(found.dtype, tensor.dtype):
        return f"is {found.dtype}; {tensor.dtype}, which this config stores, does not hold its values exactly"
    return None


def exact(found: np.dtype, wanted: Any) -> bool:
    """Whether every value of one floating dtype is a value of the other."""
    if not jax.dtypes.issubdtype(found, np.floating):
        return False
    a, b = jax.numpy.finfo(found), jax.numpy.finfo(wanted)
    return bool(a.nmant <= b.nmant and a.maxexp <= b.maxexp and a.minexp >= b.minexp)


def pass_strengths(source: Source) -> tuple[tuple[float, ...] | None, list[str]]:
    """alpha as the layers' buffers hold it, and the layers that hold another; None without buffers."""
    names = [name for name in source.places if re.fullmatch(rf"layers\.[^.]*\.{re.escape(ALPHA)}", name)]
    held: dict[str, tuple[float, ...]] = {}
    problems = []
    for name in names:
        value = source.read(name)
        if jax.dtypes.issubdtype(value.dtype, np.floating) and value.size:
            held[name] = tuple(_decimal(number) for number in value.reshape(-1))
        else:
            problems.append(f"{name} is {source.tensors[name]}; pass strengths are expected")
    if not held:
        return None, problems
    alpha = Counter(held.values()).most_common(1)[0][0]
    return alpha, problems + [f"{name} is {list(value)}; other layers have {list(alpha)}, and a model has one alpha"
                              for name, value in held.items() if value != alpha]


def _decimal(number: Any) -> float:
    """The shortest decimal that is this number in its dtype: 0.7, not the 0.69921875 of bfloat16."""
    for digits in range(1, 18):
        short = float(f"{float(number):.{digits}g}")
        if np.asarray(short).astype(number.dtype) == number:
            return short
    return float(number)
