"""The midpoint stack at mixing 1, run backwards instead of remembered: memory that does not grow with depth.

    forward   p_{l+1} = p_{l-1} + c_l Delta_l(p_l),      c_0 = step/2 from p_{-1} = p_0,  then c_l = 2 step
    inverse   p_{l-1} = p_{l+1} - c_l Delta_l(p_l)       (leapfrog, arXiv 2512.02056)

- Only the last pair (p_{L-1}, p_L) is kept. The backward pass walks down from it, layer by layer: one `jax.vjp` of the
  layer gives Delta_l(p_l), hence p_{l-1}, and the gradients. One forward more than plain autodiff, as under remat.
- A layer is any function; blocks of layers are scanned, so compile time does not grow with depth either.
- Different patterns follow each other as chained calls, each keeping its last pair only.
- The pair is float32 whatever the compute dtype: in bfloat16 the sum would drop bits of p_{l-1} that no inverse brings
  back. What is left is one float32 rounding a layer, carried on by the Deltas; at a mixing a below 1 the inverse would
  multiply it by 1/a a layer, so there the stack is recomputed from saved states (remat) and not reconstructed.
- A choice in a layer that is not continuous (router, top-k, rounding to the compute dtype) may fall otherwise on the
  reconstructed state in a near tie; the gradient is then that of the neighbouring choice.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gt_jax.models.layers.primitives import widen
from gt_jax.models.layers.stack import coefficients
from gt_jax.typing import Tree

Delta: TypeAlias = Callable[[Any, Any, Any], tuple[Any, Any]]
"""delta(parameters of the block, x, consts) -> (update like x, extras: float arrays)."""


class Pair(NamedTuple):
    """Two states of the stream one after the other, (p_{l-1}, p_l), float32 at least."""

    previous: Array
    current: Array


class _Fixed(NamedTuple):
    """The leaves of `params` and `consts` that are not float: they have no gradient."""

    params: Tree
    consts: Tree


class _Walk(NamedTuple):
    """What the backward pass carries down: the states, their cotangents, the sum of the cotangents of `consts`."""

    pair: Pair
    cotangent: Pair
    to_consts: Tree


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All that is static: one delta a slot of the pattern, the steps, the dtype the deltas see."""

    deltas: tuple[Delta, ...]
    step: float
    first: bool
    dtype: str | None

    def factors(self, params: Tree, dtype: Any) -> Float[Array, "n slots"]:
        """c_l of each block and slot."""
        shape = (jax.tree.leaves(params)[0].shape[0], len(self.deltas))
        factors = coefficients(int(np.prod(shape)) + 1, 1.0, self.step).delta
        return jnp.asarray(factors[:-1] if self.first else factors[1:], dtype).reshape(shape)


def start(x: Float[Array, "*x"]) -> Pair:
    """The pair before the first layer: p_0 twice, which makes the first step an ordinary one of another length."""
    return Pair(widen(x), widen(x))


def reversible_stack(
    deltas: tuple[Delta, ...],
    params: Tree,
    pair: Pair,
    consts: Tree,
    step: float,
    *,
    first: bool,
    dtype: str | None = None,
) -> tuple[Pair, Tree]:
    """Run a segment of the stack: (the pair after it, extras stacked [blocks, slots, …]), differentiable in reverse.

    `deltas[slot](params of a block, x, consts) -> (update, extras)`: static functions that close over nothing traced.
    The leaves of `params` have a leading block axis. Leaves of `params` and `consts` that are not float (segment ids,
    positions, keys) have no gradient. `extras`, the same float tree in every slot, has (auxiliary losses). `dtype` is
    what x is cast to for the deltas, None for as it is. `first` says that the stack starts here, at `pair.current`
    (`start(x)`). Takes memory for one layer's backward pass, the gradients of `params`, and the pair at its end.

    Raises TypeError where extras are not float.
    """
    pair = Pair(widen(pair.current if first else pair.previous), widen(pair.current))
    plan = _Plan(tuple(deltas), float(step), first, dtype)
    return _stack(plan, _floats(params), _floats(consts), pair, _Fixed(_others(params), _others(consts)))


def reconstruct(
    deltas: tuple[Delta, ...],
    params: Tree,
    pair: Pair,
    consts: Tree,
    step: float,
    *,
    first: bool,
    dtype: str | None = None,
) -> Pair:
    """The pair before a segment from the pair after it: the inverse of `reversible_stack`, up to rounding."""
    plan = _Plan(tuple(deltas), float(step), first, dtype)

    def block(pair: Pair, xs: tuple[Tree, Tree, Array]) -> tuple[Pair, None]:
        fixed = _Fixed(xs[1], _others(consts))
        for slot in reversed(range(len(plan.deltas))):
            update, _ = _layer(plan, slot, fixed, xs[0], pair.previous, _floats(consts))
            pair = _undo(pair, xs[2][slot], update)
        return pair, None

    xs = (_floats(params), _others(params), plan.factors(params, pair.current.dtype))
    return jax.lax.scan(block, pair, xs, reverse=True)[0]


