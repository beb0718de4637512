"""Rows of several chunks whose layers run backward for all chunks at once: `layers.replay`, with what stands around it.

1. `LanguageModel.record`, chunk after chunk, without gradient: what entered each layer, and the memory of each chunk.
2. With gradient, chunk by chunk: embedding and memory; then the layers as recorded; then what the caller measures.

The memory that enters a chunk has no gradient, so the gradient is that of running the chunks one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gt_jax.devices.sharding import on_mesh
from gt_jax.models.language_model import Begun, LanguageModel, ModelOutput
from gt_jax.models.layers.adaptive_depth import stream_mean
from gt_jax.models.layers.block import replayed_steps, replays
from gt_jax.models.layers.memory_stream import Memory
from gt_jax.models.layers.pass_statistics import PassStatistics
from gt_jax.models.layers.replay import Entered, Recorded, replay
from gt_jax.models.memory_chunks import chunk_length, floats, in_chunks, over_chunks
from gt_jax.typing import State, Tree

Measure = Callable[[ModelOutput, Mapping[str, Array]], Any]
"""measure(output of a chunk, the chunk's part of the batch)."""


def runs_replayed(network: LanguageModel, tokens: int) -> bool:
    """Whether rows of `tokens` are trained so: those of several chunks of a model that `replays`."""
    return replays(network.config) and chunk_length(network.config, tokens) < tokens


def replayed_rows(
    network: LanguageModel, variables: Tree, batch: Mapping[str, Array], mtp: bool, measure: Measure
) -> tuple[Tree, Any]:
    """(statistics as each chunk moved them, None for what does not move; what was measured of each chunk), [c, …].

    Differentiable in `variables["params"]`.
    """
    config, fixed = network.config, jax.lax.stop_gradient(variables)

    def forward(carry: tuple[Array, Memory], piece: tuple[Mapping[str, Array], Array]) -> tuple[tuple[Array, Any], Any]:
        (states, memory), (one, number) = carry, piece
        given = one["tokens"], one["segment_ids"], memory, Entered(states, number)
        output, moved = network.apply(fixed, *given, method=LanguageModel.record, mutable=["statistics"])
        left, memory_after, entered, seen = cast(tuple[State, Memory, Entered, PassStatistics], output)
        return (entered.states, memory_after), (left, memory, seen, floats(moved.get("statistics", {})))

    room = _room(network, batch)
    (states, _), (left, memories, seen, moved) = over_chunks(forward, config, network.rules, room, batch)
    pieces = in_chunks(batch, chunk_length(config, batch["tokens"].shape[1]))

    def begin(piece: tuple[Mapping[str, Array], Memory]) -> Begun:
        one, memory = piece
        given = one["tokens"], one["segment_ids"], memory
        return cast(Begun, network.apply(variables, *given, method=LanguageModel.begin))

    def finish(piece: tuple[Mapping[str, Array], State, PassStatistics, Begun]) -> Any:
        one, x, seen, begun = piece
        given = x, stream_mean(x), seen, begun, mtp
        output, moved = network.apply(variables, *given, method=LanguageModel.finish, mutable=["statistics"])
        return measure(cast(ModelOutput, output), one), floats(moved.get("statistics", {}).get("mtp"))

    begun = cast(Begun, jax.lax.map(begin, (pieces, memories)))
    x, said = _layers(network, variables, begun.x, left, Recorded(states, _number(0), begun.place, {}, seen))
    measured, of_mtp = jax.lax.map(finish, (pieces, x, said, begun))
    return moved | ({} if of_mtp is None else {"mtp": of_mtp}), measured


def _room(network: LanguageModel, batch: Mapping[str, Array]) -> Array:
    """Room [l, c, b, …, t, d] for what enters each layer of each chunk: all of it is written before it is read."""
    c, (count, tokens) = network.config, batch["tokens"].shape
    size = chunk_length(c, tokens)
    streams = () if c.hyper is None else (c.hyper.streams,)
    shape = (len(c.depth), tokens // size, count, *streams, size, c.width)
    spec = network.rules.spec(None, None, "batch", *(None,) * (len(shape) - 3))
    return jax.lax.empty(shape, jnp.dtype(c.compute_dtype), out_sharding=on_mesh(spec))


def _layers(
    network: LanguageModel, variables: Tree, x: State, left: State, whole: Recorded
) -> tuple[State, PassStatistics]:
    """X after all layers [c, b, t, …] and what they said of themselves [c, l, p], segment after segment.

    `whole` is recorded of the whole stack, which `left` came out of. Between segments only its shape is right: there
    nobody reads X.
    """
    c, first, said = network.config, 0, []
    for index, segment in enumerate(c.depth.segments):
        name, stop = f"segment{index}", first + len(segment)
        own = whole._replace(
            first=_number(first), statistics=variables["statistics"].get(name, {}),
            seen=jax.tree.map(lambda a, first=first, stop=stop: a[:, first:stop], whole.seen))  # fmt: skip
        steps = replayed_steps(segment.pattern, c, network.rules)
        x, one = replay(steps, variables["params"][name], x, left, own)
        said.append(one)
        first = stop
    return x, jax.tree.map(lambda *a: jnp.concatenate(a, axis=1), *said)


def _number(layer: int) -> Array:
    return jnp.asarray(layer, jnp.int32)
