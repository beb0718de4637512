"""Memory stream: what the last token of a chunk knew enters one stream of the next chunk of the same document.

Before the first layer, X_s <- X_s + softplus(r) sigmoid(w.x + b) LayerNorm(memory) at every token, where x is the
token's embedding and r, one number, starts low. The memory carries no gradient from one chunk into the last.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gt_jax.devices.sharding import Rules, on_mesh, reshard
from gt_jax.models.layers.primitives import INIT, float32_einsum, widen
from gt_jax.typing import Activations, PerToken, State, Tokens

EPSILON = 1e-5


class Memory(NamedTuple):
    """The state that is carried and the segment id of its document; segment 0 is no memory."""

    value: Float[Array, "b d"]
    segment: Int[Array, " b"]


def no_memory(batch: int, width: int, dtype: str) -> Memory:
    """What the first chunk starts from."""
    return Memory(jnp.zeros((batch, width), dtype), jnp.zeros((batch,), jnp.int32))


def carry_memory(x: State, segment_ids: Tokens, stream: int) -> Memory:
    """The memory a chunk leaves: the last token's stream of the state after the last layer, without gradient."""
    last = x[:, -1] if x.ndim == 3 else x[:, -1, stream]
    return Memory(jax.lax.stop_gradient(last), segment_ids[:, -1])


class MemoryStream(nn.Module):
    """x with the memory in stream `stream`, at the tokens of the memory's own document; float32 inside.

    A state without streams, [b, t, d], is its own and only stream.
    """

    width: int
    initial_strength: float
    rules: Rules

    @nn.compact
    def __call__(
        self, x: State, embedded: Activations, segment_ids: Tokens, memory: Memory | None, stream: int
    ) -> State:
        memory = no_memory(x.shape[0], self.width, x.dtype.name) if memory is None else memory
        start = nn.initializers.constant(self.initial_strength)
        strength = self.param("strength", start, (), jnp.float32, on_mesh(self.rules.spec()))
        gate = Gate(self.width, self.rules, name="gate")(embedded)
        normed = LayerNorm(self.width, self.rules, name="norm")(self._placed(memory.value))
        segment = self._placed(memory.segment)[:, None]
        same = (segment_ids == segment) & (segment > 0)
        weight = jnp.where(same, jax.nn.softplus(strength) * gate, 0.0)
        entry = (weight[..., None] * normed[:, None]).astype(x.dtype)
        if x.ndim == 3:
            return x + entry
        streams = ((0, 0), (0, 0), (stream, x.shape[2] - 1 - stream), (0, 0))
        return x + jnp.pad(entry[:, :, None], streams)

    def _placed(self, carried: Array) -> Array:
        """On the rows' devices, without gradient."""
        spec = self.rules.spec("batch", *(None,) * (carried.ndim - 1))
        return jax.lax.stop_gradient(reshard(carried, spec))


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-5) * scale + bias, float32 (arXiv 1607.06450)."""

    width: int
    rules: Rules

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b d"]:
        whole = on_mesh(self.rules.spec(None))
        scale = self.param("scale", nn.initializers.ones, (self.width,), jnp.float32, whole)
        bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32, whole)
        wide = widen(x)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + EPSILON) * scale[None] + bias[None]


class Gate(nn.Module):
    """sigmoid(w.x + b), one number a token, float32."""

    width: int
    rules: Rules

    @nn.compact
    def __call__(self, x: Activations) -> PerToken:
        w = self.param("w", INIT, (self.width,), jnp.float32, on_mesh(self.rules.spec(None)))
        b = self.param("b", nn.initializers.zeros, (), jnp.float32, on_mesh(self.rules.spec()))
        rows = on_mesh(self.rules.spec("batch", None))
        return jax.nn.sigmoid(float32_einsum("btd,d->bt", x, w, out_sharding=rows) + b)
