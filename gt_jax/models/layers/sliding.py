"""`S` of the GroundThink study: attention over a short window, and a read of the state of the `D` layer before it.

- The state is read *at each position*: the recurrence of the D layer runs once more with this layer's queries. (The
  published notebook reads the state of the end of the row everywhere and so sees the future.)
- The queries are the D layer's key projection applied to this layer's input: keys and queries cannot drift apart.
- In training the window is taken away from whole rows, so that the layer has to learn to read the state; what is left
  of it on average, 1 - drop, is about the share it has in evaluation. (The notebook also divides by 1 - drop in
  training, so that its window is three times as strong there as in evaluation.)
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gt_jax.configs.model import SlidingConfig
from gt_jax.devices.sharding import Rules, on_mesh, per_device, reshard
from gt_jax.errors import Refused
from gt_jax.models.layers.deltanet import HeadGate
from gt_jax.models.layers.groundthink import Link, project_keys, read_pairs
from gt_jax.models.layers.mixer import MixerOutput, Place, gate_statistics
from gt_jax.models.layers.primitives import Einsum, WeightSpec, scaled, widen
from gt_jax.typing import Activations, Tokens, Tree


def empty_cache(config: SlidingConfig, batch: int, dtype: str) -> Tree:
    """The decode cache before the first token: the last window - 1 keys and values; segment -1 is never visible.

    It rolls along, so its size does not depend on the length. The state that is read is in the D layer's cache.
    """
    before = config.window - 1
    heads = (batch, before, config.heads, config.head_width)
    return {
        "key": jnp.zeros(heads, dtype),
        "value": jnp.zeros(heads, dtype),
        "segments": jnp.full((batch, before), -1, jnp.int32),
        "positions": jnp.zeros((batch, before), jnp.int32),
    }


def window_attention(
    q: Float[Array, "b t h w"],
    k: Float[Array, "b s h w"],
    v: Float[Array, "b s h w"],
    q_place: tuple[Tokens, Tokens],
    k_place: tuple[Int[Array, "b s"], Int[Array, "b s"]],
    window: int,
) -> Float[Array, "b t h w"]:
    """softmax(q.k / sqrt(w)) v over the keys of the same segment at most window - 1 positions back; float32 softmax.

    Places are (segment ids, positions); the keys are those of the window - 1 tokens before the row, then of the row
    (s = t + window - 1). Tokens go in blocks of at most `window`, so memory is O(t * window).
    """
    tokens = q.shape[1]
    size = min(window, tokens)
    blocks = -(-tokens // size)
    queries, segments, positions = (_to_blocks(x, blocks, size, 0) for x in (q, *q_place))
    keys, values, key_segments, key_positions = (_to_blocks(x, blocks, size, window - 1) for x in (k, v, *k_place))
    distance = positions[..., :, None] - key_positions[..., None, :]
    same = segments[..., :, None] == key_segments[..., None, :]
    attention = _softmax(queries, keys, same & (distance >= 0) & (distance < window))
    read = jnp.einsum("bnhqk,bnkhw->bnqhw", attention.astype(v.dtype), values)
    return read.reshape(q.shape[0], blocks * size, *q.shape[2:])[:, :tokens]


def _to_blocks(x: Array, blocks: int, size: int, before: int) -> Array:
    """[b, before + t, …] -> [b, n, before + size, …], each block with what stands before it.

    What lies past the end has segment and position -2, so that it sees itself and no token sees it.
    """
    past = [(0, 0), (0, before + blocks * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    padded = jnp.pad(x, past, constant_values=-2 if jnp.issubdtype(x.dtype, jnp.integer) else 0)
    index = size * jnp.arange(blocks)[:, None] + jnp.arange(before + size)[None]
    return padded[:, index]


def _softmax(
    q: Float[Array, "b n q h w"], k: Float[Array, "b n k h w"], visible: Bool[Array, "b n q k"]
) -> Float[Array, "b n h q k"]:
    """Over the visible keys, at least float32; a query always sees itself, so none is empty."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bnqhw,bnkhw->bnhqk", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(visible[:, :, None], logits, -jnp.inf), axis=-1)


