"""One training step: loss, gradient, update, price. Pure; the loop jits it with its state donated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from gt_jax.configs.model import ModelConfig
from gt_jax.configs.price import PriceConfig
from gt_jax.configs.thaw import ThawConfig
from gt_jax.devices.sharding import Rules, model_inputs, reshard
from gt_jax.models.language_model import LanguageModel, ModelOutput, apply_network, free_passes
from gt_jax.models.layers.adaptive_depth import PassControl
from gt_jax.models.layers.memory_stream import Memory
from gt_jax.models.layers.mixer import real_tokens
from gt_jax.models.layers.pass_statistics import PassStatistics, mean_over_tokens, token_shares
from gt_jax.models.layers.primitives import widen
from gt_jax.models.memory_chunks import chunk_length, floats, mean_over_chunks, over_chunks, whole_rows
from gt_jax.models.replayed_rows import replayed_rows, runs_replayed
from gt_jax.training.accumulation import accumulate_gradients, parts_that_fit, rows_in_parts
from gt_jax.training.budget import BudgetState, move_budget, with_gates_moved, with_last_biases_moved
from gt_jax.training.loss import loss_if, unembedded_cross_entropy
from gt_jax.training.optimizer import Float32State, at_step
from gt_jax.training.price import Phase, PriceState, move_price, phase, price_loss
from gt_jax.training.running_means import moved_once
from gt_jax.training.state import TrainState
from gt_jax.training.thaw import keep_frozen, thawed
from gt_jax.typing import Activations, Scalar, Tree

DEPTH = {"mean_weight": "survival", "passes_run": "ran", "passes_computed": "computed"}
"""The metrics of depth, by layer, and the statistic whose sum over passes each is."""

STEERED = {"mean_weight": "survival", "passes_run": "alive"}
"""What the price steers, by its `target_of`: under halting "batch" too the tokens above the threshold, as the origin's
does, though there each of them runs what its batch runs."""

Counts = tuple[Scalar, Scalar, Scalar]

Batch = Mapping[str, Any]
"""`tokens`, `targets` (-1 where nothing is predicted) and `segment_ids`, int32 [b, t]."""


def shard_batch(batch: Batch, rules: Rules) -> dict[str, Array]:
    """What a model reads of the batch, on the mesh; raises AssertionError for arrays that are not alike [b, t]."""
    read = model_inputs(batch)
    chex.assert_rank(list(read.values()), 2)
    chex.assert_equal_shape(list(read.values()))
    return {name: reshard(jnp.asarray(array), rules.spec("batch", None)) for name, array in read.items()}


class Sums(NamedTuple):
    """What one chunk of a batch contributes: totals and counts of the losses, and means over its tokens."""

    next_token: tuple[Scalar, Scalar]
    first_pass: tuple[Scalar, Scalar]
    after_next: tuple[Scalar, Scalar]
    auxiliary: Scalar
    passes: PassStatistics


def after_next_targets(
    targets: Int[Array, "b t"], segment_ids: Int[Array, "b t"], chunk: int | None = None
) -> Int[Array, "b t"]:
    """The token after the next, where the next is predicted too, of the same document and chunk; else -1.

    None: a row is one chunk. A document's last token may have a target of its own, with the next document behind it.
    """
    ahead = jnp.concatenate([targets[:, 1:], jnp.full_like(targets[:, :1], -1)], axis=1)
    size = targets.shape[1] if chunk is None else chunk
    last = jnp.arange(targets.shape[1]) % size == size - 1  # whoever looks ahead from there sees no next token
    same = segment_ids == jnp.concatenate([segment_ids[:, 1:], segment_ids[:, -1:]], axis=1)
    return jnp.where((targets >= 0) & same & ~last[None], ahead, -1)


def losses(
    network: LanguageModel, variables: Tree, hidden: Activations, targets: Int[Array, "b t"]
) -> tuple[Scalar, Scalar]:
    """(summed cross-entropy in nats, number of targets) of states before the final norm; no logits are kept."""
    config = network.config
    normed: Any = network.apply(variables, hidden, method=LanguageModel.normed)
    matrix: Any = network.apply(variables, method=LanguageModel.unembedding_matrix)
    return unembedded_cross_entropy(
        matrix, normed, targets, rules=network.rules, compute=config.compute_dtype, tied=config.embedding.tied
    )


def chunk_sums(
    network: LanguageModel, variables: Tree, memory: Memory | None, batch: Batch, control: PassControl,
    key: Array | None, charged: Array | None,
) -> tuple[tuple[Tree, Memory | None], Sums]:
    """Run one chunk in training: ((moved statistics, memory for the next chunk), its sums).

    The loss after the first pass is counted where `charged`, never for None: a price alone reads it.
    """
    model, targets = network.config, batch["targets"]
    output: ModelOutput
    output, moved = network.apply(
        variables, batch["tokens"], batch["segment_ids"], control=control, memory=memory, mtp=model.mtp is not None,
        key=key, mutable=["statistics"],
    )  # fmt: skip
    measured = functools.partial(losses, network)
    first = ahead = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    if charged is not None:
        states = jax.lax.stop_gradient((variables, output.first_pass_hidden))
        first = loss_if(charged, functools.partial(measured, *states, targets))
    if output.mtp_hidden is not None and output.mtp_loss is not None:
        ahead = measured(variables, output.mtp_hidden, after_next_targets(targets, batch["segment_ids"]))
    next_token = measured(variables, output.hidden, targets)
    sums = Sums(next_token, first, ahead, auxiliary_loss(model, output), output.statistics)
    return (moved.get("statistics", variables["statistics"]), output.memory), sums


def auxiliary_loss(model: ModelConfig, output: ModelOutput) -> Scalar:
    """What the layers of one chunk charge for themselves: indexers, routers, and the ponder cost of leaving early."""
    charged = jnp.sum(output.statistics.auxiliary_loss) + jnp.sum(output.statistics.router_loss)
    if output.mtp_loss is not None:
        charged += output.mtp_loss
    if output.ponder is not None and model.exit is not None:
        charged += model.exit.ponder * output.ponder
    return charged


def replayed_sums(network: LanguageModel, variables: Tree, batch: Batch) -> tuple[Tree, Sums, Array]:
    """(moved statistics [c, …], sums, real tokens [c]) of rows whose chunks run backward together.

    The losses are of whole rows: the unembedding is gathered, and its gradient added up, once for all chunks. What is
    no loss of tokens has an axis of chunks.
    """
    model, zero = network.config, jnp.zeros((), jnp.float32)

    def measure(output: ModelOutput, one: Batch) -> tuple[Any, ...]:
        of_chunk = auxiliary_loss(model, output), output.statistics, jnp.sum(real_tokens(one["segment_ids"]))
        return output.hidden, output.mtp_hidden, *of_chunk

    moved, measured = replayed_rows(network, variables, batch, model.mtp is not None, measure)
    hidden, ahead_hidden, auxiliary, passes, seen = measured
    ahead = (zero, zero)
    if ahead_hidden is not None:
        size = chunk_length(model, batch["tokens"].shape[1])
        targets = after_next_targets(batch["targets"], batch["segment_ids"], size)
        ahead = losses(network, variables, whole_rows(ahead_hidden), targets)
    next_token = losses(network, variables, whole_rows(hidden), batch["targets"])
    return moved, Sums(next_token, (zero, zero), ahead, auxiliary, passes), seen


def make_loss(
    model: ModelConfig, price: PriceConfig, rules: Rules, seed: int = 0
) -> Callable[..., tuple[Scalar, dict[str, Any]]]:
    """loss(params, statistics, batch, lambda, phase, step) -> (loss, everything worth reporting).

    For a part of a batch: `counts`, what its means divide by (`token_counts`), and the number of the `part`.
    """
    network = LanguageModel(model, rules)
    draws = model.sliding is not None
    reads_first = model.adaptive is not None and price.rule == "ouro"

    def loss(
        params: Tree, statistics: Tree, batch: Batch, value: Scalar, now: Phase, step: Array,
        counts: Counts | None = None, part: Array | None = None,
    ) -> tuple[Scalar, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.key(seed), step) if draws else None
        key = key if key is None or part is None else jax.random.fold_in(key, part)

        def chunk(carry: tuple[Tree, Any], piece: tuple[Batch, Array]) -> tuple[tuple[Tree, Any], Any]:
            start, memory = carry
            one = None if key is None else jax.random.fold_in(key, piece[1])
            given = {"params": params, "statistics": start}
            charged = now.charged if reads_first else None
            (moved, memory), sums = chunk_sums(network, given, memory, piece[0], now.control, one, charged)
            return (start, memory), (sums, floats(moved), jnp.sum(real_tokens(piece[0]["segment_ids"])))

        if runs_replayed(network, batch["tokens"].shape[1]):
            given = {"params": params, "statistics": statistics}
            moved, sums, seen = replayed_sums(network, given, batch)
        else:
            _, (sums, moved, seen) = over_chunks(chunk, model, rules, statistics, batch)
        tokens, later, real = (None, None, None) if counts is None else counts
        share = jnp.ones(()) if real is None else jnp.sum(seen) / jnp.maximum(real, 1.0)  # 1 where parts are alike
        ce, first, ahead = _mean(sums[0], tokens), _mean(sums[1], tokens), _mean(sums[2], later)
        passes = mean_over_tokens(sums.passes, seen, model.adaptive, model.exit is not None)
        charge = jnp.zeros((), jnp.float32)
        if model.adaptive is not None:
            charge = jnp.where(now.charged, share * price_loss(price, value, passes, ce, first), 0.0)
        report = {"cross_entropy": ce, "price_loss": charge, "mtp_loss": ahead, "passes": passes}
        own = share * jnp.sum(token_shares(seen) * sums.auxiliary)  # what layers charge for themselves
        total = ce + own + (0.0 if model.mtp is None else model.mtp.weight) * ahead
        extra = {"report": report, "statistics": moved_once(statistics, moved, seen), "tokens": jnp.sum(seen)}
        return total + charge, extra

    return loss


def token_counts(model: ModelConfig, batch: Batch) -> Counts:
    """How many next tokens, and how many tokens after the next, a batch predicts, chunk by chunk; its real tokens."""
    size = chunk_length(model, batch["targets"].shape[1])
    after = after_next_targets(batch["targets"], batch["segment_ids"], size)
    next_token, later = (jnp.sum(targets >= 0, dtype=jnp.float32) for targets in (batch["targets"], after))
    return next_token, later, jnp.sum(real_tokens(batch["segment_ids"]))


def of_parts(model: ModelConfig, reports: Mapping[str, Any], tokens: Float[Array, " parts"]) -> dict[str, Any]:
    """The report of a batch from those of its parts, each with its `tokens`: losses are counted so already."""
    losses = {name: jnp.mean(values, axis=0) for name, values in reports.items() if name != "passes"}
    return {**losses, "passes": mean_over_tokens(reports["passes"], tokens, model.adaptive, model.exit is not None)}


def _mean(pair: tuple[Array, Array], count: Scalar | None) -> Scalar:
    """Total over count, the pair's own if None, both with a leading chunk axis; 0 where nothing was counted."""
    count = jnp.sum(pair[1]) if count is None else count
    return jnp.sum(pair[0]) / jnp.where(count > 0, count, 1.0)


