"""What a model is: frozen dataclasses, validated at construction, with a JSON round trip.

One small config a layer type; a feature is a field of its layer's config, never a global flag.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from gt_jax.configs import layout as layouts
from gt_jax.configs.adaptive import AdaptiveConfig, GatedCopiesConfig
from gt_jax.configs.attention import AttentionConfig
from gt_jax.configs.json_config import Config, below
from gt_jax.configs.moe import MoEConfig
from gt_jax.configs.resolvent import ResolventConfig
from gt_jax.errors import Refused

DType = Literal["float32", "bfloat16"]
Remat = Literal["none", "pass", "layer", "block", "kernels"]
Rope = Literal["none", "standard", "origin"]


_GATED_ONLY = ("beta_max", "rope", "conv_bias", "read_scale", "skip", "activation_on", "decay_floor",
               "head_gate_bias", "output_epsilon")


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(Config):
    """`D`, Gated DeltaNet (arXiv 2412.06464).

    `value_heads` is a multiple of `heads`; `beta_max` 2 allows negative eigenvalues. The fields from `rope` on are what
    the origin (PyTorch) system does otherwise: rotary embedding of q and k after the convolution, its bias, the read
    at `read_scale` (None: key_width^-0.5), `skip` D_h (q.k) v, SiLU on the normalised output instead of the gate, and a
    floor of the log decay. `variant` "groundthink" is another recurrence (gt_jax.models.layers.groundthink).
    `head_gate_bias` is a bias in the projections to beta and decay (`dt_bias` stays without it), `output_epsilon` that
    of the norm of the read; None is the model's `norm_epsilon`.
    """

    heads: int
    value_heads: int
    key_width: int
    value_width: int
    conv_width: int = 4
    beta_max: float = 1.0
    chunk_size: int = 64
    implementation: str | None = None
    variant: Literal["gated", "groundthink"] = "gated"
    rope: Rope = "none"
    conv_bias: bool = False
    read_scale: float | None = None
    skip: bool = False
    activation_on: Literal["gate", "output"] = "gate"
    decay_floor: float | None = None
    head_gate_bias: bool = True
    output_epsilon: float | None = None

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
        if self.variant == "groundthink":
            fields = {field.name: field.default for field in dataclasses.fields(self)}
            wrong += [f"{name} is {getattr(self, name)!r}; variant 'groundthink' has no such setting, leave it "
                      f"{fields[name]!r}" for name in _GATED_ONLY if getattr(self, name) != fields[name]]
        if self.rope != "none" and self.key_width % (4 if self.rope == "origin" else 2):
            need = "a multiple of 4" if self.rope == "origin" else "an even width"
            wrong.append(f"key_width is {self.key_width}; {self.rope} rotary embedding needs {need}")
        if self.read_scale is not None and self.read_scale <= 0:
            wrong.append(f"read_scale is {self.read_scale}; it must be positive")
        if self.decay_floor is not None and self.decay_floor >= 0:
            wrong.append(f"decay_floor is {self.decay_floor}; a log decay is negative")
        if self.output_epsilon is not None and self.output_epsilon <= 0:
            wrong.append(f"output_epsilon is {self.output_epsilon}; it must be positive")
        return wrong


@dataclasses.dataclass(frozen=True)
class GSAConfig(Config):
    """`G`, gated sparse attention (arXiv 2601.15305).

    An indexer selects `k_min` to `k_max` keys a token: `k_base` times the variance of its scores over the running mean,
    so `k_base` may lie outside the two. `indexer_loss` weighs its KL loss. The origin system uses its own rotary table,
    `score_scale` 1 (None: indexer_width^-0.5) and the variance over the whole row. `implementation` None is the best
    one of `pallas_kernels.sparse_attention` for the length of the row.
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
    rope: Rope = "standard"
    score_scale: float | None = None
    variance: Literal["visible", "row"] = "visible"
    implementation: str | None = None

    def problems(self) -> list[str]:
        wrong = below(self, 1, "heads", "head_width", "indexer_heads", "indexer_width", "k_base", "k_min")
        wrong += below(self, 0, "sinks", "indexer_loss")
        if self.head_width % (4 if self.rope == "origin" else 2):
            need = "a multiple of 4" if self.rope == "origin" else "an even width"
            wrong.append(f"head_width is {self.head_width}; {self.rope} rotary embedding needs {need}")
        if self.score_scale is not None and self.score_scale <= 0:
            wrong.append(f"score_scale is {self.score_scale}; it must be positive")
        if self.indexer_heads >= 1 and self.heads % self.indexer_heads:
            wrong.append(f"heads is {self.heads}; it must be a multiple of indexer_heads {self.indexer_heads}")
        if self.k_min > self.k_max:
            wrong.append(f"k_min is {self.k_min}; it must be at most k_max {self.k_max}")
        if not 0 <= self.ema_decay < 1:
            wrong.append(f"ema_decay is {self.ema_decay}; it must lie in [0, 1)")
        return wrong


