"""The price of rule "budget": what one more pass must be worth, so that the mean depth is at its target.

w* = - sum_l dL/db_l / sum_l dC/db_l over the last bias b_l of each layer's halting head is what a pass is worth to
the loss L at the margin, in nats: at price w* the common push on the gates is zero. C is the sum over layers and passes
after the first of `smooth_count`, L the loss without the price.

    price = mean(w*) + rms(w*) (4 e + i),    i <- i + 0.08 e,    e = depth - target

- Means are exponential, over some twenty steps. In units of rms(w*) the loop is the same for every loss and model.
  Where depth is worth little the price is little; where the loss asks for less than the target it is negative.
- A gradient acts on the gates through Adam, ten steps late. So the biases are also moved at once, by -0.2 e, which
  keeps the loop from swinging.
- Audits, steps in which no token is finished, tell gates below the threshold what a pass would have been worth. They
  are charged as others are, and measure nothing here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gt_jax.configs.price import PriceConfig
from gt_jax.models.layers.pass_statistics import PassStatistics
from gt_jax.typing import Scalar, Tree

_KEEP = 0.95  # of a mean, each step
_NOW, _SUM, _BIAS = 4.0, 0.08, 0.2  # a pass of excess: in rms(w*), in rms(w*) each step, in logits each step
_SUM_BOUND = 20.0
_LEAST_SLOPE = 0.02  # passes a logit and layer: with fewer, nearly all gates are shut and tell nothing


class BudgetState(NamedTuple):
    """`value` is the price; running sums of w*, its square and their weight; the integral of the excess; float32 []."""

    value: Float[Array, ""]
    worth: Float[Array, ""]
    square: Float[Array, ""]
    weight: Float[Array, ""]
    integral: Float[Array, ""]


def initial_budget(config: PriceConfig) -> BudgetState:
    """The price that is given, nothing measured."""
    zeros = [jnp.zeros((), jnp.float32) for _ in BudgetState._fields[1:]]  # the step donates each of them
    return BudgetState(jnp.asarray(config.value, jnp.float32), *zeros)


def move_budget(
    config: PriceConfig, state: BudgetState, statistics: PassStatistics, gradients: Tree, depth: Scalar, moves: Array
) -> BudgetState:
    """One step of the price; `gradients` are of the loss with the price."""
    if config.target is None:
        return state
    excess = depth - config.target
    slopes = jnp.sum(statistics.cost_slope, axis=-1)
    slope = jnp.sum(slopes)
    push = jnp.sum(jnp.stack(last_biases(gradients)))  # up is what raises the loss
    worth = state.value - push / jnp.maximum(slope, 1e-6)
    seen = moves & (slope > _LEAST_SLOPE * slopes.size)

    def mean(old: Array, new: Array) -> Array:
        return jnp.where(seen, _KEEP * old + (1 - _KEEP) * new, old)

    square, weight = mean(state.square, jnp.square(worth)), mean(state.weight, jnp.ones(()))
    total = mean(state.worth, worth)
    integral = jnp.clip(state.integral + _SUM * excess, -_SUM_BOUND, _SUM_BOUND)
    known = jnp.maximum(weight, 1e-6)
    value = total / known + jnp.sqrt(square / known) * (_NOW * excess + integral)
    moved = BudgetState(jnp.clip(value, config.lowest, config.highest), total, square, weight, integral)
    return jax.tree.map(lambda new, old: jnp.where(moves, new, old), moved, state)


def with_gates_moved(params: Tree, config: PriceConfig, depth: Scalar, moves: Array) -> Tree:
    """The parameters with the last bias of every halting head moved by -0.2 times the excess."""
    if config.target is None:
        return params
    return with_last_biases_moved(params, jnp.where(moves, -_BIAS * (depth - config.target), 0.0))


def with_last_biases_moved(params: Tree, by: Array | float) -> Tree:
    """The parameters with `by` added to the last bias of every halting head."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf + by if _is_last_bias(path) else leaf, params)


def last_biases(tree: Tree) -> list[Array]:
    """The sum over blocks of every halting head's last bias, or of what a tree of that form has in its place."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [jnp.sum(leaf) for path, leaf in found if _is_last_bias(path)]


def _is_last_bias(path: tuple) -> bool:
    return jax.tree_util.keystr(path, simple=True, separator="/").endswith("halting/output/b")
