"""`D`: Gated DeltaNet (arXiv 2412.06464), linear attention that writes with the delta rule and forgets with a gate.

- Decay comes before the prediction error, the read after the write.
- What the origin system does otherwise is one field of `DeltaNetConfig` each and one pure function or argument here.
- Short convolutions, recurrent state and decode window never cross a segment boundary.
- The recurrence itself is `pallas_kernels.gated_delta_rule`, run on each device's own heads.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gt_jax.configs.model import DeltaNetConfig
from gt_jax.devices.sharding import Rules, gather_weight, on_mesh, per_device, reshard
from gt_jax.models.layers.mixer import MixerOutput, Place, gate_statistics, last_real, without_padding
from gt_jax.models.layers.primitives import (
    INIT,
    Einsum,
    RMSNorm,
    WeightSpec,
    float32_einsum,
    rope,
    short_convolution,
    widen,
)
from gt_jax.typing import Activations, PerToken, Tokens, Tree
from pallas_kernels.gated_delta_rule.api import gated_delta_rule

ROPE_BASE = 10000.0


def l2_normalise(x: Float[Array, "... k"]) -> Float[Array, "... k"]:
    """x / |x| in float32; 0 stays 0."""
    wide = widen(x)
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def log_decay(
    logits: Float[Array, "b t hv"], a_log: Float[Array, " hv"], dt_bias: Float[Array, " hv"], floor: float | None = None
) -> Float[Array, "b t hv"]:
    """g = max(-exp(A_log) softplus(logits + dt_bias), floor) <= 0, float32; None is no floor."""
    wide = widen(logits) + dt_bias[None, None]
    g = -jnp.exp(a_log)[None, None] * jax.nn.softplus(wide)
    return g if floor is None else jnp.maximum(g, floor)


def skip_read(
    q: Float[Array, "b t h k"], k: Float[Array, "b t h k"], v: Float[Array, "b t hv v"], strength: Float[Array, " hv"]
) -> Float[Array, "b t hv v"]:
    """D_h (q.k) v, float32, with the q and k that value head h reads and writes with; not scaled like the read."""
    match = jnp.repeat(jnp.sum(widen(q) * widen(k), axis=-1), v.shape[2] // q.shape[2], axis=2)
    return (match * widen(strength)[None, None])[..., None] * widen(v)


def gated(
    normed: Float[Array, "b t hv v"], logits: Float[Array, "b t hv v"], activation_on: Literal["gate", "output"]
) -> Float[Array, "b t hv v"]:
    """normed * SiLU(logits), or with `activation_on` "output" SiLU(normed) * logits; SiLU in float32."""
    plain, active = (normed, logits) if activation_on == "gate" else (logits, normed)
    return plain.astype(normed.dtype) * jax.nn.silu(widen(active)).astype(normed.dtype)


def init_a_log(key: Array, shape: tuple[int, ...], dtype: Any, out_sharding: Any = None) -> Array:
    """log U(0, 16), bounded away from log 0."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1e-3, 16.0, out_sharding=out_sharding))


def init_dt_bias(key: Array, shape: tuple[int, ...], dtype: Any, out_sharding: Any = None) -> Array:
    """Inverse softplus of a step drawn log-uniformly from [1e-3, 1e-1]: memories of 10 to 1000 tokens at A = 1."""
    low, high = jnp.log(1e-3), jnp.log(1e-1)
    step = jnp.exp(jax.random.uniform(key, shape, dtype, low, high, out_sharding=out_sharding))
    return step + jnp.log(-jnp.expm1(-step))


def empty_cache(config: DeltaNetConfig, batch: int, dtype: str) -> Tree:
    """The decode cache before the first token: zero state and windows; segment -1 is no document."""
    window = config.conv_width - 1
    keys = (batch, window, config.heads, config.key_width)
    values = (batch, window, config.value_heads, config.value_width)
    state = (batch, config.value_heads, config.key_width, config.value_width)
    return {
        "query_window": jnp.zeros(keys, dtype),
        "key_window": jnp.zeros(keys, dtype),
        "value_window": jnp.zeros(values, dtype),
        "segments": jnp.full((batch, window), -1, jnp.int32),
        "state": jnp.zeros(state, jnp.promote_types(dtype, jnp.float32)),
    }


