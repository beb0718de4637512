"""`B`: each head reads how a wave that comes from the left answers at every token (an honest, causal ResNet-BK).

- A head's potential at a token, v = w.x, stands on the diagonal of a tridiagonal matrix, v - 2; what the head gives is
  the last diagonal element of the resolvent of the block of all tokens up to this one. (The published layer takes the
  element of the whole matrix, which depends on the tokens after it.)
- The state of a row is one complex number a head. At the first token of a document it is not read.
- Every token enters at full strength and nothing gates the output: to the halting head both gates are 1, and the
  potential stands for the query.
- The recurrence itself is `gt_jax.models.layers.left_resolvent`, run on each device's own rows and heads.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gt_jax.configs.resolvent import ResolventConfig
from gt_jax.devices.sharding import Rules, on_mesh, per_device, reshard
from gt_jax.models.layers.deltanet import HeadGate
from gt_jax.models.layers.left_resolvent import left_resolvent
from gt_jax.models.layers.mixer import MixerOutput, Place, gate_statistics, last_real, without_padding
from gt_jax.models.layers.primitives import Einsum, WeightSpec, widen
from gt_jax.typing import Activations, PerToken, Tokens, Tree

LEAST_BROADENING = 1e-6
COUPLING_START = 3.0  # sigmoid(3) = 0.95


def empty_cache(config: ResolventConfig, batch: int, dtype: str) -> Tree:
    """The decode cache before the first token: g of the token before, [b, 1, h, 2]; segment -1 is no document."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return {
        "resolvent": jnp.zeros((batch, 1, config.heads, 2), wide),
        "segments": jnp.full((batch, 1), -1, jnp.int32),
    }


def init_broadening(key: Array, shape: tuple[int, ...], dtype: Any, out_sharding: Any = None) -> Array:
    """Inverse softplus of numbers from 1 to 0.1: so no feature is above 10 in the beginning."""
    values = jnp.geomspace(1.0, 0.1, shape[0], dtype=dtype)
    start = values + jnp.log(-jnp.expm1(-values))
    return start if out_sharding is None else reshard(start, out_sharding)


class LeftResolvent(nn.Module):
    """y = W_o( scale [Re g, Im g] ), g_t = 1 / (v_t - 2 - z - o^2 g_{t-1}), g 0 before the first token of a document.

    v = clip(W x, +-bound); z = i (softplus(broadening) + 1e-6), so |g| <= 1 / Im z; o = 1, with learned `coupling`
    sigmoid(coupling). All of it float32 but the product with W_o; scale, z and o are one number a head.
    """

    config: ResolventConfig
    width: int
    rules: Rules
    weights: WeightSpec

    def setup(self) -> None:
        c, rules = self.config, self.rules
        per_head, shape = on_mesh(rules.spec("heads")), (c.heads,)
        self.potential = HeadGate(self.width, c.heads, rules, biased=False)
        self.broadening = self.param("broadening", init_broadening, shape, jnp.float32, per_head)
        if c.coupling == "learned":
            start = nn.initializers.constant(COUPLING_START)
            self.coupling = self.param("coupling", start, shape, jnp.float32, per_head)
        self.scale = self.param("scale", nn.initializers.ones, shape, jnp.float32, per_head)
        self.output = Einsum((c.heads, 2, self.width), ("heads", None, "embed"), rules, self.weights)

    def __call__(self, x: Activations, place: Place, cache: Tree | None = None) -> MixerOutput:
        """Run along each segment; with a cache, go on from it and return the new one."""
        segment_ids = place.segment_ids
        start = self._place(empty_cache(self.config, x.shape[0], self.weights.compute) if cache is None else cache)
        potential = self.potential(x)
        of_state, real = segment_ids, jnp.ones_like(segment_ids, bool)
        if cache is not None:  # g goes through padding as it is
            of_state = without_padding(segment_ids, start["segments"][:, -1], self.rules)
            real = segment_ids > 0
        g = self._recurrence(potential, of_state, real, start)
        features = widen(self.scale)[None, None, :, None] * g
        y = self.output("bthr,hrd->btd", features, ("batch", None, None))
        new_cache = None
        if cache is not None:
            new = {"resolvent": (g, ("heads", None)), "segments": (segment_ids, ())}
            new_cache = {name: last_real(start[name], array, segment_ids, self.rules, axes)
                         for name, (array, axes) in new.items()}  # fmt: skip
        zero = jnp.zeros((), jnp.float32)
        return MixerOutput(y, *_statistics(potential), zero, zero, zero, new_cache)

    def gates(self, h: Activations) -> tuple[PerToken, PerToken, PerToken]:
        """`gate_statistics` of gates of 1 and the potential of h."""
        return _statistics(self.potential(jax.lax.stop_gradient(h)))

    def _recurrence(self, potential: Array, segment_ids: Tokens, real: Array, start: Tree) -> Float[Array, "b t h 2"]:
        """g on each device's own rows and heads; the coupling is 0 at the first token of a segment."""
        bound = self.config.bound
        off_diagonal = (self.coupling,) if self.config.coupling == "learned" else ()

        def local(
            potential: Array, broadening: Array, ids: Array, real: Array, before: Array, seen: Array, *coupling: Array
        ) -> Array:
            follows = jnp.concatenate([seen, ids[:, :-1]], axis=1) == ids
            square = jnp.ones_like(broadening) if not coupling else jax.nn.sigmoid(widen(coupling[0])) ** 2
            squares = jnp.where(follows[..., None], square.astype(potential.dtype)[None, None], 0.0)
            eta = jax.nn.softplus(widen(broadening)) + LEAST_BROADENING
            diagonal = jnp.clip(potential, -bound, bound) - 2.0
            state = before[:, 0, :, 0], before[:, 0, :, 1]
            g = left_resolvent(diagonal, eta.astype(potential.dtype), squares, state, real)
            return jnp.stack(g, axis=-1)

        spec = self.rules.spec
        per_head, rows, wide = spec("heads"), spec("batch", None), spec("batch", None, "heads", None)
        in_specs = (spec("batch", None, "heads"), per_head, rows, rows, wide, rows, *[per_head] * len(off_diagonal))
        arrays = potential, self.broadening, segment_ids, real, start["resolvent"], start["segments"], *off_diagonal
        return per_device(local, in_specs, wide)(*arrays)

    def _place(self, cache: Tree) -> Tree:
        """The cache laid out like the activations: rows with the batch, heads with the heads."""
        specs = {"resolvent": self.rules.spec("batch", None, "heads", None), "segments": self.rules.spec("batch", None)}
        return {name: reshard(array, specs[name]) for name, array in cache.items()}


def _statistics(potential: Array) -> tuple[PerToken, PerToken, PerToken]:
    """What a halting head sees: gates of 1, and the spread over heads of the potential's size."""
    ones = jnp.ones_like(potential)
    write, output, spread = gate_statistics(ones, ones[..., None], potential[..., None])
    return write, jnp.ones_like(output), spread
