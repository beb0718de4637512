"""A forward pass without its logits, and a look inside: the state every pass of every layer starts from, router slots.

Layers show these in the collection `intermediates` (`models.layers.sow`) to who asks for it. Nobody asks in training,
evaluation or decoding, whose compiled programs know nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gt_jax.configs.model import ModelConfig
from gt_jax.models.language_model import LanguageModel, apply_network
from gt_jax.models.layers.adaptive_depth import PassControl
from gt_jax.models.layers.pass_statistics import PassStatistics
from gt_jax.models.layers.sow import INTERMEDIATES
from gt_jax.models.memory_chunks import mean_over_chunks, over_chunks
from gt_jax.typing import Activations, Tokens, Tree


class Intermediates(NamedTuple):
    """By layer and pass: `slots`, the router's logits [l,p,b,t,s] float32, None for a dense MLP.

    Of the first rows asked for, and of their first chunk where the model has a memory stream: `states`, the input of
    the pass [l,p,r,t,d] or [l,p,r,t,n,d] in the compute dtype, and `links`, by S layer what it reads of a D layer.
    """

    slots: Float[Array, "l p b t s"] | None
    states: Float[Array, "l p r t *n d"]
    links: dict[int, Tree]


def over_all_tokens(statistics: PassStatistics, config: ModelConfig) -> PassStatistics:
    """`update_ratio` as a mean over all real tokens: those that do not run a pass add nothing in it."""
    if config.adaptive is not None and config.adaptive.halting == "batch":
        return statistics  # it is one already
    return statistics._replace(update_ratio=statistics.update_ratio * statistics.alive)


def hidden_rows(
    network: LanguageModel, variables: Tree, tokens: Tokens, segment_ids: Tokens, control: PassControl
) -> tuple[Activations, PassStatistics]:
    """The state before the final norm of whole rows [b, t, d], and the mean statistics [l, p] `over_all_tokens`."""

    def chunk(carry: tuple[Tree, Any], piece: tuple[Mapping[str, Array], Array]) -> tuple[tuple[Tree, Any], Any]:
        one = piece[0]
        output = apply_network(network, variables, one["tokens"], one["segment_ids"], control=control, memory=carry[1])
        return (carry[0], output.memory), (output.hidden, output.statistics)

    batch = {"tokens": tokens, "segment_ids": segment_ids}
    _, (hidden, statistics) = over_chunks(chunk, network.config, network.rules, (), batch)
    whole = jnp.moveaxis(hidden, 0, 1).reshape(*tokens.shape, hidden.shape[-1])
    return whole, over_all_tokens(mean_over_chunks(statistics, segment_ids, network.config), network.config)


def hidden_with_intermediates(
    network: LanguageModel, variables: Tree, tokens: Tokens, segment_ids: Tokens, control: PassControl, rows: int
) -> tuple[Activations, PassStatistics, Intermediates]:
    """`hidden_rows`, with what is to be seen inside; every pass is run, those that count and those that do not.

    Not for models whose tokens leave the stack early: a layer there has no row of states to show.
    """
    config = network.config

    def chunk(carry: tuple[Tree, Any], piece: tuple[Mapping[str, Array], Array]) -> tuple[tuple[Tree, Any], Any]:
        one = piece[0]
        output, shown = network.apply(
            variables, one["tokens"], one["segment_ids"], control=control, memory=carry[1], mutable=[INTERMEDIATES]
        )
        inside = _inside(config, shown[INTERMEDIATES], rows)
        return (carry[0], output.memory), (output.hidden, output.statistics, inside)

    batch = {"tokens": tokens, "segment_ids": segment_ids}
    _, (hidden, statistics, inside) = over_chunks(chunk, config, network.rules, (), batch)
    whole = jnp.moveaxis(hidden, 0, 1).reshape(*tokens.shape, hidden.shape[-1])
    slots = None
    if inside.slots is not None:
        by_layer = jnp.moveaxis(inside.slots, 0, 3)
        slots = by_layer.reshape(*by_layer.shape[:2], *tokens.shape, by_layer.shape[-1])
    first = jax.tree.map(lambda a: a[0], (inside.states, inside.links))
    mean = over_all_tokens(mean_over_chunks(statistics, segment_ids, config), config)
    return whole, mean, Intermediates(slots, *first)


def _inside(config: ModelConfig, shown: Tree, rows: int) -> Intermediates:
    """What the segments show, [blocks, (p,) …] a slot of the pattern, by layer."""

    def of(layer: int, name: str) -> Tree:
        segment, block, slot = config.depth.position(layer)
        own = shown[f"segment{segment}"][f"layer{slot}"]
        return jax.tree.map(lambda a: a[block], own["mlp"][name] if name == "slots" else own[name])

    def by_pass(name: str) -> Array:
        every = [of(layer, name) for layer in range(len(config.depth))]
        return jnp.stack(every if config.adaptive is not None else [one[None] for one in every])

    links = {layer: of(layer, "link") for layer, kind in enumerate(config.depth.types) if kind == "S"}
    slots = None if config.moe is None else by_pass("slots")
    return Intermediates(slots, by_pass("state")[:, :, :rows], links)