class HeadGate(nn.Module):
    """x W + b, one number a head, in float32 whatever the compute dtype; without `biased` x W."""

    width: int
    heads: int
    rules: Rules
    biased: bool = True

    @nn.compact
    def __call__(self, x: Activations) -> Float[Array, "b t hv"]:
        spec = self.rules.spec("embed", "heads")
        w = self.param("w", INIT, (self.width, self.heads), jnp.float32, on_mesh(spec))
        out = on_mesh(self.rules.spec("batch", None, "heads"))
        w = gather_weight(w, x, self.rules, "embed", "heads")
        logits = float32_einsum("btd,dh->bth", x, w, out_sharding=out)
        if not self.biased:
            return logits
        b = self.param("b", nn.initializers.zeros, (self.heads,), jnp.float32, on_mesh(self.rules.spec("heads")))
        return logits + b[None, None]


class Convolution(nn.Module):
    """`short_convolution` with one learned tap vector a channel, float32, uniform in +-1/sqrt(taps) at init.

    With `biased` each channel has a bias too, 0 at init.
    """

    shape: tuple[int, int, int]
    rules: Rules
    biased: bool = False

    @nn.compact
    def __call__(self, x: Array, segment_ids: Tokens, window_segments: Array, window: Array) -> Array:
        bound = self.shape[0] ** -0.5

        def init(key: Array, shape: tuple[int, ...], dtype: Any, out_sharding: Any = None) -> Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

        weight = self.param("w", init, self.shape, jnp.float32, on_mesh(self.rules.spec(None, "heads", None)))
        bias = None
        if self.biased:
            spec = on_mesh(self.rules.spec("heads", None))
            bias = self.param("b", nn.initializers.zeros, self.shape[1:], jnp.float32, spec)
        return short_convolution(x, weight, segment_ids, window, window_segments, bias)


