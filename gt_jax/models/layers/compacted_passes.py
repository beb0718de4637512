"""Passes that cost what they use: pass k of a layer on rows of its living tokens alone (`context` "alive").

A token that is finished is absent from later passes of the layer: it writes no state, no key and no convolution input
there, and the living tokens stand next to each other, each at its true position. So the length of a row is what is
alive of it, cut to one of a few static lengths:

    cost of pass k = (bucket that holds the fullest row) / t of a whole pass, forward and backward

- The bucket is one for the whole batch, over all devices; which one is run changes no value.
- The backward pass computes a pass again inside its bucket's branch, so that nothing is kept, or made as zeros, for
  the buckets that did not run.
- With a cache each pass's cache holds the tokens that lived in it; a pass that nobody lives in is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gt_jax.devices.sharding import Rules, has_mesh, reshard
from gt_jax.models.layers.compaction import Living, beside, compact, move_tokens, outline, partition, stand
from gt_jax.models.layers.mixer import Place
from gt_jax.models.layers.sow import INTERMEDIATES
from gt_jax.typing import Array, Tokens, Tree

PassFn = Callable[[Any, Tree, Place, Tree], tuple[Tree, Tree, Tree]]
"""(layer, rows, place, cache) -> (rows, extras, cache): see `run_on_living`."""

GRAIN = 8  # lengths are whole vectors of a processor


def pass_lengths(tokens: int, shares: Sequence[float]) -> tuple[int, ...]:
    """0 and these shares of a row of t, up to whole vectors, ascending: what a pass is compiled for, each a program."""
    return tuple(sorted({0, *(min(tokens, -(-round(tokens * share) // GRAIN) * GRAIN) for share in shares)}))


def run_on_living(
    layer: Any,
    run: PassFn,
    rows: Tree,
    place: Place,
    living: Living,
    cache: Tree,
    *,
    rules: Rules,
    lengths: Sequence[int],
    nothing: Tree,
) -> tuple[Tree, Tree, Tree, Array]:
    """`run` on the living tokens alone: (rows with the living ones moved, extras, cache, share of a pass computed).

    run(layer, rows, place, cache) -> (rows, extras, cache) is given leaves [b, length, …] of the tree `rows` and the
    place of their tokens, padding at the end of a row; extras are of shapes that do not depend on the length, and
    `nothing` where no pass is run. `layer` is a bound Linen module, and `run` reaches parameters only through it.
    `lengths` ascend to the length of the rows; a single one is run whatever lives.
    """
    tokens = living.shape[1]
    packing = compact(living, rules)
    operands = (rows, place.segment_ids, place.positions, packing, cache)

    def at(length: int) -> Callable[..., tuple[Tree, Tree, Tree]]:
        def bucket(layer: Any, rows: Tree, segment_ids: Tokens, positions: Tokens, packing: Any, cache: Tree) -> Any:
            order, spot, fill = packing.order[:, :length], packing.place, packing.fill[:, None]
            taken = jnp.arange(length, dtype=jnp.int32)[None] < fill
            own = jax.tree.map(lambda leaf: move_tokens(leaf, order, spot, rules), rows)
            ids, positions = stand(taken, segment_ids, positions, packing, rules)
            new, extras, new_cache = run(layer, own, place._replace(segment_ids=ids, positions=positions), cache)
            back, forth = jnp.where(spot < fill, spot, length), jnp.where(taken, order, tokens)
            return jax.tree.map(lambda leaf: move_tokens(leaf, back, forth, rules), new), extras, new_cache

        return bucket

    def pure(length: int) -> Callable[..., tuple[Tree, Tree, Tree]]:  # no variable of the layer comes out of it
        apply = nn.apply(at(length), layer)
        return jax.checkpoint(apply, prevent_cse=False) if cache is None else apply

    if len(lengths) == 1:
        moved, extras, cache = at(tokens)(layer, *operands)
        computed = jnp.ones((), jnp.float32)
        back = jnp.where(packing.place < packing.fill[:, None], packing.place, tokens)
        _show_in_place(layer, lambda leaf: move_tokens(leaf, back, back, rules))
    else:
        if cache is not None and has_mesh():  # mixers lay their cache out at first use; a switch needs it so before
            laid_out = outline(layer, at(tokens), *operands)[2]
            cache = jax.tree.map(lambda leaf, shape: reshard(leaf, partition(shape)), cache, laid_out)
        skip = lambda variables, rows, *same: (rows, nothing, same[-1])  # noqa: E731
        branches = [pure(length) if length else skip for length in lengths]
        fullest = jnp.max(packing.fill)
        index = jnp.sum(fullest > jnp.asarray(lengths[:-1], jnp.int32), dtype=jnp.int32)
        moved, extras, cache = jax.lax.switch(index, branches, layer.variables, *operands[:-1], cache)
        computed = jnp.asarray(lengths, jnp.float32)[index] / tokens
    kept = jax.tree.map(lambda new, old: jnp.where(beside(living, new), new, old), moved, rows)
    return kept, extras, cache, computed


def _show_in_place(layer: Any, back: Callable[[Array], Array]) -> None:
    """What a pass showed in the collection `intermediates`, moved to where its tokens stand; 0 where none lived."""

    def move(module: Any, shown: Mapping[str, Any]) -> None:
        for name, value in shown.items():
            if isinstance(value, Mapping):
                move(getattr(module, name), value)
            else:
                module.put_variable(INTERMEDIATES, name, back(value))

    if layer.is_mutable_collection(INTERMEDIATES):
        move(layer, dict(layer.variables.get(INTERMEDIATES, {})))
