"""`A`: causal attention to all earlier tokens of the document, with fewer heads of keys and values than of queries.

- Queries and keys may be normed, of each head or over all heads, before the rotary embedding.
- The rotary embedding may turn a part of each head alone; the channels after it carry no position.
- With `bias` all projections have one.
- Every token is written at full strength: to the halting head the write gate is 1, without a gate the output gate too.
- The attention itself is `pallas_kernels.causal_attention`, run on each device's own heads.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gt_jax.configs.attention import AttentionConfig
from gt_jax.devices.sharding import Rules, on_mesh, per_device
from gt_jax.models.layers.mixer import MixerOutput, Place, gate_statistics, key_places, write_at
from gt_jax.models.layers.primitives import Einsum, RMSNorm, WeightSpec, rope, widen
from gt_jax.typing import Activations, PerToken, Tree
from pallas_kernels.causal_attention.api import causal_attention
from pallas_kernels.positions import Positions


def empty_cache(config: AttentionConfig, batch: int, length: int, dtype: str) -> Tree:
    """The key/value cache before the first token, room for `length` tokens; segment -1 is never visible."""
    heads = (batch, length, config.kv_heads, config.head_width)
    return {
        "key": jnp.zeros(heads, dtype),
        "value": jnp.zeros(heads, dtype),
        "segments": jnp.full((batch, length), -1, jnp.int32),
    }


class AllHeadsNorm(nn.Module):
    """RMSNorm over all heads of a token together, a float32 scale a channel, 1 at init."""

    heads: int
    head_width: int
    rules: Rules
    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "b t h k"]) -> Float[Array, "b t h k"]:
        spec = on_mesh(self.rules.spec("heads", None))
        shape = (self.heads, self.head_width)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32, spec)
        wide = widen(x)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=(-2, -1), keepdims=True) + self.epsilon)
        return (wide * inverse * widen(scale)[None, None]).astype(x.dtype)


class FullAttention(nn.Module):
    """y = W_o( softmax(q.k / sqrt(head_width)) v * sigmoid(W_go x) ) over the earlier tokens of the document.

    q = rope(norm(W_q x)), k = rope(norm(W_k x)), v = W_v x; query head j reads key head j // (heads / kv_heads).
    Without `gate` the second factor is 1. Softmax and norms are float32.
    """

    config: AttentionConfig
    width: int
    rules: Rules
    weights: WeightSpec
    epsilon: float = 1e-6

    def setup(self) -> None:
        c, d, rules = self.config, self.width, self.rules
        inward, outward = (1, 2) if c.bias else (None, None)
        queries = ((d, c.heads, c.head_width), ("embed", "heads", None), rules, self.weights, inward)
        keys = ((d, c.kv_heads, c.head_width), ("embed", "heads", None), rules, self.weights, inward)
        self.query, self.key, self.value = Einsum(*queries), Einsum(*keys), Einsum(*keys)
        if c.gate:
            self.output_gate = Einsum(*queries)
        if c.qk_norm != "none":
            self.query_norm, self.key_norm = self._norm(c.heads), self._norm(c.kv_heads)
        self.output = Einsum((c.heads, c.head_width, d), ("heads", None, "embed"), rules, self.weights, outward)

    def __call__(self, x: Activations, place: Place, cache: Tree | None = None) -> MixerOutput:
        """Attend within each segment; with a cache, write the new keys at their positions and attend to all of it."""
        c, heads = self.config, ("batch", None, "heads", None)
        query, k = self.query("btd,dhk->bthk", x, heads), self.key("btd,dhk->bthk", x, heads)
        v, q = self.value("btd,dhk->bthk", x, heads), query
        if c.qk_norm != "none":
            q, k = self.query_norm(q), self.key_norm(k)
        turn = (place.positions, c.rope_base, c.rope, c.rope_width)
        q, k = rope(q, *turn), rope(k, *turn)
        new_cache, key_positions, key_segments = None, place.positions, place.segment_ids
        if cache is not None:
            new_cache = write_at(cache, {"key": k, "value": v, "segments": place.segment_ids}, place, self.rules)
            k, v = new_cache["key"], new_cache["value"]
            key_positions, key_segments = key_places(new_cache, self.rules)
        where = Positions(place.positions, place.segment_ids, key_positions, key_segments)
        o = self._attend(q, k, v, where, same_tokens=cache is None)
        gate_logits = self.output_gate("btd,dhk->bthk", x, heads) if c.gate else None
        if gate_logits is not None:
            o = o * jax.nn.sigmoid(widen(gate_logits)).astype(o.dtype)
        y = self.output("bthk,hkd->btd", o, ("batch", None, None))
        zero = jnp.zeros((), jnp.float32)
        return MixerOutput(y, *_statistics(query, gate_logits), zero, zero, zero, new_cache)

    def gates(self, h: Activations) -> tuple[PerToken, PerToken, PerToken]:
        """`gate_statistics` of a write gate of 1, W_go h (1 without a gate) and W_q h."""
        h, heads = jax.lax.stop_gradient(h), ("batch", None, "heads", None)
        logits = self.output_gate("btd,dhk->bthk", h, heads) if self.config.gate else None
        return _statistics(self.query("btd,dhk->bthk", h, heads), logits)

    def _norm(self, heads: int) -> nn.Module:
        c = self.config
        if c.qk_norm == "head":
            return RMSNorm(c.head_width, self.rules, self.epsilon)
        return AllHeadsNorm(heads, c.head_width, self.rules, self.epsilon)

    def _attend(self, q: Array, k: Array, v: Array, positions: Positions, same_tokens: bool) -> Array:
        """The operation on each device's own rows and heads."""
        c = self.config
        tokens, rows = self.rules.spec("batch", None, "heads", None), self.rules.spec("batch", None)

        def local(q: Array, k: Array, v: Array, *place: Array) -> Array:
            return causal_attention(
                q, k, v, Positions(*place), c.window, same_tokens=same_tokens, implementation=c.implementation
            )

        return per_device(local, (tokens, tokens, tokens, *([rows] * 4)), tokens)(q, k, v, *positions)


def _statistics(query: Array, gate_logits: Array | None) -> tuple[PerToken, PerToken, PerToken]:
    """What a halting head sees: a write gate of 1, the mean output gate (1 where there is none), the head spread."""
    logits = jnp.zeros_like(query) if gate_logits is None else gate_logits
    write, output, spread = gate_statistics(jnp.ones_like(query[..., 0]), logits, query)
    return write, output if gate_logits is not None else jnp.ones_like(output), spread