class GatedDeltaNet(nn.Module):
    """y = W_o( RMSNorm(o) * SiLU(W_g x) ), o the gated delta rule on short-convolved, normalised q, k and v.

    q, k = normalise(SiLU(conv(W x))); v = SiLU(conv(W_v x)); beta = beta_max sigmoid(W_b x + b);
    g = -exp(A_log) softplus(W_a x + b_a + dt_bias);  S <- e^g S + k (beta (v - e^g S^T k))^T;  o = k_width^-0.5 S^T q.
    Variants: rotary q and k before they are normalised (`rope`), a bias in conv, another scale of the read, `skip_read`
    added to it, no bias b and b_a, a floor of g, SiLU on the other factor of `gated`.
    """

    config: DeltaNetConfig
    width: int
    rules: Rules
    weights: WeightSpec
    epsilon: float = 1e-6

    def setup(self) -> None:
        c, d = self.config, self.width
        rules, weights = self.rules, self.weights
        keys = ((d, c.heads, c.key_width), ("embed", "heads", None), rules, weights)
        values = ((d, c.value_heads, c.value_width), ("embed", "heads", None), rules, weights)
        self.query, self.key = Einsum(*keys), Einsum(*keys)
        self.value, self.gate = Einsum(*values), Einsum(*values)
        self.beta = HeadGate(d, c.value_heads, rules, c.head_gate_bias)
        self.decay = HeadGate(d, c.value_heads, rules, c.head_gate_bias)
        per_head = on_mesh(rules.spec("heads"))
        self.a_log = self.param("a_log", init_a_log, (c.value_heads,), jnp.float32, per_head)
        self.dt_bias = self.param("dt_bias", init_dt_bias, (c.value_heads,), jnp.float32, per_head)
        if c.skip:
            self.skip = self.param("skip", nn.initializers.ones, (c.value_heads,), jnp.float32, per_head)
        self.query_conv = Convolution((c.conv_width, c.heads, c.key_width), rules, c.conv_bias)
        self.key_conv = Convolution((c.conv_width, c.heads, c.key_width), rules, c.conv_bias)
        self.value_conv = Convolution((c.conv_width, c.value_heads, c.value_width), rules, c.conv_bias)
        epsilon = self.epsilon if c.output_epsilon is None else c.output_epsilon
        self.output_norm = RMSNorm(c.value_width, rules, epsilon)
        self.output = Einsum((c.value_heads, c.value_width, d), ("heads", None, "embed"), rules, weights)

    def __call__(self, x: Activations, place: Place, cache: Tree | None = None) -> MixerOutput:
        """Mix the tokens of each segment; with a cache, go on from it and return the new one."""
        segment_ids = place.segment_ids
        heads = ("batch", None, "heads", None)
        start = empty_cache(self.config, x.shape[0], self.weights.compute) if cache is None else cache
        start = self._place(start)
        q_in = self.query("btd,dhk->bthk", x, heads)
        k_in = self.key("btd,dhk->bthk", x, heads)
        v_in = self.value("btd,dhk->bthk", x, heads)
        before = (segment_ids, start["segments"])
        turn = (place.positions, ROPE_BASE, self.config.rope)
        q = l2_normalise(rope(jax.nn.silu(self.query_conv(q_in, *before, start["query_window"])), *turn))
        k = l2_normalise(rope(jax.nn.silu(self.key_conv(k_in, *before, start["key_window"])), *turn))
        v = jax.nn.silu(self.value_conv(v_in, *before, start["value_window"]))
        beta = self.config.beta_max * jax.nn.sigmoid(self.beta(x))
        g = log_decay(self.decay(x), self.a_log, self.dt_bias, self.config.decay_floor)
        of_state = segment_ids
        if cache is not None:  # the state goes through padding as it is
            of_state = without_padding(segment_ids, start["segments"][:, -1], self.rules)
            real = (segment_ids > 0)[..., None]
            g, beta = jnp.where(real, g, 0.0), jnp.where(real, beta, 0.0)
        continues = start["segments"][:, -1] == of_state[:, 0]
        state = jnp.where(continues[:, None, None, None], start["state"], 0.0)
        o, state = self._recurrence(q, k, v, g, beta, state, of_state)
        gate_logits = self.gate("btd,dhv->bthv", x, heads)
        read = gated(self.output_norm(o), gate_logits, self.config.activation_on)
        y = self.output("bthv,hvd->btd", read, ("batch", None, None))
        zero = jnp.zeros((), jnp.float32)
        new_cache = None
        if cache is not None:
            new_cache = self._advance(start, q_in, k_in, v_in, segment_ids, state)
        return MixerOutput(y, *gate_statistics(beta, gate_logits, q_in), zero, zero, zero, new_cache)

    def gates(self, h: Activations) -> tuple[PerToken, PerToken, PerToken]:
        """`gate_statistics` of beta, W_g h and W_q h."""
        h, heads = jax.lax.stop_gradient(h), ("batch", None, "heads", None)
        beta = self.config.beta_max * jax.nn.sigmoid(self.beta(h))
        return gate_statistics(beta, self.gate("btd,dhv->bthv", h, heads), self.query("btd,dhk->bthk", h, heads))

    def _recurrence(
        self, q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array, segment_ids: Tokens
    ) -> tuple[Array, Array]:
        """The gated delta rule, with `skip` the direct read added, on each device's own rows and heads."""
        config = self.config
        strength = (self.skip,) if config.skip else ()

        def local(
            q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array, segments: Array, *strength: Array
        ) -> tuple[Array, Array]:
            o, new_state = gated_delta_rule(
                q, k, v, g, beta, initial_state=state, segment_ids=segments, scale=config.read_scale,
                chunk_size=config.chunk_size, return_state=True, implementation=config.implementation,
                most_beta=config.beta_max,
            )  # fmt: skip
            if strength:
                o = widen(o) + skip_read(q, k, v, *strength)
            return o.astype(q.dtype), new_state

        tokens, gates = self.rules.spec("batch", None, "heads", None), self.rules.spec("batch", None, "heads")
        states = self.rules.spec("batch", "heads", None, None)
        rows, per_head = self.rules.spec("batch", None), [self.rules.spec("heads")] * len(strength)
        in_specs = (tokens, tokens, tokens, gates, gates, states, rows, *per_head)
        return per_device(local, in_specs, (tokens, states))(q, k, v, g, beta, state, segment_ids, *strength)

    def _advance(self, start: Tree, q_in: Array, k_in: Array, v_in: Array, segment_ids: Tokens, state: Array) -> Tree:
        """The cache after these tokens: the last inputs of the convolutions, their segments, the state."""
        inputs, heads = {"query_window": q_in, "key_window": k_in, "value_window": v_in}, ("heads", None)
        last = {name: last_real(start[name], new, segment_ids, self.rules, heads) for name, new in inputs.items()}
        segments = last_real(start["segments"], segment_ids, segment_ids, self.rules, ())
        return {**last, "segments": segments, "state": state}

    def _place(self, cache: Tree) -> Tree:
        """The cache laid out like the activations: rows with the batch, heads with the heads."""
        window = self.rules.spec("batch", None, "heads", None)
        specs = {
            "query_window": window, "key_window": window, "value_window": window,
            "segments": self.rules.spec("batch", None), "state": self.rules.spec("batch", "heads", None, None),
        }  # fmt: skip
        return {name: reshard(array, specs[name]) for name, array in cache.items()}
