"""`D` of the GroundThink study (variant "groundthink"): a delta rule that remembers what came *after* each key.

- There is no query, no convolution, no output gate: the layer reads with the key it has just written with.
- The pair (k_{t-1}, v_t) is written when token t arrives, so an `S` layer that asks with the key of a token seen before
  gets the value of its successor, and nothing of a later token enters the state at t.
- The prediction is taken from the undecayed state. With a = e^g the rule S <- a S + beta k (v - S^T k)^T is the gated
  delta rule for value a v and rate beta / a, so it runs on `pallas_kernels.gated_delta_rule` in chunks.

Structure and widths as in the public repository 9to5ninja-projects/groundthink (version 7), whose five published
parameter counts come out exactly. Its later D layers start from the last state of the D layer below, which has seen the
whole row; here every layer starts empty, or in decoding from its own cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gt_jax.configs.model import DeltaNetConfig
from gt_jax.devices.sharding import Rules, gather_weight, on_mesh, per_device, reshard
from gt_jax.models.layers.deltanet import HeadGate, l2_normalise
from gt_jax.models.layers.mixer import MixerOutput, Place, gate_statistics, last_real, without_padding
from gt_jax.models.layers.primitives import Einsum, WeightSpec, widen
from gt_jax.typing import Activations, PerToken, Tokens, Tree
from pallas_kernels.gated_delta_rule.api import gated_delta_rule

KEEP_START = 2.0  # sigmoid(2) = 0.88 of the state is kept
WRITE_START = -2.0  # sigmoid(-2) = 0.12 of the error is written
LOWEST_LOG_KEEP = -30.0  # beta / a stays finite in float32; e^-30 of a state is nothing to it

class Pairs(NamedTuple):
    """What is written at each token: the key of the token before it with its own value.

    `log_keep` (g) and `beta` are those of the token before, too; at the first token of a segment key and beta are 0.
    `state` is what the first of these tokens goes on from.
    """

    key: Float[Array, "b t h k"]
    value: Float[Array, "b t hv v"]
    log_keep: Float[Array, "b t hv"]
    beta: Float[Array, "b t hv"]
    state: Float[Array, "b hv k v"]
    segment_ids: Tokens


class Link(NamedTuple):
    """What an `S` layer needs to read this layer's state at every position: the key projection and what was written."""

    key_weight: Float[Array, "d h k"]
    pairs: Pairs