@dataclasses.dataclass(frozen=True)
class SlidingConfig(Config):
    """`S`, causal attention over the last `window` tokens plus a read of the preceding D layer's state.

    The local path is dropped for a whole row with probability `drop` in training and scaled by `evaluation_scale`
    otherwise; `gate_bias` is where the gate of the state read starts.
    """

    heads: int
    head_width: int
    window: int = 64
    drop: float = 0.7
    evaluation_scale: float = 0.3
    gate_bias: float = 1.0

    def problems(self) -> list[str]:
        wrong = below(self, 1, "heads", "head_width", "window")
        if not 0 <= self.drop < 1:
            wrong.append(f"drop is {self.drop}; it must lie in [0, 1)")
        return wrong


@dataclasses.dataclass(frozen=True)
class HyperConfig(Config):
    """Hyper-connections (arXiv 2512.24880): `streams` residual streams, mixed by a doubly stochastic matrix a layer.

    `implementation` None is the best one of `pallas_kernels.hyper_connections` for the platform.
    """

    streams: int = 4
    sinkhorn_rounds: int = 20
    sinkhorn_floor: float = 1e-6
    initial_scale: float = 0.1
    implementation: str | None = None

    def problems(self) -> list[str]:
        wrong = below(self, 1, "sinkhorn_rounds")
        if not 1 <= self.streams <= 8:
            wrong.append(f"streams is {self.streams}; it must lie in 1 to 8")
        if not 0 < self.sinkhorn_floor < 1:
            wrong.append(f"sinkhorn_floor is {self.sinkhorn_floor}; it must lie in (0, 1)")
        return wrong


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig(Config):
    """A table, the Kronecker code of each token's bytes (arXiv 2605.29459), or the sum of both.

    A table may be `normed` (RMSNorm after the look-up) and `tied`: then it unembeds too.
    """

    kind: Literal["table", "kronecker", "kronecker+table"] = "table"
    token_bytes: int = 32
    normed: bool = False
    tied: bool = False

    def problems(self) -> list[str]:
        wrong = below(self, 1, "token_bytes")
        wrong += [f"{name} belongs to kind 'table'; kind is {self.kind!r}" for name in ("normed", "tied")
                  if getattr(self, name) and self.kind != "table"]
        return wrong


@dataclasses.dataclass(frozen=True)
class StackConfig(Config):
    """How a layer's update enters the stream.

    residual: x + gain Delta(x). lambda: first x <- a x + b x0, and the output of layer i is added before layer j for
    every (i, j) of `skips`; j one past the last layer is behind it, before the final norm. midpoint: p_{l+1} = mixing
    p_{l-1} + (1 - mixing) p_l + 2 step Delta_l(p_l), reversible at mixing 1.
    """

    kind: Literal["residual", "lambda", "midpoint"] = "residual"
    initial_residual: float = 1.1
    skips: tuple[tuple[int, ...], ...] = ()
    mixing: float = 0.5
    step: float = 0.25

    def problems(self) -> list[str]:
        wrong = []
        for pair in self.skips:
            if len(pair) != 2 or not 0 <= pair[0] < pair[1]:
                wrong.append(f"skips has {list(pair)}; it must be [from, to] with 0 <= from < to")
        if self.skips and self.kind != "lambda":
            wrong.append(f"skips belong to the lambda stack; kind is {self.kind!r}")
        if not 0 <= self.mixing <= 1:
            wrong.append(f"mixing is {self.mixing}; it must lie in [0, 1]")
        if self.step <= 0:
            wrong.append(f"step is {self.step}; it must be positive")
        return wrong


