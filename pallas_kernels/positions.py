"""Where queries and keys stand, and which see each other: what every attention here is given."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Positions(NamedTuple):
    """Index in the row and segment id of queries [b,t] and keys [b,s]; a key of segment -1 is never visible."""

    query: Array
    query_segment: Array
    key: Array
    key_segment: Array


def accumulator(x: Array) -> jnp.dtype:
    """Float32, or float64 for float64 inputs: the dtype of scores, softmax and sums."""
    return jnp.promote_types(x.dtype, jnp.float32)


def sees(
    query: Int[Array, "b t"],
    query_segment: Int[Array, "b t"],
    key: Int[Array, "b s"],
    key_segment: Int[Array, "b s"],
    window: int | None = None,
) -> Bool[Array, "b t s"]:
    """Causal and within the segment: key <= query in the row, same segment, which is not -1.

    With `window` the key stands at most window - 1 places before the query.
    """
    same = (key_segment[:, None] == query_segment[..., None]) & (key_segment[:, None] != -1)
    seen = same & (key[:, None] <= query[..., None])
    return seen if window is None else seen & (key[:, None] > query[..., None] - window)
