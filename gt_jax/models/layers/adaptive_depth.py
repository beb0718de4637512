"""Adaptive depth: several passes of one layer, as many as each token asks for (ACT, arXiv 1603.08983).

s_1 = 1; for k = 1 … K:  X <- X + w_k alpha_k Delta(X);  s_{k+1} = s_k p_k;  w_k = s_k while s_k >= threshold, else 0.

- A token below the threshold is finished: its weight is 0 from then on, yet it still writes states and keys in the
  passes that run. So skipping a pass in which nobody is alive changes no value, and no token depends on its batch.
- `weights` "hard": w_k = 1 while s_k >= threshold, with the gradient of s_k, which falls on for finished tokens too. A
  pass is learned and priced as what it is, all or nothing.
- All that is `halting="token"`. The origin's "batch" has w_k = s_k for everyone and ends the loop for the whole batch
  once at most `batch_share` of the tokens are at or above the threshold; there a token depends on its batch.
- X is [b, t, d], or [b, t, n, d] under hyper-connections; features and norms are of the mean over streams.
- A dead pass costs nothing: `lax.scan` over passes with a `lax.cond` on "anyone alive", forward and backward.
- With a cache (decoding) every pass runs, because a later token may read what this one wrote; also where someone looks
  inside (collection `intermediates` mutable), because what is shown has a place for every pass.
- Finished tokens write under `context` "all". Under "alive" they are absent from later passes, and a pass runs on rows
  of living tokens alone, in decoding too: `layers.compacted_passes`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from gt_jax.configs.model import AdaptiveConfig
from gt_jax.devices.sharding import Rules, gather_compute_weights, has_mesh, on_mesh
from gt_jax.models.layers.compacted_passes import pass_lengths, run_on_living
from gt_jax.models.layers.hyper_connections import from_streams
from gt_jax.models.layers.mixer import MixerOutput, Place, masked_mean, real_tokens
from gt_jax.models.layers.moe import MLPOutput
from gt_jax.models.layers.pass_statistics import PassStatistics, no_statistics, of_everyone, weight_moments
from gt_jax.models.layers.primitives import INIT, add_scaled, float32_einsum, widen
from gt_jax.models.layers.sow import INTERMEDIATES, PASSES, asked_for, sow
from gt_jax.typing import Activations, PerToken, State, Tree

FEATURES = 5
BEGUN = "what a pass begins with"
RATIO_CLIP = 10.0


class PassControl(NamedTuple):
    """How many passes: `forced` [] or [l] int32, 0 for the halting heads' choice; `p_max` [] caps the continue gate.

    Where `uncut` [] is above 0, no token is finished: every pass runs and counts with s_k, however small, with hard
    weights as it did, by its gradient alone. So a gate far below the threshold still has a gradient, which training
    needs now and then.
    """

    forced: Array
    p_max: Array
    uncut: Array | float = 0.0


class LayerOutput(NamedTuple):
    """What mixer and MLP of one layer say beside the update."""

    mixer: MixerOutput
    mlp: MLPOutput

    @property
    def statistics(self) -> tuple[Array, ...]:
        """The last fields of `PassStatistics`, from `auxiliary_loss` on."""
        mixer, mlp = self.mixer, self.mlp
        return (
            mixer.auxiliary_loss, mixer.entropy, mixer.score_variance,
            mlp.auxiliary_loss, mlp.router_entropy, mlp.null_rate, mlp.experts,
        )  # fmt: skip


class Carry(NamedTuple):
    """What goes from pass to pass of a layer: X, what is left of each token, the update before, X after the first."""

    x: Array
    s: Array
    slope: Array  # of s in a number added to the logits of all gates
    previous: Array
    first: Array


DeltaFn: TypeAlias = Callable[[Any, State, Place, Tree], tuple[State, LayerOutput]]
"""delta(layer, X, place, cache): the layer's update."""


