"""One training step: loss, gradient, update, price. Pure; the loop jits it with its state donated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from gt_jax.config import ModelConfig
from gt_jax.layers.adaptive_depth import PassControl
from gt_jax.model import LanguageModel, ModelOutput, forward, free_passes
from gt_jax.sharding import Rules, reshard
from gt_jax.training.price import Phase, PriceConfig, move_price, phase, price_loss
from gt_jax.training.state import TrainState
from gt_jax.typing import Scalar, Tree

Batch = Mapping[str, Any]
"""`tokens`, `targets` (-1 where nothing is predicted) and `segment_ids`, int32 [b, t]."""


def cross_entropy(logits: Float[Array, "b t v"], targets: Int[Array, "b t"]) -> tuple[Scalar, Scalar]:
    """(sum of -log softmax(logits)[target], number of targets) over the positions with a target >= 0, float32 nats."""
    logits = logits.astype(jnp.float32)
    # a one-hot sum, not a gather: it keeps a vocabulary axis sharded
    vocabulary = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None]
    hit = vocabulary == targets[..., None]
    chosen = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    counted = targets >= 0
    loss = jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)
    return jnp.sum(loss), jnp.sum(counted, dtype=jnp.float32)


def mean_cross_entropy(logits: Float[Array, "b t v"], targets: Int[Array, "b t"]) -> Scalar:
    """`cross_entropy` a target, 0 when there is none."""
    total, count = cross_entropy(logits, targets)
    return total / jnp.maximum(count, 1.0)


def place(batch: Batch, rules: Rules) -> dict[str, Array]:
    """The batch on the mesh, rows with the batch axes; raises AssertionError for arrays that are not alike [b, t]."""
    chex.assert_rank(list(batch.values()), 2)
    chex.assert_equal_shape(list(batch.values()))
    return {name: reshard(jnp.asarray(array), rules.spec("batch", None)) for name, array in batch.items()}


def make_loss(model: ModelConfig, price: PriceConfig, rules: Rules) -> Callable[..., tuple[Scalar, dict[str, Any]]]:
    """loss(params, statistics, batch, lambda, phase) -> (loss, everything worth reporting)."""
    network = LanguageModel(model, rules)

    def loss(params: Tree, statistics: Tree, batch: Batch, value: Scalar, now: Phase) -> tuple[Scalar, dict[str, Any]]:
        variables = {"params": params, "statistics": statistics}
        output: ModelOutput
        output, moved = network.apply(
            variables, batch["tokens"], batch["segment_ids"], control=now.control, mutable=["statistics"]
        )
        ce = mean_cross_entropy(output.logits, batch["targets"])
        total = ce + jnp.sum(output.statistics.auxiliary_loss)
        charge = jnp.zeros((), jnp.float32)
        if model.adaptive is not None:
            hidden = jax.lax.stop_gradient(output.first_pass_hidden)
            logits: Any = network.apply(jax.lax.stop_gradient(variables), hidden, method=LanguageModel.unembed)
            first = mean_cross_entropy(logits, batch["targets"])
            charge = jnp.where(now.charged, price_loss(price, value, output.statistics, ce, first), 0.0)
        report = {"cross_entropy": ce, "price_loss": charge, "passes": output.statistics}
        return total + charge, {"report": report, "statistics": moved.get("statistics", statistics)}

    return loss


def make_step(
    model: ModelConfig, price: PriceConfig, optimizer: optax.GradientTransformation, steps: int, rules: Rules
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """The jitted step(state, batch) -> (state, metrics); the state is donated."""
    loss = make_loss(model, price, rules)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        now = phase(price, state.step, steps)
        gradient = jax.value_and_grad(loss, has_aux=True)
        placed = place(batch, rules)
        (total, extra), grads = gradient(state.params, state.statistics, placed, state.price.value, now)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        report = extra["report"]
        expected = jnp.sum(report["passes"].survival, axis=-1)
        moved = move_price(price, state.price, jnp.mean(expected), now.moves, steps)
        metrics = {
            "loss": report["cross_entropy"],
            "total_loss": total,
            "price_loss": report["price_loss"],
            "indexer_loss": jnp.sum(report["passes"].auxiliary_loss),
            "gradient_norm": optax.tree.norm(grads),
            "price": state.price.value,
            "expected_k": expected,
            "executed": jnp.sum(report["passes"].alive, axis=-1),
            "delta_ratio": report["passes"].delta_ratio[:, 0],
        }
        return TrainState(params, extra["statistics"], moments, moved, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def make_evaluation(
    model: ModelConfig, rules: Rules
) -> Callable[[Tree, Batch, PassControl | None], tuple[Scalar, Scalar, Any]]:
    """The jitted evaluation(variables, batch, control) -> (summed cross-entropy, targets, pass statistics)."""
    network = LanguageModel(model, rules)

    def evaluation(variables: Tree, batch: Batch, control: PassControl | None = None) -> tuple[Scalar, Scalar, Any]:
        placed = place(batch, rules)
        output = forward(network, variables, placed["tokens"], placed["segment_ids"], control=control or free_passes())
        total, count = cross_entropy(output.logits, placed["targets"])
        return total, count, output.statistics

    return jax.jit(evaluation)


def evaluate(evaluation: Callable[..., Any], variables: Tree, batches: Sequence[Batch], control: Any = None) -> float:
    """Mean cross-entropy in nats a token over the batches."""
    sums = [evaluation(variables, batch, control)[:2] for batch in batches]
    total, count = (sum(float(pair[i]) for pair in sums) for i in range(2))
    return total / max(count, 1.0)
