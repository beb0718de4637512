"""Mixture of SwiGLU experts with null experts, dropless, beside a shared one.

- A null expert is a slot that the router can pick and that does nothing: a token chooses how many experts it needs.
- No capacity: picks are sorted by expert and each expert multiplies the run of rows it was given, however long.
- Router, its softmax and its losses are float32 whatever the compute dtype.
- Experts are cut over the mesh axis of "experts": a device handles the picks of its own experts, a sum over the
  devices joins them. Tokens are not moved, so each device holds rows for the worst case, all picks its own.

Letters: e experts, s slots (experts and null experts), k picks of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gt_jax.configs.model import MoEConfig
from gt_jax.devices.sharding import Rules, gather_own, gather_weight, has_mesh, is_whole, on_mesh, per_device
from gt_jax.models.layers.grouped_product import block_for, collect, dispatch, grouped_product, spread
from gt_jax.models.layers.mixer import masked_mean
from gt_jax.models.layers.primitives import SwiGLU, WeightSpec, float32_einsum, widen
from gt_jax.models.layers.sow import sow
from gt_jax.typing import Activations, PerToken, Scalar


class MLPOutput(NamedTuple):
    """The value, the weighted router losses, and statistics over real tokens, which carry no gradient (float32).

    `experts`: share of the real picks each expert got; `null_rate`: share of all picks that are null;
    `router_entropy`: mean entropy of the softmax over the slots, divided by log(slots).
    """

    y: Activations
    auxiliary_loss: Scalar
    experts: Float[Array, " e"]
    null_rate: Scalar
    router_entropy: Scalar


class Routing(NamedTuple):
    """For each pick of each token the expert, or e for a null pick, and its weight, 0 for a null pick."""

    experts: Int[Array, "b t k"]
    weights: Float[Array, "b t k"]


def route(slots: Float[Array, "b t s"], experts: int, top_k: int, normalise: bool = True) -> Routing:
    """The top_k largest slots of each token (ties: the smaller index); the first `experts` slots are the real ones.

    Weights are softmax(slots) at the real picks, renormalised to sum 1; all 0 where every pick is null. Computed as the
    softmax over the picked real slots alone: the same, and right where softmax(slots) underflows. Without `normalise`
    they are softmax(slots) as it is.
    """
    values, picks = jax.lax.top_k(slots, top_k)
    real = picks < experts
    if not normalise:
        shares = jnp.exp(values - jax.nn.logsumexp(slots, axis=-1, keepdims=True))
        return Routing(jnp.minimum(picks, experts), jnp.where(real, shares, 0.0))
    largest = jnp.max(jnp.where(real, values, jnp.finfo(slots.dtype).min), axis=-1, keepdims=True)
    above = jnp.where(real, values - jax.lax.stop_gradient(largest), 0.0)
    parts = jnp.where(real, jnp.exp(above), 0.0)
    total = jnp.sum(parts, axis=-1, keepdims=True)
    return Routing(jnp.minimum(picks, experts), parts / jnp.where(total > 0, total, 1.0))


def router_losses(
    config: MoEConfig, slots: Float[Array, "b t s"], experts: Int[Array, "b t k"], real: PerToken
) -> tuple[Scalar, Float[Array, " e"], Scalar, Scalar]:
    """(auxiliary loss, shares of experts, null rate, entropy) over the tokens with real 1; see `MLPOutput`.

    loss = balance_loss e sum_i f_i P_i + router_z_loss mean(logsumexp(slots)^2)
         + null_loss (null_rate - (1 - real_share))^2

    f_i is the share of real picks that went to expert i, P_i the mean over tokens of the softmax over the real slots.
    The source writes (null_rate - real_share)^2, the same at its 0.5; 1 - real_share is what the number of null slots
    says. Counts have no gradient. For the null rate, where the loss would then be a constant, the gradient is that of
    the probability of the null slots (straight through); the value is the count.
    """
    e, picks = config.experts, experts.shape[-1]
    tokens = jnp.maximum(jnp.sum(real), 1.0)
    taken = jnp.sum(jax.nn.one_hot(experts, e, dtype=slots.dtype) * real[..., None, None], axis=(0, 1, 2))
    shares = taken / jnp.maximum(jnp.sum(taken), 1.0)
    mean_real = jnp.sum(jax.nn.softmax(slots[..., :e], axis=-1) * real[..., None], axis=(0, 1)) / tokens
    balance = e * jnp.sum(shares * mean_real)
    z = masked_mean(jnp.square(jax.nn.logsumexp(slots, axis=-1)), real)
    log_p = jax.nn.log_softmax(slots, axis=-1)
    p = jnp.exp(log_p)
    null_rate = masked_mean(jnp.sum((experts == e).astype(slots.dtype), axis=-1) / picks, real)
    probability = masked_mean(jnp.sum(p[..., e:], axis=-1), real)
    through = null_rate + probability - jax.lax.stop_gradient(probability)
    excess = jnp.square(through - (1 - config.real_share))
    loss = config.balance_loss * balance + config.router_z_loss * z + config.null_loss * excess
    entropy = masked_mean(-jnp.sum(p * log_p, axis=-1), real) / max(math.log(slots.shape[-1]), 1e-12)
    return loss, *jax.lax.stop_gradient((shares, null_rate, entropy))


def mix_experts(
    x: Activations,
    routing: Routing,
    inward: Sequence[Float[Array, "e d _"]],
    down: Float[Array, "e _ _"],
    transposed: bool = False,
) -> Activations:
    """sum_i w_i SwiGLU_i(x) over the picks of experts 0 … e-1; picks of any other number add nothing.

    `inward` is gate and up [e, d, f], or the two side by side in one, [e, d, 2 f]; `down` is [e, f, d], or with
    `transposed` [e, d, f]. The products run in x's dtype, what is between them and the sum in float32. Hidden units are
    weighed, not what comes of them: they are narrower, rounded once for it, and so is the gradient of the weights.
    """
    tokens, picks, count = x.shape[0] * x.shape[1], routing.experts.shape[-1], down.shape[0]
    block = block_for(tokens * picks, x, down)
    rows = dispatch(routing.experts.reshape(-1), count, block)
    token, of_token = rows.pick // picks, rows.row.reshape(tokens, picks)  # an empty row: one past the last token
    inner = spread(x.reshape(tokens, -1), token, of_token)
    own = spread(routing.weights.reshape(-1, 1), rows.pick, rows.row[:, None])
    weight = jnp.where((rows.pick < tokens * picks)[:, None], own, 0.0)  # a row that is nobody's adds nothing anywhere
    products = [grouped_product(inner, w, rows.sizes, block) for w in inward]
    gated, linear = map(widen, products if len(products) == 2 else jnp.split(products[0], 2, axis=-1))
    hidden = (jax.nn.silu(gated) * linear * weight).astype(x.dtype)
    return collect(grouped_product(hidden, down, rows.sizes, block, transposed), token, of_token).reshape(x.shape)


class Router(nn.Module):
    """[W x + b ; null_logit once for each null expert], float32: the slots a token picks from.

    Without `router_bias`, which has no null experts, W x alone.
    """

    config: MoEConfig
    width: int
    rules: Rules
    weights: WeightSpec

    @nn.compact
    def __call__(self, x: Activations) -> Float[Array, "b t s"]:
        shape, axes, whole = (self.width, self.config.experts), ("embed", None), on_mesh(self.rules.spec(None))
        w = self.param("w", self.weights.init, shape, jnp.float32, on_mesh(self.rules.spec(*axes)))
        w = gather_weight(w, x, self.rules, *axes)
        place = self.rules.spec("batch", None, None)
        logits = float32_einsum("btd,de->bte", x, w, out_sharding=on_mesh(place))
        if not self.config.router_bias:
            return logits
        b = self.param("b", nn.initializers.zeros, shape[1:], jnp.float32, whole)
        null_logit = self.param("null_logit", nn.initializers.zeros, (), jnp.float32, on_mesh(self.rules.spec()))
        # added to zeros that lie where the tokens do: the gradient of a number that is spread out first, and then laid
        # out over the mesh, is gathered whole, every token of the batch on every device
        null = jnp.zeros_like(logits[..., :1]) + null_logit
        nulls = jnp.broadcast_to(null, (*x.shape[:2], self.config.null_experts))
        return jnp.concatenate([logits + b[None, None], nulls], axis=-1)


class ExpertWeight(nn.Module):
    """One matrix an expert, in the compute dtype, as it is stored."""

    shape: tuple[int, int, int]
    axes: tuple[str, str, str]
    rules: Rules
    weights: WeightSpec

    @nn.compact
    def __call__(self) -> Float[Array, "e _ _"]:
        spec = on_mesh(self.rules.spec(*self.axes))
        w = self.param("w", self.weights.init, self.shape, jnp.dtype(self.weights.param), spec)
        return w.astype(jnp.dtype(self.weights.compute))


class Experts(nn.Module):
    """`mix_experts` on each device's own tokens, experts and hidden units, summed over the devices."""

    config: MoEConfig
    width: int
    rules: Rules
    weights: WeightSpec

    def setup(self) -> None:
        e, d, f = self.config.experts, self.width, self.config.expert_width
        inward = ((e, d, f), ("experts", "embed", "mlp"), self.rules, self.weights)
        self.gate, self.up = ExpertWeight(*inward), ExpertWeight(*inward)
        self.down = ExpertWeight((e, f, d), ("experts", "mlp", "embed"), self.rules, self.weights)

    def __call__(self, x: Activations, routing: Routing) -> Activations:
        rules, inward, outward = self.rules, ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        expert_axes = rules.mesh_axes("experts") if has_mesh() else ()
        summed = (*expert_axes, *rules.mesh_axes("mlp")) if has_mesh() else ()
        weights = self.gate(), self.up(), self.down()
        whole = all(is_whole(w, rules) for w in weights)
        turned = has_mesh() and rules.shards("embed") > 1 and not whole

        def local(x: Array, routing: Routing, gate: Array, up: Array, down: Array) -> Array:
            # side by side the rows are read once and come back as one gradient, and one gather is one fewer; but the
            # stored pieces are copied for it, which for the few rows of decoding is more than there is to read, and
            # gathered ones are much to copy
            many = x.size * routing.experts.shape[-1] >= 2 * gate.size and not whole
            sides = [jnp.concatenate([gate, up], axis=2)] if many else [gate, up]
            # a gather over the last axis is laid out in another way than a product reads, and would be copied for it
            down, axes = (jnp.swapaxes(down, 1, 2), inward) if turned else (down, outward)
            if not whole:
                sides = [gather_own(w, x, rules, *inward) for w in sides]
                down = gather_own(down, x, rules, *axes)
            own = down.shape[0]
            mine = routing.experts - (jax.lax.axis_index(expert_axes) * own if expert_axes else 0)
            mine = jnp.where((mine >= 0) & (mine < own), mine, own)
            y = mix_experts(x, Routing(mine, routing.weights), sides, down, turned)
            return jax.lax.psum(y, summed) if summed else y

        tokens: Any = rules.spec("batch", None, None)
        stored = [jax.typeof(w).sharding.spec for w in weights]
        run = per_device(local, (tokens, Routing(tokens, tokens), *stored), tokens)
        return run(x.astype(jnp.dtype(self.weights.compute)), routing, *weights)


