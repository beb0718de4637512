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

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from gt_jax.configs.model import ExitConfig
from gt_jax.devices.sharding import Rules, has_mesh, on_mesh, per_device, reshard
from gt_jax.models.layers.mixer import masked_mean
from gt_jax.models.layers.primitives import float32_einsum, widen
from gt_jax.typing import PerToken, Scalar, Tokens, Tree

_PRESETS = {"accuracy": (0.99, 0.001), "balanced": (0.95, 0.01), "speed": (0.80, 0.1)}
EXIT_PRESETS: Mapping[str, ExitConfig] = MappingProxyType({name: ExitConfig(*pair) for name, pair in _PRESETS.items()})

Stream = Float[Array, "b t *n d"]
Living = Bool[Array, "b t"]
LayerFn = Callable[[Any, Array, Array, Array], tuple[Tree, Tree]]
"""(layer, x, segment_ids, positions) -> (update, extras): see `run_compacted`."""
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
    return ExitState(x, _beside(halted, wide) * wide, halted, zero, zero)


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
        output=state.output + _beside(weight, state.output) * widen(state.x),
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


class Packing(NamedTuple):
    """A permutation of each row with its living tokens first, in order.

    `order` [b, t] is the token at each place, `place` [b, t] the place of each token, `fill` [b] the living tokens.
    """

    order: Any
    place: Any
    fill: Any


