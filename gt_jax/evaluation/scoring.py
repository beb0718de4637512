"""What a model says of every token of held-out text, and how many bytes that text is.

- The nats of a token are those of predicting it: -log p(target). The first token of a document is predicted by nobody.
- Bits per byte compare models of any tokenizer: the bits of all scored tokens over the bytes that those tokens stand
  for. The end of a document is scored, since where a text ends is part of it, and stands for no byte.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int, Int64

from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules, global_batch, reshard
from gt_jax.models.language_model import LanguageModel, apply_network
from gt_jax.models.layers.adaptive_depth import PassControl
from gt_jax.models.memory_chunks import over_chunks
from gt_jax.text.tokenizers import Tokenizer
from gt_jax.training.accumulation import parts_that_fit, rows_in_parts
from gt_jax.training.loss import token_losses
from gt_jax.training.step import Batch, shard_batch
from gt_jax.typing import Tree


def byte_lengths(tokenizer: Tokenizer) -> Int64[np.ndarray, " vocab"]:
    """How many bytes each token stands for; 0 for the end of a document, and for what stands for unknown text."""
    lengths = np.fromiter(map(len, tokenizer.texts()), np.int64, tokenizer.vocab_size)
    lengths[tokenizer.end_of_document] = 0
    if tokenizer.unknown is not None:
        lengths[tokenizer.unknown] = 0
    return lengths


@functools.lru_cache(maxsize=8)
def make_scores(
    model: ModelConfig, rules: Rules
) -> Callable[[Tree, Batch, PassControl], Float[Array, "b t"]]:
    """The jitted scores(variables, batch, control) -> nats of each target [b, t], 0 where there is none.

    A batch runs in as many parts as fit one device each. The same model gives the same compiled function: checkpoints
    of one run compile once.
    """
    network = LanguageModel(model, rules)

    def of_rows(variables: Tree, placed: Batch, control: PassControl) -> Float[Array, "b t"]:
        def chunk(carry: tuple[Tree, Any], piece: tuple[Batch, Array]) -> tuple[tuple[Tree, Any], Array]:
            one = piece[0]
            ids = one["tokens"], one["segment_ids"]
            output = apply_network(network, variables, *ids, control=control, memory=carry[1])
            normed: Any = network.apply(variables, output.hidden, method=LanguageModel.normed)
            matrix: Any = network.apply(variables, method=LanguageModel.unembedding_matrix)
            nats = token_losses(
                matrix, normed, one["targets"], rules=rules, compute=model.compute_dtype, tied=model.embedding.tied
            )
            return (carry[0], output.memory), nats

        _, nats = over_chunks(chunk, model, rules, (), placed)
        whole = jnp.moveaxis(nats, 0, 1).reshape(placed["tokens"].shape)
        return reshard(whole, P(None, None))  # every process reads all of it

    def scores(variables: Tree, batch: Batch, control: PassControl) -> Float[Array, "b t"]:
        placed = shard_batch(batch, rules)
        parts = parts_that_fit(placed["tokens"], model, rules)
        if parts == 1:
            return of_rows(variables, placed, control)
        pieces = {name: rows_in_parts(array, parts, rules) for name, array in placed.items()}
        nats = jax.lax.map(lambda part: of_rows(variables, part, control), pieces)
        return jnp.moveaxis(nats, 0, 1).reshape(placed["tokens"].shape)

    return jax.jit(scores)


def score(
    model: ModelConfig, variables: Tree, batches: Sequence[Batch], control: PassControl, rules: Rules
) -> Float32[np.ndarray, " scored"]:
    """The nats of every target of the batches, in order; as many as `targets_of` the batches."""
    scores = make_scores(model, rules)
    found = []
    for batch in batches:
        nats = np.asarray(jax.device_get(scores(variables, global_batch(dict(batch), rules), control)))
        found.append(nats[batch["targets"] >= 0])
    return np.concatenate(found)


def targets_of(batches: Sequence[Batch]) -> Int[np.ndarray, " scored"]:
    """The tokens that are predicted, in order."""
    return np.concatenate([batch["targets"][batch["targets"] >= 0] for batch in batches])
