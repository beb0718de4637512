"""What a model is: frozen dataclasses, validated at construction, with a JSON round trip.

One small config a layer type; a feature is a field of its layer's config, never a global flag.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from gt_jax import layout
from gt_jax.errors import Refused, refuse_all

DType = Literal["float32", "bfloat16"]
Remat = Literal["none", "pass", "block"]
C = TypeVar("C", bound="Config")


class Config:
    """Shared behaviour of the dataclasses below: JSON both ways, all problems reported at once."""

    def problems(self) -> list[str]:
        """What is wrong with the values, one line each, naming field, value and what would be right."""
        return []

    def __post_init__(self) -> None:
        refuse_all(self.problems(), f"{type(self).__name__} is not valid:")

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal config."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_json(cls: type[C], data: Mapping[str, Any]) -> C:
        """Read `to_json`'s object; raises `Refused` that lists unknown fields and fields of the wrong type."""
        hints = typing.get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        required = [
            f.name
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        wrong = [f"unknown field {key!r}" for key in data if key not in names]
        wrong += [f"field {name!r} is missing" for name in required if name not in data]
        values = {}
        for name in names:
            if name in data:
                try:
                    values[name] = _typed(hints[name], data[name])
                except TypeError as error:
                    wrong.append(f"field {name!r}: {error}")
        refuse_all(wrong, f"{cls.__name__} does not read from this JSON (fields are {', '.join(names)}):")
        return cls(**values)

    def replace(self: C, **changes: Any) -> C:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_json()
    return list(value) if isinstance(value, tuple) else value


def _typed(hint: Any, value: Any) -> Any:
    """`value` from JSON as `hint` (a scalar type, Literal, tuple[float, ...], a config or config | None)."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in args:
        return None if value is None else _typed(next(a for a in args if a is not type(None)), value)
    if origin is Literal:
        if value in args:
            return value
        raise TypeError(f"{value!r} is not one of {', '.join(map(repr, args))}")
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_typed(args[0], item) for item in value)
        raise TypeError(f"{value!r} is not a list")
    if isinstance(hint, type) and issubclass(hint, Config):
        if isinstance(value, Mapping):
            return hint.from_json(value)
        raise TypeError(f"{value!r} is not an object")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and (hint is bool) == isinstance(value, bool):
        return value
    raise TypeError(f"{value!r} is not {hint.__name__}")


def below(config: Config, minimum: int, *names: str) -> list[str]:
    """One line for each named field below `minimum`."""
    values = {name: getattr(config, name) for name in names}
    return [f"{name} is {value}; it must be at least {minimum}" for name, value in values.items() if value < minimum]


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(Config):
    """`D`, Gated DeltaNet (arXiv 2412.06464).

    `value_heads` is a multiple of `heads`; `beta_max` 2 allows negative eigenvalues.
    """

    heads: int
    value_heads: int
    key_width: int
    value_width: int
    conv_width: int = 4
    beta_max: float = 1.0
    chunk_size: int = 64
    implementation: str | None = None

    def problems(self) -> list[str]:
        wrong = below(self, 1, "heads", "value_heads", "key_width", "value_width")
        wrong += below(self, 2, "conv_width")
        if self.heads >= 1 and self.value_heads % self.heads:
            wrong.append(f"value_heads is {self.value_heads}; it must be a multiple of heads {self.heads}")
        if self.heads * self.key_width < 2 and not wrong:
            wrong.append("heads * key_width must be at least 2")
        if not 0 < self.beta_max <= 2:
            wrong.append(f"beta_max is {self.beta_max}; it must lie in (0, 2]")
        if self.chunk_size < 1 or self.chunk_size & (self.chunk_size - 1):
            wrong.append(f"chunk_size is {self.chunk_size}; it must be a power of two")
        return wrong


@dataclasses.dataclass(frozen=True)
class GSAConfig(Config):
    """`G`, gated sparse attention (arXiv 2601.15305).

    An indexer selects `k_min` to `k_max` keys a token, around `k_base`; `indexer_loss` weighs its KL loss.
    """

    heads: int
    head_width: int
    indexer_heads: int = 4
    indexer_width: int = 32
    k_base: int = 512
    k_min: int = 32
    k_max: int = 1024
    sinks: int = 4
    ema_decay: float = 0.99
    rope_base: float = 10000.0
    indexer_loss: float = 0.1

    def problems(self) -> list[str]:
        wrong = below(self, 1, "heads", "head_width", "indexer_heads", "indexer_width", "k_base", "k_min")
        wrong += below(self, 0, "sinks", "indexer_loss")
        if self.head_width % 2:
            wrong.append(f"head_width is {self.head_width}; rotary embedding needs an even width")
        if self.indexer_heads >= 1 and self.heads % self.indexer_heads:
            wrong.append(f"heads is {self.heads}; it must be a multiple of indexer_heads {self.indexer_heads}")
        if not self.k_min <= self.k_base <= self.k_max:
            wrong.append(f"k_min {self.k_min} <= k_base {self.k_base} <= k_max {self.k_max} does not hold")
        if not 0 <= self.ema_decay < 1:
            wrong.append(f"ema_decay is {self.ema_decay}; it must lie in [0, 1)")
        return wrong


@dataclasses.dataclass(frozen=True)
class AdaptiveConfig(Config):
    """Adaptive depth: up to `len(alpha)` passes a layer, pass k at strength alpha[k], while s >= `threshold`."""

    alpha: tuple[float, ...] = (1.0, 0.7, 0.5, 0.35)
    threshold: float = 0.10
    p_floor: float = 0.01
    hidden: int = 32
    embedding: int = 16
    initial_bias: float = -1.0

    @property
    def max_passes(self) -> int:
        return len(self.alpha)

    def problems(self) -> list[str]:
        wrong = below(self, 1, "hidden", "embedding")
        if not self.alpha or min(self.alpha) <= 0:
            wrong.append(f"alpha is {self.alpha}; it needs positive strengths, for example 1.0, 0.7, 0.5, 0.35")
        if not 0 < self.threshold < 1:
            wrong.append(f"threshold is {self.threshold}; it must lie in (0, 1)")
        if not 0 <= self.p_floor < self.threshold:
            wrong.append(f"p_floor is {self.p_floor}; it must lie in [0, threshold {self.threshold})")
        return wrong


@dataclasses.dataclass(frozen=True)
class ModelConfig(Config):
    """A whole language model. `adaptive=None` is the plain feed-forward form of the same weights."""

    layout: str
    width: int
    vocab: int
    mlp_width: int
    deltanet: DeltaNetConfig
    gsa: GSAConfig
    adaptive: AdaptiveConfig | None = None
    norm_epsilon: float = 1e-6
    init_std: float = 0.02
    param_dtype: DType = "float32"
    compute_dtype: DType = "float32"
    remat: Remat = "pass"

    def problems(self) -> list[str]:
        wrong = below(self, 1, "width", "vocab", "mlp_width")
        try:
            parsed = layout.parse(self.layout)
        except Refused as error:
            return [*wrong, str(error)]
        unsupported = sorted(set(parsed.types) - set("DG"))
        if unsupported:
            wrong.append(f"layout {self.layout}: layer type {', '.join(unsupported)} is not built yet; D and G are")
        return wrong

    @property
    def depth(self) -> layout.Layout:
        """The parsed layout."""
        return layout.parse(self.layout)

    @property
    def plain(self) -> ModelConfig:
        """The same model with every layer run once: same weight names less the halting heads."""
        return self.replace(adaptive=None)


def tiny() -> ModelConfig:
    """The demo's source: bytes, 8 layers, 1.6 million parameters; so narrow that it starts from a larger deviation."""
    return ModelConfig(
        layout="DDDG*2",
        width=128,
        init_std=0.08,
        vocab=264,
        mlp_width=256,
        deltanet=DeltaNetConfig(heads=4, value_heads=4, key_width=32, value_width=32, chunk_size=32),
        gsa=GSAConfig(heads=4, head_width=32, indexer_heads=2, indexer_width=16, k_base=64, k_min=16, k_max=128),
        adaptive=AdaptiveConfig(),
    )


def small() -> ModelConfig:
    """A first model for one accelerator: 8 layers of width 768, about 113 million parameters, vocabulary 32768."""
    return ModelConfig(
        layout="DDDG*2",
        width=768,
        vocab=32768,
        mlp_width=2048,
        deltanet=DeltaNetConfig(heads=6, value_heads=6, key_width=128, value_width=128),
        gsa=GSAConfig(heads=6, head_width=128, indexer_heads=2),
        adaptive=AdaptiveConfig(),
        compute_dtype="bfloat16",
    )


PRESETS: Mapping[str, Callable[[], ModelConfig]] = {"tiny": tiny, "small": small}


def preset(name: str) -> ModelConfig:
    """The named preset; raises `Refused` with the names there are."""
    if name not in PRESETS:
        raise Refused(f"unknown preset {name!r}; known are {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()
