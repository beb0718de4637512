"""Token embedding: a plain table."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from gt_jax.layers.primitives import WeightSpec
from gt_jax.sharding import Rules, on_mesh, reshard
from gt_jax.typing import Activations, Tokens


class Embedding(nn.Module):
    """x = table[token], [vocab, d] -> [b, t, d] in the compute dtype."""

    vocab: int
    width: int
    rules: Rules
    weights: WeightSpec

    @nn.compact
    def __call__(self, tokens: Tokens) -> Activations:
        spec = on_mesh(self.rules.spec(None, "embed"))
        table = self.param("table", self.weights.init, (self.vocab, self.width), jnp.dtype(self.weights.param), spec)
        table = reshard(table.astype(self.weights.compute), self.rules.gathered(None, "embed"))
        return table.at[tokens].get(out_sharding=on_mesh(self.rules.spec("batch", None, None)))
