"""What Pallas kernels for a TPU share: products on the matrix unit, and the lanes of the vector unit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

LANES = 128

Ref = Any  # of a block or of scratch, in VMEM

Form = tuple[tuple[int, ...], tuple[int, ...]]

NN: Form = ((1,), (0,))  # X Y

NT: Form = ((1,), (1,))  # X Y^T

TN: Form = ((0,), (0,))  # X^T Y


def multiply(x: Array, y: Array, form: Form, exact: bool) -> Array:
    """One pass of the matrix unit, float32 sums; `exact` keeps float32 operands whole."""
    if exact:
        x, y, precision = x.astype(jnp.float32), y.astype(jnp.float32), jax.lax.Precision.HIGHEST
    else:
        x, y, precision = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(x, y, (form, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def split(x: Array) -> list[Array]:
    """x = high + low in bfloat16, to 2^-17 of x."""
    if x.dtype == jnp.bfloat16:
        return [x]
    high = x.astype(jnp.bfloat16)
    return [high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)]


def lane_index(shape: tuple[int, ...]) -> Array:
    """The lane of every element."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1)
