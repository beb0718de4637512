"""Adaptive depth: several passes of one layer, as many as each token asks for (ACT, arXiv 1603.08983).

s_1 = 1; for k = 1 … K:  X <- X + w_k alpha_k Delta(X);  s_{k+1} = s_k p_k;  w_k = s_k while s_k >= threshold, else 0.

- A token below the threshold is finished: its weight is 0 from then on, yet it still writes states and keys in the
  passes that run. So skipping a pass in which nobody is alive changes no value, and no token depends on its batch.
- That is `halting="token"`. The origin's `halting="batch"` has w_k = s_k for everyone and ends the loop for the whole
  batch once at most `batch_share` of the tokens are at or above the threshold; there a token depends on its batch.
- X is [b, t, d], or [b, t, n, d] under hyper-connections; features and norms are of the mean over streams.
- A dead pass costs nothing: `lax.scan` over passes with a `lax.cond` on "anyone alive", forward and backward.
- With a cache (decoding) every pass runs, because a later token may read what this one wrote; also where someone looks
  inside (collection `intermediates` mutable), because what is shown has a place for every pass.
- All that is of `context` "all". With "alive" a finished token is absent from later passes, and a pass runs on rows of
  living tokens alone, in decoding too: `layers.compacted_passes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gt_jax.configs.model import AdaptiveConfig
from gt_jax.devices.sharding import Rules, on_mesh
from gt_jax.models.layers.compacted_passes import pass_lengths, run_on_living
from gt_jax.models.layers.hyper_connections import from_streams
from gt_jax.models.layers.mixer import MixerOutput, Place, masked_mean, real_tokens
from gt_jax.models.layers.moe import MLPOutput
from gt_jax.models.layers.primitives import INIT, add_scaled, float32_einsum, widen
from gt_jax.models.layers.sow import INTERMEDIATES, PASSES, asked_for, sow
from gt_jax.typing import Activations, PerToken, State, Tree

FEATURES = 5
RATIO_CLIP = 10.0


class PassControl(NamedTuple):
    """How many passes: `forced` [] or [l] int32, 0 for the halting heads' choice; `p_max` [] caps the continue gate."""

    forced: Array
    p_max: Array


class PassStatistics(NamedTuple):
    """Per pass [p], float32, means over tokens: what `measure` and the training metrics read.

    `survival` is the mean weight w_k, `alive` the share of tokens with s_k >= threshold, `computed` 1 where the pass
    was computed for the batch, else 0, `s_after` the mean s after the pass (finished tokens keep theirs), `p_mean`,
    `p_std` and `p_floored` (share at the floor) are of the continue gate over alive tokens, `delta_ratio` is |dh|/|h|
    and `update_ratio` that times |gain| alpha_k w_k, the size of what the pass adds, over alive tokens ("batch": over
    all, a pass moves them all); the rest comes from mixer and MLP;
    `experts` [p, e] is the share of the real picks that went to each expert, e = 0 for a dense MLP.

    A layer's `mean_weight`, `passes_run` and `passes_computed` are the sums of the first three over passes.
    """

    survival: Array
    alive: Array
    computed: Array
    s_after: Array
    p_mean: Array
    p_std: Array
    p_floored: Array
    delta_ratio: Array
    update_ratio: Array
    auxiliary_loss: Array
    entropy: Array
    score_variance: Array
    router_loss: Array
    router_entropy: Array
    null_rate: Array
    experts: Array


def mean_over_tokens(
    statistics: PassStatistics, tokens: Float[Array, " pieces"], adaptive: AdaptiveConfig | None
) -> PassStatistics:  # fmt: skip
    """Statistics [l, p] of a text from those of its pieces [pieces, l, p]: what is a mean over tokens stays one.

        whole = sum_i n_i x_i / sum_i n_i,    n_i the `tokens` of piece i, for the gates those alive among them

    `computed` is a mean over pieces: each is a batch by itself, for which a pass runs or does not.
    """
    if (count := statistics.alive.shape[0]) == 1:
        return jax.tree.map(lambda a: a[0], statistics)
    moves_all = adaptive is not None and adaptive.halting == "batch"
    of_alive = {"p_mean", "p_std", "p_floored", "delta_ratio", *(() if moves_all else ("update_ratio",))}
    everyone = jnp.broadcast_to(tokens[:, None, None], statistics.alive.shape)

    def mean(name: str, values: Array) -> Array:
        if name == "computed":
            return jnp.mean(values, axis=0)
        weights = everyone * statistics.alive if name in of_alive else everyone
        total = jnp.sum(weights, axis=0, keepdims=True)
        shares = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 1 / count)
        return jnp.sum(shares.reshape(*shares.shape, *[1] * (values.ndim - 3)) * values, axis=0)

    return PassStatistics(**{name: mean(name, values) for name, values in statistics._asdict().items()})


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


