"""One model trained with several seeds at once: one compiled program over the stacked states of all of them.

    trained = fit(config, seeds=(0, 1), rates=(3e-3, 3e-3), steps=400, batches=batches)
    trained.variables        every leaf with a leading axis of seeds; `one(trained.variables, 0)` is a model's

- Models so narrow that a core spends its time between operations gain from it, wide ones do not; what is computed is
  the same: each seed has its own initial weights, batches, dropped rows and learning rate.
- A batch may have parts of as many rows each, text and questions for example: the loss is the mean of the parts' own
  means, so that few answers weigh as much as many words.
- `scales` name parameters, by the last name of their path, whose updates are multiplied; by 0 they stay as drawn.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments.growth_study.engine import NO_LOSS, paced
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.models.language_model import LanguageModel, apply_network
from gt_jax.training.optimizer import make_optimizer
from gt_jax.training.step import losses
from gt_jax.typing import Tree

Batch = Mapping[str, Any]
"""`tokens`, `targets` (-1 where nothing is asked) and `segment_ids`, int32 [seeds, rows, t]."""
Scales: TypeAlias = tuple[tuple[str, float], ...]


class State(NamedTuple):
    """What one seed carries from step to step."""

    params: Tree
    statistics: Tree
    optimizer: Any
    key: Array
    step: Array


class Trained(NamedTuple):
    """Weights by seed, training loss [steps, seeds], wall seconds of the steps after the first, which compiles."""

    variables: Tree
    curve: Float[np.ndarray, "steps seeds"]
    seconds: float


def fit(
    config: ModelConfig, *, seeds: Sequence[int], rates: Sequence[float], steps: int,
    batches: Callable[[int], Batch], parts: int = 1, scales: Scales = (),
) -> Trained:  # fmt: skip
    """Train for `steps` steps, seed i at `rates[i]` (up over a tenth, then a cosine to a tenth), on `batches(step)`.

    A step whose loss or gradient is not finite moves nothing.
    """
    start, step = programs(config, parts, scales)
    state = start(jnp.asarray(seeds, jnp.uint32), jnp.asarray(rates, jnp.float32), jnp.float32(steps))
    curve, began = [], 0.0
    for number in range(steps):
        state, loss = step(state, dict(batches(number)))
        curve.append(loss)
        if number == 0:
            jax.block_until_ready(loss)
            began = time.monotonic()
    seen = np.stack(jax.device_get(curve))
    return Trained({"params": state.params, "statistics": state.statistics}, seen, time.monotonic() - began)


@functools.lru_cache(maxsize=16)
def programs(config: ModelConfig, parts: int, scales: Scales) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(start(seeds, rates, steps) -> states, step(states, batches) -> (states, loss [seeds])), each compiled once."""
    network = LanguageModel(config)
    constant = OptimizerConfig(learning_rate=1.0, schedule="wsd", warmup=0.0, final=1.0)
    optimizer = paced(make_optimizer(constant, 1))

    def start(seed: Array, rate: Array, steps: Array) -> State:
        key = jax.random.key(seed)
        variables = dict(network.init(key, jnp.zeros((1, 2), jnp.int32)))
        pace = optimizer.init(variables["params"])._replace(steps=steps, peak=rate)
        return State(variables["params"], variables.get("statistics", {}), pace, key, jnp.zeros((), jnp.int32))

    def loss(params: Tree, state: State, batch: Batch) -> tuple[Array, tuple[Array, Tree]]:
        variables = {"params": params, "statistics": state.statistics}
        key = jax.random.fold_in(state.key, state.step) if config.sliding is not None else None
        output, moved = network.apply(
            variables, batch["tokens"], batch["segment_ids"], key=key, mutable=["statistics"])
        means = []
        for hidden, targets in zip(jnp.split(output.hidden, parts), jnp.split(batch["targets"], parts), strict=True):
            total, count = losses(network, variables, hidden, targets)
            means.append(total / jnp.maximum(count, 1.0))
        found = jnp.asarray(sum(means) / parts)
        kept = cast(Tree, moved.get("statistics", state.statistics))
        return found + jnp.sum(output.statistics.auxiliary_loss), (found, kept)

    def step(state: State, batch: Batch) -> tuple[State, Array]:
        (_, (found, statistics)), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, state, batch)
        gradients = scaled(gradients, [(name, 0.0) for name, factor in scales if not factor])  # out of the norm, too
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, scaled(updates, scales))
        finite = jnp.isfinite(found) & jnp.isfinite(optax.tree.norm(gradients))
        new = state._replace(params=params, statistics=statistics, optimizer=moments)
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state._replace(key=new.key))
        kept = kept._replace(optimizer=kept.optimizer._replace(step=moments.step), step=state.step + 1)
        return kept, found

    many = jax.jit(jax.vmap(start, in_axes=(0, 0, None)))
    return many, jax.jit(jax.vmap(step), donate_argnums=0)


def scaled(tree: Tree, scales: Sequence[tuple[str, float]]) -> Tree:
    """The tree with the leaves whose path ends in one of these names times its factor."""
    factors = dict(scales)

    def one(path: tuple[Any, ...], leaf: Array) -> Array:
        last = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")[2]
        return leaf * factors[last] if last in factors else leaf

    return jax.tree_util.tree_map_with_path(one, tree) if factors else tree


def one(variables: Tree, index: int) -> Tree:
    """The variables of one seed."""
    return jax.tree.map(lambda a: a[index], variables)


@functools.lru_cache(maxsize=8)
def _evaluation(config: ModelConfig) -> Callable[..., Any]:
    network = LanguageModel(config)

    def run(variables: Tree, batch: Batch) -> tuple[Array, Array]:
        output = apply_network(network, variables, jnp.asarray(batch["tokens"]), jnp.asarray(batch["segment_ids"]))
        return losses(network, variables, output.hidden, batch["targets"])

    return jax.jit(jax.vmap(run, in_axes=(0, None)))


def held_out_nats(config: ModelConfig, variables: Tree, batches: Sequence[Batch]) -> list[float]:
    """By seed the mean nats a target over batches [rows, t] that all seeds share; what is no number sorts last."""
    evaluation, names = _evaluation(config), ("tokens", "targets", "segment_ids")
    seen = [jax.device_get(evaluation(variables, {name: batch[name] for name in names})) for batch in batches]
    total = np.sum([np.asarray(sums, np.float64) for sums, _ in seen], axis=0)
    count = np.sum([np.asarray(counts, np.float64) for _, counts in seen], axis=0)
    return [float(value) if np.isfinite(value) else NO_LOSS for value in total / np.maximum(count, 1.0)]


def stacked(batches: Sequence[Batch]) -> dict[str, np.ndarray]:
    """Batches of one shape, one a seed, with a leading axis."""
    names = ("tokens", "targets", "segment_ids")
    return {name: np.stack([np.asarray(batch[name], np.int32) for batch in batches]) for name in names}
