"""One layer: mixer and MLP sublayers around the stream, their update Delta, the gain, and adaptive depth around it.

Delta(X) = MLPblock(MixerBlock(X)) - X;  X <- X + gain Delta(X), or with adaptive depth gain times each pass's strength.
A block is x + F(norm(x)), with post-norm x + norm(F(x)); under hyper-connections
H_res X + H_post (outer) F(norm(sum_n H_pre X)), and the norm likewise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules, on_mesh
from gt_jax.models.layers.adaptive_depth import (
    FEATURES,
    HaltingHead,
    LayerOutput,
    PassControl,
    delta_ratio,
    run_passes,
    stream_mean,
)
from gt_jax.models.layers.attention import FullAttention
from gt_jax.models.layers.deltanet import GatedDeltaNet
from gt_jax.models.layers.gated_copies import Gate, run_copy
from gt_jax.models.layers.groundthink import GroundThinkDeltaNet
from gt_jax.models.layers.gsa import GatedSparseAttention
from gt_jax.models.layers.hyper_connections import HyperConnection
from gt_jax.models.layers.mixer import MixerOutput, Place, masked_mean, real_tokens
from gt_jax.models.layers.moe import MixtureOfExperts, MLPOutput
from gt_jax.models.layers.pass_statistics import PassStatistics, no_statistics
from gt_jax.models.layers.primitives import RMSNorm, SwiGLU, WeightSpec, add_scaled, scaled, widen
from gt_jax.models.layers.resolvent import LeftResolvent
from gt_jax.models.layers.sliding import SlidingAttention
from gt_jax.models.layers.sow import PASSES, asked_for, sow
from gt_jax.models.layers.stack import mix
from gt_jax.typing import Activations, State, Tree


class Update(NamedTuple):
    """gain * Delta(X) of one pass, its statistics with a pass axis of one, cache and link of the mixer."""

    value: State
    statistics: PassStatistics
    cache: Tree
    link: Tree


def make_mixer(kind: str, config: ModelConfig, rules: Rules, weights: WeightSpec) -> Any:
    """The mixer module of a layer type."""
    c = config
    if kind == "D":
        assert c.deltanet is not None
        mixer = GroundThinkDeltaNet if c.deltanet.variant == "groundthink" else GatedDeltaNet
        return mixer(c.deltanet, c.width, rules, weights, c.norm_epsilon)
    if kind == "G":
        assert c.gsa is not None
        return GatedSparseAttention(c.gsa, c.width, rules, weights)
    if kind == "A":
        assert c.attention is not None
        return FullAttention(c.attention, c.width, rules, weights, c.norm_epsilon)
    if kind == "B":
        assert c.resolvent is not None
        return LeftResolvent(c.resolvent, c.width, rules, weights)
    assert c.sliding is not None
    return SlidingAttention(c.sliding, c.width, rules, weights)


class Layer(nn.Module):
    """Mixer and MLP, each with its norm; adaptive and plain forms have the same weights, less the halting head."""

    kind: str
    config: ModelConfig
    rules: Rules
    with_gain: bool = True

    def setup(self) -> None:
        c, rules = self.config, self.rules
        weights = WeightSpec(c.param_dtype, c.compute_dtype, c.init_std)
        norm = c.width, rules, c.norm_epsilon
        if c.has_post_norm(self.kind):  # names of their own: they carry a grown layer's strength
            self.mixer_post_norm, self.mlp_post_norm = RMSNorm(*norm), RMSNorm(*norm)
        else:
            self.mixer_norm, self.mlp_norm = RMSNorm(*norm), RMSNorm(*norm)
        self.mixer = make_mixer(self.kind, c, rules, weights)
        self.mlp: Any
        if c.moe is None:
            self.mlp = SwiGLU(c.width, c.mlp_width, rules, weights)
        else:
            self.mlp = MixtureOfExperts(c.moe, c.width, c.mlp_width, rules, weights)
        if c.hyper is not None:
            self.mixer_hyper = HyperConnection(c.hyper, c.width, rules, weights, c.norm_epsilon)
            self.mlp_hyper = HyperConnection(c.hyper, c.width, rules, weights, c.norm_epsilon)
        ones = nn.initializers.ones
        if self.with_gain:
            self.gain = self.param("gain", ones, (), jnp.float32, on_mesh(rules.spec()))
        if c.stack.kind == "lambda":
            start = nn.initializers.constant(c.stack.initial_residual)
            self.residual_scale = self.param("residual_scale", start, (), jnp.float32, on_mesh(rules.spec()))
            self.x0_scale = self.param("x0_scale", nn.initializers.zeros, (), jnp.float32, on_mesh(rules.spec()))
        if c.halting is not None:
            self.halting = HaltingHead(c.halting, rules)

    def delta(self, x: State, place: Place, cache: Tree = None, link: Tree = None) -> tuple[State, LayerOutput]:
        """Delta(X) = MLPblock(MixerBlock(X)) - X, the update before gain and strength."""
        sow(self, "state", x)
        post = self.config.has_post_norm(self.kind)
        if self.kind == "S":
            sow(self, "link", link)

        def attend(u: Activations) -> tuple[Activations, MixerOutput]:
            arguments = (link,) if self.kind == "S" else ()
            normed = u if post else self.mixer_norm(u)
            with jax.named_scope(f"mixer_{self.kind}"):
                mixed = self.mixer(normed, place, cache, *arguments)
            y = self.mixer_post_norm(mixed.y) if post else mixed.y
            return y.astype(u.dtype), mixed

        def think(u: Activations) -> tuple[Activations, MLPOutput]:
            inner = u if post else self.mlp_norm(u)
            if self.config.moe is None:
                thought = _dense(self.mlp(inner))
            else:
                thought = self.mlp(inner, real_tokens(place.segment_ids))
            y = self.mlp_post_norm(thought.y) if post else thought.y
            return y.astype(u.dtype), thought

        if self.config.hyper is None:  # summing the two keeps the update exact where X is large
            inner, mixed = attend(x)
            outer, thought = think(x + inner)
            return inner + outer, LayerOutput(self._seen(x, mixed), thought)
        u, opened = self.mixer_hyper.enter(x)
        y, mixed = attend(u)
        u, opened = self.mlp_hyper.between(opened, y)
        y, thought = think(u)
        last = self.mlp_hyper.leave(opened, y)
        return last - x, LayerOutput(self._seen(x, mixed), thought)

    def _seen(self, x: State, mixed: MixerOutput) -> MixerOutput:
        """`mixed` with the gates that the halting head is to see, of the raw mean over streams where it asks for it."""
        halting = self.config.halting
        if halting is None or halting.features == "mixer_input":
            return mixed
        write, output, spread = self.mixer.gates(stream_mean(x))
        return mixed._replace(write_gate=write, output_gate=output, head_spread=spread)

    def update(self, x: State, place: Place, cache: Tree = None, link: Tree = None) -> Update:
        """One plain pass: gain * Delta(X)."""
        one = self._pass(x, place, cache, link)
        if not self.with_gain:
            return one
        if self.config.stack.kind == "midpoint" or self.config.exit is not None:  # their sum is rounded once
            return one._replace(value=self.gain * widen(one.value))
        return one._replace(value=scaled(one.value, self.gain))

    def _pass(self, x: State, place: Place, cache: Tree, link: Tree) -> Update:
        """One plain pass without the gain."""
        step, seen = self.delta(x, place, cache, link)
        self._observe(seen.mixer.score_variance)
        ratio = masked_mean(delta_ratio(stream_mean(step), stream_mean(x)), real_tokens(place.segment_ids))
        added = jnp.abs(self.gain) * ratio if self.with_gain else ratio
        return Update(step, _single(ratio, added, seen), seen.mixer.cache, seen.mixer.link)

    def __call__(
        self, x: State, place: Place, control: PassControl, cache: Tree = None, link: Tree = None
    ) -> tuple[State, Activations, PassStatistics, Tree, Tree]:
        """(X, mean stream after the first pass, statistics with a leading pass axis, cache, link)."""
        adaptive = self.config.adaptive
        if adaptive is None:
            one = self._pass(x, place, cache, link)
            moved = add_scaled(x, one.value, self.gain)
            return moved, stream_mean(moved), one.statistics, one.cache, one.link
        if self.is_initializing():  # one call makes every parameter; tracing the passes would triple its time
            self.delta(x, place)
            h = stream_mean(x)
            features = jnp.zeros((*h.shape[:2], FEATURES), jnp.float32) + jnp.zeros_like(h[..., :1], jnp.float32)
            self.halting(features, h, jnp.zeros((), jnp.int32))
            return x, stream_mean(x), _unseen(adaptive.max_passes, self.config), cache, None
        moved, first, statistics, caches = run_passes(
            self, x, adaptive, control, cache,
            place=place, delta=lambda layer, x, place, cache: layer.delta(x, place, cache),
            gain=self.gain, remat=self.config.remat == "pass",
            experts=_experts(self.config), rules=self.rules,
        )  # fmt: skip
        self._observe(statistics.score_variance[0])
        return moved, first, statistics, caches, None

    def gated(
        self, x: State, place: Place, gate: Gate, k: Array, cache: Tree = None
    ) -> tuple[State, PassStatistics, Tree, Gate]:
        """The one pass of a copy that keeps its gate, after `gate` and as pass `k` of its source layer."""
        copies = self.config.gated_copies
        assert copies is not None
        if asked_for(self, PASSES):
            sow(self, "runs", (gate.s >= copies.gate.threshold) & (real_tokens(place.segment_ids) > 0), PASSES)
        moved, statistics, new_cache, after = run_copy(
            self, x, gate, k, copies, cache, place=place, gain=self.gain,
            delta=lambda layer, x, place, cache: layer.delta(x, place, cache),
        )  # fmt: skip
        self._observe(statistics.score_variance)
        return moved, jax.tree.map(lambda a: a[None], statistics), new_cache, after

    def mixed(self, x: State, x0: State) -> State:
        """a X + b X0, what the lambda stack does before the layer."""
        return mix(x, x0, self.residual_scale, self.x0_scale)

    def _observe(self, score_variance: Array) -> None:
        """In training (collection `statistics` mutable): move the running variance of a G layer by one step."""
        if self.kind == "G" and self.is_mutable_collection("statistics") and not self.is_initializing():
            assert self.config.gsa is not None
            ema = self.mixer.variance_ema
            ema.value = moved_variance(ema.value, score_variance, self.config.gsa.ema_decay)


def moved_variance(old: Array, score_variance: Array, keep: float) -> Array:
    """The running variance one step on: keep * old + (1 - keep) * new; the first sets it, 0 says nothing was seen."""
    moved = jnp.where(old > 0, keep * old + (1 - keep) * score_variance, score_variance)
    return jax.lax.stop_gradient(jnp.where(score_variance > 0, moved, old))


def _dense(x: Activations) -> MLPOutput:
    """A dense MLP routes nothing."""
    zero = jnp.zeros((), jnp.float32)
    none = jnp.zeros((0,), jnp.float32)
    return MLPOutput(y=x, auxiliary_loss=zero, experts=none, null_rate=zero, router_entropy=zero)


def _experts(config: ModelConfig) -> int:
    return 0 if config.moe is None else config.moe.experts


def _unseen(passes: int, config: ModelConfig) -> PassStatistics:
    """The statistics of passes that did not run: zeros with a leading pass axis."""
    return jax.tree.map(lambda zero: jnp.stack([zero] * passes), no_statistics(_experts(config)))


def _single(ratio: Array, added: Array, seen: LayerOutput) -> PassStatistics:
    """The statistics of a layer that runs once: one pass, everyone alive; no moments of weights that are all 1."""
    one, zero = jnp.ones((1,), jnp.float32), jnp.zeros((1,), jnp.float32)
    none = jnp.zeros((1, 4), jnp.float32)
    rest = [value[None] for value in seen.statistics]
    ratio, added = (jax.lax.stop_gradient(each)[None] for each in (ratio, added))
    return PassStatistics(one, one, one, zero, zero, one, zero, zero, zero, zero, ratio, added, none, *rest)