class _Carry(NamedTuple):
    x: Array
    s: Array
    previous: Array
    first: Array


class HaltingHead(nn.Module):
    """p = sigmoid(MLP([features, embedding])), the probability to continue; float32; gradient to its own weights."""

    config: AdaptiveConfig
    rules: Rules

    @nn.compact
    def __call__(self, features: Float[Array, "b t f"]) -> PerToken:
        c = self.config
        embedding = self.param("embedding", INIT, (c.embedding,), jnp.float32, on_mesh(self.rules.spec(None)))
        tiled = jnp.broadcast_to(embedding[None, None], (*features.shape[:2], c.embedding))
        tiled = tiled + jnp.zeros_like(features[..., :1])  # takes the rows' sharding
        hidden = Affine((FEATURES + c.embedding, c.hidden), 0.0, self.rules, name="hidden")
        output = Affine((c.hidden, 1), c.initial_bias, self.rules, name="output")
        inner = jax.nn.gelu(hidden(jnp.concatenate([features, tiled], axis=-1)))
        return jax.nn.sigmoid(output(inner)[..., 0])


class Affine(nn.Module):
    """x W + b in float32, whole on every device (the halting heads are tiny)."""

    shape: tuple[int, int]
    bias: float
    rules: Rules

    @nn.compact
    def __call__(self, x: Float[Array, "b t f"]) -> Float[Array, "b t g"]:
        init = nn.initializers.lecun_normal()
        w = self.param("w", init, self.shape, jnp.float32, on_mesh(self.rules.spec(None, None)))
        bias = nn.initializers.constant(self.bias)
        b = self.param("b", bias, self.shape[1:], jnp.float32, on_mesh(self.rules.spec(None)))
        out = on_mesh(self.rules.spec("batch", None, None))
        return float32_einsum("btf,fg->btg", x, w, out_sharding=out) + b[None, None]


def _rms(x: Activations) -> PerToken:
    return jnp.sqrt(jnp.mean(jnp.square(widen(x)), axis=-1))


def stream_mean(x: State) -> Activations:
    """h: X itself, under hyper-connections the mean over its streams."""
    return x if x.ndim == 3 else from_streams(x)


def delta_ratio(delta: Activations, x: Activations) -> PerToken:
    """|delta| / |x| per token, root mean squares, clipped at 10."""
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
    free = jnp.clip(p, floor, control.p_max)
    return jnp.where(control.forced > 0, jnp.where(k + 1 < control.forced, 1.0, 0.0), free)


def _goes_on(s: PerToken, config: AdaptiveConfig, real: PerToken) -> Array:
    """Whether another pass runs: "token" while anyone is alive, "batch" while more than `batch_share` are."""
    alive = (s >= config.threshold).astype(jnp.float32) * real
    share = masked_mean(alive, real)
    return share > (config.batch_share if config.halting == "batch" else 0.0)


def _weight(s: PerToken, config: AdaptiveConfig, goes_on: Array) -> PerToken:
    """w_k: what is left of s_k where this pass counts."""
    if config.halting == "batch":
        return jnp.where(goes_on, s, 0.0)
    return jnp.where(s >= config.threshold, s, 0.0)


