"""The largest singular value of a layer's Jacobian, by Lanczos' iteration on J^T J: how much it can stretch its input.

    V^T J^T J V = T (k x k, V an orthonormal basis of v, J^T J v, …, v random),   v = V y of T's largest eigenvalue
    value = |J v|,   distance = |J^T J v - value^2 v| / value,   value <= sigma_max <= value * factor

- The value is of a real unit vector, so sigma_max is at least that, however far the iteration has come; and some
  singular value is within `distance` of it. Neither says how far above sigma_max may be: where many singular values are
  near 1, a small residual, like a small change from one iteration to the next, does not mean that it is near.
- The factor does, with `PROBABILITY` over the random start: after k steps in n dimensions (Kuczynski and Wozniakowski,
  SIAM J. Matrix Anal. Appl. 13, 1992, theorem 4.2, whatever the spectrum)

    P(value^2 < (1 - e) sigma_max^2) <= 1.648 sqrt(n) exp(-sqrt(e) (2k - 1)),   factor = (1 - e)^(-1/2)

- J is of the whole map X -> X + g Delta(X) at the states the layer is really given, over a row of tokens as one vector;
  g is the layer's gain, for a pass of adaptive depth times that pass's strength. What is constant or rounded in Delta
  is so here too: a G layer's choice of keys, the picks of a router. Halting is no part of it.
- Padding is outside: J acts on the tokens of documents and is read there.
- J v is the transpose of the linear map u -> J^T u, itself a vjp: forward mode knows nothing of the backward passes
  that kernels, experts and hyper-connections write out by hand.
- One program for all layers of a type and shape, whichever model they are of: float32, in whatever dtype they run. It
  holds k + 2 states of the rows: 1.5 GB for a row of 4,096 tokens of width 4,096 and k = 20.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from gt_jax.configs.model import EmbeddingConfig, ModelConfig
from gt_jax.devices.sharding import Rules, reshard
from gt_jax.evaluation.intermediates import Intermediates
from gt_jax.models.layers.mixer import place_rows, real_tokens
from gt_jax.models.layers.residual import Layer
from gt_jax.typing import PerToken, State, Tokens, Tree

TINY = 1e-30
PROBABILITY = 0.99
EXHAUSTED = 1e-5


class SingularValue(NamedTuple):
    """Of each row's Jacobian: `value` <= sigma_max <= value * factor, a singular value within `distance` of value."""

    value: Float[Array, " b"]
    distance: Float[Array, " b"]
    factor: Float[Array, " b"]


class Step(NamedTuple):
    """One application of a layer: which layer, which pass (from 0), and g."""

    layer: int
    number: int
    strength: float


def error_factor(size: int, iterations: int) -> float:
    """How many times the value sigma_max may be, with `PROBABILITY`; infinite after too few iterations."""
    share = (math.log(1.648 * math.sqrt(size) / (1 - PROBABILITY)) / (2 * iterations - 1)) ** 2
    return math.inf if share >= 1 else (1 - share) ** -0.5


