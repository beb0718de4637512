"""Tiles of queries and keys: what is loaded of them and written, and which can see each other."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Tree = TypeVar("Tree")
_FAR = jnp.iinfo(jnp.int32).max


def take(tree: Tree, row: Array, index: Array | int, size: int) -> Tree:
    """Tile `index` of row `row` of every [b, t, ...] array, as [1, size, ...]."""

    def load(x: Array) -> Array:
        tile = jax.lax.dynamic_slice(_raw(x), _corner(x, row, index * size), (1, size, *x.shape[2:]))
        return _raw(tile, x.dtype)

    return jax.tree.map(load, tree)


def put(tree: Tree, tile: Tree, row: Array, index: Array) -> Tree:
    """Every array with the tile written, in the array's dtype."""

    def store(x: Array, part: Array) -> Array:
        corner = _corner(x, row, index * part.shape[1])
        return _raw(jax.lax.dynamic_update_slice(_raw(x), _raw(part.astype(x.dtype)), corner), x.dtype)

    return jax.tree.map(store, tree, tile)


def _raw(x: Array, dtype: jnp.dtype | None = None) -> Array:
    """Bits of bfloat16 as integers, or back into `dtype`.

    XLA's CPU compiler slices bfloat16 as float32, and makes that of the whole array once, before the loop over tiles.
    """
    if dtype is None:
        return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype != dtype else x


def add(tree: Tree, tile: Tree, row: Array, index: Array) -> Tree:
    """Every array with the tile added."""
    old = jax.tree.map(lambda x, part: take(x, row, index, part.shape[1]), tree, tile)
    return put(tree, jax.tree.map(jnp.add, old, tile), row, index)


def _corner(x: Array, row: Array, token: Array | int) -> list[Array]:
    return [jnp.int32(start) for start in (row, token, *[0] * (x.ndim - 2))]


def pad(tree: Tree, tile: int) -> Tree:
    """Every [b, t, ...] array up to whole tiles; what is added is of segment -1 where the array is a segment."""

    def filled(x: Array) -> Array:
        widths = [(0, 0), (0, -x.shape[1] % tile)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths)

    padded = jax.tree.map(filled, tree)
    segment = tree.segment  # type: ignore[attr-defined]
    return padded._replace(segment=jnp.pad(segment, [(0, 0), (0, -segment.shape[1] % tile)], constant_values=-1))


@runtime_checkable
class Placed(Protocol):
    """Tokens with their places: index in the row and segment id, [b,t]; a token of segment -1 is not there."""

    @property
    def position(self) -> Array: ...

    @property
    def segment(self) -> Array: ...


class Reach(NamedTuple):
    """Ranges of tiles that may see each other: key tiles of each query tile [b,nq], query tiles of each key tile."""

    first_key: Array
    end_key: Array
    first_query: Array
    end_query: Array


def reach(queries: Placed, keys: Placed, query_tile: int, key_tile: int, window: int | None = None) -> Reach:
    """From the extremes of the tiles, so that the ranges hold every visible pair, and few others.

    For a causal row half of the tiles, for packed documents those of the same document.
    """
    tiled = lambda x, tile: x.reshape(x.shape[0], -1, tile)  # noqa: E731 - one expression, used six times
    real_query, real_key = queries.segment != -1, keys.segment != -1
    last = jnp.max(tiled(jnp.where(real_query, queries.position, -_FAR), query_tile), axis=-1)
    earliest = jnp.min(tiled(jnp.where(real_key, keys.position, _FAR), key_tile), axis=-1)
    low_query = jnp.min(tiled(jnp.where(real_query, queries.segment, _FAR), query_tile), axis=-1)
    low_key = jnp.min(tiled(jnp.where(real_key, keys.segment, _FAR), key_tile), axis=-1)
    high_query = jnp.max(tiled(jnp.where(real_query, queries.segment, -_FAR), query_tile), axis=-1)
    high_key = jnp.max(tiled(jnp.where(real_key, keys.segment, -_FAR), key_tile), axis=-1)
    seen = (
        (earliest[:, None] <= last[..., None])
        & (low_key[:, None] <= high_query[..., None])
        & (low_query[..., None] <= high_key[:, None])
    )
    if window is not None:
        first = jnp.min(tiled(jnp.where(real_query, queries.position, _FAR), query_tile), axis=-1)
        latest = jnp.max(tiled(jnp.where(real_key, keys.position, -_FAR), key_tile), axis=-1)
        seen = seen & (latest[:, None] > first[..., None] - window)
    return Reach(*_range(seen), *_range(seen.swapaxes(1, 2)))


def _range(seen: Array) -> tuple[Int[Array, "b n"], Int[Array, "b n"]]:
    """First true index along the last axis and the one after the last; (0, 0) where none is true."""
    some, index = jnp.any(seen, axis=-1), jnp.arange(seen.shape[-1], dtype=jnp.int32)[None, None]
    first = jnp.min(jnp.where(seen, index, _FAR), axis=-1)
    return jnp.where(some, first, 0), jnp.max(jnp.where(seen, index + 1, 0), axis=-1)