def bounded_logit(logit: PerToken, config: AdaptiveConfig) -> PerToken:
    """A gate's logit within +-`logit_bound`, its gradient as if it were not bound; bound 0 leaves it as it is.

    Farther out the gate's slope p (1 - p) is so small that nothing it learns later can bring it back.
    """
    bound = config.logit_bound
    return logit + jax.lax.stop_gradient(jnp.clip(logit, -bound, bound) - logit) if bound else logit


class HaltingHead(nn.Module):
    """p = sigmoid(MLP([features, embedding])), the probability to continue; float32; gradient to its own weights.

    With `state_width` the features have W h / rms(h) behind them, h the state [b, t, d] after the pass; with `by_pass`
    the embedding is that of pass `k` [].
    """

    config: AdaptiveConfig
    rules: Rules

    @nn.compact
    def __call__(
        self, features: Float[Array, "b t f"], state: Activations | None = None, k: Array | None = None
    ) -> PerToken:
        c, spec = self.config, self.rules.spec
        if c.by_pass:
            assert k is not None
            table = self.param("embedding", INIT, (c.max_passes, c.embedding), jnp.float32, on_mesh(spec(None, None)))
            embedding = jnp.sum(jax.nn.one_hot(k, c.max_passes)[:, None] * table, axis=0)
        else:
            embedding = self.param("embedding", INIT, (c.embedding,), jnp.float32, on_mesh(spec(None)))
        seen = [features]
        if c.state_width:
            assert state is not None
            h = widen(jax.lax.stop_gradient(state))
            h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + 1e-6)
            seen.append(Affine((h.shape[-1], c.state_width), 0.0, self.rules, name="state")(h))
        hidden = Affine((FEATURES + c.embedding + c.state_width, c.hidden), 0.0, self.rules, name="hidden")
        output = Affine((c.hidden, 1), c.initial_bias, self.rules, name="output")
        inner = jax.nn.gelu(hidden(jnp.concatenate(seen, axis=-1), embedding, FEATURES))
        return jax.nn.sigmoid(bounded_logit(output(inner)[..., 0], c))


class Affine(nn.Module):
    """x W + b in float32, whole on every device (the halting heads are tiny).

    With `common` [c], numbers that every token has, it is [x_1 … x_at, common, the rest of x] W + b; their share of the
    product is computed once, and its gradient is a sum over tokens before devices add theirs up.
    """

    shape: tuple[int, int]
    bias: float
    rules: Rules

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t f"], common: Float[Array, " c"] | None = None, at: int = 0
    ) -> Float[Array, "b t g"]:
        init = nn.initializers.lecun_normal()
        w = self.param("w", init, self.shape, jnp.float32, on_mesh(self.rules.spec(None, None)))
        bias = nn.initializers.constant(self.bias)
        b = self.param("b", bias, self.shape[1:], jnp.float32, on_mesh(self.rules.spec(None)))
        if common is not None:
            after = at + common.shape[0]
            b = b + float32_einsum("f,fg->g", common, w[at:after])
            w = jnp.concatenate([w[:at], w[after:]])
        out = on_mesh(self.rules.spec("batch", None, None))
        return float32_einsum("btf,fg->btg", x, w, out_sharding=out) + b[None, None]


def _rms(x: Activations) -> PerToken:
    return jnp.sqrt(jnp.mean(jnp.square(widen(x)), axis=-1))


def stream_mean(x: State) -> Activations:
    """h: X itself, under hyper-connections the mean over its streams."""
    return x if x.ndim == 3 else from_streams(x)


def delta_ratio(delta: Activations, x: Activations) -> PerToken:
    """|delta| / |x| per token, root mean squares, clipped at 10: a feature of the halting heads, and what is reported.

    Unclipped, the first pass of the first layer, which makes the stream, would outweigh all others in any mean.
    """
    return jnp.minimum(_rms(delta) / jnp.maximum(_rms(x), 1e-6), RATIO_CLIP)


