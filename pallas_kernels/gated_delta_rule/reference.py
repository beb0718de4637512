"""The gated delta rule one token at a time: the definition that every other implementation is held to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def gated_delta_rule_step(
    q: Float[Array, "b h k"],
    k: Float[Array, "b h k"],
    v: Float[Array, "b hv v"],
    g: Float[Array, "b hv"],
    beta: Float[Array, "b hv"],
    state: Float[Array, "b hv k v"],
    scale: float | None = None,
) -> tuple[Float[Array, "b hv v"], Float[Array, "b hv k v"]]:
    """One token: decay, write the prediction error, read.

    S <- e^g S;  S <- S + beta k (v - S^T k)^T;  o = scale S^T q, with the state in float32 (float64 for float64
    inputs) and o in v's dtype. Consecutive value heads share one q/k head; scale defaults to k^-0.5.
    Source: arXiv 2412.06464, equation 10.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    group = v.shape[1] // q.shape[1]
    query, key = (jnp.repeat(x.astype(dtype), group, axis=1) for x in (q, k))
    decayed = jnp.exp(g.astype(dtype))[..., None, None] * state.astype(dtype)
    prediction = (decayed * key[..., None]).sum(-2)
    error = beta.astype(dtype)[..., None] * (v.astype(dtype) - prediction)
    new_state = decayed + key[..., None] * error[..., None, :]
    output = scale * (new_state * query[..., None]).sum(-2)
    return output.astype(v.dtype), new_state


def gated_delta_rule(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t hv v"],
    g: Float[Array, "b t hv"],
    beta: Float[Array, "b t hv"],
    initial_state: Float[Array, "b hv k v"],
    segment_ids: Int[Array, "b t"] | None,
    scale: float,
    chunk_size: int,
) -> tuple[Float[Array, "b t hv v"], Float[Array, "b hv k v"]]:
    """Scan `gated_delta_rule_step` over the tokens; the state is emptied where the segment id changes.

    `chunk_size` is not used: every implementation has this signature.
    """
    del chunk_size
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    keep = jnp.ones(q.shape[:2], dtype)
    if segment_ids is not None:
        keep = keep.at[:, 1:].set((segment_ids[:, 1:] == segment_ids[:, :-1]).astype(dtype))

    def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        *operands, kept = token
        query, key, value, decay, rate = operands
        output, state = gated_delta_rule_step(query, key, value, decay, rate, state * kept[:, None, None, None], scale)
        return state, output

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta, keep))
    state, outputs = jax.lax.scan(step, initial_state.astype(dtype), tokens)
    return jnp.moveaxis(outputs, 0, 1), state
