"""Small parts every layer is made of: weights, RMSNorm, short convolution, rotary embedding, SwiGLU.

Pure functions first, a thin Linen module after. No `nn.Dense`: shape, sharding and initializer stand in sight.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from gt_jax.configs.model import Rope
from gt_jax.devices.sharding import Rules, gather_weight, on_mesh, reshard
from gt_jax.typing import Activations
from pallas_kernels.platform import target_device

Initializer = jax.nn.initializers.Initializer
INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """How matrices are stored, in which dtype their products run, and the deviation they are drawn with."""

    param: str = "float32"
    compute: str = "float32"
    std: float = 0.02

    @property
    def init(self) -> Initializer:
        """Normal with deviation `std`."""
        return nn.initializers.normal(self.std)


def widen(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """At least float32: what states, gates, norms and softmax are computed in (float64 stays, for the tests)."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def float32_einsum(equation: str, *operands: Array, out_sharding: P | None = None) -> Array:
    """einsum(equation, operands) whose factors and sums are float32 at least, on every kind of device.

    HIGHEST: by default a TPU rounds the factors of a float32 product to bfloat16, a GPU to TensorFloat-32. Every gate,
    router, halting head and coefficient of the model is computed by this.
    """
    wide = [widen(operand) for operand in operands]
    sums = jnp.result_type(*wide)
    return jnp.einsum(
        equation, *wide, out_sharding=out_sharding, precision=jax.lax.Precision.HIGHEST, preferred_element_type=sums
    )


@jax.custom_vjp
def scaled(x: Float[Array, "..."], strength: Float[Array, "..."]) -> Float[Array, "..."]:
    """strength x in float32, rounded once to x's dtype; `strength` is a scalar, or of x's rank with axes of 1.

    So is the gradient of the strength, a sum over as many elements as x has: in bfloat16 half of it is gone at 12
    million. Of x its own dtype is kept for the backward pass and no float32 copy.
    """
    return (widen(strength) * widen(x)).astype(x.dtype)


def _scaled_forward(x: Array, strength: Array) -> tuple[Array, tuple[Array, Array]]:
    return scaled(x, strength), (x, strength)


def _scaled_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, strength = saved
    wide = widen(gradient)
    summed = tuple(axis for axis in range(x.ndim) if strength.ndim == 0 or strength.shape[axis] == 1)
    total = jnp.sum(wide * widen(x), axis=summed, keepdims=strength.ndim > 0)
    return (widen(strength) * wide).astype(x.dtype), total.astype(strength.dtype)


scaled.defvjp(_scaled_forward, _scaled_backward)


@jax.custom_vjp
def add_scaled(
    x: Float[Array, "..."], delta: Float[Array, "..."], strength: Float[Array, "..."]
) -> Float[Array, "..."]:
    """x + strength delta in float32, rounded once to x's dtype; gradients as `scaled` has them.

    Rounded before it is added, strength delta would fall back on delta wherever the strength is within 2^-9 of 1.
    """
    return (widen(x) + widen(strength) * widen(delta)).astype(x.dtype)


def _add_scaled_forward(x: Array, delta: Array, strength: Array) -> tuple[Array, tuple[Array, Array]]:
    return add_scaled(x, delta, strength), (delta, strength)


def _add_scaled_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    return gradient, *_scaled_backward(saved, gradient)


add_scaled.defvjp(_add_scaled_forward, _add_scaled_backward)


def rms_norm(x: Float[Array, "... d"], scale: Float[Array, " d"], epsilon: float) -> Float[Array, "... d"]:
    """x / sqrt(mean(x^2) + epsilon) * scale, computed in float32, returned in x's dtype (arXiv 1910.07467)."""
    wide = widen(x)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * widen(scale).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def short_convolution(
    x: Float[Array, "b t *c"],
    weight: Float[Array, " w *c"],
    segment_ids: Int[Array, "b t"],
    window: Float[Array, "b r *c"],
    window_segments: Int[Array, "b r"],
    bias: Float[Array, "*c"] | None = None,
) -> Float[Array, "b t *c"]:
    """Causal depthwise convolution y_t = sum_j w_j x_{t-(W-1)+j} + bias, j = 0 … W-1, in float32.

    `window` holds the r = W-1 inputs before the row with their segment ids; an input of another segment counts as 0.
    """
    return _convolved(x, window.astype(x.dtype), weight, bias, window_segments, segment_ids)


