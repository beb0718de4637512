"""Causal attention over a dense mask: the definition that memory-lean implementations are tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.positions import Positions, accumulator, sees


def causal_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s n k"],
    v: Float[Array, "b s n k"],
    positions: Positions,
    window: int | None,
) -> Float[Array, "b t h k"]:
    """o = softmax(q.k / sqrt(k) over the visible keys) v, head j of q with head j // (h / n) of k; float32 softmax.

    Memory O(t * s) a head. A query that sees no key gets zeros.
    """
    wide = accumulator(q)
    visible = sees(*positions, window)[:, None, None]
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    logits = jnp.einsum("btngk,bsnk->bngts", grouped, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    attention = jnp.where(visible, jax.nn.softmax(jnp.where(visible, logits, -1e30), axis=-1), 0.0)
    o = jnp.einsum("bngts,bsnk->btngk", attention.astype(v.dtype), v, preferred_element_type=wide)
    return o.reshape(q.shape).astype(v.dtype)


def by_cudnn(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s n k"],
    v: Float[Array, "b s n k"],
    positions: Positions,
    window: int | None,
) -> Float[Array, "b t h k"]:
    """The same by the flash attention of a GPU's cuDNN, which takes half precision alone; memory that of the mask."""
    visible = sees(*positions, window)
    o = jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], implementation="cudnn")
    return jnp.where(jnp.any(visible, axis=-1)[..., None, None], o, 0)