def halting_features(x: Activations, delta: Activations, previous: Activations, mixer: MixerOutput) -> Array:
    """[|dh|/|h|, cos(dh, previous dh), write gate, output gate, spread of head query norms], no gradient: [b, t, 5]."""
    x, delta, previous = jax.lax.stop_gradient((x, delta, previous))
    a, b = widen(delta), widen(previous)
    norms = jnp.sqrt(jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1))
    cosine = jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-12)
    parts = [delta_ratio(delta, x), cosine, mixer.write_gate, mixer.output_gate, mixer.head_spread]
    return jax.lax.stop_gradient(jnp.stack(parts, axis=-1))


def continue_probability(p: PerToken, k: Array, control: PassControl, floor: float) -> PerToken:
    """The gate in use: clipped to [floor, p_max]; with forced passes 1 before the last of them and 0 after it."""
    raised = p + jax.lax.stop_gradient(jnp.maximum(floor - p, 0.0))  # a gate at the floor can still rise
    free = jnp.minimum(raised, control.p_max)
    return jnp.where(control.forced > 0, jnp.where(k + 1 < control.forced, 1.0, 0.0), free)


def smooth_count(s: PerToken, config: AdaptiveConfig) -> PerToken:
    """What a pass of weight s counts in the price: (1 + h) s / (h + s), h = 2 threshold; 0 at 0, 1 at 1.

    A token runs a pass whole or not at all, whatever its weight: the count rises where the threshold is, and has a
    slope everywhere, so that the price has a gradient for every gate. A hard weight is that count already.
    """
    if config.weights == "hard":
        return s
    h = 2 * config.threshold
    return (1 + h) * s / (h + s)


def smooth_slope(s: PerToken, config: AdaptiveConfig) -> PerToken:
    """Its slope, (1 + h) h / (h + s)^2; of hard weights 1."""
    if config.weights == "hard":
        return jnp.ones_like(s)
    h = 2 * config.threshold
    return (1 + h) * h / jnp.square(h + s)


def _goes_on(s: PerToken, config: AdaptiveConfig, control: PassControl, real: PerToken) -> Array:
    """Whether another pass runs: "token" while anyone is alive, "batch" while more than `batch_share` are."""
    alive = (s >= config.threshold).astype(jnp.float32) * real
    share = masked_mean(alive, real)
    going = share > (config.batch_share if config.halting == "batch" else 0.0)
    return going | (jnp.asarray(control.uncut) > 0)


def _weight(s: PerToken, config: AdaptiveConfig, control: PassControl, goes_on: Array) -> PerToken:
    """w_k: what is left of s_k where this pass counts."""
    if config.halting == "batch":
        return jnp.where(goes_on, s, 0.0)
    if config.weights == "hard":
        return (s >= config.threshold).astype(jnp.float32) + (s - jax.lax.stop_gradient(s))
    return jnp.where(_counted(s, config, control), s, 0.0)


def _falls(s: PerToken, config: AdaptiveConfig, control: PassControl) -> Array:
    """For which tokens the gate of this pass lowers s: those that it moves, and where a finished one learns, all."""
    if config.halting == "batch" or config.weights == "hard":
        return jnp.ones_like(s, bool)
    return _counted(s, config, control)


def _counted(s: PerToken, config: AdaptiveConfig, control: PassControl) -> Array:
    """Which tokens this pass moves, halting by token."""
    return (s >= config.threshold) | (jnp.asarray(control.uncut) > 0)


