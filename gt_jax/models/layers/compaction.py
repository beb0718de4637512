"""Rows of living tokens alone: each row's living tokens at its front, in order, cut to one of a few static lengths.

- The smallest length that holds the fullest row of the whole batch is run; padding (segment id 0) fills the rest, at
  the position of the row's last living token. A length of 0 runs nothing.
- Both ways are gathers, forward and backward: no scatter, which accelerators serialise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from gt_jax.devices.sharding import Rules, has_mesh, per_device, reshard
from gt_jax.typing import Tokens, Tree

Stream = Float[Array, "b t *n d"]
Living = Bool[Array, "b t"]
LayerFn = Callable[[Any, Array, Array, Array], tuple[Tree, Tree]]
"""(layer, x, segment_ids, positions) -> (update, extras): see `run_compacted`."""


class Packing(NamedTuple):
    """A permutation of each row with its living tokens first, in order.

    `order` [b, t] is the token at each place, `place` [b, t] the place of each token, `fill` [b] the living tokens.
    """

    order: Any
    place: Any
    fill: Any


def compact(living: Living, rules: Rules) -> Packing:
    """The stable permutation that brings each row's living tokens to its front."""

    def local(living: Array) -> Packing:
        order = jnp.argsort(~living, axis=1, stable=True).astype(jnp.int32)
        place = jnp.argsort(order, axis=1).astype(jnp.int32)
        return Packing(order, place, jnp.sum(living, axis=1, dtype=jnp.int32))

    rows = rules.spec("batch", None)
    return per_device(local, (rows,), Packing(rows, rows, rules.spec("batch")))(reshard(living, rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def move_tokens(x: Array, source: Array, target: Array, rules: Rules) -> Array:
    """y[b, i] = x[b, source[b, i]], 0 where `source` points outside: x [b, t, …], source [b, s] -> [b, s, …].

    `target` [b, t] is the way back, x[b, j] went to y[b, target[b, j]] (outside: nowhere), so that the gradient is a
    gather too: no scatter, which accelerators serialise, and no sum over devices that hold the same rows.
    """
    spec, rows = rules.spec("batch", *(None,) * (x.ndim - 1)), rules.spec("batch", None)

    def local(x: Array, source: Array) -> Array:
        return jax.vmap(lambda row, index: row.at[index].get(mode="fill", fill_value=0))(x, source)

    return per_device(local, (spec, rows), spec)(reshard(x, spec), source)


def _move_forward(x: Array, source: Array, target: Array, rules: Rules) -> tuple[Array, tuple[Array, Array]]:
    return move_tokens(x, source, target, rules), (source, target)


def _move_backward(rules: Rules, ways: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    source, target = ways
    return move_tokens(gradient, target, source, rules), None, None


move_tokens.defvjp(_move_forward, _move_backward)


def bucket_lengths(tokens: int, halvings: int = 3) -> tuple[int, ...]:
    """0, t/8, t/4, t/2, t (rounded up, ascending): the lengths a layer is compiled for."""
    return tuple(sorted({0, *(-(-tokens // 2**i) for i in range(halvings + 1))}))


def run_compacted(
    layer: Any,
    run: LayerFn,
    x: Stream,
    segment_ids: Tokens,
    positions: Tokens,
    living: Living,
    *,
    rules: Rules,
    buckets: Sequence[int] | None = None,
) -> tuple[Tree, Tree]:
    """`run` on the living tokens alone: (update at the original places, 0 for the others; extras).

    run(layer, x, segment_ids, positions) -> (update, extras) gets rows [b, length] of living tokens at their original
    `positions`, then padding of segment id 0. `update` is an array [b, length, …] or a tree of them; `extras` a tree
    of arrays whose shapes do not depend on the length (losses, statistics), 0 where the layer is skipped. `layer` is
    a bound Linen module; `run` reaches parameters only through it.

    `buckets` are the lengths to choose from, ascending, the last one t; the smallest that holds the fullest row of the
    whole batch is run. None: only t, which is compiled once and skips nothing. Raises ValueError for other buckets.
    """
    tokens = x.shape[1]
    lengths = (tokens,) if buckets is None else tuple(buckets)
    if not lengths or lengths[-1] != tokens or list(lengths) != sorted(set(lengths)) or lengths[0] < 0:
        raise ValueError(f"buckets are {lengths}; they must ascend from 0 or more and end with the {tokens} tokens")
    if layer.is_initializing():  # every token is alive, and the lifted switch needs the parameters to exist
        return run(layer, x, segment_ids, positions)
    packing = compact(living & (segment_ids > 0), rules)
    operands = (x, segment_ids, positions, packing)
    branches: list[Callable[..., Any]] = [_run_bucket(length, run, rules) for length in lengths]
    if lengths[0] == 0:
        nothing = outline(layer, branches[-1], *operands)
        branches[0] = lambda layer, *operands: jax.tree.map(zeros_of, nothing)
    if len(branches) == 1:
        return branches[0](layer, *operands)
    index = jnp.sum(jnp.max(packing.fill) > jnp.asarray(lengths[:-1], jnp.int32), dtype=jnp.int32)
    return nn.switch(index, branches, layer, *operands)


def _run_bucket(length: int, run: LayerFn, rules: Rules) -> Callable[..., tuple[Tree, Tree]]:
    """`run` on the first `length` places of the packed rows."""

    def bucket(layer: Any, x: Array, segment_ids: Array, positions: Array, packing: Packing) -> tuple[Tree, Tree]:
        order, place, fill = packing.order[:, :length], packing.place, packing.fill
        taken = jnp.arange(length, dtype=jnp.int32)[None] < fill[:, None]
        x = move_tokens(x, order, place, rules)
        update, extras = run(layer, x, *stand(taken, segment_ids, positions, packing, rules))
        # Padding goes nowhere on the way back, neither its update nor a gradient to it.
        back = jnp.where(place < fill[:, None], place, length)
        forth = jnp.where(taken, order, place.shape[1])
        return jax.tree.map(lambda leaf: move_tokens(leaf, back, forth, rules), update), extras

    return bucket


def stand(
    taken: Array, segment_ids: Tokens, positions: Tokens, packing: Packing, rules: Rules
) -> tuple[Array, Array]:
    """Segment ids and positions of packed rows [b, length]; where `taken` [b, length] is false there is padding."""
    order, place = packing.order[:, : taken.shape[1]], packing.place
    ids, at = (jnp.where(taken, move_tokens(a, order, place, rules), 0) for a in (segment_ids, positions))
    return ids, jnp.where(taken, at, jnp.max(at, axis=1, keepdims=True))


def outline(layer: Any, function: Callable[..., Tree], *operands: Any) -> Tree:
    """The shapes that function(layer, *operands) returns, computing nothing and touching no variable of `layer`."""
    pure = nn.apply(function, layer, mutable=True)
    return jax.eval_shape(lambda variables, *args: pure(variables, *args)[0], layer.variables, *operands)


def zeros_of(shape: jax.ShapeDtypeStruct) -> Array:
    """Zeros of a shape, laid out as it says."""
    return reshard(jnp.zeros(shape.shape, shape.dtype), partition(shape))


def partition(x: Any) -> P:
    """The partition of an array, a tracer or a shape on the current mesh."""
    sharding = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x).sharding
    return P() if sharding is None or not has_mesh() else sharding.spec


def beside(per_row: Array, x: Array) -> Array:
    """`per_row` [b] or [b, t] with trailing axes of 1, to stand beside x."""
    return per_row.reshape(*per_row.shape, *(1,) * (x.ndim - per_row.ndim))
