"""One layer of the residual stack: X <- X + gain * Delta(X), Delta(X) = MLP(Mixer(X)) - X, run once or adaptively.

`gain` is one float32 parameter a layer, 1 at init: the exact carrier of an adaptive-depth coefficient (growth).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from gt_jax.config import ModelConfig
from gt_jax.layers.adaptive_depth import HaltingHead, PassControl, PassStatistics, delta_ratio, run_passes
from gt_jax.layers.deltanet import GatedDeltaNet
from gt_jax.layers.gsa import GatedSparseAttention
from gt_jax.layers.mixer import MixerOutput, masked_mean, real_tokens
from gt_jax.layers.primitives import RMSNorm, SwiGLU, WeightSpec
from gt_jax.sharding import Rules, on_mesh
from gt_jax.typing import Activations, Tokens, Tree


class Place(NamedTuple):
    """Where the tokens stand: segment ids [b, t] (0 is padding); in decoding the index [b] of the row's first token."""

    segment_ids: Tokens
    position: Array | None


class Layer(nn.Module):
    """Mixer and MLP with pre-norm; adaptive and plain forms have the same weights, less the halting head."""

    kind: str
    config: ModelConfig
    rules: Rules

    def setup(self) -> None:
        c, rules = self.config, self.rules
        weights = WeightSpec(c.param_dtype, c.compute_dtype, c.init_std)
        self.mixer_norm = RMSNorm(c.width, rules, c.norm_epsilon)
        self.mixer: Any
        if self.kind == "D":
            self.mixer = GatedDeltaNet(c.deltanet, c.width, rules, weights, c.norm_epsilon)
        else:
            self.mixer = GatedSparseAttention(c.gsa, c.width, rules, weights)
        self.mlp_norm = RMSNorm(c.width, rules, c.norm_epsilon)
        self.mlp = SwiGLU(c.width, c.mlp_width, rules, weights)
        self.gain = self.param("gain", nn.initializers.ones, (), jnp.float32, on_mesh(rules.spec()))
        if c.adaptive is not None:
            self.halting = HaltingHead(c.adaptive, rules)

    def delta(self, x: Activations, place: Place, cache: Tree = None) -> tuple[Activations, MixerOutput]:
        """Delta(X) = MLP(X + Mixer(X)) + Mixer(X), the update before gain and strength."""
        normed = self.mixer_norm(x)
        if self.kind == "D":
            mixed = self.mixer(normed, place.segment_ids, cache)
        else:
            mixed = self.mixer(normed, place.segment_ids, cache, place.position)
        inner = mixed.y.astype(x.dtype)
        return inner + self.mlp(self.mlp_norm(x + inner)).astype(x.dtype), mixed

    def __call__(
        self, x: Activations, place: Place, control: PassControl, cache: Tree = None
    ) -> tuple[Activations, Activations, PassStatistics, Tree]:
        """(X, X after the first pass, statistics with a leading pass axis, cache)."""
        adaptive, real = self.config.adaptive, real_tokens(place.segment_ids)
        if adaptive is None:
            step, mixed = self.delta(x, place, cache)
            moved = x + self.gain.astype(x.dtype) * step
            self._observe(mixed.score_variance)
            return moved, moved, _single(masked_mean(delta_ratio(step, x), real), mixed), mixed.cache
        if self.is_initializing():  # the lifted scan and cond need the parameters to exist
            _, mixed = self.delta(x, place, None if cache is None else jax.tree.map(lambda a: a[0], cache))
            self.halting(jnp.zeros((*x.shape[:2], 5), jnp.float32))
        moved, first, statistics, caches = run_passes(
            self, x, adaptive, control, cache,
            real=real, delta=lambda layer, x, cache: layer.delta(x, place, cache),
            gain=self.gain, remat=self.config.remat == "pass",
        )  # fmt: skip
        self._observe(statistics.score_variance[0])
        return moved, first, statistics, caches

    def _observe(self, score_variance: Array) -> None:
        """In training (collection `statistics` mutable): move the running variance of a G layer by one step."""
        if self.kind == "G" and self.is_mutable_collection("statistics") and not self.is_initializing():
            old, keep = self.mixer.variance_ema.value, self.config.gsa.ema_decay
            moved = jnp.where(old > 0, keep * old + (1 - keep) * score_variance, score_variance)
            self.mixer.variance_ema.value = jax.lax.stop_gradient(moved)


def _single(ratio: Array, mixed: MixerOutput) -> PassStatistics:
    """The statistics of a layer that runs once: one pass, everyone alive."""
    one, zero = jnp.ones((1,), jnp.float32), jnp.zeros((1,), jnp.float32)
    mixer = (mixed.auxiliary_loss[None], mixed.entropy[None], mixed.score_variance[None])
    return PassStatistics(one, one, zero, zero, zero, zero, jax.lax.stop_gradient(ratio)[None], *mixer)