def _layer(plan: _Plan, slot: int, fixed: _Fixed, params: Tree, x: Array, consts: Tree) -> tuple[Array, Tree]:
    """(Delta(x) in x's dtype, extras) of the layer in `slot`, from the float and the fixed leaves of a block."""
    seen = x if plan.dtype is None else x.astype(plan.dtype)
    update, extras = plan.deltas[slot](_join(params, fixed.params), seen, _join(consts, fixed.consts))
    wrong = [str(leaf.dtype) for leaf in jax.tree.leaves(extras) if not _is_float(leaf)]
    if wrong:
        raise TypeError(f"extras of delta {slot} hold {', '.join(wrong)}; they must be float arrays")
    return update.astype(x.dtype), extras


def _undo(pair: Pair, factor: Array, update: Array) -> Pair:
    """(p_{l-1}, p_l) from (p_l, p_{l+1}) and Delta_l(p_l)."""
    return Pair(pair.current - factor * update, pair.previous)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stack(plan: _Plan, params: Tree, consts: Tree, pair: Pair, fixed: _Fixed) -> tuple[Pair, Tree]:
    def block(pair: Pair, xs: tuple[Tree, Tree, Array]) -> tuple[Pair, Tree]:
        params, others, factors = xs
        seen = []
        for slot in range(len(plan.deltas)):
            update, extras = _layer(plan, slot, _Fixed(others, fixed.consts), params, pair.current, consts)
            pair = Pair(pair.current, pair.previous + factors[slot] * update)
            seen.append(extras)
        return pair, jax.tree.map(lambda *a: jnp.stack(a), *seen)

    factors = plan.factors((params, fixed.params), pair.current.dtype)
    return jax.lax.scan(block, pair, (params, fixed.params, factors))


def _forward(plan: _Plan, params: Tree, consts: Tree, pair: Pair, fixed: _Fixed) -> tuple[tuple[Pair, Tree], Tree]:
    end, extras = _stack(plan, params, consts, pair, fixed)
    return (end, extras), (params, consts, end, fixed)


def _backward(plan: _Plan, saved: Tree, cotangents: tuple[Pair, Tree]) -> tuple[Tree, Tree, Pair, None]:
    """From the cotangents (g, g') of (p_l, p_{l+1}) to those of (p_{l-1}, p_l): (g', g + c_l J_l^T g')."""
    params, consts, end, fixed = saved

    def block(walk: _Walk, xs: tuple[Tree, Tree, Array, Tree]) -> tuple[_Walk, Tree]:
        params, others, factors, to_extras = xs
        pair, cotangent, to_consts = walk
        to_params = jax.tree.map(jnp.zeros_like, params)
        for slot in reversed(range(len(plan.deltas))):
            layer = functools.partial(_layer, plan, slot, _Fixed(others, fixed.consts))
            (update, _), pull = jax.vjp(layer, params, pair.previous, consts)
            to_here = jax.tree.map(operator.itemgetter(slot), to_extras)
            from_params, from_x, from_consts = pull((factors[slot] * cotangent.current, to_here))
            pair = _undo(pair, factors[slot], update)
            cotangent = Pair(cotangent.current, cotangent.previous + from_x)
            to_params = jax.tree.map(jnp.add, to_params, from_params)
            to_consts = jax.tree.map(lambda total, one: total + widen(one), to_consts, from_consts)
        return _Walk(pair, cotangent, to_consts), to_params

    # Summed over the layers in float32 at least: hundreds of small bfloat16 terms would round each other away.
    top = _Walk(end, cotangents[0], jax.tree.map(lambda a: jnp.zeros_like(widen(a)), consts))
    xs = (params, fixed.params, plan.factors((params, fixed.params), end.current.dtype), cotangents[1])
    walk, to_params = jax.lax.scan(block, top, xs, reverse=True)
    to_consts = jax.tree.map(lambda total, a: total.astype(a.dtype), walk.to_consts, consts)
    return to_params, to_consts, walk.cotangent, None


_stack.defvjp(_forward, _backward)


def _is_float(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _floats(tree: Tree) -> Tree:
    """The tree with None where a leaf is not float: what can be differentiated."""
    return jax.tree.map(lambda leaf: leaf if _is_float(leaf) else None, tree)


def _others(tree: Tree) -> Tree:
    """The tree with None where a leaf is float."""
    return jax.tree.map(lambda leaf: None if _is_float(leaf) else leaf, tree)


def _join(floats: Tree, others: Tree) -> Tree:
    """The tree that `_floats` and `_others` took apart."""
    return jax.tree.map(lambda a, b: b if a is None else a, floats, others, is_leaf=lambda a: a is None)
