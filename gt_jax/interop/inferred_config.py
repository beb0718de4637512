"""The config of an origin checkpoint: layout and sizes from names and shapes, the rest from the user.

- What the tensors say is law: an override that contradicts them is a mistake, and is listed as one.
- What they do not say (budgets of keys, thresholds, loss weights, chunks) comes from the overrides, else from the
  config that our own safetensors files carry, else from the `3b` preset.
- A component is there if one of its tensors is; then all of them must be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gt_jax.configs import layout
from gt_jax.configs.json_config import merged
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.presets import preset
from gt_jax.errors import Refused, refuse_all
from gt_jax.interop.inferred_sizes import Key, Sizes, layer_types
from gt_jax.interop.tensor_files import Info

DEFAULTS = "3b"
Json = dict[str, Any]


class Inferred(NamedTuple):
    """The config, and what is wrong with the layers and with the overrides, one line each."""

    config: ModelConfig
    problems: list[str]


def infer(tensors: Mapping[str, Info], alpha: tuple[float, ...] | None = None,
          overrides: Mapping[str, Any] | None = None, stored: Mapping[str, Any] | None = None) -> Inferred:
    """The config of a checkpoint with these tensors, by canonical name; `alpha` are the strengths its buffers hold.

    Where the overrides do not fit, the config is the one without them: the caller has more to check before it raises.
    Raises `Refused` when the tensors are of no such model at all.
    """
    asked = dict(overrides or {})
    types, problems = layer_types(tensors)
    sizes = Sizes(tensors)
    base = _base(sizes, types, stored)
    law = sizes.fields() | _keys(sizes, base, {}) | ({} if alpha is None else {("adaptive", "alpha"): list(alpha)})
    wished = law | _keys(sizes, base, asked)
    same_layers = _types(asked.get("layout")) == types
    wished["layout",] = law["layout",] = asked["layout"] if same_layers else base["layout"]
    problems += [f"config field {'.'.join(key)} is {found!r}; the tensors say {value!r}"
                 for key, value in wished.items() if (found := _get(asked, key)) is not None and found != value]
    config, wrong = _config(_with(merged(base, asked), wished))
    if config is None:
        problems += wrong
        config, wrong = _config(_with(base, law))
    if config is None:
        refuse_all([*problems, *wrong], "tensors and config do not give a model:")
        raise AssertionError  # there is a problem where there is no config
    return Inferred(config, problems)


def _base(sizes: Sizes, types: str, stored: Mapping[str, Any] | None) -> Json:
    """A config with the components that have tensors, each as stored, else as in the preset."""
    default = preset(DEFAULTS).to_json()
    base = dict(default if stored is None else ModelConfig.from_json(stored).to_json())
    base |= {name: (base[name] or default[name]) if there else None for name, there in sizes.components(types).items()}
    if stored is None or _types(base["layout"]) != types:
        base["layout"] = str(layout.from_types(types))
    base["param_dtype"] = sizes.param_dtype()
    if stored is None:
        base["compute_dtype"] = base["param_dtype"]
        base["remat"] = default["remat"] if base["adaptive"] else preset(DEFAULTS).plain.remat
    return base


def _keys(sizes: Sizes, base: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[Key, Any]:
    """Heads and width of the keys of D layers: one product in the tensors, as many heads as values have by default."""
    rows, value_heads = sizes.key_rows(), sizes.value_heads()
    if not rows or not value_heads:
        return {}
    heads = _get(asked, ("deltanet", "heads"))
    if heads is None and _get(base, ("deltanet", "value_heads")) == value_heads:
        heads = _get(base, ("deltanet", "heads"))
    if type(heads) is not int or heads < 1 or value_heads % heads or rows % heads:
        heads = value_heads
    return {("deltanet", "heads"): heads, ("deltanet", "key_width"): max(1, rows // heads)}


def _config(data: Json) -> tuple[ModelConfig | None, list[str]]:
    """The config of a JSON object, or everything that is wrong with it, of every component."""
    try:
        return ModelConfig.from_json(data), []
    except Refused as error:
        return None, [str(error).replace("\n", "\n  ")]


def _types(text: Any) -> str | None:
    """The layer types of a layout's text; None when it is none."""
    try:
        return layout.parse(text).types if isinstance(text, str) else None
    except Refused:
        return None


def _get(config: Mapping[str, Any], key: Key) -> Any:
    """A field of a config's JSON; None where it, or what it lies in, is not there."""
    node: Any = config
    for name in key:
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _with(config: Json, fields: Mapping[Key, Any]) -> Json:
    """`config` with these fields set, as far as there are the components that they belong to."""
    made = dict(config)
    for key, value in fields.items():
        *parents, name = key
        if not parents:
            made[name] = value
        elif isinstance(made.get(parents[0]), Mapping):
            made[parents[0]] = {**made[parents[0]], name: value}
    return made