class SharedGate(nn.Module):
    """sigmoid(w.x), one number a token, [b, t, 1] float32."""

    width: int
    rules: Rules
    weights: WeightSpec

    @nn.compact
    def __call__(self, x: Activations) -> Float[Array, "b t 1"]:
        w = self.param("w", self.weights.init, (self.width, 1), jnp.float32, on_mesh(self.rules.spec("embed", None)))
        w = gather_weight(w, x, self.rules, "embed", None)
        place = on_mesh(self.rules.spec("batch", None, None))
        return jax.nn.sigmoid(float32_einsum("btd,de->bte", x, w, out_sharding=place))


class MixtureOfExperts(nn.Module):
    """y = SwiGLU_shared(x) + sum over real picks i of w_i SwiGLU_i(x); the first term alone where all picks are null.

    With `shared_gate` the first term is sigmoid(w_s.x) SwiGLU_shared(x), the gate computed in float32.

    A token with `real` 0 (padding) goes to no expert and is in no loss or statistic.
    """

    config: MoEConfig
    width: int
    shared_width: int
    rules: Rules
    weights: WeightSpec

    def setup(self) -> None:
        parts = (self.config, self.width, self.rules, self.weights)
        self.router, self.experts = Router(*parts), Experts(*parts)
        self.shared = SwiGLU(self.width, self.shared_width, self.rules, self.weights)
        if self.config.shared_gate:
            self.shared_gate = SharedGate(self.width, self.rules, self.weights)

    def __call__(self, x: Activations, real: PerToken) -> MLPOutput:
        config = self.config
        slots = self.router(x)
        sow(self, "slots", slots)
        with jax.named_scope("route"):
            routing = route(slots, config.experts, config.top_k, config.normalise)
            loss, *statistics = router_losses(config, slots, routing.experts, real)
            sent = jnp.where(real[..., None] > 0, routing.experts, config.experts)
        shared = self.shared(x)
        if config.shared_gate:
            shared = (widen(shared) * self.shared_gate(x)).astype(shared.dtype)
        y = shared + self.experts(x, Routing(sent, routing.weights))
        return MLPOutput(y, loss, *statistics)
