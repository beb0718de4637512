"""Manifold-constrained hyper-connections (mHC, arXiv 2512.24880): n residual streams, mixed by a matrix a sublayer.

z = RMSNorm(vec X);  H_pre = sigmoid(a_pre z phi_pre + b_pre);  H_post = 2 sigmoid(a_post z phi_post + b_post);
H_res = Sinkhorn(a_res mat(z phi_res) + b_res);  X' = H_res X + H_post (outer) F(H_pre X).

- Here n is the number of streams: the state X is [b, t, n, d].
- H_res is doubly stochastic, so a sublayer that returns 0 keeps the mean over streams, and nothing else.
- The operation is `pallas_kernels.hyper_connections`, run on each device's own rows: a sublayer's read opens it, its
  write closes it, and the write of one and the read of the next are one pass over X.
- The scale of the norm and the a are folded into phi.
"""

from __future__ import annotations

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gt_jax.configs.model import HyperConfig
from gt_jax.devices.sharding import Rules, has_mesh, on_mesh, reshard
from gt_jax.models.layers.primitives import WeightSpec, widen
from gt_jax.typing import Activations
from pallas_kernels.hyper_connections import api
from pallas_kernels.hyper_connections.api import Coefficients, Opened, Settings, Weights

Streams = Float[Array, "b t n d"]


def to_streams(x: Activations, n: int) -> Streams:
    """The state before the first layer: stream 0 is x, the others are 0."""
    return jnp.pad(x[:, :, None], ((0, 0), (0, 0), (0, n - 1), (0, 0)))


def from_streams(x: Streams) -> Activations:
    """The mean over streams, computed in float32, in x's dtype."""
    return jnp.mean(widen(x), axis=2).astype(x.dtype)


class HyperConnection(nn.Module):
    """One sublayer's connection: opened by its read, closed by its write."""

    config: HyperConfig
    width: int
    rules: Rules
    weights: WeightSpec
    epsilon: float = 1e-6

    def enter(self, x: Streams) -> tuple[Activations, Opened]:
        """(H_pre X, the sublayer left open)."""
        projection = self.projection()
        with jax.named_scope("hyper_read"):
            return api.enter(x, projection, self.settings)

    def between(self, before: Opened, y: Activations) -> tuple[Activations, Opened]:
        """The sublayer before closed with its branch's y, and this one entered."""
        projection = self.projection()
        with jax.named_scope("hyper_write_read"):
            return api.between(before, y, projection, self.settings)

    def leave(self, opened: Opened, y: Activations) -> Streams:
        """H_res X + H_post (outer) y."""
        with jax.named_scope("hyper_write"):
            return api.leave(opened, y, self.settings)

    def __call__(self, x: Streams) -> Coefficients:
        """The coefficients alone, float32."""
        return api.coefficients(x, self.projection(), self.settings)

    @property
    def settings(self) -> Settings:
        """What the operation is told beside the arrays."""
        c, axes = self.config, self.rules.mesh_axes("batch")
        present = tuple(axis for axis in axes if axis in jax.sharding.get_abstract_mesh().axis_names)
        return Settings(c.sinkhorn_rounds, c.sinkhorn_floor, self.epsilon, present if has_mesh() else None,
                        c.implementation)  # fmt: skip

    @nn.compact
    def projection(self) -> Weights:
        """phi [n, d, n^2 + 2n] and bias, float32."""
        n, d = self.config.streams, self.width
        scale = Scale(n * d, self.rules, name="norm")().reshape(n, d, 1)
        shapes = {"pre": (n,), "post": (n,), "res": (n, n)}
        parts = [Projection(self.config, d, shape, self.rules, self.weights, name=name)()
                 for name, shape in shapes.items()]  # fmt: skip
        phi = jnp.concatenate([widen(w) * alpha for w, _, alpha in parts], axis=-1) * scale
        return Weights(phi, jnp.concatenate([b.reshape(-1) for _, b, _ in parts]))


class Scale(nn.Module):
    """The learned float32 scale of an RMSNorm, 1 at init; applying it is left to the caller."""

    width: int
    rules: Rules

    @nn.compact
    def __call__(self) -> Float[Array, " d"]:
        return self.param("scale", nn.initializers.ones, (self.width,), jnp.float32, on_mesh(self.rules.spec(None)))


class Projection(nn.Module):
    """The weights of one coefficient: phi [n, d, m], gathered, in the parameter dtype; b and alpha in float32."""

    config: HyperConfig
    width: int
    shape: tuple[int, ...]
    rules: Rules
    weights: WeightSpec

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "n d m"], Float[Array, "..."], Float[Array, ""]]:
        size = functools.reduce(operator.mul, self.shape)
        shape, axes = (self.config.streams, self.width, size), (None, "embed", None)
        w = self.param("w", self.weights.init, shape, jnp.dtype(self.weights.param), on_mesh(self.rules.spec(*axes)))
        whole = on_mesh(self.rules.spec(*[None] * len(self.shape)))
        b = self.param("b", nn.initializers.zeros, self.shape, jnp.float32, whole)
        start = nn.initializers.constant(self.config.initial_scale)
        alpha = self.param("alpha", start, (), jnp.float32, on_mesh(self.rules.spec()))
        return reshard(w, self.rules.gathered(*axes)), b, alpha
