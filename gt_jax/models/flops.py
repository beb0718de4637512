"""How many floating point operations a token costs, counted from the config, and what share of a chip's peak that is.

- Model FLOPs, as PaLM (arXiv 2204.02311, appendix B) counts them: a multiply and an add are two, the products of the
  forward pass count once and those of the backward pass twice. What is computed again to save memory, the attention to
  keys that a mask removes, norms and other elementwise work are not counted.
- With adaptive depth, or where tokens leave the stack early, a layer counts as often as a token runs it, a mean over
  tokens (`passes_run`). That a pass is computed for the whole batch while one token is alive (`passes_computed`) is the
  machine's waste and not the model's work: a chip that is busy with finished tokens is not well used. The second
  unembedding, by which the price hears what the later passes gain, is not counted either.
- A row is one document: packed rows attend to less. Of an expert's picks the share is counted that the null loss aims
  at.
- Tokens a second are positions of rows: the padding behind the instances of a task, and in rows of JSON lines, is among
  them, so that utilisation is an upper bound there. Text is packed without.
- Utilisation is against the chip's bfloat16 peak, whatever the compute dtype, and against all devices of the mesh.

    MFU = tokens a second * 3 * forward FLOPs a token / (devices * peak of a device)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from gt_jax.configs.model import AdaptiveConfig, HyperConfig, ModelConfig
from gt_jax.devices.sharding import has_mesh
from gt_jax.models.layers.adaptive_depth import FEATURES

FORWARD_AND_BACKWARD = 3.0
Passes = Sequence[float] | Float[np.ndarray, "l"]

# FLOPs a second of one jax device in bfloat16, dense, by the beginning of its device_kind. The numbers are the
# vendors'. A TPU7x chip is two devices, a v4 or v5p chip of two cores is one.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


class ModelFlops(NamedTuple):
    """Of the forward pass, a token: `outside` the stack once, and one pass of each of the `layers`."""

    outside: float
    layers: tuple[float, ...]

    def forward(self, passes: Passes | None = None) -> float:
        """outside + sum over layers of passes times their FLOPs; None is one pass each."""
        times = [1.0] * len(self.layers) if passes is None else passes
        return self.outside + sum(float(n) * flops for n, flops in zip(times, self.layers, strict=True))

    def training(self, passes: Passes | None = None) -> float:
        """Forward and backward."""
        return FORWARD_AND_BACKWARD * self.forward(passes)


def model_flops(config: ModelConfig, tokens: int) -> ModelFlops:
    """The FLOPs a token of rows of `tokens` tokens, in chunks of the memory stream where the model has one."""
    c = config
    length = tokens if c.memory is None else min(tokens, c.memory.chunk)
    head = 2.0 * c.width * c.vocab
    outside = head
    if c.mtp is not None:
        outside += 2.0 * 2 * c.width * c.width + _layer("G", c.plain.replace(exit=None), length) + head
    return ModelFlops(outside, tuple(_layer(kind, c, length) for kind in c.depth.types))


def _layer(kind: str, c: ModelConfig, length: int) -> float:
    """One pass of one layer."""
    mixers: dict[str, Callable[[ModelConfig, int], float]] = {
        "D": _delta_rule, "G": _sparse, "S": _sliding, "A": _full, "B": _resolvent}  # fmt: skip
    total = mixers[kind](c, length) + _mlp(c)
    total += 0.0 if c.hyper is None else 2 * _streams(c.hyper, c.width)
    total += 0.0 if c.halting is None else _halting(c.halting, c.width)
    if c.halting is not None and c.halting.features == "stream_mean":
        total += 2.0 * c.width * _seen_columns(kind, c)
    return total + (0.0 if c.exit is None else 2.0 * c.width * (c.width // 2))


def _delta_rule(c: ModelConfig, length: int) -> float:
    """Projections, convolutions and the recurrence: S^T k, the outer product and S^T q, token by token."""
    m = c.deltanet
    assert m is not None
    keys, values = m.heads * m.key_width, m.value_heads * m.value_width
    recurrence = 6.0 * m.value_heads * m.key_width * m.value_width
    gates, output = 2.0 * c.width * 2 * m.value_heads, 2.0 * values * c.width
    if m.variant == "groundthink":
        return 2.0 * c.width * (keys + values) + gates + output + recurrence
    convolutions = 2.0 * m.conv_width * (2 * keys + values)
    skip = 2.0 * keys if m.skip else 0.0
    return 2.0 * c.width * (2 * keys + 2 * values) + gates + output + recurrence + convolutions + skip


def _sparse(c: ModelConfig, length: int) -> float:
    """Projections, the indexer's scores of every earlier key, attention to the keys that it picks."""
    m = c.gsa
    assert m is not None
    inner = m.heads * m.head_width
    projections = 2.0 * c.width * (6 * inner + 2 * m.indexer_heads * m.indexer_width + m.indexer_heads)
    scores = 2.0 * m.indexer_heads * m.indexer_width * _mean_keys(length, length)
    return projections + scores + 4.0 * inner * _mean_keys(length, min(max(m.k_base, m.k_min), m.k_max))