@jax.custom_vjp
def _convolved(
    x: Float[Array, "b t *c"], window: Float[Array, "b r *c"], weight: Float[Array, " w *c"],
    bias: Float[Array, "*c"] | None, window_segments: Int[Array, "b r"], segment_ids: Int[Array, "b t"],
) -> Float[Array, "b t *c"]:
    """`short_convolution`; its own derivative, since JAX's writes a gradient a tap, in float32."""
    total = _by_taps(*_in_a_row(window, x, window_segments, segment_ids), segment_ids, weight)
    return (total if bias is None else total + widen(bias)[None, None]).astype(x.dtype)


def _in_a_row(window: Array, x: Array, window_segments: Array, segment_ids: Array) -> tuple[Array, Array]:
    return jnp.concatenate([window, x], axis=1), jnp.concatenate([window_segments, segment_ids], axis=1)


def _by_taps(inputs: Array, of: Array, to: Array, weight: Array) -> Array:
    """sum_j w_j inputs_{t+j} in float32, inputs of another segment than `to` left out."""
    taps = enumerate(weight)
    return functools.reduce(jnp.add, (_of_tap(inputs, of, to, tap) * widen(w)[None, None] for tap, w in taps))


def _of_tap(inputs: Array, of: Array, to: Array, tap: int) -> Array:
    here = slice(tap, tap + to.shape[1])
    same = (of[:, here] == to).reshape(*to.shape, *(1,) * (inputs.ndim - 2))
    return jnp.where(same, widen(inputs[:, here]), 0.0)


def _convolved_forward(*inputs: Any) -> tuple[Array, Any]:
    return _convolved(*inputs), inputs


def _convolved_backward(kept: Any, gradient: Array) -> tuple[Array, Array, Array, Array | None, None, None]:
    """An input gets what a convolution with the taps in reverse makes of the gradients after it."""
    x, window, weight, bias, window_segments, segment_ids = kept
    before = weight.shape[0] - 1

    def pulled(gradient: Array, of: Array, to: Array, front: int) -> Array:
        ends = [(0, 0), (front, before)]
        later = jnp.pad(gradient, ends + [(0, 0)] * (x.ndim - 2))
        return _by_taps(later, jnp.pad(of, ends, constant_values=-2), to, weight[::-1]).astype(x.dtype)

    of_x = pulled(gradient, segment_ids, segment_ids, 0)
    of_window = pulled(gradient[:, :before], segment_ids[:, :before], window_segments, before)
    inputs, of = _in_a_row(window, x, window_segments, segment_ids)
    wide = widen(gradient)
    of_weight = [jnp.sum(_of_tap(inputs, of, segment_ids, tap) * wide, axis=(0, 1)) for tap in range(before + 1)]
    of_bias = None if bias is None else jnp.sum(wide, axis=(0, 1)).astype(bias.dtype)
    return of_x, of_window, jnp.stack(of_weight).astype(weight.dtype), of_bias, None, None


_convolved.defvjp(_convolved_forward, _convolved_backward)


def rotary_frequencies(width: int, base: float, table: Rope, dtype: jnp.dtype) -> Float[Array, " half"]:
    """Radians a position of each of the width/2 pairs: base^(-2i/width) ("standard", arXiv 2104.09864).

    "origin": base^(-2 ((2i) mod (width/2)) / width), every second one of the standard table, each used twice.
    """
    half = width // 2
    index = jnp.arange(half, dtype=dtype)
    if table == "origin":
        index = (2 * index) % half
    return base ** (-index / half)


def rope(
    x: Float[Array, "b t h k"], positions: Int[Array, "b t"], base: float, table: Rope = "standard",
    turned: int | None = None,
) -> Float[Array, "b t h k"]:
    """Rotary embedding, pair i turned by positions * `rotary_frequencies`[i], in float32; "none" returns x.

    A pair is (x_i, x_{i+k/2}) in the standard table and (x_{2i}, x_{2i+1}) in the origin one. With `turned` only that
    many channels of each head, the first, are turned, as if they were all.
    """
    width = x.shape[-1] if turned is None else turned
    if table == "none" or width == 0:
        return x
    frequency = rotary_frequencies(width, base, table, widen(x).dtype)
    if target_device()[0] == "tpu":
        return _turn_lanes(x, positions, frequency, table)
    angle = positions.astype(frequency.dtype)[..., None, None] * frequency[None, None, None]
    turn = _turn_adjacent if table == "origin" else _turn_halves
    done = turn(widen(x[..., :width]), jnp.cos(angle), jnp.sin(angle)).astype(x.dtype)
    return done if width == x.shape[-1] else jnp.concatenate([done, x[..., width:]], axis=-1)


