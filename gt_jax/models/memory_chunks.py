"""Rows longer than a chunk: the chunks of a row in order, the memory stream going from each to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules, reshard
from gt_jax.errors import Refused
from gt_jax.models.language_model import LanguageModel, apply_network
from gt_jax.models.layers.adaptive_depth import PassControl
from gt_jax.models.layers.memory_stream import Memory, no_memory
from gt_jax.models.layers.mixer import real_tokens
from gt_jax.models.layers.pass_statistics import PassStatistics, mean_over_tokens
from gt_jax.typing import Tokens, Tree


def chunk_length(model: ModelConfig, tokens: int) -> int:
    """Of how many tokens a chunk is in rows of `tokens`."""
    return tokens if model.memory is None else min(tokens, model.memory.chunk)


def over_chunks(
    body: Callable[..., tuple[Any, Any]], model: ModelConfig, rules: Rules, statistics: Tree,
    batch: Mapping[str, Array],
) -> tuple[tuple[Tree, Memory | None], Any]:
    """`body` over the chunks of a batch in order, from an empty memory; what it returns gets a leading chunk axis.

    Without a memory stream the batch is one chunk. Raises `Refused` for rows that are not whole chunks.
    """
    count, tokens = batch["tokens"].shape
    memory = None
    if model.memory is not None:
        empty = no_memory(count, model.width, model.compute_dtype)
        memory = Memory(reshard(empty.value, rules.spec("batch", None)), reshard(empty.segment, rules.spec("batch")))
    size = chunk_length(model, tokens)
    if tokens % size:
        raise Refused(f"rows of {tokens} tokens are not whole chunks of memory.chunk {size}")
    if tokens == size:
        carry, one = body((statistics, memory), (batch, jnp.zeros((), jnp.int32)))
        return carry, jax.tree.map(lambda a: a[None], one)
    numbers = jnp.arange(tokens // size, dtype=jnp.int32)
    return jax.lax.scan(body, (statistics, memory), (in_chunks(batch, size), numbers))


def in_chunks(batch: Mapping[str, Array], size: int) -> dict[str, Array]:
    """[b, t] -> [c, b, size]: the chunks of a batch in order."""
    return {name: jnp.moveaxis(a.reshape(a.shape[0], -1, size), 1, 0) for name, a in batch.items()}


def whole_rows(chunks: Array) -> Array:
    """[c, b, size, …] -> [b, t, …]: the inverse of `in_chunks`, of one array."""
    return jnp.moveaxis(chunks, 0, 1).reshape(chunks.shape[1], -1, *chunks.shape[3:])


def floats(statistics: Tree) -> Tree:
    """The running statistics that move, None for the others (the bytes of the tokens), which no chunk need hand on."""
    return jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else None, statistics)


def mean_over_chunks(statistics: PassStatistics, segment_ids: Tokens, model: ModelConfig) -> PassStatistics:
    """Statistics [l, p] of whole rows from those of their chunks [c, l, p], each weighed by its real tokens."""
    pieces = real_tokens(segment_ids).reshape(segment_ids.shape[0], statistics.alive.shape[0], -1)
    return mean_over_tokens(statistics, jnp.sum(pieces, axis=(0, 2)), model.adaptive, model.exit is not None)


def forward_rows(
    network: LanguageModel, variables: Tree, tokens: Tokens, segment_ids: Tokens, control: PassControl
) -> tuple[Float[Array, "b t v"], PassStatistics]:
    """Logits of whole rows, chunk by chunk where the model has a memory stream, and the mean statistics [l, p]."""

    def chunk(carry: tuple[Tree, Any], piece: tuple[Mapping[str, Array], Array]) -> tuple[tuple[Tree, Any], Any]:
        one = piece[0]
        output = apply_network(network, variables, one["tokens"], one["segment_ids"], control=control, memory=carry[1])
        return (carry[0], output.memory), (output.logits, output.statistics)

    rows = {"tokens": tokens, "segment_ids": segment_ids}
    _, (logits, statistics) = over_chunks(chunk, network.config, network.rules, (), rows)
    return whole_rows(logits), mean_over_chunks(statistics, segment_ids, network.config)
