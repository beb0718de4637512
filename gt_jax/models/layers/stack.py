"""How a layer's update enters the stream when it is not simply added: the lambda stack and the midpoint stack.

Lambda stack (modded-nanogpt), for layer l with x0 the embedding and skips (i, j) of weight w:

    x <- x + sum_{(i, j): j = l} w_ij out_i,    x <- a_l x + b_l x0,    out_l = x = layer_l(x)

A skip to the number of layers is added behind the last of them, to what the final norm reads.

Midpoint stack (leapfrog, arXiv 2512.02056), with mixing a and step h:

    p_1 = p_0 + h/2 Delta_0(p_0),    p_{l+1} = a p_{l-1} + (1 - a) p_l + 2 h Delta_l(p_l)

- Pure functions of a stream X of any shape, [b,t,d] or [b,t,n,d]. Sums run in float32 at least and are rounded to X's
  dtype once: in bfloat16 the scale 1.1 itself would be off by 0.1 % a layer.
- Layers are scanned, so `layer` may be a traced int. What a skip needs later rides in a buffer that is a scan carry.
- At mixing 1 the midpoint stack can be run backwards: gt_jax.models.layers.reversible.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gt_jax.models.layers.primitives import widen

Skips: TypeAlias = tuple[tuple[int, ...], ...]
"""Pairs (from, to) of layer indices, static."""
SkipBuffer: TypeAlias = dict[int, Array]
"""The output of each layer that a skip starts from, by its index; zeros until that layer has run."""
Number: TypeAlias = Float[Array, ""] | np.floating[Any] | float
LayerIndex: TypeAlias = Int[Array, ""] | int


def mix(
    x: Float[Array, "*x"], x0: Float[Array, "*x"], residual_scale: Number, x0_scale: Number
) -> Float[Array, "*x"]:
    """a x + b x0: what a layer of the lambda stack reads, after `enter`."""
    return (residual_scale * widen(x) + x0_scale * widen(x0)).astype(x.dtype)


def empty_buffer(x: Float[Array, "*x"], skips: Skips) -> SkipBuffer:
    """The buffer before the first layer: one X for each layer that a skip starts from, nothing without skips."""
    return {source: jnp.zeros_like(x) for source in sorted({pair[0] for pair in skips})}


def enter(
    x: Float[Array, "*x"], buffer: SkipBuffer, weights: Float[Array, " s"] | None, layer: LayerIndex, skips: Skips
) -> Float[Array, "*x"]:
    """x + sum of weights[i] buffer[source of skip i] over the skips that end at `layer`, before `mix`.

    `weights` are None where there are no skips.
    """
    if weights is None:
        return x
    for index, (source, target) in enumerate(skips):
        added = (widen(x) + weights[index] * widen(buffer[source])).astype(x.dtype)
        x = jnp.where(layer == target, added, x)
    return x


def record(x: Float[Array, "*x"], buffer: SkipBuffer, layer: LayerIndex, skips: Skips) -> SkipBuffer:
    """The buffer after `layer`, whose output is x."""
    sources = {pair[0] for pair in skips}
    return {source: jnp.where(layer == source, x, kept) if source in sources else kept
            for source, kept in buffer.items()}  # fmt: skip


def contributions(
    residual_scales: Float[Array | np.ndarray, " l"],
    weights: Float[Array | np.ndarray, " s"] | None = None,
    skips: Skips = (),
) -> Float[Array | np.ndarray, " l"]:
    """The factor with which each layer's update reaches the output on the direct path: prod_{j>l} a_j.

    With skips also along them: c_l = a_{l+1} c_{l+1} + sum_{(l, j)} w a_j c_j, where for the end of the stack, j = l's
    number, a_j c_j is 1. numpy in, numpy out.
    """
    xp: ModuleType = np if isinstance(residual_scales, np.ndarray) else jnp
    depth = len(residual_scales)
    shares: list[Any] = [xp.ones_like(residual_scales[0])] * depth
    for layer in reversed(range(depth)):
        if layer + 1 < depth:
            shares[layer] = residual_scales[layer + 1] * shares[layer + 1]
        for index, (source, target) in enumerate(skips):
            if source == layer and weights is not None:
                reach = 1.0 if target == depth else residual_scales[target] * shares[target]
                shares[layer] = shares[layer] + weights[index] * reach
    return xp.stack(shares)


class Coefficients(NamedTuple):
    """Of p_{l-1}, p_l and Delta_l in p_{l+1}: float32, [l] for a stack (to be scanned), [] for a layer."""

    previous: Any
    current: Any
    delta: Any


def coefficients(depth: int, mixing: float, step: float) -> Coefficients:
    """The midpoint stack's: (0, 1, step/2) for layer 0, (mixing, 1 - mixing, 2 step) for the others; numpy [l]."""
    first = np.arange(depth) == 0
    columns = ((0.0, mixing), (1.0, 1.0 - mixing), (0.5 * step, 2.0 * step))
    return Coefficients(*(np.where(first, start, later).astype(np.float32) for start, later in columns))


def advance(
    previous: Float[Array, "*x"], current: Float[Array, "*x"], delta: Float[Array, "*x"], layer: Sequence[Number]
) -> Float[Array, "*x"]:
    """p_{l+1} from p_{l-1}, p_l, Delta_l(p_l) and the layer's `Coefficients`, in p_l's dtype."""
    before, here, move = layer
    return (before * widen(previous) + here * widen(current) + move * widen(delta)).astype(current.dtype)