def largest_singular_value(
    function: Callable[[State], State], x: State, real: PerToken, iterations: int, seed: int = 0
) -> SingularValue:
    """Of P J P for each row, J the Jacobian of `function` at x and P the projection on the tokens with real 1.

    Rows must not depend on one another. `function` need be differentiable in reverse mode only, twice. The start is
    Normal(0, 1) drawn from `seed`: the same for every x of a shape.
    """
    inside = jnp.broadcast_to(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x.shape)
    inside = reshard(inside, jax.typeof(x).sharding.spec)  # said outright: broadcasting loses it where there is one row
    pull = jax.vjp(function, x)[1]

    def transposed(u: Array) -> Array:
        return pull(u * inside)[0] * inside

    def applied(v: Array) -> Array:
        return jax.vjp(transposed, v)[1](v)[0]

    def length(v: Array) -> Array:
        return jnp.sqrt(jnp.sum(jnp.square(v), axis=tuple(range(1, v.ndim))))

    def times(v: Array, factor: Array) -> Array:
        return v * factor.reshape(*factor.shape, *[1] * (v.ndim - factor.ndim))

    def unit(v: Array) -> Array:
        return times(v, 1 / jnp.maximum(length(v), TINY))

    def outside(w: Array, basis: Array) -> Array:
        """What of w is orthogonal to the basis; twice, since once leaves what rounding hides."""
        for _ in range(2):
            parts = jnp.sum(basis * w[None], axis=tuple(range(2, basis.ndim)))
            w = w - jnp.sum(times(basis, parts), axis=0)
        return w

    def iterate(k: Array, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        v, basis, diagonal, beside = carry
        basis = jax.lax.dynamic_update_index_in_dim(basis, v, k, 0)
        w = transposed(applied(v))
        here = jnp.sum(v * w, axis=tuple(range(1, v.ndim)))
        w = outside(w, basis)
        diagonal = jax.lax.dynamic_update_index_in_dim(diagonal, here, k, 0)
        # Where the basis holds all that J maps on, what is left is rounding, and no direction: zeros from there on.
        goes_on = (length(w) > EXHAUSTED * jnp.max(diagonal, axis=0)).astype(w.dtype)
        beside = jax.lax.dynamic_update_index_in_dim(beside, goes_on * length(w), k, 0)
        return times(unit(outside(unit(w), basis)), goes_on), basis, diagonal, beside

    start = unit(jax.random.normal(jax.random.key(seed), x.shape, x.dtype) * inside)
    basis, numbers = jnp.stack([0 * start] * iterations), jnp.stack([0 * length(start)] * iterations)
    _, basis, diagonal, beside = jax.lax.fori_loop(0, iterations, iterate, (start, basis, numbers, numbers))
    best = _combination(reshard(diagonal, P(None, None)), reshard(beside, P(None, None)))
    v = unit(jnp.sum(times(basis, reshard(best, jax.typeof(diagonal).sharding.spec)), axis=0))
    u = applied(v)
    value = length(u)
    residual = length(transposed(u) - times(v, jnp.square(value)))
    factor = jnp.full_like(value, error_factor(x.size // x.shape[0], iterations))
    return SingularValue(value, residual / jnp.maximum(value, TINY), factor)


def _combination(diagonal: Float[Array, "k b"], beside: Float[Array, "k b"]) -> Float[Array, "k b"]:
    """The eigenvector of the largest eigenvalue of the tridiagonal matrix of each row."""
    def one(on: Array, off: Array) -> Array:
        return jnp.linalg.eigh(jnp.diag(on) + jnp.diag(off[:-1], 1) + jnp.diag(off[:-1], -1))[1][:, -1]

    return jax.vmap(one, in_axes=1, out_axes=1)(diagonal, beside)


@functools.cache
def make_singular_value(
    kind: str, config: ModelConfig, rules: Rules, iterations: int, seed: int
) -> Callable[..., SingularValue]:
    """The jitted stretch(variables of one layer, X, g, segment ids, link) of the layers of a type, made once.

    X [r, t, d] or [r, t, n, d] are the states before the layer. `link` is held fixed.
    """
    layer = Layer(kind, config, rules, parent=None)

    def stretch(variables: Tree, x: State, strength: Array, segment_ids: Tokens, link: Tree) -> SingularValue:
        place = place_rows(segment_ids, rules=rules)
        x = reshard(x, rules.spec("batch", *[None] * (x.ndim - 1)))

        def moved(x: State) -> State:
            update: Any = layer.apply(variables, x, place, None, link, method=Layer.delta)
            return x + strength * update[0]

        with jax.default_matmul_precision("highest"):
            found = largest_singular_value(moved, x, real_tokens(place.segment_ids), iterations, seed)
        return jax.tree.map(lambda a: reshard(a, P(None)), found)  # every process reads all of it

    return jax.jit(stretch)


def layer_config(config: ModelConfig) -> ModelConfig:
    """What of a model a single layer's update depends on, in float32: equal for a source and what is grown from it."""
    layout = "".join(sorted(set(config.depth.types)))
    return config.twice_differentiable.replace(
        layout=layout, adaptive=None, gated_copies=None, exit=None, mtp=None, memory=None,
        embedding=EmbeddingConfig(), vocab=257, stack=config.stack.replace(skips=()), param_dtype="float32",
        compute_dtype="float32", remat="none",
    )  # fmt: skip


def _float32(tree: Tree) -> Tree:
    return jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


@jax.jit
def _block(tree: Tree, index: Array) -> Tree:
    """The layer of one block out of a slot's stacked variables; float32."""
    return _float32(jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree))


def layer_singular_values(
    config: ModelConfig, variables: Tree, inside: Intermediates, segment_ids: Tokens, steps: Sequence[Step], *,
    rules: Rules, iterations: int, seed: int = 0, say: Callable[[str], None] = lambda line: None,
) -> list[SingularValue]:  # fmt: skip
    """The singular value of each step at the states it was seen to start from; `segment_ids` [r, t] are their rows'."""
    found, shape = [], layer_config(config)
    for count, step in enumerate(steps, 1):
        say(f"Jacobian {count}/{len(steps)}: layer {step.layer}, pass {step.number + 1}")
        stretch = make_singular_value(config.depth.types[step.layer], shape, rules, iterations, seed)
        own = layer_variables(config, variables, step.layer)
        x, link = _float32((inside.states[step.layer, step.number], inside.links.get(step.layer)))
        found.append(jax.device_get(stretch(own, x, jnp.float32(step.strength), segment_ids, link)))
    return found


def layer_variables(config: ModelConfig, variables: Tree, layer: int) -> Tree:
    """One layer's {"params", "statistics"} out of a model's, without its halting head; float32."""
    segment, block, slot = config.depth.position(layer)
    collections = {name: variables[name][f"segment{segment}"].get(f"layer{slot}") for name in ("params", "statistics")
                   if f"segment{segment}" in variables.get(name, {})}  # fmt: skip
    stacked = {name: {key: leaf for key, leaf in tree.items() if key != "halting"}
               for name, tree in collections.items() if tree is not None}  # fmt: skip
    return _block(stacked, np.int32(block))
