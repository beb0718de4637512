"""What a mixer returns, whichever it is: the value, the statistics adaptive depth reads, losses, the new cache."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gt_jax.layers.primitives import widen
from gt_jax.typing import Activations, PerToken, Scalar, Tokens, Tree


class MixerOutput(NamedTuple):
    """`write_gate`, `output_gate`, `head_spread` carry no gradient; the scalars are means over tokens, float32."""

    y: Activations
    write_gate: PerToken
    output_gate: PerToken
    head_spread: PerToken
    auxiliary_loss: Scalar
    entropy: Scalar
    score_variance: Scalar
    cache: Tree


def real_tokens(segment_ids: Tokens) -> PerToken:
    """1 for a token of a document, 0 for padding (segment id 0); float32."""
    return (segment_ids > 0).astype(jnp.float32)


def masked_mean(x: PerToken, mask: PerToken) -> Scalar:
    """Mean of x over the tokens with mask 1; 0 where there is none."""
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def gate_statistics(
    write: Float[Array, "b t w"], output_logits: Float[Array, "b t hv v"], query: Float[Array, "b t h k"]
) -> tuple[PerToken, PerToken, PerToken]:
    """Mean write gate, mean sigmoid of the output-gate logits, std (n-1) over heads of |query|; without gradient."""
    write, output_logits, query = jax.lax.stop_gradient((write, output_logits, query))
    norms = jnp.sqrt(jnp.sum(jnp.square(widen(query)), axis=-1))
    heads = norms.shape[-1]
    spread = jnp.sqrt(jnp.var(norms, axis=-1) * (heads / max(heads - 1, 1)))
    output = jnp.mean(jax.nn.sigmoid(widen(output_logits)), axis=(-2, -1))
    return jnp.mean(widen(write), axis=-1), output, spread
