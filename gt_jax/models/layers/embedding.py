"""Token embedding: a plain table, the Kronecker code of a token's bytes (arXiv 2605.29459), or the sum of both."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from gt_jax.configs.model import EmbeddingConfig
from gt_jax.devices.sharding import Rules, on_mesh, per_device, reshard
from gt_jax.models.layers.primitives import RMSNorm, WeightSpec, widen
from gt_jax.models.layers.table_rows import look_up, table_rows
from gt_jax.text.token_bytes import default_texts, token_table
from gt_jax.typing import Activations, Tokens

BYTES = 256
DEVIATION_EPSILON = 1e-6


class Embedding(nn.Module):
    """tokens -> [b, t, d] in the compute dtype: table[token], RMSNorm(kronecker(bytes of token)), or their sum.

    The bytes of every token are variables that are not trained, collection "statistics": `token_bytes`
    [vocab, token_bytes] and `token_length` [vocab]. They start from `default_texts`; a checkpoint may hold others.
    """

    config: EmbeddingConfig
    vocab: int
    width: int
    rules: Rules
    weights: WeightSpec
    epsilon: float = 1e-6

    def setup(self) -> None:
        rules, weights = self.rules, self.weights
        if self.config.kind != "kronecker":
            stored = on_mesh(rules.spec(None, "embed"))
            self.table = self.param("table", weights.init, (self.vocab, self.width), jnp.dtype(weights.param), stored)
        if self.config.normed:
            self.norm = RMSNorm(self.width, rules, self.epsilon)
        if self.config.kind != "table":
            start = functools.cache(lambda: token_table(default_texts(self.vocab), self.config.token_bytes))
            self.token_bytes = self.variable("statistics", "token_bytes", lambda: self._whole(start()[0]))
            self.token_length = self.variable("statistics", "token_length", lambda: self._whole(start()[1]))
            self.kronecker = Kronecker(self.config.token_bytes, self.width, rules, weights)
            self.norm = RMSNorm(self.width, rules, self.epsilon)

    def __call__(self, tokens: Tokens) -> Activations:
        dtype = jnp.dtype(self.weights.compute)
        if self.config.kind == "table":
            rows = self._rows(self.table, tokens).astype(dtype)
            return self.norm(rows) if self.config.normed else rows
        text = self._look_up(self.token_bytes.value, tokens), self._look_up(self.token_length.value, tokens)
        coded = self.norm(self.kronecker(*text))
        if self.config.kind == "kronecker+table":
            coded += widen(self._rows(self.table, tokens))
        return coded.astype(dtype)

    def unembed(self, hidden: Activations) -> Float[Array, "b t vocab"]:
        """hidden . table[token] for every token, float32: the tied unembedding."""
        table = reshard(self.table.astype(self.weights.compute), self.rules.gathered(None, "embed"))
        place, sums = on_mesh(self.rules.spec("batch", None, None)), jnp.promote_types(table.dtype, jnp.float32)
        hidden = hidden.astype(table.dtype)
        return jnp.einsum("btd,vd->btv", hidden, table, out_sharding=place, preferred_element_type=sums)

    def _rows(self, table: Float[Array, "vocab d"], tokens: Tokens) -> Activations:
        return table_rows(table, tokens, self.rules)

    def _look_up(self, table: Array, tokens: Tokens) -> Array:
        return look_up(table, tokens, self.rules)

    def _whole(self, table: np.ndarray) -> Array:
        return reshard(jnp.asarray(table), self.rules.spec(*(None,) * table.ndim))


class Kronecker(nn.Module):
    """y = W^T (M - mean M) / (std M + 1e-6), M[byte, position] = 1/sqrt(length), flattened; float32.

    M has `positions` * 256 entries, at most `positions` of them not 0, so y is a few rows of W, scaled, less a multiple
    of their column sum. std divides by (entries - 1). A token without bytes has y = 0.
    """

    positions: int
    width: int
    rules: Rules
    weights: WeightSpec

    @nn.compact
    def __call__(self, text: UInt8[Array, "b t positions"], length: Int[Array, "b t"]) -> Activations:
        axes, shape = (None, None, "embed"), (BYTES, self.positions, self.width)
        spec = on_mesh(self.rules.spec(*axes))
        w = self.param("w", self.weights.init, shape, jnp.dtype(self.weights.param), spec)
        w = reshard(w.astype(self.weights.compute), self.rules.gathered(*axes))
        rows, tokens = self.rules.spec("batch", None, None), self.rules.spec("batch", None)
        whole: Any = self.rules.spec(None, None, None)
        summed = per_device(byte_rows, (whole, rows, tokens), rows)(w, text, length)
        entries = BYTES * self.positions
        count = length.astype(summed.dtype)
        each = jax.lax.rsqrt(jnp.maximum(count, 1))
        mean = jnp.sqrt(count) / entries
        deviation = jnp.sqrt(jnp.where(count > 0, 1 - count / entries, 0) / (entries - 1))  # the squares sum to 1
        column_sum = jnp.sum(widen(w), axis=(0, 1))
        centred = each[..., None] * summed - mean[..., None] * column_sum[None, None]
        return centred / (deviation + DEVIATION_EPSILON)[..., None]


@jax.custom_vjp
def byte_rows(
    w: Float[Array, "bytes positions d"], text: UInt8[Array, "b t positions"], length: Int[Array, "b t"]
) -> Activations:
    """sum_p w[text_p, p] over the first `length` positions of each token: [b, t, d], sums and gradient in float32.

    A loop over positions up to the longest token of the batch: neither pass holds more than one row a token.
    """
    index = _indices(text, length)

    def add(position: Array, total: Array) -> Array:
        rows = jax.lax.dynamic_index_in_dim(w, position, axis=1, keepdims=False)
        return total + widen(rows.at[index[position]].get(mode="fill", fill_value=0))

    start = jnp.zeros((*length.shape, w.shape[-1]), jnp.promote_types(w.dtype, jnp.float32))
    return jax.lax.fori_loop(0, jnp.max(length), add, start)


def _indices(text: Array, length: Array) -> Array:
    """[positions, b, t]: the byte there; `BYTES`, which is out of range and reads nothing, beyond the token's end."""
    positions = jnp.arange(text.shape[-1], dtype=length.dtype)
    inside = positions[None, None] < length[..., None]
    return jnp.moveaxis(jnp.where(inside, text.astype(jnp.int32), BYTES), -1, 0)


def _byte_rows_forward(w: Array, text: Array, length: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return byte_rows(w, text, length), (w, text, length)


def _byte_rows_backward(saved: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, None, None]:
    """Each position's rows collect the gradients of the tokens that read them."""
    w, text, length = saved
    index = _indices(text, length)

    def collect(position: Array, total: Array) -> Array:
        rows = jnp.zeros(w.shape[::2], gradient.dtype).at[index[position]].add(gradient, mode="drop")
        return jax.lax.dynamic_update_index_in_dim(total, rows.astype(total.dtype), position, 1)

    return jax.lax.fori_loop(0, jnp.max(length), collect, jnp.zeros_like(w)), None, None


byte_rows.defvjp(_byte_rows_forward, _byte_rows_backward)