def _sliding(c: ModelConfig, length: int) -> float:
    """Attention over the window, and the read of the D layer's state, whose recurrence runs once more for it."""
    m, d = c.sliding, c.deltanet
    assert m is not None and d is not None
    inner, values = m.heads * m.head_width, d.value_heads * d.value_width
    attention = 2.0 * c.width * 4 * inner + 4.0 * inner * _mean_keys(length, m.window)
    projections = 2.0 * c.width * (d.heads * d.key_width + d.value_heads + values)
    return attention + projections + 6.0 * d.value_heads * d.key_width * d.value_width


def _full(c: ModelConfig, length: int) -> float:
    """Projections, and attention to every earlier key or those of the window."""
    m = c.attention
    assert m is not None
    inner, keys = m.heads * m.head_width, m.kv_heads * m.head_width
    projections = 2.0 * c.width * ((3 if m.gate else 2) * inner + 2 * keys)
    return projections + 4.0 * inner * _mean_keys(length, length if m.window is None else m.window)


def _resolvent(c: ModelConfig, length: int) -> float:
    """The potential, a step of the recurrence a head (two products, the inverse of a complex number), the output."""
    m = c.resolvent
    assert m is not None
    return 2.0 * c.width * 3 * m.heads + 9.0 * m.heads


def _mean_keys(length: int, most: int) -> float:
    """The mean over positions p = 1 … length of min(p, most)."""
    short = min(length, most)
    return (short * (short + 1) / 2 + (length - short) * most) / length


def _mlp(c: ModelConfig) -> float:
    """A SwiGLU, and with experts the router and the picks that are real."""
    shared = 6.0 * c.width * c.mlp_width
    if c.moe is None:
        return shared
    picks = c.moe.top_k * c.moe.real_share
    shared += 2.0 * c.width if c.moe.shared_gate else 0.0
    return shared + 2.0 * c.width * c.moe.experts + picks * 6.0 * c.width * c.moe.expert_width


def _streams(hyper: HyperConfig, width: int) -> float:
    """The coefficients of one sublayer, its read, and its mixing of the streams."""
    n = hyper.streams
    return 2.0 * n * width * (2 * n + n * n) + 2.0 * n * width + 2.0 * (n * n + n) * width


def _seen_columns(kind: str, c: ModelConfig) -> int:
    """Columns of the projections whose output the halting head sees: query or key, write gate, output gate."""
    if kind == "G":
        assert c.gsa is not None
        return 2 * c.gsa.heads * c.gsa.head_width + c.gsa.indexer_heads
    if kind == "A":
        assert c.attention is not None
        return (2 if c.attention.gate else 1) * c.attention.heads * c.attention.head_width
    if kind == "B":
        assert c.resolvent is not None
        return c.resolvent.heads
    m = c.deltanet
    assert m is not None
    output = 0 if m.variant == "groundthink" else m.value_heads * m.value_width
    return m.heads * m.key_width + m.value_heads + output


def _halting(adaptive: AdaptiveConfig, width: int) -> float:
    inputs = FEATURES + adaptive.embedding + adaptive.state_width
    return 2.0 * (width * adaptive.state_width + inputs * adaptive.hidden + adaptive.hidden)


def peak_flops(device_kind: str) -> float | None:
    """FLOPs a second of a device by its `device_kind`, bfloat16; None where it is not in `PEAKS`."""
    known = [name for name in PEAKS if device_kind.startswith(name)]
    return PEAKS[max(known, key=len)] if known else None


def utilisation(
    config: ModelConfig, tokens: int, device_kinds: Sequence[str] | None = None
) -> Callable[[float, Mapping[str, Any]], float | None] | None:
    """MFU as a function of (tokens a second, the metrics of a step, whose `passes_run` is by layer).

    It is None for metrics without that. `device_kinds` are those of all devices, None takes the current mesh. Returns
    None where the peak of one of them is not known, for example on a CPU.
    """
    peaks = [peak_flops(kind) for kind in (_kinds() if device_kinds is None else device_kinds)]
    known = [peak for peak in peaks if peak is not None]
    if not known or len(known) < len(peaks):
        return None
    flops, whole = model_flops(config, tokens), sum(known)

    def share(tokens_per_second: float, metrics: Mapping[str, Any]) -> float | None:
        passes = metrics.get("passes_run")
        return None if passes is None else tokens_per_second * flops.training(passes) / whole

    return share


def _kinds() -> list[str]:
    """Of the devices of the current mesh, or of the one that is used where none is set."""
    devices = jax.sharding.get_mesh().devices.flat if has_mesh() else jax.devices()[:1]
    return [device.device_kind for device in devices]