def run_pass(
    layer: Any, carry: Carry, k: Array, alpha: Array | float, cache: Tree, *, place: Place, config: AdaptiveConfig,
    control: PassControl, delta: DeltaFn, gain: Array,
) -> tuple[Carry, PassStatistics, Tree]:  # fmt: skip
    """Pass `k` (from 0) of a layer for all tokens, each at its weight w_k: (carry, statistics, cache)."""
    x, s, slope, previous, first = carry
    real = real_tokens(place.segment_ids)
    goes_on = _goes_on(s, config, control, real)
    weight = _weight(s, config, control, goes_on)
    step, seen = delta(layer, x, place, cache)
    h, dh = stream_mean(x), stream_mean(step)
    strength = (gain * alpha * weight).reshape(*weight.shape, *[1] * (x.ndim - 2))
    moved = add_scaled(x, step, strength)
    p_free = layer.halting(halting_features(h, dh, previous, seen.mixer), stream_mean(moved), k)
    p = continue_probability(p_free, k, control, config.p_floor)
    alive = (s >= config.threshold).astype(jnp.float32) * real
    cost = jnp.where(k > 0, masked_mean(smooth_count(weight, config), real), 0.0)
    priced = _falls(s, config, control)
    rises = jnp.where(priced, slope * smooth_slope(weight, config), 0.0)  # 0 in the first pass, as `slope` is
    cost_slope = jax.lax.stop_gradient(masked_mean(rises, real))
    p_mean = masked_mean(p, alive)
    p_std = jnp.sqrt(masked_mean(jnp.square(p - p_mean), alive))
    floored = masked_mean((p <= config.p_floor).astype(jnp.float32), alive)
    ratios = delta_ratio(dh, h)
    ratio = masked_mean(ratios, alive)
    batch = config.halting == "batch"
    moving = real if batch else alive  # there a pass that runs moves every token
    ran = jnp.where(goes_on, real, 0.0) if batch else alive
    added = jax.lax.stop_gradient(jnp.abs(gain) * alpha * masked_mean(weight * ratios, moving))
    moments = weight_moments(*jax.lax.stop_gradient((weight, jnp.abs(gain) * alpha * ratios)), real)
    free = jnp.where(control.forced > 0, 0.0, p * (1 - p))
    slope = jax.lax.stop_gradient(jnp.where(priced, slope * p + s * free, slope))
    s = jnp.where(priced, s * p, s)
    statistics = PassStatistics(
        masked_mean(weight, real), masked_mean(alive, real), masked_mean(ran, real), cost, cost_slope,
        jnp.ones((), jnp.float32), masked_mean(s, real), p_mean, p_std, floored, ratio, added, moments,
        *seen.statistics,
    )  # fmt: skip
    first = jnp.where(k == 0, jax.lax.stop_gradient(stream_mean(moved)), first)
    return Carry(moved, s, slope, jax.lax.stop_gradient(dh), first), statistics, seen.mixer.cache


def gathering_once(
    passes: Callable[..., Any], layer: Any, x: State, rules: Rules, remat: bool
) -> Callable[..., Any]:  # fmt: skip
    """`passes(layer, start, xs)` on weights that are gathered once, and whose gradients are added up once, for all of
    them. With `remat`, where what each pass begins with bears the name `BEGUN`, nothing else is kept: the backward pass
    gathers them again.

    Those that `gather_compute_weights` leaves are gathered pass by pass.
    """
    if not has_mesh() or layer.is_initializing():
        return passes

    def gather(variables: Tree) -> Tree:
        return gather_compute_weights(variables, x, rules, layer.config.compute_dtype, layer.kind)

    mapped = nn.map_variables(passes, "params", trans_in_fn=gather)
    begun = jax.checkpoint_policies.save_only_these_names(BEGUN)
    return nn.remat(mapped, prevent_cse=False, policy=begun) if remat else mapped


