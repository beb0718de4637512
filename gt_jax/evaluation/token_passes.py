"""How many passes each token ran in each layer: what `passes_run` is the mean of, token by token.

Layers say it in the collection `passes` (`models.layers.sow`) to who asks for it. No pass runs for it that did not
before, and nobody asks in training or decoding, whose programs know nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from gt_jax.configs.model import ModelConfig
from gt_jax.models.language_model import LanguageModel
from gt_jax.models.layers.adaptive_depth import PassControl
from gt_jax.models.layers.sow import PASSES
from gt_jax.models.memory_chunks import over_chunks
from gt_jax.typing import Activations, Tokens, Tree


def hidden_and_passes(
    network: LanguageModel, variables: Tree, tokens: Tokens, segment_ids: Tokens, control: PassControl
) -> tuple[Activations, Int[Array, "l b t"]]:
    """The state before the final norm of whole rows [b, t, d], and the passes of each token by layer, int32.

        passes of a token in a layer = sum over k of [pass k runs, and s_k >= threshold]

    Under halting "batch" a pass that runs moves every token, below the threshold too, and counts for all. A plain layer
    runs once, one that a token has left (depth-wise ACT) not at all; padding has 0.
    """
    config = network.config

    def chunk(carry: tuple[Tree, Any], piece: tuple[Mapping[str, Array], Array]) -> tuple[tuple[Tree, Any], Any]:
        one = piece[0]
        output, shown = network.apply(
            variables, one["tokens"], one["segment_ids"], control=control, memory=carry[1], mutable=[PASSES]
        )
        return (carry[0], output.memory), (output.hidden, passes_by_layer(config, shown, one["segment_ids"]))

    rows = {"tokens": tokens, "segment_ids": segment_ids}
    _, (hidden, passes) = over_chunks(chunk, config, network.rules, (), rows)
    whole = jnp.moveaxis(hidden, 0, 1).reshape(*tokens.shape, hidden.shape[-1])
    return whole, jnp.moveaxis(passes, 0, 2).reshape(len(config.depth), *tokens.shape)


def passes_by_layer(config: ModelConfig, shown: Tree, segment_ids: Tokens) -> Int[Array, "l b t"]:
    """The sum over passes of what a model shows in `passes`, [blocks, (p,) b, t] a slot of a segment's pattern.

    A plain model shows nothing: every layer runs once.
    """
    found = []
    if PASSES not in shown:
        once = (segment_ids > 0).astype(jnp.int32)
        return jnp.stack([once] * len(config.depth))
    for layer in range(len(config.depth)):
        segment, block, slot = config.depth.position(layer)
        runs = shown[PASSES][f"segment{segment}"][f"layer{slot}"]["runs"][block].astype(jnp.int32)
        found.append(runs if config.adaptive is None else jnp.sum(runs, axis=0))
    return jnp.stack(found)
