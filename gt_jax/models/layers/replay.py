"""Layers that have run forward: what they gave is handed on, and they run backward for all chunks of a row at once.

    forward    (X_{l+1}, statistics) as they were recorded; nothing is computed
    backward   for l = last … first:  gather W_l;  for every chunk c: one vjp of layer l at the recorded X_l[c];
               dW_l = sum_c dW_l[c], added up over devices and scattered once

The memory stream takes no gradient from a chunk into the one before it. So a row's chunks, which run forward one after
the other, need not run backward so: with the layers outside and the chunks inside, a layer's weights are gathered, and
their gradients added up over links, once for all chunks. Nothing more is computed than under `remat` "layer", where the
backward pass runs each layer again too; what entered the layers is written once, in place, and read once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from gt_jax.devices.sharding import Rules, gather_compute_weights, zero_gradient
from gt_jax.models.layers.mixer import Place
from gt_jax.models.layers.pass_statistics import PassStatistics
from gt_jax.typing import State, Tree

LayerStep: TypeAlias = Callable[[Tree, State, Place], tuple[State, PassStatistics]]
"""layer(variables, x, place) -> (x after the layer, its statistics)."""


class Entered(NamedTuple):
    """What entered each layer in each chunk of a row, and the `chunk` that runs.

    `states` [l, c, b, …, t, d]: row l is X before layer l. One array, written in place; its streams stand before its
    tokens, as the kernels of hyper-connections have them on a TPU, or all of it is copied.
    """

    states: Array
    chunk: Int[Array, ""]

    def kept(self, x: State, layer: Array | int) -> Entered:
        """With `x` as what entered `layer`."""
        stored = jnp.moveaxis(x, 1, -2)[None, None]
        start = (layer, self.chunk, *(0,) * x.ndim)
        return self._replace(states=jax.lax.dynamic_update_slice(self.states, stored, start))

    def before(self, layer: Array | int) -> State:
        """X before `layer` in this chunk."""
        shape = self.states.shape[2:]
        start = (layer, self.chunk, *(0,) * len(shape))
        return jnp.moveaxis(jnp.squeeze(jax.lax.dynamic_slice(self.states, start, (1, 1, *shape)), (0, 1)), -2, 1)


class Recorded(NamedTuple):
    """A segment's forward pass: `Entered.states` of the whole stack, the number of its `first` layer, where the tokens
    of each chunk stand [c, b, t], its `statistics` variables [blocks, …], and what its layers said of themselves
    [c, its layers, p]."""

    states: Array
    first: Array
    place: Place
    statistics: Tree
    seen: PassStatistics


@dataclasses.dataclass(frozen=True)
class Steps:
    """What is static of a segment: its pattern, the layer of each slot, neighbours that are one program (`runs`, from
    slot to slot), the dtype products are computed in, the rules of the mesh."""

    pattern: str
    layers: tuple[LayerStep, ...]
    runs: tuple[tuple[int, int], ...]
    compute_dtype: str
    rules: Rules


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def replay(
    steps: Steps, params: Tree, x: State, left: State, recorded: Recorded
) -> tuple[State, PassStatistics]:
    """(`left`, X after the segment; what its layers said [c, l, p]) for `x` [c, b, t, …], as they were recorded.

    `params` are the segment's, [blocks, …] by `layer0` …; gradients go to them and to `x`, none to what was recorded.
    Wrong unless `left` and `recorded` are what these layers gave for these values.
    """
    return left, recorded.seen


def _forward(
    steps: Steps, params: Tree, x: State, left: State, recorded: Recorded
) -> tuple[tuple[State, PassStatistics], Tree]:
    return replay(steps, params, x, left, recorded), (params, recorded)


def _backward(steps: Steps, saved: Tree, cotangents: tuple[State, PassStatistics]) -> tuple[Tree, State, None, None]:
    """From the cotangents of X after the segment to those of its weights and of X before it, block by block."""
    params, recorded = saved
    slots = len(steps.layers)
    blocks = recorded.seen.alive.shape[1] // slots

    def block(after: State, xs: tuple[Tree, Tree, Array, PassStatistics]) -> tuple[State, Tree]:
        params, statistics, numbers, to_seen = xs
        to_params: Tree = {}
        for start, stop in reversed(steps.runs):
            own = [
                (params[f"layer{slot}"], statistics.get(f"layer{slot}", {}), numbers[slot],
                 jax.tree.map(lambda a, slot=slot: a[slot], to_seen))
                for slot in range(start, stop)
            ]  # fmt: skip
            one = functools.partial(_layer_backward, steps, start, recorded)
            if len(own) == 1:
                after, found = one(after, own[0])
                to_params[f"layer{start}"] = found
                continue
            stacked = jax.tree.map(lambda *a: jnp.stack(a), *own)
            after, found = jax.lax.scan(one, after, stacked, reverse=True)
            for index in range(stop - start):
                to_params[f"layer{start + index}"] = jax.tree.map(lambda a, index=index: a[index], found)
        return after, to_params

    by_layer = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), cotangents[1])
    numbers = recorded.first + jnp.arange(blocks * slots, dtype=jnp.int32)
    cut = jax.tree.map(lambda a: a.reshape(blocks, slots, *a.shape[1:]), (numbers, by_layer))
    before, to_params = jax.lax.scan(block, cotangents[0], (params, recorded.statistics, *cut), reverse=True)
    return to_params, before, None, None


def _layer_backward(
    steps: Steps, slot: int, recorded: Recorded, after: State, own: tuple[Tree, Tree, Array, PassStatistics]
) -> tuple[State, Tree]:
    """(cotangents of X before one layer, of its weights) from those of X after it, [c, b, t, …]: all chunks."""
    params, statistics, number, to_seen = own
    layer, given = steps.layers[slot], (after, steps.rules, steps.compute_dtype, steps.pattern[slot])
    weights, scatter = jax.vjp(lambda w: gather_compute_weights(w, *given), params)

    def chunk(carry: tuple[Tree, State], piece: tuple[Array, Place, PassStatistics]) -> tuple[tuple[Tree, State], None]:
        (total, moved), (index, place, to_seen) = carry, piece
        to_x = jax.lax.dynamic_index_in_dim(moved, index, keepdims=False)
        variables = {} if not statistics else {"statistics": statistics}
        x = Entered(recorded.states, index).before(number)
        again = jax.checkpoint(lambda w, x: layer({"params": w} | variables, x, place), prevent_cse=False)
        _, pull = jax.vjp(again, weights, x)  # what it computes of the layer first is read by nobody, and not computed
        to_weights, before = pull((to_x, to_seen))
        moved = jax.lax.dynamic_update_index_in_dim(moved, before, index, 0)
        with jax.named_scope("accumulation"):
            return (jax.tree.map(jnp.add, total, to_weights), moved), None

    indices = jnp.arange(after.shape[0], dtype=jnp.int32)
    with jax.named_scope("accumulation"):
        start = jax.tree.map(zero_gradient, weights)
    (total, before), _ = jax.lax.scan(chunk, (start, after), (indices, recorded.place, to_seen))
    with jax.named_scope("accumulation"):
        return before, scatter(total)[0]


replay.defvjp(_forward, _backward)


def runs_of(pattern: str) -> tuple[tuple[int, int], ...]:
    """The slots of a pattern from … to, neighbours of kind D together: they differ in their weights alone."""
    starts = [slot for slot in range(len(pattern)) if slot == 0 or pattern[slot - 1 : slot + 1] != "DD"]
    return tuple(itertools.pairwise([*starts, len(pattern)]))