class SlidingAttention(nn.Module):
    """y = m W_o attention(x) + gate W_s S_t^T (W_k x_t), S_t and W_k those of the preceding D layer.

    gate = mean over heads of sigmoid(W_g x + b + gate_bias); m in training (the place has a key) is 0 for a row with
    probability `drop` and 1 otherwise, in evaluation `evaluation_scale`. No positions enter but the window's edge.

    `state_query` [d, h, k] belongs to the published model and its counts (it would be W_k's place without shared keys)
    but nothing reads it: it stays as drawn. Raises `Refused` without the link of a "groundthink" D layer.
    """

    config: SlidingConfig
    width: int
    rules: Rules
    weights: WeightSpec

    @nn.compact
    def __call__(
        self, x: Activations, place: Place, cache: Tree | None = None, link: Link | None = None
    ) -> MixerOutput:
        """Attend and read within each segment; with a cache, go on from it and return the new one."""
        if link is None:
            raise Refused("an S layer reads the state of a D layer before it; deltanet.variant must be 'groundthink'")
        local, new_cache = self._window(x, place, cache)
        reading, statistics = self._read_state(x, link)
        y = scaled(local, self._strength(place, x.shape[0])[:, None, None]) + reading
        zero = jnp.zeros((), jnp.float32)
        return MixerOutput(y, *statistics, zero, zero, zero, None if cache is None else new_cache)

    def _window(self, x: Activations, place: Place, cache: Tree | None) -> tuple[Array, Tree]:
        """The local path and the cache after it."""
        c, rules, heads = self.config, self.rules, ("batch", None, "heads", None)
        inward = ((self.width, c.heads, c.head_width), ("embed", "heads", None), rules, self.weights)
        q, k, v = (Einsum(*inward, name=name)("btd,dhk->bthk", x, heads) for name in ("query", "key", "value"))
        before = empty_cache(c, x.shape[0], self.weights.compute) if cache is None else cache
        rows, of_heads = rules.spec("batch", None), rules.spec(*heads)
        new = {"key": k, "value": v, "segments": place.segment_ids, "positions": place.positions}
        before = {name: reshard(array, of_heads if array.ndim == 4 else rows) for name, array in before.items()}
        joined = {name: jnp.concatenate([before[name].astype(a.dtype), a], axis=1) for name, a in new.items()}

        def attend(q: Array, k: Array, v: Array, ids: Array, at: Array, key_ids: Array, key_at: Array) -> Array:
            return window_attention(q, k, v, (ids, at), (key_ids, key_at), c.window)

        run = per_device(attend, (of_heads,) * 3 + (rows,) * 4, of_heads)
        places = (place.segment_ids, place.positions, joined["segments"], joined["positions"])
        o = run(q, joined["key"], joined["value"], *places)
        shape = (c.heads, c.head_width, self.width)
        outward = Einsum(shape, ("heads", None, "embed"), rules, self.weights, name="output")
        rolled = {name: array[:, x.shape[1] :] for name, array in joined.items()}
        return outward("bthw,hwd->btd", o, ("batch", None, None)), rolled

    def _read_state(self, x: Activations, link: Link) -> tuple[Array, tuple[Array, Array, Array]]:
        """The gated read of the state, and the statistics of the gate and of the queries (nothing is written)."""
        rules, (value_heads, value_width) = self.rules, link.pairs.value.shape[2:]
        spec, dtype = on_mesh(rules.spec("embed", "heads", None)), jnp.dtype(self.weights.param)
        self.param("state_query", self.weights.init, link.key_weight.shape, dtype, spec)
        query = project_keys(x, link.key_weight, rules, self.weights)
        read, _ = read_pairs(query, link.pairs, rules)
        shape = (value_heads, value_width, self.width)
        outward = Einsum(shape, ("heads", None, "embed"), rules, self.weights, name="state_output")
        logits = HeadGate(self.width, value_heads, rules, name="state_gate")(x) + self.config.gate_bias
        gate = jnp.mean(jax.nn.sigmoid(logits), axis=-1)[..., None]
        statistics = gate_statistics(jnp.zeros_like(logits), logits[..., None], query)
        y = outward("bthv,hvd->btd", read, ("batch", None, None))
        return (widen(y) * gate).astype(y.dtype), statistics

    def _strength(self, place: Place, rows: int) -> Float[Array, " b"]:
        """m of each row."""
        if place.key is None:
            strength = jnp.full((rows,), self.config.evaluation_scale, jnp.float32)
        else:
            strength = jax.random.bernoulli(place.key, 1 - self.config.drop, (rows,)).astype(jnp.float32)
        return reshard(strength, self.rules.spec("batch"))
