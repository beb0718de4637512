"""Depth-wise ACT: a token leaves the stack at the layer where its halting sum is full (Graves, arXiv 1603.08983).

After layer l:  p_l = sigmoid(MLP(x_l));  N = the first l with p_1 + … + p_l >= threshold, or the last layer;
R = 1 - sum_{l<N} p_l;  output = sum_{l<N} p_l x_l + R x_N, weights that sum to 1;  ponder cost N + R.

- The gradient of the cost is that of R: N has none. To halt sooner is to raise the p before the halting layer.
- A halted token is invisible to deeper layers: they compute nothing for it, and it writes no state, no key and no
  convolution input. So leaving it out is the definition and not an approximation of one.
- Skipping is compaction: each row's living tokens move to its front, the layer runs on the shortest of a few static
  lengths that holds them, padding (segment id 0) after, and its update moves back. A length of 0 costs nothing.
- With a cache (decoding) a token that nobody lives for skips the layer; halted rows keep their cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from gt_jax.configs.model import ExitConfig
from gt_jax.devices.sharding import Rules, has_mesh, on_mesh, reshard
from gt_jax.models.layers.compaction import Living, Stream, beside, outline, partition, run_compacted, zeros_of
from gt_jax.models.layers.mixer import masked_mean
from gt_jax.models.layers.primitives import float32_einsum, widen
from gt_jax.typing import PerToken, Scalar, Tokens, Tree

_PRESETS = {"accuracy": (0.99, 0.001), "balanced": (0.95, 0.01), "speed": (0.80, 0.1)}
EXIT_PRESETS: Mapping[str, ExitConfig] = MappingProxyType({name: ExitConfig(*pair) for name, pair in _PRESETS.items()})

CachedFn = Callable[[Any, Array, Array, Array, Tree], tuple[Tree, Tree, Tree]]
"""(layer, x, segment_ids, positions, cache) -> (update, extras, cache): see `run_cached`."""


class ExitWeights(NamedTuple):
    """The halting unit's parameters, float32 and whole on every device: [d, d//2], [d//2], [d//2, 1], [1]."""

    hidden: Array
    hidden_bias: Array
    output: Array
    output_bias: Array


class Projection(nn.Module):
    """A matrix and a bias, float32; called without arguments, returns both as they are used (the matrix whole)."""

    shape: tuple[int, int]
    axes: tuple[str | None, str | None]
    bias: float
    rules: Rules

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        init = nn.initializers.lecun_normal()
        w = self.param("w", init, self.shape, jnp.float32, on_mesh(self.rules.spec(*self.axes)))
        bias = nn.initializers.constant(self.bias)
        b = self.param("b", bias, self.shape[1:], jnp.float32, on_mesh(self.rules.spec(None)))
        return reshard(w, self.rules.gathered(*self.axes)), b


class ExitHead(nn.Module):
    """p = sigmoid(W_o gelu(W_h x + b_h) + b_o), one unit for all layers; with streams x is their mean.

    A scan over layers cannot hold a module that its layers share: take `weights()` outside it and call
    `exit_probability` inside. `initial_bias` is where b_o starts; `even_bias(layers)` begins with the whole stack.
    """

    width: int
    rules: Rules
    initial_bias: float = -2.0

    def setup(self) -> None:
        half = self.width // 2
        self.hidden = Projection((self.width, half), ("embed", None), 0.0, self.rules)
        self.output = Projection((half, 1), (None, None), self.initial_bias, self.rules)

    def weights(self) -> ExitWeights:
        """The parameters, gathered for use."""
        return ExitWeights(*self.hidden(), *self.output())

    def __call__(self, x: Stream) -> PerToken:
        return exit_probability(self.weights(), x, self.rules)


def exit_probability(weights: ExitWeights, x: Stream, rules: Rules) -> PerToken:
    """The halting probability of each token after a layer, in float32: `ExitHead`'s equation."""
    wide = jnp.mean(widen(x), axis=2) if x.ndim == 4 else widen(x)
    out = on_mesh(rules.spec("batch", None, None))
    hidden = float32_einsum("btd,df->btf", wide, weights.hidden, out_sharding=out) + weights.hidden_bias[None, None]
    logit = float32_einsum("btf,fg->btg", jax.nn.gelu(hidden), weights.output, out_sharding=out)
    return jax.nn.sigmoid(logit[..., 0] + weights.output_bias[None])