@dataclasses.dataclass(frozen=True)
class MTPConfig(Config):
    """Multi-token prediction: one more G layer predicts the token after the next; `weight` weighs its loss."""

    weight: float = 0.3

    def problems(self) -> list[str]:
        return below(self, 0, "weight")


@dataclasses.dataclass(frozen=True)
class MemoryConfig(Config):
    """Memory stream: the last token's hyper-connection stream `stream` of a chunk enters the next chunk of a document.

    Rows are cut in chunks of `chunk` tokens. The strength of the entry starts at softplus(`initial_strength`).
    """

    chunk: int = 2048
    stream: int = 3
    initial_strength: float = -2.5

    def problems(self) -> list[str]:
        return below(self, 1, "chunk") + below(self, 0, "stream")


@dataclasses.dataclass(frozen=True)
class ExitConfig(Config):
    """Depth-wise ACT: a token leaves the stack where its halting sum reaches `threshold`; `ponder` weighs N + R."""

    threshold: float = 0.99
    ponder: float = 0.001

    def problems(self) -> list[str]:
        wrong = below(self, 0, "ponder")
        if not 0 < self.threshold < 1:
            wrong.append(f"threshold is {self.threshold}; it must lie in (0, 1)")
        return wrong


MIXERS = {"D": "deltanet", "G": "gsa", "S": "sliding", "A": "attention", "B": "resolvent"}
"""The field of `ModelConfig` that layers of each type need."""