def _turn_halves(x: Float[Array, "b t h k"], cos: Array, sin: Array) -> Float[Array, "b t h k"]:
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def _turn_adjacent(x: Float[Array, "b t h k"], cos: Array, sin: Array) -> Float[Array, "b t h k"]:
    # one pass over x: taking the pairs apart and weaving them together again was 10 % of a tiny_3b step on a CPU
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    signed = jnp.stack([-sin, sin], axis=-1)
    return (pairs * cos[..., None] + jnp.flip(pairs, axis=-1) * signed).reshape(x.shape)


def _turn_lanes(
    x: Float[Array, "b t h k"], positions: Int[Array, "b t"], frequency: Float[Array, " half"], table: Rope
) -> Float[Array, "b t h k"]:
    """`rope` for a TPU, where an axis of two would fill a sixty-fourth of the lanes, and lanes that are taken from
    elsewhere are written out in float32 and read again.

    So the other of each pair, with its sign, comes from a product with a matrix of 0, 1 and -1, which is exact. What is
    not turned has the frequency 0.
    """
    channels, width = x.shape[-1], 2 * frequency.size
    place = np.arange(width)
    partner = place ^ 1 if table == "origin" else (place + width // 2) % width
    signs = np.zeros((channels, channels), np.int8)
    signs[partner, place] = np.where(partner > place, -1, 1)
    each = jnp.repeat(frequency, 2) if table == "origin" else jnp.tile(frequency, 2)
    each = jnp.pad(each, (0, channels - width))
    angle = positions.astype(each.dtype)[..., None, None] * each[None, None, None]
    precision = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    other = jnp.einsum("bthk,kl->bthl", x, jnp.asarray(signs, x.dtype), precision=precision)
    return (widen(x) * jnp.cos(angle) + widen(other) * jnp.sin(angle)).astype(x.dtype)


class Einsum(nn.Module):
    """A weight of `shape` with one logical axis name each, applied by an einsum whose output sharding is stated.

    With `bias_from` i a bias of shape[i:], 0 at init, is added: i is how many axes of the weight are the input's.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    rules: Rules
    weights: WeightSpec
    bias_from: int | None = None

    def setup(self) -> None:
        dtype, first = jnp.dtype(self.weights.param), self.bias_from
        self.w = self.param("w", self.weights.init, self.shape, dtype, on_mesh(self.rules.spec(*self.axes)))
        if first is not None:
            spec = on_mesh(self.rules.spec(*self.axes[first:]))
            self.b = self.param("b", nn.initializers.zeros, self.shape[first:], dtype, spec)

    def stored(self) -> Array:
        """The weight."""
        return self.w

    def __call__(
        self, equation: str, x: Array, out: tuple[str | None, ...], accumulate: bool = False, exact: bool = False
    ) -> Array:
        """einsum(equation, x, w) with the logical axes `out`; `accumulate` keeps the sums in float32 at least.

        `exact` rounds no factor, whatever a device does to those of float32 products by default.
        """
        dtype = jnp.dtype(self.weights.compute)
        weight = gather_weight(self.stored().astype(dtype), x, self.rules, *self.axes)
        sums = jnp.promote_types(dtype, jnp.float32) if accumulate else None
        place = on_mesh(self.rules.spec(*out))
        precision = jax.lax.Precision.HIGHEST if exact else None
        y = jnp.einsum(
            equation, x.astype(dtype), weight, out_sharding=place, precision=precision, preferred_element_type=sums
        )
        if self.bias_from is None:
            return y
        before = len(out) - self.b.ndim
        bias = reshard(self.b.astype(y.dtype), self.rules.spec(*out[before:]))
        return y + jnp.expand_dims(bias, tuple(range(before)))


class RMSNorm(nn.Module):
    """`rms_norm` with a learned float32 scale, 1 at init."""

    width: int
    rules: Rules
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.param("scale", nn.initializers.ones, (self.width,), jnp.float32, on_mesh(self.rules.spec(None)))
        return rms_norm(x, scale, self.epsilon)


class SwiGLU(nn.Module):
    """y = W_down( SiLU(W_gate x) * W_up x ) (arXiv 2002.05202)."""

    width: int
    hidden: int
    rules: Rules
    weights: WeightSpec

    def setup(self) -> None:
        inward = ((self.width, self.hidden), ("embed", "mlp"), self.rules, self.weights)
        self.gate = Einsum(*inward)
        self.up = Einsum(*inward)
        self.down = Einsum((self.hidden, self.width), ("mlp", "embed"), self.rules, self.weights)

    def __call__(self, x: Activations) -> Activations:
        inner = ("batch", None, "mlp")
        hidden = jax.nn.silu(self.gate("btd,df->btf", x, inner)) * self.up("btd,df->btf", x, inner)
        return self.down("btf,fd->btd", hidden, ("batch", None, None))