def read_pairs(
    query: Float[Array, "b t h k"],
    pairs: Pairs,
    rules: Rules,
    chunk_size: int = 64,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t hv v"], Float[Array, "b hv k v"]]:
    """o_t = S_t^T query_t with S_t = a S_{t-1} + beta k (v - S_{t-1}^T k)^T, and the last state (float32).

    S_t holds the pairs up to (k_{t-1}, v_t) of t's segment. Memory O(t / chunk_size) states; each device its own heads.
    """
    keep = jnp.exp(pairs.log_keep)
    value = (keep[..., None] * widen(pairs.value)).astype(pairs.value.dtype)

    def local(q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array, segments: Array):
        return gated_delta_rule(
            q, k, v, g, beta, initial_state=state, segment_ids=segments, scale=1.0, chunk_size=chunk_size,
            return_state=True, implementation=implementation, most_beta=1.0,
        )  # fmt: skip

    # beta / keep may exceed 1, but between two tokens stands beta keep_{i-1} .. keep_{j+1}, and that does not
    tokens, gates = rules.spec("batch", None, "heads", None), rules.spec("batch", None, "heads")
    states = rules.spec("batch", "heads", None, None)
    in_specs = (tokens, tokens, tokens, gates, gates, states, rules.spec("batch", None))
    run = per_device(local, in_specs, (tokens, states))
    query = query.astype(pairs.key.dtype)
    return run(query, pairs.key, value, pairs.log_keep, pairs.beta / keep, pairs.state, pairs.segment_ids)


def project_keys(
    x: Activations, weight: Float[Array, "d h k"], rules: Rules, weights: WeightSpec
) -> Float[Array, "b t h k"]:
    """W_k x in the compute dtype; `weight` as it is stored."""
    dtype = jnp.dtype(weights.compute)
    weight = gather_weight(weight.astype(dtype), x, rules, "embed", "heads", None)
    out = on_mesh(rules.spec("batch", None, "heads", None))
    return jnp.einsum("btd,dhk->bthk", x.astype(dtype), weight, out_sharding=out)


def empty_cache(config: DeltaNetConfig, batch: int, dtype: str) -> Tree:
    """The decode cache before the first token: no state, no token before it (segment -1 is no document)."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return {
        "key": jnp.zeros((batch, config.heads, config.key_width), dtype),
        "log_keep": jnp.zeros((batch, config.value_heads), wide),
        "beta": jnp.zeros((batch, config.value_heads), wide),
        "segment": jnp.full((batch,), -1, jnp.int32),
        "state": jnp.zeros((batch, config.value_heads, config.key_width, config.value_width), wide),
    }


class KeyProjection(nn.Module):
    """A key projection whose weight `w` can be handed on."""

    shape: tuple[int, int, int]
    rules: Rules
    weights: WeightSpec

    def setup(self) -> None:
        spec = on_mesh(self.rules.spec("embed", "heads", None))
        self.w = self.param("w", self.weights.init, self.shape, jnp.dtype(self.weights.param), spec)

    def __call__(self, x: Activations) -> Float[Array, "b t h k"]:
        return project_keys(x, self.w, self.rules, self.weights)


class GroundThinkDeltaNet(nn.Module):
    """y = W_o S_t^T k_{t-1}, the state S read with the key that token t's value was just written under.

    k = normalise(W_k x); v = W_v x; beta = sigmoid(W_b x + b - 2); a = sigmoid(W_a x + b + 2);
    S_t = a_{t-1} S_{t-1} + beta_{t-1} k_{t-1} (v_t - S_{t-1}^T k_{t-1})^T, empty at the first token of a segment.

    `cue_query` [d, k] and `cue_query_bias` [k] belong to the published model and its counts but nothing reads them,
    there as here: they stay as drawn.
    """

    config: DeltaNetConfig
    width: int
    rules: Rules
    weights: WeightSpec
    epsilon: float = 1e-6  # every D layer is given one; there is no norm here

    def setup(self) -> None:
        c, d, rules, weights = self.config, self.width, self.rules, self.weights
        self.key = KeyProjection((d, c.heads, c.key_width), rules, weights)
        self.value = Einsum((d, c.value_heads, c.value_width), ("embed", "heads", None), rules, weights)
        self.beta = HeadGate(d, c.value_heads, rules)
        self.decay = HeadGate(d, c.value_heads, rules)
        self.output = Einsum((c.value_heads, c.value_width, d), ("heads", None, "embed"), rules, weights)
        dtype, zeros = jnp.dtype(weights.param), nn.initializers.zeros
        self.param("cue_query", weights.init, (d, c.key_width), dtype, on_mesh(rules.spec("embed", None)))
        self.param("cue_query_bias", zeros, (c.key_width,), dtype, on_mesh(rules.spec(None)))

    def __call__(self, x: Activations, place: Place, cache: Tree | None = None) -> MixerOutput:
        """Mix the tokens of each segment; with a cache, go on from it and return the new one; `link` is a `Link`."""
        start = empty_cache(self.config, x.shape[0], self.weights.compute) if cache is None else cache
        start = self._lay_out(start)
        projected = self.key(x)
        value = self.value("btd,dhv->bthv", x, ("batch", None, "heads", None))
        now = {
            "key": l2_normalise(projected),
            "log_keep": jnp.maximum(jax.nn.log_sigmoid(self.decay(x) + KEEP_START), LOWEST_LOG_KEEP),
            "beta": jax.nn.sigmoid(self.beta(x) + WRITE_START),
            "segment": place.segment_ids,
        }
        pairs = _pairs(start, now, value)
        if cache is not None:  # the state goes through padding as it is; padding follows nothing and writes nothing
            of_state = without_padding(place.segment_ids, start["segment"], self.rules)
            continues = (start["segment"] == of_state[:, 0])[:, None, None, None]
            pairs = pairs._replace(segment_ids=of_state, state=jnp.where(continues, start["state"], 0.0))
        o, state = read_pairs(pairs.key, pairs, self.rules, self.config.chunk_size, self.config.implementation)
        y = self.output("bthv,hvd->btd", o, ("batch", None, None))
        new_cache = None
        if cache is not None:
            axes = {"key": ("heads", None), "log_keep": ("heads",), "beta": ("heads",), "segment": ()}
            last = {name: last_real(start[name][:, None], array, place.segment_ids, self.rules, axes[name])[:, 0]
                    for name, array in now.items()}  # fmt: skip
            new_cache = {**last, "state": state}
        zero = jnp.zeros((), jnp.float32)
        seen = _open_gate(now["beta"], projected)
        return MixerOutput(y, *seen, zero, zero, zero, new_cache, Link(self.key.w, pairs))

    def gates(self, h: Activations) -> tuple[PerToken, PerToken, PerToken]:
        """`gate_statistics` of beta and W_k h; there is no output gate, so it is open."""
        h = jax.lax.stop_gradient(h)
        return _open_gate(jax.nn.sigmoid(self.beta(h) + WRITE_START), self.key(h))

    def _lay_out(self, cache: Tree) -> Tree:
        """The cache laid out like the activations: rows with the batch, heads with the heads."""
        rules = self.rules
        specs: dict[str, Any] = {
            "key": rules.spec("batch", "heads", None), "log_keep": rules.spec("batch", "heads"),
            "beta": rules.spec("batch", "heads"), "segment": rules.spec("batch"),
            "state": rules.spec("batch", "heads", None, None),
        }  # fmt: skip
        return {name: reshard(array, specs[name]) for name, array in cache.items()}


def _open_gate(
    beta: Float[Array, "b t hv"], key: Float[Array, "b t h k"]
) -> tuple[PerToken, PerToken, PerToken]:
    """`gate_statistics` of a mixer without an output gate: 1."""
    write, _, spread = gate_statistics(beta, key, key)
    return write, jnp.ones_like(write), spread


def _pairs(start: Tree, now: Tree, value: Array) -> Pairs:
    """The pairs of a row from what its tokens are (`now`, [b, t, …]) and what the token before the first was."""
    before = {name: jnp.concatenate([start[name][:, None].astype(array.dtype), array[:, :-1]], axis=1)
              for name, array in now.items()}  # fmt: skip
    follows = (before["segment"] == now["segment"]) & (now["segment"] > 0)  # padding follows nothing, not even padding
    key = jnp.where(follows[..., None, None], before["key"], 0.0)
    beta = jnp.where(follows[..., None], before["beta"], 0.0)
    log_keep = jnp.where(follows[..., None], before["log_keep"], 0.0)
    state = jnp.where(follows[:, 0, None, None, None], start["state"], 0.0)
    return Pairs(key, value, log_keep, beta, state, now["segment"])
