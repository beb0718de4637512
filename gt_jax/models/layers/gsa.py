"""`G`: gated sparse attention (arXiv 2601.15305): an indexer picks a few keys, gates before and after.

- The indexer reads its input without gradient; its own KL loss is what it learns from.
- The budget of keys follows the variance of the scores against a running mean, `variance_ema`, a statistic that
  training updates and checkpoints keep. (The paper's repository lowers the budget with variance, the system
  re-implemented here raises it; so do we.)
- With `variance` "row" the budget of a token depends on how many tokens its row has so far: a prefix, or a document
  alone, no longer gives the same answer. What later tokens contain still makes no difference.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from gt_jax.configs.model import GSAConfig
from gt_jax.devices.sharding import Rules, has_mesh, on_mesh, per_device
from gt_jax.models.layers.mixer import (
    MixerOutput,
    Place,
    gate_statistics,
    key_places,
    masked_mean,
    real_tokens,
    write_at,
)
from gt_jax.models.layers.primitives import Einsum, WeightSpec, rope, widen
from gt_jax.typing import Activations, PerToken, Tree
from pallas_kernels.positions import Positions
from pallas_kernels.sparse_attention.api import Indexer, Statistics, sparse_attention


def empty_cache(config: GSAConfig, batch: int, length: int, dtype: str) -> Tree:
    """The key/value cache before the first token, room for `length` tokens; segment -1 is never visible."""
    heads = (batch, length, config.heads, config.head_width)
    return {
        "key": jnp.zeros(heads, dtype),
        "value": jnp.zeros(heads, dtype),
        "indexer_key": jnp.zeros((batch, length, config.indexer_heads, config.indexer_width), dtype),
        "segments": jnp.full((batch, length), -1, jnp.int32),
    }


class GatedSparseAttention(nn.Module):
    """y = W_o( o * sigmoid(W_go x) ), o = sparse attention over values gated by sigmoid(W_gv x), RoPE on q and k."""

    config: GSAConfig
    width: int
    rules: Rules
    weights: WeightSpec

    def setup(self) -> None:
        c, d = self.config, self.width
        rules, weights = self.rules, self.weights
        heads = ((d, c.heads, c.head_width), ("embed", "heads", None), rules, weights)
        self.query, self.key, self.value = Einsum(*heads), Einsum(*heads), Einsum(*heads)
        self.value_gate, self.output_gate = Einsum(*heads), Einsum(*heads)
        index = ((d, c.indexer_heads, c.indexer_width), ("embed", "heads", None), rules, weights)
        self.indexer_query, self.indexer_key = Einsum(*index), Einsum(*index)
        self.indexer_weight = Einsum((d, c.indexer_heads), ("embed", "heads"), rules, weights)
        per_head = on_mesh(rules.spec("heads"))
        self.indexer_bias = self.param("indexer_bias", nn.initializers.zeros, (c.indexer_heads,), jnp.float32, per_head)
        self.head_importance = self.param("head_importance", nn.initializers.zeros, (c.heads,), jnp.float32, per_head)
        self.variance_ema = self.variable("statistics", "variance_ema", lambda: jnp.zeros((), jnp.float32))
        self.output = Einsum((c.heads, c.head_width, d), ("heads", None, "embed"), rules, weights)

    def __call__(self, x: Activations, place: Place, cache: Tree | None = None) -> MixerOutput:
        """Attend within each segment; with a cache, write the new keys at their positions and attend to all of it."""
        heads = ("batch", None, "heads", None)
        segment_ids, positions = place.segment_ids, place.positions
        query = self.query("btd,dhk->bthk", x, heads)
        turn = (positions, self.config.rope_base, self.config.rope)
        q, k = rope(query, *turn), rope(self.key("btd,dhk->bthk", x, heads), *turn)
        value_gate = jax.nn.sigmoid(widen(self.value_gate("btd,dhk->bthk", x, heads)))
        v = self.value("btd,dhk->bthk", x, heads) * value_gate.astype(q.dtype)
        frozen = jax.lax.stop_gradient(x)
        index_q = self.indexer_query("btd,dhk->bthk", frozen, heads)
        index_k = self.indexer_key("btd,dhk->bthk", frozen, heads)
        logits = self.indexer_weight("btd,dh->bth", frozen, ("batch", None, "heads"), accumulate=True, exact=True)
        weight = jax.nn.sigmoid(logits)
        new_cache, key_positions, key_segments = None, positions, segment_ids
        if cache is not None:
            new = {"key": k, "value": v, "indexer_key": index_k, "segments": segment_ids}
            new_cache = write_at(cache, new, place, self.rules)
            k, v, index_k = new_cache["key"], new_cache["value"], new_cache["indexer_key"]
            key_positions, key_segments = key_places(new_cache, self.rules)
        where = Positions(positions, segment_ids, key_positions, key_segments)
        o, statistics = self._attend(q, k, v, index_q, index_k, weight, where)
        real = real_tokens(segment_ids)
        gate_logits = self.output_gate("btd,dhk->bthk", x, heads)
        gated = o * jax.nn.sigmoid(widen(gate_logits)).astype(o.dtype)
        y = self.output("bthk,hkd->btd", gated, ("batch", None, None))
        return MixerOutput(
            y,
            *gate_statistics(weight, gate_logits, query),
            auxiliary_loss=self.config.indexer_loss * masked_mean(statistics.kl, real),
            entropy=masked_mean(statistics.entropy, real),
            score_variance=masked_mean(statistics.score_variance, real),
            cache=new_cache,
        )

    def gates(self, h: Activations) -> tuple[PerToken, PerToken, PerToken]:
        """`gate_statistics` of the indexer's weight, W_go h and W_q h."""
        h, heads = jax.lax.stop_gradient(h), ("batch", None, "heads", None)
        weight = self.indexer_weight("btd,dh->bth", h, ("batch", None, "heads"), accumulate=True, exact=True)
        logits = self.output_gate("btd,dhk->bthk", h, heads)
        return gate_statistics(jax.nn.sigmoid(weight), logits, self.query("btd,dhk->bthk", h, heads))

    def _attend(
        self, q: Array, k: Array, v: Array, index_q: Array, index_k: Array, weight: Array, positions: Positions
    ) -> tuple[Array, Statistics]:
        """The kernel on each device's own rows and heads."""
        c, rules = self.config, self.rules
        tokens, gates = rules.spec("batch", None, "heads", None), rules.spec("batch", None, "heads")
        per_head = rules.spec("heads")
        rows: Any = rules.spec("batch", None)
        head_axes = rules.mesh_axes("heads") if has_mesh() else ()

        def local(q, k, v, index_q, index_k, weight, bias, importance, ema, *place):
            indexer = Indexer(index_q, index_k, weight, bias, importance, ema)
            return sparse_attention(
                q, k, v, indexer, Positions(*place), k_base=c.k_base, k_min=c.k_min, k_max=c.k_max, sinks=c.sinks,
                score_scale=c.score_scale, variance=c.variance, head_axes=head_axes, implementation=c.implementation,
            )  # fmt: skip

        run = per_device(
            local,
            in_specs=(tokens, tokens, tokens, tokens, tokens, gates, per_head, per_head, P(), *([rows] * 4)),
            out_specs=(tokens, Statistics(rows, rows, rows, rows)),
        )
        bias, importance, ema = self.indexer_bias, self.head_importance, self.variance_ema.value
        return run(q, k, v, index_q, index_k, weight, bias, importance, ema, *positions)
