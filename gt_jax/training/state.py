"""What training carries from step to step: one pytree, saved and restored whole."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from gt_jax.configs.price import PriceConfig
from gt_jax.training.budget import BudgetState
from gt_jax.training.price import PriceState, initial_price
from gt_jax.typing import Tree


class TrainState(NamedTuple):
    """`statistics` are the model's untrained running means; `step` counts the batches seen."""

    params: Tree
    statistics: Tree
    optimizer: optax.OptState
    price: PriceState | BudgetState
    step: Array


def new_state(variables: Tree, optimizer: optax.GradientTransformation, price: PriceConfig) -> TrainState:
    """A state at step 0 with a fresh optimizer, its moments laid out like the parameters."""
    params = variables["params"]
    statistics = variables.get("statistics", {})
    moments = jax.jit(optimizer.init)(params)
    return TrainState(params, statistics, moments, initial_price(price), jnp.zeros((), jnp.int32))