def even_bias(layers: int) -> float:
    """The logit of 1 / layers: a fresh model gives every layer about the same weight, so that all of them learn."""
    return -math.log(max(layers - 1, 1))


class ExitState(NamedTuple):
    """What the scan over layers carries.

    `x` is the stream (a halted token's stays as it left), `output` the weighted sum so far, of x's shape and at least
    float32. Per token [b, t]: `halted` the sum of weights, 1 once the token has left; `remainder` R, 0 before that;
    `layers` N, the layers that computed it.
    """

    x: Array
    output: Array
    halted: Array
    remainder: Array
    layers: Array


def start(x: Stream, segment_ids: Tokens) -> ExitState:
    """Before the first layer: every token of a document is alive; padding has left with its embedding as output."""
    real, wide = segment_ids > 0, widen(x)
    halted = jnp.where(real, 0.0, 1.0).astype(wide.dtype)
    zero = 0 * halted  # and not zeros_like, which drops the rows' sharding
    return ExitState(x, beside(halted, wide) * wide, halted, zero, zero)


def alive(state: ExitState) -> Living:
    """Which tokens the next layer computes: the sum of a living token is below the threshold, so below 1."""
    return state.halted < 1


def observe(state: ExitState, p: PerToken, threshold: float, last: Array | bool) -> ExitState:
    """Weigh `state.x`, the stream after a layer, by p or by the remainder where the token halts.

    A living token halts where halted + p >= threshold, and at the `last` layer (traced bool []) whatever its p.
    """
    living, total = alive(state), state.halted + p
    rest = 1 - state.halted
    stops = living & ((total >= threshold) | jnp.asarray(last))
    weight = jnp.where(living, jnp.where(stops, rest, p), 0.0)
    return ExitState(
        x=state.x,
        output=state.output + beside(weight, state.output) * widen(state.x),
        halted=jnp.where(stops, 1.0, jnp.where(living, total, state.halted)),
        remainder=jnp.where(stops, rest, state.remainder),
        layers=state.layers + living.astype(state.layers.dtype),
    )


def ponder(state: ExitState, real: PerToken) -> Scalar:
    """The mean of N + R over real tokens after the last layer; `ExitConfig.ponder` times this is added to the loss."""
    return masked_mean(jax.lax.stop_gradient(state.layers) + state.remainder, real)


def layers_used(state: ExitState, real: PerToken) -> Scalar:
    """The mean of N over real tokens after the last layer."""
    return masked_mean(state.layers, real)


def alive_share(state: ExitState, real: PerToken) -> Scalar:
    """The share of real tokens that the next layer computes; its sum over layers is the mean number of layers used."""
    return masked_mean(alive(state).astype(jnp.float32), real)


def keep_where(living: Bool[Array, " b"], new: Tree, old: Tree) -> Tree:
    """`new` for living rows, `old` for halted ones, leaf by leaf [b, …], laid out as `new`."""

    def choose(new: Array, old: Array) -> Array:
        spec = partition(new)
        mask = reshard(jnp.broadcast_to(beside(living, new), new.shape), spec)
        return jnp.where(mask, new, reshard(old, spec))

    return jax.tree.map(choose, new, old)


def run_cached(
    layer: Any, run: CachedFn, x: Stream, segment_ids: Tokens, positions: Tokens, living: Living, cache: Tree
) -> tuple[Tree, Tree, Tree]:
    """`run` on the living tokens with a cache: (update, 0 for halted tokens; extras; cache that only they wrote).

    run(layer, x, segment_ids, positions, cache) -> (update, extras, cache) as in `run_compacted`; cache leaves are
    [b, …] and a token's slot is its position (the first of the call's: positions[:, 0]), so what a halted token did not
    write stays invisible. One token a step; a step that no row lives for is skipped. Where all tokens of a prompt live
    they go in one call; elsewhere one after the other, as rows halt apart. Extras are means over the steps that ran.
    """
    living = living & (segment_ids > 0)
    if layer.is_initializing():
        return run(layer, x, segment_ids, positions, cache)
    if has_mesh():  # mixers lay their cache out at first use; a cond and a scan need it so from the start
        laid_out = outline(layer, run, x, segment_ids, positions, cache)[2]
        cache = jax.tree.map(lambda leaf, shape: reshard(leaf, partition(shape)), cache, laid_out)
    operands = (x, segment_ids, positions, living, cache)
    if x.shape[1] == 1:
        return _one_token(run, layer, *operands)

    return nn.cond(
        jnp.all(living),
        lambda layer, x, ids, at, living, cache: run(layer, x, ids, at, cache),
        lambda layer, *operands: _token_by_token(run, layer, *operands),
        layer, *operands,
    )  # fmt: skip