def run_passes(
    layer: Any,
    x: State,
    config: AdaptiveConfig,
    control: PassControl,
    cache: Tree,
    *,
    place: Place,
    delta: Callable[[Any, State, Place, Tree], tuple[State, LayerOutput]],
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

    def run(
        layer: Any, carry: _Carry, k: Array, alpha: Array, cache: Tree, place: Place = place
    ) -> tuple[_Carry, PassStatistics, Tree]:
        x, s, previous, first = carry
        real = real_tokens(place.segment_ids)
        weight = _weight(s, config, _goes_on(s, config, real))
        step, seen = delta(layer, x, place, cache)
        h, dh = stream_mean(x), stream_mean(step)
        p_free = layer.halting(halting_features(h, dh, previous, seen.mixer))
        p = continue_probability(p_free, k, control, config.p_floor)
        counted = s >= config.threshold
        alive = counted.astype(jnp.float32) * real
        p_mean = masked_mean(p, alive)
        p_std = jnp.sqrt(masked_mean(jnp.square(p - p_mean), alive))
        floored = masked_mean((p <= config.p_floor).astype(jnp.float32), alive)
        ratios = delta_ratio(dh, h)
        ratio = masked_mean(ratios, alive)
        moving = real if config.halting == "batch" else alive  # there a pass that runs moves every token
        added = jax.lax.stop_gradient(jnp.abs(gain) * alpha * masked_mean(weight * ratios, moving))
        s = s * p if config.halting == "batch" else jnp.where(counted, s * p, s)
        statistics = PassStatistics(
            masked_mean(weight, real), masked_mean(alive, real), jnp.ones((), jnp.float32), masked_mean(s, real),
            p_mean, p_std, floored, ratio, added, *seen.statistics,
        )  # fmt: skip
        strength = (gain * alpha * weight).reshape(*weight.shape, *[1] * (x.ndim - 2))
        moved = add_scaled(x, step, strength)
        first = jnp.where(k == 0, jax.lax.stop_gradient(stream_mean(moved)), first)
        return _Carry(moved, s, jax.lax.stop_gradient(dh), first), statistics, seen.mixer.cache

    def skip(layer: Any, carry: _Carry, k: Array, alpha: Array, cache: Tree) -> tuple[_Carry, PassStatistics, Tree]:
        nothing = no_statistics(experts)
        return carry, nothing._replace(s_after=masked_mean(carry.s, real_tokens(place.segment_ids))), cache

    def of_living(
        layer: Any, carry: _Carry, k: Array, alpha: Array, cache: Tree
    ) -> tuple[_Carry, PassStatistics, Tree]:
        def own(layer: Any, rows: Tree, place: Place, cache: Tree) -> tuple[Tree, PassStatistics, Tree]:
            x, s, previous = rows
            moved, statistics, new_cache = run(layer, _Carry(x, s, previous, previous), k, alpha, cache, place)
            return moved[:3], statistics, new_cache

        real = real_tokens(place.segment_ids)
        living = (carry.s >= config.threshold) & (real > 0)
        rows, seen, cache, computed = run_on_living(
            layer, own, carry[:3], place, living, cache, rules=rules, lengths=lengths, nothing=no_statistics(experts)
        )
        if shown:
            sow(layer, "state", carry.x)  # of finished tokens too
        first = jnp.where(k == 0, jax.lax.stop_gradient(stream_mean(rows[0])), carry.first)
        new = _Carry(rows[0], rows[1], rows[2], first)
        return new, of_everyone(seen, living, real, new.s, computed), cache

    def one_pass(layer: Any, carry: _Carry, xs: tuple[Array, Array, Tree]) -> tuple[_Carry, Any]:
        real = real_tokens(place.segment_ids)
        if asked_for(layer, PASSES):
            runs = (carry.s >= config.threshold) & (real > 0) & _goes_on(carry.s, config, real)
            sow(layer, "runs", runs, PASSES)
        if config.context == "alive":
            carry, statistics, new_cache = of_living(layer, carry, *xs)
        elif every_pass:
            carry, statistics, new_cache = run(layer, carry, *xs)
        else:
            going = _goes_on(carry.s, config, real)
            carry, statistics, new_cache = nn.cond(going, run, skip, layer, carry, *xs)
        return carry, (statistics, new_cache)

    h = stream_mean(x)
    start = _Carry(x, jnp.ones_like(h[..., 0], jnp.float32), jnp.zeros_like(h), jnp.zeros_like(h))
    passes = config.max_passes
    scanned = nn.scan(
        nn.remat(one_pass, prevent_cse=False) if remat else one_pass,
        variable_broadcast=("params", "statistics"),
        variable_axes={INTERMEDIATES: 0, PASSES: 0},
        split_rngs={"params": False},
        length=passes,
    )
    xs = (jnp.arange(passes, dtype=jnp.int32), jnp.asarray(config.alpha, jnp.float32), cache)
    last, (statistics, caches) = scanned(layer, start, xs)
    return last.x, last.first, statistics, caches


def of_everyone(seen: PassStatistics, living: Array, real: PerToken, s: PerToken, computed: Array) -> PassStatistics:
    """Statistics of a pass that was shown its living tokens alone, as those of all real tokens; `s` [b, t] after it."""
    share = masked_mean(living.astype(jnp.float32), real)
    return seen._replace(survival=share * seen.survival, alive=share, computed=computed, s_after=masked_mean(s, real))


def no_statistics(experts: int) -> PassStatistics:
    """The statistics of a pass that did not run: zeros."""
    zeros = {name: jnp.zeros((), jnp.float32) for name in PassStatistics._fields}
    return PassStatistics(**{**zeros, "experts": jnp.zeros((experts,), jnp.float32)})
