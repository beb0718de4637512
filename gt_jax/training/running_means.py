"""Running statistics move once a step, however its batch is cut in chunks and parts.

    moved = sum_i n_i moved_i / sum_i n_i,    moved_i = keep start + (1 - keep) seen_i

Each piece i of a batch, of n_i real tokens, moves what the step began with. A running mean is linear in what it sees,
so that is one move by the mean over the tokens of the batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gt_jax.typing import Tree


def moved_once(start: Tree, moved: Tree, tokens: Float[Array, " pieces"]) -> Tree:
    """`start` with the mean of the leaves of `moved` [pieces, …] by `tokens`; as it is where no piece has any."""
    total = jnp.sum(tokens)

    def mean(old: Array, new: Array | None) -> Array:
        if new is None:
            return old
        weights = tokens.reshape(-1, *[1] * old.ndim)
        return jnp.where(total > 0, jnp.sum(weights * new, axis=0) / jnp.where(total > 0, total, 1.0), old)

    return jax.tree.map(mean, start, moved)
