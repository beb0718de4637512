"""Multi-token prediction: one more layer looks one token ahead and predicts the token after it (arXiv 2404.19737).

x_t = W [h_t ; embedding of token t+1] into stream 0 -> one G layer -> mean over streams; final norm and unembedding are
the model's own. h_t is the model's state after its final norm.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules
from gt_jax.models.layers.adaptive_depth import stream_mean
from gt_jax.models.layers.hyper_connections import to_streams
from gt_jax.models.layers.mixer import Place
from gt_jax.models.layers.primitives import Einsum, WeightSpec
from gt_jax.models.layers.residual import Layer
from gt_jax.typing import Activations, Scalar


class MultiTokenPrediction(nn.Module):
    """(state that predicts token t+2 [b,t,d], indexer loss); the last token of a row sees zeros as its next."""

    config: ModelConfig
    rules: Rules

    @nn.compact
    def __call__(self, hidden: Activations, embedded: Activations, place: Place) -> tuple[Activations, Scalar]:
        c, rules = self.config, self.rules
        weights = WeightSpec(c.param_dtype, c.compute_dtype, c.init_std)
        ahead = jnp.concatenate([embedded[:, 1:], jnp.zeros_like(embedded[:, :1])], axis=1)
        both = jnp.stack([hidden.astype(embedded.dtype), ahead], axis=2)
        fusion = Einsum((2, c.width, c.width), (None, "embed", None), rules, weights, name="fusion")
        x = fusion("btcd,cde->bte", both, ("batch", None, None))
        state = x if c.hyper is None else to_streams(x, c.hyper.streams)
        plain = c.plain.replace(stack=c.stack.replace(kind="residual", skips=()))
        # not in the scan over blocks: without a barrier the compiler would keep what it can instead of computing again
        again = c.remat in ("layer", "block", "kernels") and not self.is_initializing()
        update = nn.remat(Layer.update) if again else Layer.update
        one = update(Layer("G", plain, rules, with_gain=False, name="layer"), state, place)
        return stream_mean(state + one.value), jnp.sum(one.statistics.auxiliary_loss)
