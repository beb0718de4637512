"""Inverse of a unit lower triangular matrix by the ladder: matrix products only, every intermediate a true inverse.

The inverses of the diagonal blocks of size s give those of size 2s:

    [[I + L1, 0], [L21, I + L2]]^-1 = [[X1, 0], [-X2 L21 X1, X2]]

so entries stay as bounded as the answer's. (Powers of L, as in a Neumann series, are not: with correlated keys they
overflow what they later cancel.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_BASE = 8  # below this the blocks are cheaper masked out of one small product than cut out


def invert_unit_lower(
    lower: Float[Array, "*batch c c"], precision: jax.lax.Precision = jax.lax.Precision.HIGHEST
) -> Float[Array, "*batch c c"]:
    """(I + L)^-1 for strictly lower triangular L, c a power of two; what is on and above the diagonal must be zero."""
    size = lower.shape[-1]
    base = min(_BASE, size)
    inverse = _invert_small(_diagonal_blocks(lower, base, base), precision)
    step = base
    while step < size:
        upper_left, lower_right = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        product = jnp.matmul(_diagonal_blocks(lower, 2 * step, step), upper_left, precision=precision)
        lower_left = -jnp.matmul(lower_right, product, precision=precision)
        top = jnp.concatenate([upper_left, jnp.zeros_like(upper_left)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([lower_left, lower_right], axis=-1)], axis=-2)
        step *= 2
    return inverse[..., 0, :, :]


def _diagonal_blocks(matrix: Array, size: int, width: int) -> Array:
    """[..., c, c] -> [..., c/size, width, width]: of each diagonal block of that size, the lower left corner."""
    starts = range(0, matrix.shape[-1], size)
    corners = [matrix[..., start + size - width : start + size, start : start + width] for start in starts]
    return jnp.stack(corners, axis=-3)


def _invert_small(lower: Array, precision: jax.lax.Precision) -> Array:
    """The same ladder over a whole small matrix: X <- X - X (L_s X), L_s the lower left s x s of each 2s block."""
    size = lower.shape[-1]
    row, column = np.arange(size)[:, None], np.arange(size)[None, :]
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    step = 1
    while step < size:
        rung = (row // (2 * step) == column // (2 * step)) & (row // step % 2 == 1) & (column // step % 2 == 0)
        part = jnp.where(np.broadcast_to(rung, lower.shape), lower, 0)
        if step == 1:
            inverse = inverse - part
        else:
            inverse = inverse - jnp.matmul(inverse, jnp.matmul(part, inverse, precision=precision), precision=precision)
        step *= 2
    return inverse