def compact(living: Living, rules: Rules) -> Packing:
    """The stable permutation that brings each row's living tokens to its front."""

    def local(living: Array) -> Packing:
        order = jnp.argsort(~living, axis=1, stable=True).astype(jnp.int32)
        place = jnp.argsort(order, axis=1).astype(jnp.int32)
        return Packing(order, place, jnp.sum(living, axis=1, dtype=jnp.int32))

    rows = rules.spec("batch", None)
    return per_device(local, (rows,), Packing(rows, rows, rules.spec("batch")))(reshard(living, rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def move_tokens(x: Array, source: Array, target: Array, rules: Rules) -> Array:
    """y[b, i] = x[b, source[b, i]], 0 where `source` points outside: x [b, t, …], source [b, s] -> [b, s, …].

    `target` [b, t] is the way back, x[b, j] went to y[b, target[b, j]] (outside: nowhere), so that the gradient is a
    gather too: no scatter, which accelerators serialise, and no sum over devices that hold the same rows.
    """
    spec, rows = rules.spec("batch", *(None,) * (x.ndim - 1)), rules.spec("batch", None)

    def local(x: Array, source: Array) -> Array:
        return jax.vmap(lambda row, index: row.at[index].get(mode="fill", fill_value=0))(x, source)

    return per_device(local, (spec, rows), spec)(reshard(x, spec), source)


def _move_forward(x: Array, source: Array, target: Array, rules: Rules) -> tuple[Array, tuple[Array, Array]]:
    return move_tokens(x, source, target, rules), (source, target)


def _move_backward(rules: Rules, ways: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    source, target = ways
    return move_tokens(gradient, target, source, rules), None, None


move_tokens.defvjp(_move_forward, _move_backward)


def bucket_lengths(tokens: int, halvings: int = 3) -> tuple[int, ...]:
    """0, t/8, t/4, t/2, t (rounded up, ascending): the lengths a layer is compiled for."""
    return tuple(sorted({0, *(-(-tokens // 2**i) for i in range(halvings + 1))}))


def run_compacted(
    layer: Any,
    run: LayerFn,
    x: Stream,
    segment_ids: Tokens,
    positions: Tokens,
    living: Living,
    *,
    rules: Rules,
    buckets: Sequence[int] | None = None,
) -> tuple[Tree, Tree]:
    """`run` on the living tokens alone: (update at the original places, 0 for the others; extras).

    run(layer, x, segment_ids, positions) -> (update, extras) gets rows [b, length] of living tokens at their original
    `positions`, then padding of segment id 0. `update` is an array [b, length, …] or a tree of them; `extras` a tree
    of arrays whose shapes do not depend on the length (losses, statistics), 0 where the layer is skipped. `layer` is
    a bound Linen module; `run` reaches parameters only through it.

    `buckets` are the lengths to choose from, ascending, the last one t; the smallest that holds the fullest row of the
    whole batch is run. None: only t, which is compiled once and skips nothing. Raises ValueError for other buckets.
    """
    tokens = x.shape[1]
    lengths = (tokens,) if buckets is None else tuple(buckets)
    if not lengths or lengths[-1] != tokens or list(lengths) != sorted(set(lengths)) or lengths[0] < 0:
        raise ValueError(f"buckets are {lengths}; they must ascend from 0 or more and end with the {tokens} tokens")
    if layer.is_initializing():  # every token is alive, and the lifted switch needs the parameters to exist
        return run(layer, x, segment_ids, positions)
    packing = compact(living & (segment_ids > 0), rules)
    operands = (x, segment_ids, positions, packing)
    branches: list[Callable[..., Any]] = [_run_bucket(length, run, rules) for length in lengths]
    if lengths[0] == 0:
        nothing = _outline(layer, branches[-1], *operands)
        branches[0] = lambda layer, *operands: jax.tree.map(_zeros, nothing)
    if len(branches) == 1:
        return branches[0](layer, *operands)
    index = jnp.sum(jnp.max(packing.fill) > jnp.asarray(lengths[:-1], jnp.int32), dtype=jnp.int32)
    return nn.switch(index, branches, layer, *operands)


def _run_bucket(length: int, run: LayerFn, rules: Rules) -> Callable[..., tuple[Tree, Tree]]:
    """`run` on the first `length` places of the packed rows."""

    def bucket(layer: Any, x: Array, segment_ids: Array, positions: Array, packing: Packing) -> tuple[Tree, Tree]:
        order, place, fill = packing.order[:, :length], packing.place, packing.fill
        taken = jnp.arange(length, dtype=jnp.int32)[None] < fill[:, None]
        x, segment_ids, positions = (move_tokens(a, order, place, rules) for a in (x, segment_ids, positions))
        update, extras = run(layer, x, jnp.where(taken, segment_ids, 0), positions)
        # Padding goes nowhere on the way back, neither its update nor a gradient to it.
        back = jnp.where(place < fill[:, None], place, length)
        forth = jnp.where(taken, order, place.shape[1])
        return jax.tree.map(lambda leaf: move_tokens(leaf, back, forth, rules), update), extras

    return bucket


def _outline(layer: Any, function: Callable[..., Tree], *operands: Any) -> Tree:
    """The shapes that function(layer, *operands) returns, computing nothing and touching no variable of `layer`."""
    pure = nn.apply(function, layer, mutable=True)
    return jax.eval_shape(lambda variables, *args: pure(variables, *args)[0], layer.variables, *operands)


def _zeros(shape: jax.ShapeDtypeStruct) -> Array:
    return reshard(jnp.zeros(shape.shape, shape.dtype), _spec(shape))


def _spec(x: Any) -> P:
    """The partition of an array, a tracer or a shape on the current mesh."""
    sharding = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x).sharding
    return P() if sharding is None or not has_mesh() else sharding.spec


def _beside(per_row: Array, x: Array) -> Array:
    """`per_row` [b] or [b, t] with trailing axes of 1, to stand beside x."""
    return per_row.reshape(*per_row.shape, *(1,) * (x.ndim - per_row.ndim))


def keep_where(living: Bool[Array, " b"], new: Tree, old: Tree) -> Tree:
    """`new` for living rows, `old` for halted ones, leaf by leaf [b, …], laid out as `new`."""

    def choose(new: Array, old: Array) -> Array:
        spec = _spec(new)
        mask = reshard(jnp.broadcast_to(_beside(living, new), new.shape), spec)
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
    # Mixers lay their cache out at first use; a cond and a scan need it so from the start.
    laid_out = _outline(layer, run, x, segment_ids, positions, cache)[2]
    cache = jax.tree.map(lambda leaf, shape: reshard(leaf, _spec(shape)), cache, laid_out)
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
        update = jax.tree.map(lambda leaf: jnp.where(_beside(living, leaf), leaf, 0), update)
        return update, extras, keep_where(living[:, 0], new, cache)

    nothing = _outline(layer, compute, *operands)[:2]
    skip = lambda layer, *same: (*jax.tree.map(_zeros, nothing), same[-1])  # noqa: E731
    return nn.cond(jnp.any(operands[3]), compute, skip, layer, *operands)


def _token_by_token(
    run: CachedFn, layer: Any, x: Array, segment_ids: Array, positions: Array, living: Array, cache: Tree
) -> tuple[Tree, Tree, Tree]:
    """The tokens of a prompt as so many steps of decoding."""

    def step(layer: Any, cache: Tree, xs: tuple[Array, ...]) -> tuple[Tree, tuple[Tree, Tree]]:
        update, extras, cache = _one_token(run, layer, *(leaf[:, None] for leaf in xs), cache)
        return cache, (jax.tree.map(lambda leaf: leaf[:, 0], update), extras)

    scanned = nn.scan(step, variable_broadcast=True, split_rngs={"params": False}, in_axes=1, out_axes=(1, 0))
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
    """x <- x + Delta(x) for the living tokens, then `observe`: (state, extras, cache).

    delta(layer, x, segment_ids, positions, cache) -> (Delta(x) of x's shape, extras, cache); without a cache it gets
    None and the tokens are compacted. The halting unit too runs on living tokens alone.
    """

    def cached(layer: Any, x: Array, segment_ids: Array, positions: Array, cache: Tree) -> tuple[Tree, Tree, Tree]:
        step, extras, cache = delta(layer, x, segment_ids, positions, cache)
        return (step, exit_probability(weights, x + step, rules)), extras, cache

    def plain(layer: Any, x: Array, segment_ids: Array, positions: Array) -> tuple[Tree, Tree]:
        return cached(layer, x, segment_ids, positions, None)[:2]

    where = (state.x, segment_ids, positions, alive(state))
    if cache is None:
        (step, p), extras = run_compacted(layer, plain, *where, rules=rules, buckets=buckets)
    else:
        (step, p), extras, cache = run_cached(layer, cached, *where, cache)
    return observe(state._replace(x=state.x + step), p, threshold, last), extras, cache
