"""What the TPU kernels of the gated delta rule cost, counted: for the compiler, and for who measures them.

Products as the equations of `tpu.forward` and `tpu.backward` have them, C tokens a chunk. Forward: K K^T and Q K^T a
key head; K S, Q S, K^T U, the inverse (C^3 / 3), A (..) and P U a value head. Backward: the scores again; K S, Q S,
Y S^T, dO S^T, K dS', U dS'^T, Q^T dO, K^T Y; U, P^T dO, A^T dU, dO U^T, Y U^T; dP and dL with K, their transposes with
Q and K.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl

from pallas_kernels.gated_delta_rule.tpu.packs import Plan


class Sizes(NamedTuple):
    """Of a chunk: its tokens, heads and their widths."""

    chunk: int
    key_heads: int
    value_heads: int
    key_width: int
    value_width: int


def chunk_flops(sizes: Sizes, backward: bool) -> float:
    """Of a chunk, all heads: its matrix products."""
    c, key_heads, value_heads, k, v = sizes
    with_state, of_keys, of_values = 2 * c * k * v, 2 * c**2 * k, 2 * c**2 * v
    scores = 2 * of_keys * key_heads
    if backward:
        return float(scores + (8 * with_state + 4 * of_keys + 5 * of_values) * value_heads)
    return scores + (3 * with_state + 2 * of_values + c**3 / 3) * value_heads


def estimate(
    plan: Plan, backward: bool, chunks: int, steps: int, arrays: Sequence[jax.Array | jax.ShapeDtypeStruct]
) -> pl.CostEstimate:
    """Of `chunks` in `steps` groups of heads, as they are laid out, with operands and results `arrays`, each once.

    The exponentials are those of the decay from one token of a chunk to another.
    """
    sizes = Sizes(plan.chunk, plan.key_heads, plan.heads, plan.key_width, plan.value_width)
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    exponentials = chunks * steps * plan.heads * plan.chunk**2
    return pl.CostEstimate(
        flops=round(chunks * steps * chunk_flops(sizes, backward)), transcendentals=exponentials, bytes_accessed=moved
    )
