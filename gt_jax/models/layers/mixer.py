"""The interface of a mixer: what every D, G, S, A and B layer is given, and what it returns.

`mixer(x, place, cache)`: `Place` says where the tokens stand; `MixerOutput` is the value, the statistics that adaptive
depth reads, the losses and the new cache. `mixer.gates(h)` are the same statistics of any other [b, t, d], by the
mixer's own projections; S layers run one pass and have none.

With a cache, padding at the end of a row writes nothing: the cache goes on from the row's last real token.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gt_jax.devices.sharding import Rules, per_device, reshard
from gt_jax.models.layers.primitives import widen
from gt_jax.typing import Activations, PerToken, Scalar, Tokens, Tree


class Place(NamedTuple):
    """Where the tokens stand: segment ids (0 is padding) and the index of each token in its row, both [b, t].

    With a cache `start` [b] is the index of the first of these tokens, None without one. Positions grow along a row but
    may have gaps (a token that left the stack). `key` is what random numbers are drawn from, None for none.
    """

    segment_ids: Tokens
    positions: Tokens
    start: Int[Array, " b"] | None = None
    key: Array | None = None


class MixerOutput(NamedTuple):
    """`write_gate`, `output_gate`, `head_spread` carry no gradient; the scalars are means over tokens, float32.

    `link` is what a D layer hands to the S layers after it in its pattern, None where it hands nothing.
    """

    y: Activations
    write_gate: PerToken
    output_gate: PerToken
    head_spread: PerToken
    auxiliary_loss: Scalar
    entropy: Scalar
    score_variance: Scalar
    cache: Tree
    link: Tree = None


def place_rows(
    segment_ids: Tokens, start: Int[Array, " b"] | None = None, key: Array | None = None, rules: Rules | None = None
) -> Place:
    """The place of whole rows, or with a cache of the tokens from index `start` on: positions = start + 0, 1, 2 …"""
    rules = Rules() if rules is None else rules
    segment_ids = reshard(segment_ids, rules.spec("batch", None))
    offset = jnp.zeros_like(segment_ids[:, 0]) if start is None else start
    offset = reshard(offset, rules.spec("batch"))  # said outright: jax 0.12 loses it on the way through zeros_like
    positions = offset[:, None] + jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    positions = reshard(positions, rules.spec("batch", None))
    return Place(segment_ids, positions, None if start is None else offset, key)


def real_tokens(segment_ids: Tokens) -> PerToken:
    """1 for a token of a document, 0 for padding (segment id 0); float32."""
    return (segment_ids > 0).astype(jnp.float32)


def masked_mean(x: PerToken, mask: PerToken) -> Scalar:
    """Mean of x over the tokens with mask 1; 0 where there is none."""
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def without_padding(segment_ids: Tokens, before: Int[Array, " b"], rules: Rules) -> Tokens:
    """Segment ids with padding counted to the segment before it (`before`, that of the cache, where there is none)."""

    def local(ids: Array, before: Array) -> Array:
        places = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        latest = jax.lax.cummax(jnp.where(ids > 0, places, -1), axis=1)
        return jnp.where(latest < 0, before[:, None], jnp.take_along_axis(ids, jnp.maximum(latest, 0), axis=1))

    rows = rules.spec("batch", None)
    return per_device(local, (rows, rules.spec("batch")), rows)(segment_ids, before)


def last_real(old: Array, new: Array, segment_ids: Tokens, rules: Rules, axes: tuple[str | None, ...]) -> Array:
    """The last w entries of `old` [b, w, *axes] and then those of `new` [b, t, *axes] that are no padding."""
    window = old.shape[1]

    def local(old: Array, new: Array, ids: Array) -> Array:
        joined = jnp.concatenate([old, new.astype(old.dtype)], axis=1)
        if ids.shape[1] == 1:  # decoding: one step on, or none
            here = (ids > 0).reshape(-1, *(1,) * (old.ndim - 1))
            return jnp.where(here, joined[:, 1:], joined[:, :-1])
        real = jnp.concatenate([jnp.ones(old.shape[:2], bool), ids > 0], axis=1)
        order = jnp.argsort(real, axis=1, stable=True)[:, -window:]  # padding first, the rest as it comes
        return jax.vmap(lambda row, index: row[index])(joined, order)

    spec = rules.spec("batch", None, *axes)
    return per_device(local, (spec, spec, rules.spec("batch", None)), spec)(old, new, segment_ids)


def write_at(cache: Tree, new: Tree, place: Place, rules: Rules) -> Tree:
    """The cache of keys with each new token at its own position, [b, room, …] of names in both trees.

    Padding, and what lies past the room, is not written.
    """
    of_heads, rows = rules.spec("batch", None, "heads", None), rules.spec("batch", None)
    specs = {name: of_heads if array.ndim == 4 else rows for name, array in cache.items()}
    room = cache["segments"].shape[1]
    index = jnp.where(place.segment_ids > 0, place.positions, room)

    def local(old: Tree, new: Tree, index: Array) -> Tree:
        def row(old: Array, new: Array, index: Array) -> Array:
            return old.at[index].set(new.astype(old.dtype), mode="drop")

        return jax.tree.map(lambda a, b: jax.vmap(row)(a, b, index), old, new)

    placed = {name: reshard(array, specs[name]) for name, array in cache.items()}
    return per_device(local, (specs, specs, rows), specs)(placed, new, index)


def key_places(cache: Tree, rules: Rules) -> tuple[Tokens, Tokens]:
    """Positions and segment ids of the keys of a cache that `write_at` writes: each stands at its own position."""
    segments = cache["segments"]
    every = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    return reshard(jnp.broadcast_to(every, segments.shape), rules.spec("batch", None)), segments


def gate_statistics(
    write: Float[Array, "b t w"], output_logits: Float[Array, "b t hv v"], query: Float[Array, "b t h k"]
) -> tuple[PerToken, PerToken, PerToken]:
    """Mean write gate, mean sigmoid of the output-gate logits, std (n-1) over heads of |query|; without gradient."""
    write, output_logits, query = jax.lax.stop_gradient((write, output_logits, query))
    norms = jnp.sqrt(jnp.sum(jnp.square(widen(query)), axis=-1))
    heads = norms.shape[-1]
    spread = jnp.sqrt(jnp.var(norms, axis=-1) * (heads / max(heads - 1, 1)))
    output = jnp.mean(jax.nn.sigmoid(widen(output_logits)), axis=(-2, -1))
    return jnp.mean(widen(write), axis=-1), output, spread
