"""Figures of each token that need logits, of a piece of the rows at a time: no vocabulary is held over a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules, reshard
from gt_jax.typing import Tree

LOGITS = 1 << 26  # of a piece of the rows on one device, of each model: 256 MiB in float32


def in_pieces(
    body: Callable[..., Tree], arrays: Sequence[Array | None], fillings: Sequence[int], config: ModelConfig,
    rules: Rules,
) -> Tree:  # fmt: skip
    """`body` of pieces [b, piece, …] of the arrays [b, t, …]: a tree of [b, t], whole on every process.

    As many tokens of a row go together as hold `LOGITS` logits of the model on a device; the last piece is filled up,
    each array with its own filling. What is None stays that.
    """
    rows, length = next(a for a in arrays if a is not None).shape[:2]
    columns = config.vocab // (1 if config.embedding.tied else rules.shards("vocab"))
    piece = max(1, min(length, LOGITS // max(rows // rules.shards("batch") * columns, 1)))
    count = -(-length // piece)

    def cut(x: Array, filling: int) -> Array:
        padding = [(0, 0), (0, count * piece - length)] + [(0, 0)] * (x.ndim - 2)
        filled = jnp.pad(x, padding, constant_values=filling)
        return jnp.moveaxis(filled.reshape(rows, count, piece, *x.shape[2:]), 1, 0)

    def one(_: None, xs: Any) -> tuple[None, Tree]:
        return None, body(*xs)

    pieces = tuple(None if a is None else cut(a, filling) for a, filling in zip(arrays, fillings, strict=True))
    _, found = jax.lax.scan(one, None, pieces)

    def whole(x: Array) -> Array:  # every process reads all of it
        return reshard(jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :length], P(None, None))

    return jax.tree.map(whole, found)