def _one_token(run: CachedFn, layer: Any, *operands: Any) -> tuple[Tree, Tree, Tree]:
    """One step of decoding, [b, 1]: skipped where no row is alive; halted rows neither move nor write."""

    def compute(layer: Any, x: Array, segment_ids: Array, positions: Array, living: Array, cache: Tree) -> Any:
        update, extras, new = run(layer, x, jnp.where(living, segment_ids, 0), positions, cache)
        update = jax.tree.map(lambda leaf: jnp.where(beside(living, leaf), leaf, 0), update)
        return update, extras, keep_where(living[:, 0], new, cache)

    nothing = outline(layer, compute, *operands)[:2]
    skip = lambda layer, *same: (*jax.tree.map(zeros_of, nothing), same[-1])  # noqa: E731
    return nn.cond(jnp.any(operands[3]), compute, skip, layer, *operands)


def _token_by_token(
    run: CachedFn, layer: Any, x: Array, segment_ids: Array, positions: Array, living: Array, cache: Tree
) -> tuple[Tree, Tree, Tree]:
    """The tokens of a prompt as so many steps of decoding."""

    def step(layer: Any, cache: Tree, xs: tuple[Array, ...]) -> tuple[Tree, tuple[Tree, Tree]]:
        update, extras, cache = _one_token(run, layer, *(leaf[:, None] for leaf in xs), cache)
        return cache, (jax.tree.map(lambda leaf: leaf[:, 0], update), extras)

    scanned = nn.scan(step, variable_broadcast=True, split_rngs={"params": False}, in_axes=1, out_axes=(1, 0),
                      check_constancy_invariants=False)  # fmt: skip
    cache, (update, extras) = scanned(layer, cache, (x, segment_ids, positions, living))
    ran = jnp.maximum(jnp.sum(jnp.any(living, axis=0), dtype=jnp.float32), 1.0)
    return update, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0) / ran.astype(leaf.dtype), extras), cache


def exit_step(
    layer: Any,
    delta: CachedFn,
    state: ExitState,
    segment_ids: Tokens,
    positions: Tokens,
    cache: Tree = None,
    *,
    weights: ExitWeights,
    threshold: float,
    last: Array | bool,
    rules: Rules,
    buckets: Sequence[int] | None = None,
) -> tuple[ExitState, Tree, Tree]:
    """x <- x + Delta(x) for the living tokens, rounded once, then `observe`: (state, extras, cache).

    delta(layer, x, segment_ids, positions, cache) -> (Delta(x) of x's shape, extras, cache); without a cache it gets
    None and the tokens are compacted. The halting unit too runs on living tokens alone.
    """

    def moved(x: Array, step: Array) -> Array:
        return (widen(x) + step).astype(x.dtype)

    def cached(layer: Any, x: Array, segment_ids: Array, positions: Array, cache: Tree) -> tuple[Tree, Tree, Tree]:
        step, extras, cache = delta(layer, x, segment_ids, positions, cache)
        return (step, exit_probability(weights, moved(x, step), rules)), extras, cache

    def plain(layer: Any, x: Array, segment_ids: Array, positions: Array) -> tuple[Tree, Tree]:
        return cached(layer, x, segment_ids, positions, None)[:2]

    where = (state.x, segment_ids, positions, alive(state))
    if cache is None:
        (step, p), extras = run_compacted(layer, plain, *where, rules=rules, buckets=buckets)
    else:
        (step, p), extras, cache = run_cached(layer, cached, *where, cache)
    return observe(state._replace(x=moved(state.x, step)), p, threshold, last), extras, cache