def make_step(
    model: ModelConfig, price: PriceConfig, optimizer: optax.GradientTransformation, steps: int, rules: Rules,
    seed: int = 0, thaw: ThawConfig | None = None, accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """The jitted step(state, batch) -> (state, metrics); the state is donated.

    A step whose loss or gradient is not finite changes nothing but the count of steps, which learning rate, phases and
    thaw all go by; its metrics say `bad` 1. With
    `thaw` its first steps move a few layers only; `gradient_norm` is then of what moves. With `accumulate` the
    batch runs in so many parts.
    """
    loss = make_loss(model, price, rules, seed)
    passes = 1 if model.adaptive is None else model.adaptive.max_passes
    by_budget = price.rule == "budget" and model.adaptive is not None
    gradient = jax.value_and_grad(loss, has_aux=True)
    if accumulate > 1:
        count, together = (functools.partial(work, model) for work in (token_counts, of_parts))
        gradient = accumulate_gradients(loss, accumulate, rules, count, together)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        now = phase(price, state.step, steps, passes)
        placed = shard_batch(batch, rules)
        (total, extra), grads = gradient(state.params, state.statistics, placed, state.price.value, now, state.step)
        statistics, report = extra["statistics"], extra["report"]
        depth = {name: jnp.sum(getattr(report["passes"], of), axis=-1) for name, of in DEPTH.items()}
        steered = jnp.mean(jnp.sum(getattr(report["passes"], STEERED[price.target_of]), axis=-1))
        moves = now.moves if thaw is None or not by_budget else now.moves & thawed(thaw, state.step)
        moved = state.price  # a budget is read off gates that it moves: not those of copies, whose layers all run
        if by_budget or price.rule != "budget":
            moved = _moved_price(price, state.price, report["passes"], grads, steered, moves, steps)
        if thaw is not None:
            grads = keep_frozen(thaw, model.depth, state.step, grads, jax.tree.map(jnp.zeros_like, grads))
        with jax.named_scope("optimizer"):
            updates, moments = optimizer.update(grads, at_step(state.optimizer, state.step), state.params)
            params = optax.apply_updates(state.params, updates)
        if by_budget:
            params = with_gates_moved(params, price, steered, moves)
        if price.gates_opened and model.adaptive is not None:
            params = with_last_biases_moved(params, now.opens)
        if thaw is not None:
            params = keep_frozen(thaw, model.depth, state.step, params, state.params)
            statistics = keep_frozen(thaw, model.depth, state.step, statistics, state.statistics)
            if isinstance(moments, Float32State):
                copies = keep_frozen(thaw, model.depth, state.step, moments.copies, state.optimizer.copies)
                moments = moments._replace(copies=copies)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(jax.tree.map(widen, grads))
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        metrics = {
            "loss": report["cross_entropy"],
            "total_loss": total,
            "price_loss": report["price_loss"],
            "indexer_loss": jnp.sum(report["passes"].auxiliary_loss),
            **_component_metrics(model, report),
            **_excess(model, price, steered),
            "gradient_norm": norm,
            "bad": 1.0 - finite.astype(jnp.float32),
            "price": state.price.value,
            **depth,
            "delta_ratio": report["passes"].delta_ratio[:, 0],
            "update_ratio": report["passes"].update_ratio[:, 0],
        }
        new = TrainState(params, statistics, moments, moved, state.step)
        with jax.named_scope("optimizer"):
            applied = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        return applied._replace(step=state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def _moved_price(
    price: PriceConfig, state: PriceState | BudgetState, passes: PassStatistics, gradients: Tree, steered: Scalar,
    moves: Array, steps: int,
) -> PriceState | BudgetState:  # fmt: skip
    """The price after a step, by its rule."""
    if isinstance(state, BudgetState):
        return move_budget(price, state, passes, gradients, steered, moves)
    return move_price(price, state, steered, moves, steps)


def _excess(model: ModelConfig, price: PriceConfig, steered: Scalar) -> dict[str, Array]:
    """How far depth is above the price's target, where there is one."""
    if model.adaptive is None or price.target is None:
        return {}
    return {f"{price.target_of}_excess": steered - price.target}


def _component_metrics(model: ModelConfig, report: Mapping[str, Any]) -> dict[str, Array]:
    """What the components that are on have to say: of pass 1 of each layer where a layer has several."""
    passes: PassStatistics = report["passes"]
    metrics: dict[str, Array] = {}
    if model.adaptive is not None:
        gate = {"mean": passes.p_mean, "std": passes.p_std, "floored": passes.p_floored}
        metrics |= {f"gate_{name}": value[:, 0] for name, value in gate.items()}
    if model.moe is not None:
        metrics["router_loss"] = jnp.sum(passes.router_loss)
        for name in ("router_entropy", "null_rate", "experts"):
            metrics[name] = getattr(passes, name)[:, 0]
    if model.exit is not None:
        metrics["layers_used"] = jnp.sum(passes.alive)
    if model.mtp is not None:
        metrics["mtp_loss"] = report["mtp_loss"]
    return metrics


def make_evaluation(
    model: ModelConfig, rules: Rules, parts: int | None = None
) -> Callable[[Tree, Batch, PassControl | None], tuple[Scalar, Scalar, Any]]:
    """The jitted evaluation(variables, batch, control) -> (summed cross-entropy, targets, pass statistics).

    A batch runs in so many `parts`, one after the other, as that of a training step does: it needs no more memory.
    None: in as many as fit one device each (`parts_that_fit`).
    """
    network = LanguageModel(model, rules)

    def of_rows(variables: Tree, placed: Batch, passes: PassControl) -> tuple[Scalar, Scalar, PassStatistics]:
        def chunk(carry: tuple[Tree, Any], piece: tuple[Batch, Array]) -> tuple[tuple[Tree, Any], Any]:
            one = piece[0]
            ids = one["tokens"], one["segment_ids"]
            output = apply_network(network, variables, *ids, control=passes, memory=carry[1])
            measured = losses(network, variables, output.hidden, one["targets"])
            return (carry[0], output.memory), (measured, output.statistics)

        _, (sums, statistics) = over_chunks(chunk, model, rules, (), placed)
        return jnp.sum(sums[0]), jnp.sum(sums[1]), mean_over_chunks(statistics, placed["segment_ids"], model)

    def evaluation(variables: Tree, batch: Batch, control: PassControl | None = None) -> tuple[Scalar, Scalar, Any]:
        placed, passes = shard_batch(batch, rules), control or free_passes()
        number = parts_that_fit(placed["tokens"], model, rules) if parts is None else parts
        if number == 1:
            return of_rows(variables, placed, passes)

        def one(part: Batch) -> Any:
            return of_rows(variables, part, passes), jnp.sum(real_tokens(part["segment_ids"]))

        pieces = {name: rows_in_parts(array, number, rules) for name, array in placed.items()}
        (total, count, statistics), tokens = jax.lax.map(one, pieces)
        whole = mean_over_tokens(statistics, tokens, model.adaptive, model.exit is not None)
        return jnp.sum(total), jnp.sum(count), whole

    return jax.jit(evaluation)


def evaluate(evaluation: Callable[..., Any], variables: Tree, batches: Sequence[Batch], control: Any = None) -> float:
    """Mean cross-entropy in nats a token over the batches."""
    return _nats_a_token([evaluation(variables, batch, control)[:2] for batch in batches])


def held_out_losses(
    evaluation: Callable[..., Any], variables: Tree, parts: Mapping[str, Sequence[Batch]]
) -> dict[str, float]:
    """`held_out_loss`, nats a token over the batches of all parts, and of several `held_out_loss_PART` of each; nothing
    of a part in whose batches nothing is asked."""
    every = {name: [evaluation(variables, batch, None)[:2] for batch in batches] for name, batches in parts.items()}
    sums = {name: pairs for name, pairs in every.items() if sum(float(pair[1]) for pair in pairs) > 0}
    if not sums:
        return {}
    found = {"held_out_loss": _nats_a_token([pair for of_part in sums.values() for pair in of_part])}
    if len(parts) == 1:
        return found
    return found | {f"held_out_loss_{name}": _nats_a_token(of_part) for name, of_part in sums.items()}


def _nats_a_token(sums: Sequence[Any]) -> float:
    total, count = (sum(float(pair[i]) for pair in sums) for i in range(2))
    return total / max(count, 1.0)
