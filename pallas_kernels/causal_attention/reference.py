"""Causal attention over a dense mask: the definition that memory-lean implementations are tested against."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.positions import Positions, sees


def causal_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s n k"],
    v: Float[Array, "b s n k"],
    positions: Positions,
    window: int | None,
    library: Literal["xla", "cudnn"] = "xla",
) -> Float[Array, "b t h k"]:
    """o = softmax(q.k / sqrt(k) over the visible keys) v, head j of q with head j // (h / n) of k; float32 softmax.

    `jax.nn.dot_product_attention` under a mask; memory O(t * s) a head, with `library` "cudnn" that of the mask. A
    query that sees no key gets zeros.
    """
    visible = sees(*positions, window)
    o = jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], implementation=library)
    return jnp.where(jnp.any(visible, axis=-1)[..., None, None], o, 0)