@dataclasses.dataclass(frozen=True)
class ModelConfig(Config):
    """A whole language model. `adaptive=None` is the plain feed-forward form of the same weights.

    With `gated_copies` every layer runs once, at a weight of each token's own.
    With `moe` the SwiGLU of width `mlp_width` is the shared expert. A config of a layer type may be None where the
    layout does without it; None elsewhere turns the component off. `remat` says what the backward pass computes again:
    nothing, each adaptive pass, each layer, each block, or each block but for what the kernels keep.

    >>> import gt_jax
    >>> config = gt_jax.preset("tiny").replace(layout="DDDG*5")
    >>> gt_jax.ModelConfig.from_json(config.to_json()) == config, len(config.depth)
    (True, 20)
    """

    layout: str
    width: int
    vocab: int
    mlp_width: int
    deltanet: DeltaNetConfig | None = None
    gsa: GSAConfig | None = None
    sliding: SlidingConfig | None = None
    attention: AttentionConfig | None = None
    resolvent: ResolventConfig | None = None
    moe: MoEConfig | None = None
    hyper: HyperConfig | None = None
    embedding: EmbeddingConfig = EmbeddingConfig()
    stack: StackConfig = StackConfig()
    adaptive: AdaptiveConfig | None = None
    gated_copies: GatedCopiesConfig | None = None
    exit: ExitConfig | None = None
    mtp: MTPConfig | None = None
    memory: MemoryConfig | None = None
    norm_epsilon: float = 1e-6
    init_std: float = 0.02
    param_dtype: DType = "float32"
    compute_dtype: DType = "float32"
    remat: Remat = "pass"

    def problems(self) -> list[str]:
        wrong = below(self, 1, "width", "vocab", "mlp_width")
        try:
            types = layouts.parse(self.layout).types
        except Refused as error:
            return [*wrong, str(error)]
        for kind, name in MIXERS.items():
            if kind in types and getattr(self, name) is None:
                wrong.append(f"layout {self.layout} has {kind} layers; {name} must be given")
        if "B" in types and self.resolvent is not None and self.width % self.resolvent.heads:
            wrong.append(f"layout {self.layout} has B layers, and resolvent.heads is {self.resolvent.heads}; width "
                         f"{self.width} must be a multiple of it")
        for segment in layouts.parse(self.layout).segments:
            if "S" in segment.pattern.split("D")[0]:
                wrong.append(f"pattern {segment.pattern}: an S layer reads the D layer before it in its pattern")
        if "S" in types and self.deltanet is not None and self.deltanet.variant != "groundthink":
            wrong.append(f"layout {self.layout} has S layers, which read a state of deltanet.variant 'groundthink'; "
                         f"it is {self.deltanet.variant!r}")
        return wrong + self._clashes(types)

    def _clashes(self, types: str) -> list[str]:
        """Components that exclude each other or lack what they stand on."""
        wrong = []
        one_pass = {"exit": self.exit is not None, "stack 'midpoint'": self.stack.kind == "midpoint",
                    "sliding": "S" in types}
        wrong += [f"adaptive depth and {name} exclude each other" for name, on in one_pass.items()
                  if on and self.adaptive is not None]
        if self.gated_copies is not None:
            beside = {"adaptive depth": self.adaptive is not None, "exit": self.exit is not None,
                      f"stack {self.stack.kind!r}": self.stack.kind != "residual", "S layers": "S" in types}
            wrong += [f"gated_copies and {name} exclude each other" for name, on in beside.items() if on]
            if (given := len(self.gated_copies.copies)) != len(types):
                wrong.append(f"gated_copies.copies has {given} entries; the layout has {len(types)} layers")
        if self.exit is not None and self.stack.kind != "residual":
            wrong.append(f"exit needs stack 'residual'; it is {self.stack.kind!r}")
        if self.stack.kind == "midpoint" and "S" in types:
            wrong.append("stack 'midpoint' and S layers exclude each other: an S layer reads beside the stream")
        if self.exit is not None and "S" in types:
            wrong.append("exit and S layers exclude each other: an S layer reads a state its D layer may have skipped")
        if self.mtp is not None and self.gsa is None:
            wrong.append("mtp adds a G layer; gsa must be given")
        streams = 1 if self.hyper is None else self.hyper.streams
        if self.memory is not None and self.memory.stream >= streams:
            wrong.append(f"memory.stream is {self.memory.stream}; there are {streams} streams")
        wrong += [f"stack.skips has {list(pair)}; the layout has {len(types)} layers"
                  for pair in self.stack.skips if pair[1] > len(types)]
        return wrong

    def has_post_norm(self, kind: str) -> bool:
        """Whether layers of this type norm what mixer and MLP give, and not what they take."""
        return kind == "A" and self.attention is not None and self.attention.post_norm

    @property
    def depth(self) -> layouts.Layout:
        """The parsed layout."""
        return layouts.parse(self.layout)

    @property
    def plain(self) -> ModelConfig:
        """The same model with every layer run once: same weight names less the halting heads.

        Where passes were computed again in the backward pass, layers are: each of them is one pass.
        """
        return self.replace(adaptive=None, gated_copies=None, remat="layer" if self.remat == "pass" else self.remat)

    @property
    def without_unused_mixers(self) -> ModelConfig:
        """The same model, fields of mixers that no layer has at None; multi-token prediction has a G layer."""
        types = {*self.depth.types, *("G" if self.mtp is not None else "")}
        return self.replace(**{name: None for kind, name in MIXERS.items() if kind not in types})

    @property
    def halting(self) -> AdaptiveConfig | None:
        """What the layers' halting heads are like; None where they have none."""
        return self.adaptive if self.gated_copies is None else self.gated_copies.gate

    @property
    def twice_differentiable(self) -> ModelConfig:
        """The same model on implementations whose backward passes can be differentiated too: no tiles, no kernels."""
        changes: dict[str, Any] = {}
        if self.gsa is not None and self.gsa.implementation != "reference":
            changes["gsa"] = self.gsa.replace(implementation="reference")
        if self.deltanet is not None and self.deltanet.implementation != "xla":
            changes["deltanet"] = self.deltanet.replace(implementation="xla")
        if self.attention is not None and self.attention.implementation != "reference":
            changes["attention"] = self.attention.replace(implementation="reference")
        if self.hyper is not None and self.hyper.implementation != "xla":
            changes["hyper"] = self.hyper.replace(implementation="xla")
        return self.replace(**changes) if changes else self
