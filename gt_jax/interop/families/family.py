"""A family of public models: what it is called, its table, its config.json both ways, and what it can express."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from gt_jax.configs import layout as layouts
from gt_jax.configs.model import ModelConfig
from gt_jax.errors import Refused
from gt_jax.files import is_number
from gt_jax.interop.families.rows import Table
from gt_jax.interop.tensor_transforms import Shape

Json = dict[str, Any]
TYPES = {"linear_attention": "D", "full_attention": "A"}
_NAMES = {letter: name for name, letter in TYPES.items()}
_MOST_LAYERS = layouts.MOST
_OURS_ALONE = ("layout", "init_std", "param_dtype", "compute_dtype", "remat", "deltanet.chunk_size",
               "deltanet.implementation", "attention.implementation", "moe.balance_loss", "moe.router_z_loss",
               "moe.null_loss")  # how a model is trained and computed, not what it computes


class Fields:
    """The fields of a config.json, each read by what it has to be; what is wrong is collected in `problems`.

    A field that is not there has the family's default, as transformers has it.
    """

    def __init__(self, data: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._data, self._defaults, self.problems = data, defaults, list[str]()

    def get(self, name: str) -> Any:
        """The value as it is; null where transformers derives it counts as not given."""
        value = self._data.get(name)
        return self._defaults.get(name) if value is None else value

    def is_null(self, name: str) -> bool:
        """Whether the field is there and null."""
        return name in self._data and self._data[name] is None

    def whole(self, name: str, most: int = 2**31 - 1) -> int:
        """A whole number of at least 1; what is above `most` is no size of a tensor, or no number of layers."""
        return self._checked(name, lambda value: type(value) is int and 1 <= value <= most,
                             f"a whole number of at least 1, at most {most}", 1)

    def whole_or(self, name: str, instead: int) -> int:
        """A whole number of at least 1, `instead` where the field is null or not there."""
        return instead if self.get(name) is None else self.whole(name)

    def number(self, name: str, zero: bool = False) -> float:
        """A positive number; with `zero` 0 is one too."""
        what = "0 or a positive number" if zero else "a positive number"
        return float(self._checked(name, lambda value: is_number(value) and (value > 0 or (zero and value == 0)),
                                   what, 1.0))

    def flag(self, name: str) -> bool:
        """True or false."""
        return bool(self._checked(name, lambda value: type(value) is bool, "true or false", False))

    def must(self, name: str, wanted: Any, why: str) -> None:
        """Note a problem unless the field is `wanted`, or not there."""
        value = self.get(name)
        if value not in (wanted, None):
            self.problems.append(f"{name} is {value!r}; {why}")

    def types(self) -> str:
        """The layer types as letters, from `layer_types`, else from the interval of full attention."""
        count, given = self.whole("num_hidden_layers", _MOST_LAYERS), self.get("layer_types")
        if given is None:
            every = self.whole("full_attention_interval")
            return "".join("D" if (layer + 1) % every else "A" for layer in range(count))
        if not isinstance(given, list) or not given:
            self.problems.append(f"layer_types is {given!r}; it must be a list of layer types")
            return "D"
        unknown = sorted({str(name) for name in given if str(name) not in TYPES})
        if unknown:
            self.problems.append(f"layer_types has {', '.join(map(repr, unknown))}; known are {', '.join(TYPES)}")
        if len(given) != count:
            self.problems.append(f"num_hidden_layers is {count}, but layer_types has {len(given)} entries; "
                                 "one of the two is of another model")
        return "".join(TYPES.get(str(name), "D") for name in given)

    def rope(self, partial: bool) -> Json:
        """Fields of AttentionConfig from `rope_parameters`, or from the older rope_theta and rope_scaling.

        Where both are there the older one counts, as in transformers. Every kind but the plain table is refused by
        name; `partial` families turn a part of each head.
        """
        data, default = self._data, self._defaults["rope_parameters"]
        found: Mapping[str, Any] = {}
        for name in ("rope_parameters", "rope_scaling"):
            if not (one := data.get(name)):
                continue
            if not isinstance(one, Mapping):
                self.problems.append(f"{name} is {one!r}; it must be an object")
                continue
            found, kind = one, one.get("rope_type", one.get("type", "default"))
            if kind not in ("default", "mrope"):
                self.problems.append(f"{name} has rope_type {kind!r}; only 'default' is implemented")
        theta = found.get("rope_theta", data.get("rope_theta", default["rope_theta"]))
        share = found.get("partial_rotary_factor", data.get("partial_rotary_factor",
                                                            default["partial_rotary_factor"])) if partial else 1.0
        if theta is None:
            return {"rope": "none"}
        for name, value in (("rope_theta", theta), ("partial_rotary_factor", share)):
            if not is_number(value) or value <= 0:
                self.problems.append(f"rope_parameters: {name} is {value!r}; it must be a positive number")
                return {}
        return {"rope_base": float(theta), "rope_share": float(share)}

    def _checked(self, name: str, fits: Callable[[Any], bool], what: str, instead: Any) -> Any:
        value = self.get(name)
        if fits(value):
            return value
        is_there = name in self._data
        self.problems.append(f"{name} is {value!r}; it must be {what}" if is_there else f"{name} is missing; {what}")
        return instead


@dataclasses.dataclass(frozen=True)
class Family:
    """`model_type` is that of the text model, `wrapper` that of one with a vision tower around it (text_config).

    `read` makes our config of `Fields`, `write` the fields of theirs of ours. `table` gives the rows for a config and
    the `variants` of shards: names and arrangements beside those that a new model goes out in, by the tensors' shapes.
    """

    model_type: str
    wrapper: str | None
    architecture: str
    defaults: Mapping[str, Any]
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], Json]
    table: Callable[[ModelConfig, Collection[str]], Table]
    variants: Callable[[Mapping[str, Shape]], list[str]] = lambda shapes: []

    def config(self, data: Mapping[str, Any]) -> ModelConfig:
        """Our config of a text model's config.json; raises `Refused` that lists what cannot be represented."""
        fields = Fields(data, self.defaults)
        fields.must("hidden_act", "silu", "only silu is implemented")
        made, wrong = None, []
        try:
            made = self.read(fields)
        except Refused as error:
            wrong = [str(error).replace("\n", "\n  ")]
        problems = [*fields.problems, *wrong] if fields.problems or wrong else []
        if problems or made is None:
            raise Refused("\n".join(f"  - {line}" for line in problems))
        return made

    def cannot_express(self, config: ModelConfig) -> list[str]:
        """One line for every field in which a model of this config is not one of this family."""
        foreign = sorted(set(config.depth.types) - set(_NAMES))
        if foreign:
            return [f"layers of type {', '.join(foreign)}; {self.model_type} has {', '.join(_NAMES)} alone"]
        if config.deltanet is None or config.attention is None:
            return [f"{self.model_type} needs both deltanet and attention"]
        try:
            back = self.config({**self.write(config), **depth_fields(config)})
        except (Refused, AttributeError) as error:
            return [f"{self.model_type} does not take this config: {error}"]
        mine, theirs = (_told(each.without_unused_mixers) for each in (config, back))
        return [f"{name} is {mine.get(name)!r}; {self.model_type} has {theirs.get(name)!r} alone"
                for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]  # fmt: skip


def depth_fields(config: ModelConfig) -> Json:
    """The number of layers and their types, as config.json has them."""
    return {"num_hidden_layers": len(config.depth), "layer_types": [_NAMES[kind] for kind in config.depth.types]}


def layout_of(types: str) -> str:
    """The notation of layer types: the shortest pattern that repeats, else runs of one type."""
    for size in range(1, len(types) // 2 + 1):
        if len(types) % size == 0 and types == types[:size] * (len(types) // size):
            return str(layouts.from_types(types, types[:size]))
    return str(layouts.from_types(types, types)) if len(types) <= 8 else str(layouts.from_types(types, "DDDA"))


def _told(config: ModelConfig) -> Json:
    """A config's fields by dotted name, without those that are ours alone."""
    made: Json = {}

    def visit(prefix: str, node: Mapping[str, Any]) -> None:
        for name, value in node.items():
            if isinstance(value, Mapping):
                visit(f"{prefix}{name}.", value)
            else:
                made[prefix + name] = value

    visit("", config.to_json())
    return {name: value for name, value in made.items() if name not in _OURS_ALONE}
