"""The library's front door to a model: one call on tokens, what it is given checked first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.typing import ArrayLike

from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules
from gt_jax.errors import refuse_all
from gt_jax.models.given import (
    HEADING,
    checked_tokens,
    wrong_cache,
    wrong_chunk,
    wrong_memory,
    wrong_mtp,
    wrong_padding,
    wrong_passes,
    wrong_variables,
)
from gt_jax.models.language_model import LanguageModel, ModelOutput, apply_network
from gt_jax.models.layers.adaptive_depth import PassControl
from gt_jax.models.layers.memory_stream import Memory
from gt_jax.typing import Tree


def forward(
    config: ModelConfig,
    variables: Tree,
    tokens: ArrayLike | Sequence[Any],
    segment_ids: ArrayLike | Sequence[Any] | None = None,
    *,
    control: PassControl | None = None,
    cache: Tree = None,
    memory: Memory | None = None,
    mtp: bool = False,
    rules: Rules | None = None,
) -> ModelOutput:
    """The model of `config` applied to tokens [b, t] with frozen variables.

    The arguments are those of `LanguageModel`; `rules` say where arrays lie on the current mesh. The output has
    `.logits` float32 [b, t, vocab], `.hidden` [b, t, d], `.statistics` with axes [layer, pass] and `.cache`. Not
    compiled: call it under `jax.jit` where it is called often. Under a trace values are not known: neither ids outside
    the vocabulary nor a cache that is full.

    Raises `Refused` for variables of another config, tokens and segments that are no whole numbers [b, t] of the
    vocabulary, passes that the model's layers do not run, a cache that has no room, padding with a cache, `mtp` of a
    model without it or with a cache, and more tokens than a chunk of a model with a memory stream, which takes one
    chunk at a time: `memory` is what the one before gave, `.memory` of its output.

    >>> import gt_jax, jax.numpy as jnp
    >>> config = gt_jax.preset("tiny").replace(layout="DG")
    >>> variables = gt_jax.initialise(config, seed=0)
    >>> output = gt_jax.forward(config, variables, jnp.zeros((1, 8), jnp.int32))
    >>> output.logits.shape, output.statistics.survival.shape
    ((1, 8, 264), (2, 4))
    """
    refuse_all(wrong_variables(config, variables), HEADING)
    ids, segments = checked_tokens(tokens, config.vocab, segment_ids)
    if control is not None:
        refuse_all(wrong_passes(config, control), HEADING)
    wrong = wrong_chunk(config, cache, ids.shape[1])
    wrong += [] if memory is None else wrong_memory(config, memory, ids.shape[0])
    refuse_all(wrong + (wrong_mtp(config, cache) if mtp else []), HEADING)
    if cache is not None:
        refuse_all(wrong_cache(config, cache, *ids.shape) + wrong_padding(segments), HEADING)
    network = LanguageModel(config, rules or Rules())
    return apply_network(network, variables, ids, segments, control=control, cache=cache, memory=memory, mtp=mtp)
