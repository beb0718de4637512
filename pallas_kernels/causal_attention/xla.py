"""Causal attention as plain XLA, block by block: memory O(t * tile), whatever the length.

* Forward: for each query tile an online softmax over the key tiles that it can see (arXiv 2205.14135). Kept of it: the
  output, and the logarithm of each query's sum of exponentials.
* Backward: for each key tile over the query tiles that see it; the softmax is computed again.
* Tiles out of causal reach, beyond the window or of other documents are skipped.
* On a CPU one row after the other, elsewhere all at once.

Softmax and sums are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.platform import target_device
from pallas_kernels.positions import Positions, accumulator, sees
from pallas_kernels.tiles import add, pad, put, reach, take

QUERY_TILE, KEY_TILE = 128, 256
_NONE = -1e30  # the largest logit before there is any
Tree = TypeVar("Tree")


class Queries(NamedTuple):
    """What belongs to a query: `q` [b,t,h,k], place and segment [b,t]."""

    q: Array
    position: Array
    segment: Array


class Keys(NamedTuple):
    """What belongs to a key: `k`, `v` [b,s,n,k], place and segment [b,s]."""

    k: Array
    v: Array
    position: Array
    segment: Array


class _Plan(NamedTuple):
    """What is known when compiling."""

    window: int | None
    query_tile: int
    key_tile: int
    together: bool  # all rows at once


class _Incoming(NamedTuple):
    """Of a query: the gradient of its output [b,t,h,k], its log of sums and gradient . output, both [b,t,h]."""

    o: Array
    log_sum: Array
    delta: Array


def causal_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s n k"],
    v: Float[Array, "b s n k"],
    positions: Positions,
    window: int | None,
    *,
    query_tile: int = QUERY_TILE,
    key_tile: int = KEY_TILE,
    together: bool | None = None,
) -> Float[Array, "b t h k"]:
    """`reference.causal_attention` in tiles; differentiable once, in reverse mode, also inside a `shard_map`.

    A `shard_map` around it needs `check_vma=False`: its loops start from zeros that vary over no axis.
    """
    t, s = q.shape[1], k.shape[1]
    together = target_device()[0] != "cpu" if together is None else together
    plan = _Plan(window, min(query_tile, t), min(key_tile, s), together)
    queries = pad(Queries(q, positions.query, positions.query_segment), plan.query_tile)
    keys = pad(Keys(k, v, positions.key, positions.key_segment), plan.key_tile)
    return _attend(plan, queries, keys)[:, :t]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, queries: Queries, keys: Keys) -> Array:
    """Outputs of whole tiles."""
    return _forward(plan, queries, keys)[0]


def _forward(plan: _Plan, queries: Queries, keys: Keys) -> tuple[Array, tuple]:
    """Also what the backward pass keeps."""
    o, log_sum = _by_row(plan, lambda row: _forward_row(plan, *row), (queries, keys))
    return o, (queries, keys, o, log_sum)


def _by_row(plan: _Plan, function: Callable[[Any], Tree], rows: Any) -> Tree:
    """`function` of each row as a batch of one."""
    if rows[0].position.shape[0] == 1:
        return function(rows)
    alone = lambda row: jax.tree.map(lambda x: x[0], function(jax.tree.map(lambda x: x[None], row)))  # noqa: E731
    return jax.vmap(alone)(rows) if plan.together else jax.lax.map(alone, rows)


def _forward_row(plan: _Plan, queries: Queries, keys: Keys) -> tuple[Array, Array]:
    """Output and log of sums [1,t,h], each query tile in turn; both 0 for a query without keys."""
    t, h = queries.q.shape[1:3]
    ranges = reach(queries, keys, plan.query_tile, plan.key_tile, plan.window)
    results = jnp.zeros_like(queries.q), jnp.zeros((1, t, h), accumulator(queries.q))
    first = jnp.int32(0)

    def step(tile: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        part = take(queries, first, tile, plan.query_tile)
        span = ranges.first_key[0, tile], ranges.end_key[0, tile]
        return put(results, _online_softmax(plan, part, keys, span), first, tile)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(t // plan.query_tile), step, results)


def _online_softmax(plan: _Plan, part: Queries, keys: Keys, span: tuple[Array, Array]) -> tuple[Array, Array]:
    """One query tile over the key tiles of `span`: output and log of sums."""
    q = _grouped(part.q, keys.k.shape[2])
    wide = accumulator(q)

    def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, o = carry
        own = take(keys, jnp.int32(0), j, plan.key_tile)
        logits, seen = _logits(q, own.k), _seen(plan, part, own)
        higher = jnp.maximum(top, jnp.max(jnp.where(seen, logits, _NONE), axis=-1))
        fade = jnp.exp(top - higher)
        p = jnp.where(seen, jnp.exp(logits - higher[..., None]), 0.0)
        read = jnp.einsum("bngts,bsnk->bngtk", p.astype(own.v.dtype), own.v, preferred_element_type=wide)
        return higher, total * fade + p.sum(-1), o * fade[..., None] + read

    b, t, n, g, width = q.shape
    zeros = jnp.zeros((b, n, g, t), wide)
    top, total, o = jax.lax.fori_loop(*span, step, (zeros + _NONE, zeros, jnp.zeros((b, n, g, t, width), wide)))
    some = jnp.where(total > 0, total, 1.0)
    log_sum = jnp.where(total > 0, top + jnp.log(some), 0.0)
    output = jnp.einsum("bngtk->btngk", o / some[..., None]).reshape(part.q.shape)
    return output, jnp.einsum("bngt->btng", log_sum).reshape(part.q.shape[:3])


def _grouped(x: Float[Array, "b t h *k"], kv_heads: int) -> Float[Array, "b t n g *k"]:
    return x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:])


def _logits(q: Float[Array, "b t n g k"], k: Float[Array, "b s n k"]) -> Float[Array, "b n g t s"]:
    return jnp.einsum("btngk,bsnk->bngts", q, k, preferred_element_type=accumulator(q)) * q.shape[-1] ** -0.5


def _seen(plan: _Plan, part: Queries, own: Keys) -> Array:
    """[b,1,1,t,s]"""
    return sees(part.position, part.segment, own.position, own.segment, plan.window)[:, None, None]


def _backward(plan: _Plan, kept: tuple, d_o: Array) -> tuple[Queries, Keys]:
    queries, keys, o, log_sum = kept
    wide = accumulator(o)
    delta = jnp.sum(d_o.astype(wide) * o.astype(wide), axis=-1)
    rows = queries, keys, _Incoming(d_o, log_sum, delta)
    d_q, d_k, d_v = _by_row(plan, lambda row: _backward_row(plan, *row), rows)
    none: Any = None  # of integers
    return Queries(d_q, none, none), Keys(d_k, d_v, none, none)


def _backward_row(plan: _Plan, queries: Queries, keys: Keys, incoming: _Incoming) -> tuple[Array, Array, Array]:
    """Each key tile in turn, over the query tiles that see it; gradients are summed in float32."""
    wide, first = accumulator(queries.q), jnp.int32(0)
    ranges = reach(queries, keys, plan.query_tile, plan.key_tile, plan.window)

    def step(tile: Array, results: tuple) -> tuple:
        d_q, *d_keys = results
        own = take(keys, first, tile, plan.key_tile)

        def inner(j: Array, carry: tuple) -> tuple:
            d_q, d_k, d_v = carry
            part, gradient = take((queries, incoming), first, j, plan.query_tile)
            more = _block_gradients(plan, part, own, gradient)
            return add(d_q, more[0], first, j), d_k + more[1], d_v + more[2]

        start = d_q, jnp.zeros(own.k.shape, wide), jnp.zeros(own.v.shape, wide)
        span = ranges.first_query[0, tile], ranges.end_query[0, tile]
        d_q, *d_own = jax.lax.fori_loop(*span, inner, start)
        return d_q, *put(tuple(d_keys), tuple(d_own), first, tile)

    start = jnp.zeros(queries.q.shape, wide), jnp.zeros_like(keys.k), jnp.zeros_like(keys.v)
    tiles = jnp.int32(keys.k.shape[1] // plan.key_tile)
    d_q, d_k, d_v = jax.lax.fori_loop(jnp.int32(0), tiles, step, start)
    return d_q.astype(queries.q.dtype), d_k, d_v


def _block_gradients(plan: _Plan, part: Queries, own: Keys, gradient: _Incoming) -> tuple[Array, Array, Array]:
    """What one block adds to the gradients of q, k and v."""
    heads = own.k.shape[2]
    q, d_o = _grouped(part.q, heads), _grouped(gradient.o, heads)
    log_sum, delta = (jnp.einsum("btng->bngt", _grouped(x, heads))[..., None] for x in gradient[1:])
    product = functools.partial(jnp.einsum, preferred_element_type=accumulator(q))
    # never above 1, whatever the rounding
    p = jnp.where(_seen(plan, part, own), jnp.exp(jnp.minimum(_logits(q, own.k) - log_sum, 0.0)), 0.0)
    slope = p * (product("btngk,bsnk->bngts", d_o, own.v) - delta) * q.shape[-1] ** -0.5
    slope = slope.astype(q.dtype)
    d_q, d_k = product("bngts,bsnk->btngk", slope, own.k), product("bngts,btngk->bsnk", slope, q)
    return d_q.reshape(part.q.shape), d_k, product("bngts,btngk->bsnk", p.astype(own.v.dtype), d_o)


_attend.defvjp(_forward, _backward)