def run_passes(
    layer: Any,
    x: State,
    config: AdaptiveConfig,
    control: PassControl,
    cache: Tree,
    *,
    place: Place,
    delta: DeltaFn,
    gain: Array,
    remat: bool,
    experts: int,
    rules: Rules,
) -> tuple[State, Activations, PassStatistics, Tree]:
    """Run `layer` up to K times per token: (X, mean stream after pass 1, statistics and caches with a pass axis).

    `layer` is a bound Linen module with a submodule `halting`; `delta(layer, x, place, cache)` is its update, whatever
    it is. Padding keeps no pass alive and is in no statistic.
    """
    shown = layer.is_mutable_collection(INTERMEDIATES)
    every_pass = cache is not None or shown
    lengths = (x.shape[1],) if shown else pass_lengths(x.shape[1], config.lengths)

    run = functools.partial(run_pass, place=place, config=config, control=control, delta=delta, gain=gain)

    def skip(layer: Any, carry: Carry, k: Array, alpha: Array, cache: Tree) -> tuple[Carry, PassStatistics, Tree]:
        nothing = no_statistics(experts)
        return carry, nothing._replace(s_after=masked_mean(carry.s, real_tokens(place.segment_ids))), cache

    def of_living(
        layer: Any, carry: Carry, k: Array, alpha: Array, cache: Tree
    ) -> tuple[Carry, PassStatistics, Tree]:
        def own(layer: Any, rows: Tree, place: Place, cache: Tree) -> tuple[Tree, PassStatistics, Tree]:
            x, s, slope, previous = rows
            start = Carry(x, s, slope, previous, previous)
            moved, statistics, new_cache = run(layer, start, k, alpha, cache, place=place)
            return moved[:-1], statistics, new_cache

        real = real_tokens(place.segment_ids)
        living = _counted(carry.s, config, control) & (real > 0)
        rows, seen, cache, computed = run_on_living(
            layer, own, carry[:-1], place, living, cache, rules=rules, lengths=lengths, nothing=no_statistics(experts)
        )
        if shown:
            sow(layer, "state", carry.x)  # of finished tokens too
        first = jnp.where(k == 0, jax.lax.stop_gradient(stream_mean(rows[0])), carry.first)
        new = Carry(rows[0], rows[1], rows[2], rows[3], first)
        alive = (carry.s >= config.threshold).astype(jnp.float32)
        return new, of_everyone(seen, living, alive, real, new.s, computed), cache

    def one_pass(layer: Any, carry: Carry, xs: tuple[Array, Array, Tree]) -> tuple[Carry, Any]:
        carry = Carry(*(checkpoint_name(one, BEGUN) for one in carry))
        real = real_tokens(place.segment_ids)
        if asked_for(layer, PASSES):
            runs = _goes_on(carry.s, config, control, real) & (real > 0)
            sow(layer, "runs", runs if config.halting == "batch" else runs & _counted(carry.s, config, control), PASSES)
        if config.context == "alive":
            carry, statistics, new_cache = of_living(layer, carry, *xs)
        elif every_pass:
            carry, statistics, new_cache = run(layer, carry, *xs)
        else:
            going = _goes_on(carry.s, config, control, real)
            carry, statistics, new_cache = nn.cond(going, run, skip, layer, carry, *xs)
        return carry, (statistics, new_cache)

    h = stream_mean(x)
    ones = jnp.ones_like(h[..., 0], jnp.float32)
    start = Carry(x, ones, jnp.zeros_like(ones), jnp.zeros_like(h), jnp.zeros_like(h))
    passes = config.max_passes
    scanned = nn.scan(
        nn.remat(one_pass, prevent_cse=False) if remat else one_pass,
        variable_broadcast=("params", "statistics"),
        variable_axes={INTERMEDIATES: 0, PASSES: 0},
        split_rngs={"params": False},
        length=passes,
        check_constancy_invariants=layer.is_initializing(),  # traces the passes once more, and finds new parameters so
    )
    xs = (jnp.arange(passes, dtype=jnp.int32), jnp.asarray(config.alpha, jnp.float32), cache)
    last, (statistics, caches) = gathering_once(scanned, layer, x, rules, remat)(layer, start, xs)
    return last.x, last.first, statistics, caches
