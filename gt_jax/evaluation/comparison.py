"""Two models on the same batches: their predictions, and layer by layer how each moves, routes and stretches its state.

- A layer of the target stands beside the pass of the source that the growth plan says it stands for, as the source runs
  it of itself: a token adds w_k alpha_k Delta, and nothing in a pass that it does not run. That is what the coefficient
  alpha_k times survival is the mean of. Without a plan the target's figures stand alone.
- |dh|/|h| is of the update as it is added to the stream, gain, strength and weight included, a mean over real tokens.
  Of each token |Delta|/|h| is cut at 10 before that; a figure of tokens that are nearly all cut is marked as one.
  It is also given with the source's passes fixed at k_exec, each at full alpha_k: what an exact growth by the
  coefficient alpha_k alone is equal to.
- Router figures are of the probabilities over all slots, null experts included: entropy over log of the slots,
  KL(source || target), the share of picks that are null.
- The spread of a source's pass is the share of what it adds that differs between tokens (`spread`): what a target layer
  of constant strength cannot give.
- Of a target that is itself adaptive, the figures by layer are of its first passes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules, global_batch
from gt_jax.errors import Refused
from gt_jax.evaluation.held_out_rows import HeldOutRows
from gt_jax.evaluation.intermediates import Intermediates, hidden_rows, hidden_with_intermediates
from gt_jax.evaluation.predictions import (
    Agreement,
    Predictor,
    agreement_in_pieces,
    relative_entropy,
    summary,
    sums_by_unit,
)
from gt_jax.evaluation.singular_values import PROBABILITY, Step, layer_singular_values
from gt_jax.evaluation.spread import WeightSpread, weight_spread
from gt_jax.growth.layer_states import gains_of
from gt_jax.growth.plan import Plan
from gt_jax.models.language_model import LanguageModel, fixed_passes, free_passes
from gt_jax.models.layers.adaptive_depth import RATIO_CLIP
from gt_jax.models.layers.mixer import real_tokens
from gt_jax.models.layers.stack import coefficients
from gt_jax.training.step import Batch, shard_batch
from gt_jax.typing import PerToken, Tree

AT_CUT = 0.9 * RATIO_CLIP  # a mean over tokens of |Delta|/|h|, cut for each: from here on nearly all of them are

Pass = tuple[int, int]
"""A layer of the source and one of its passes, both from 0."""


class Routing(NamedTuple):
    """Sums over real tokens: entropy over log of the slots and share of null picks, by layer or by compared pair."""

    entropy: Float[Array, " l"]
    null_rate: Float[Array, " l"]


class Totals(NamedTuple):
    """What batches add up to. Ratios and weights are times the number of real tokens; routing is None for a dense MLP.

    `source_delta` and `target_delta` are |Delta|/|h| as it is cut, without gain, strength and weight.

    `source_routing` and `router_kl` are by target layer that stands for a pass, in order.
    """

    real: Array
    source_ratio: Float[Array, "l p"]
    source_weight: Float[Array, "l p"]
    source_moments: Float[Array, "l p 4"]
    source_fixed_ratio: Float[Array, "l p"] | None
    source_delta: Float[Array, "l p"]
    target_ratio: Float[Array, " l"]
    target_delta: Float[Array, " l"]
    target_weight: Float[Array, " l"]
    source_routing: Routing | None
    target_routing: Routing | None
    router_kl: Float[Array, " l"] | None


def routing(slots: Float[Array, "l b t s"], experts: int, top_k: int, real: PerToken) -> Routing:
    """Entropy of softmax(slots) over log of the slots, and share of the top_k picks at or past `experts`, summed."""
    log_p = jax.nn.log_softmax(slots)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1) / max(math.log(slots.shape[-1]), 1e-12)
    null = jnp.mean(jax.lax.top_k(slots, top_k)[1] >= experts, axis=-1, dtype=jnp.float32)
    return Routing(_total(entropy, real), _total(null, real))


def _total(x: Float[Array, "l b t"], real: PerToken) -> Float[Array, " l"]:
    return jnp.sum(x * real[None], axis=(1, 2))


def passes_stood_for(plan: Plan, source: ModelConfig) -> dict[int, Pass]:
    """By target layer the source's pass it stands for; without identity entries and passes that k_exec does not run."""
    most = 1 if source.adaptive is None else source.adaptive.max_passes
    return {target: (entry.source, entry.copy - 1) for target, entry in enumerate(plan.entries)
            if 0 < entry.copy <= min(plan.k_exec[entry.source], most)}  # fmt: skip


@functools.lru_cache(maxsize=8)
def make_comparison(
    source: ModelConfig, target: ModelConfig, plan: Plan | None, rules: Rules, rows: int = 0
) -> Callable[[Tree, Tree, Batch], tuple[Agreement, Totals, Intermediates | None, Intermediates | None]]:
    """The jitted compare(source variables, target variables, batch) -> (by token, totals, source and target inside).

    The last two show the states of the first `rows` rows; None where nothing of them is needed. The same arguments give
    the same compiled function: an experiment with several seeds compiles once.
    """
    shallow, deep = LanguageModel(source, rules), LanguageModel(target, rules)
    stood = {} if plan is None else passes_stood_for(plan, source)

    def run(network: LanguageModel, variables: Tree, ids: tuple[Array, Array], looked: bool) -> tuple[Any, Any, Any]:
        config = network.config
        if not looked or config.exit is not None or (config.moe is None and not rows):
            return *hidden_rows(network, variables, *ids, free_passes()), None
        return hidden_with_intermediates(network, variables, *ids, free_passes(), rows)

    def compare(source_variables: Tree, target_variables: Tree, batch: Batch) -> tuple[Agreement, Totals, Any, Any]:
        batch = shard_batch(batch, rules)
        ids = batch["tokens"], batch["segment_ids"]
        real = real_tokens(batch["segment_ids"])
        count = jnp.sum(real)
        free, ran, before = run(shallow, source_variables, ids, plan is not None)
        fixed, fixed_ratio = None, None
        if plan is not None:
            fixed, forced = hidden_rows(shallow, source_variables, *ids, fixed_passes(_fixed(source, plan)))
            fixed_ratio = forced.update_ratio * count
        grown, moved, after = run(deep, target_variables, ids, True)
        sides = (Predictor(shallow, source_variables, free), fixed, Predictor(deep, target_variables, grown))
        totals = Totals(count, ran.update_ratio * count, ran.survival * count, ran.weight_moments * count, fixed_ratio,
                        ran.delta_ratio * count, moved.update_ratio[:, 0] * count, moved.delta_ratio[:, 0] * count,
                        moved.survival[:, 0] * count,
                        *_routings(source, target, before, after, stood, real))  # fmt: skip
        return agreement_in_pieces(*sides, batch["targets"], rules), totals, before, after

    return jax.jit(compare)


def _fixed(source: ModelConfig, plan: Plan) -> list[int]:
    """k_exec, as far as the source can run it."""
    most = 1 if source.adaptive is None else source.adaptive.max_passes
    return [min(k, most) for k in plan.k_exec]


def _routings(
    source: ModelConfig, target: ModelConfig, before: Intermediates | None, after: Intermediates | None,
    stood: dict[int, Pass], real: PerToken,
) -> tuple[Routing | None, Routing | None, Array | None]:  # fmt: skip
    """The routing figures of `Totals`."""
    if after is None or after.slots is None or target.moe is None:
        return None, None, None
    first = after.slots[:, 0]
    own = routing(first, target.moe.experts, target.moe.top_k, real)
    if before is None or before.slots is None or source.moe is None or not stood:
        return None, own, None
    taken = jnp.stack([before.slots[layer, index] for layer, index in stood.values()])
    child = jnp.stack([first[layer] for layer in stood])
    beside = routing(taken, source.moe.experts, source.moe.top_k, real)
    return beside, own, _total(relative_entropy(taken, child), real)


def compare_models(
    source: ModelConfig, source_variables: Tree, target: ModelConfig, target_variables: Tree, plan: Plan | None,
    rows: HeldOutRows, rules: Rules, *, jacobian_rows: int = 0, jacobian_iterations: int = 20, seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """All figures of `verify` for two models in memory, as JSON values; `plan` None for a target not grown from source.

    Losses and KL in nats a token. The Jacobians are at the states of the first `jacobian_rows` rows of the first batch;
    0 leaves them out. Raises `Refused` for rows that the batches, or the mesh, do not have.
    """
    _check_rows(rows.batches, rules, jacobian_rows, jacobian_iterations)
    compare = make_comparison(source, target, plan, rules, jacobian_rows)
    units = 1 + max(int(one.max()) for one in rows.units)
    figures, sums, shown = None, None, None
    # The first batch last, and nothing kept of the others: the states of one batch are on the devices at a time.
    for number, index in enumerate([*range(1, len(rows.batches)), 0], 1):
        say(f"batch {number}/{len(rows.batches)}")
        shown = None
        batch = global_batch(dict(rows.batches[index]), rules)
        by_token, one, *shown = compare(source_variables, target_variables, batch)
        more = sums_by_unit(jax.device_get(by_token), rows.units[index], units)
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), jax.device_get(one))
        figures = more if figures is None else figures + more
        sums = wide if sums is None else jax.tree.map(np.add, sums, wide)
    assert sums is not None and shown is not None and figures is not None
    spectra, stretches = _stretches(
        (source, source_variables, shown[0]), (target, target_variables, shown[1]), plan, sums, rows.batches[0], rules,
        (jacobian_rows, jacobian_iterations, seed), say,
    )  # fmt: skip
    between = weight_spread(*(np.asarray(one) / max(float(sums.real), 1.0)
                              for one in (sums.source_weight, sums.source_moments)))  # fmt: skip
    return {
        **summary(figures, rows.kind),
        "spread": None if plan is None else {"whole": between.whole, "kept": target.gated_copies is not None},
        "jacobian": spectra,
        "layers": _layers(source, target, plan, sums, stretches, between),
        "notes": _notes(target, jacobian_rows),
    }


def _check_rows(batches: Sequence[Batch], rules: Rules, rows: int, iterations: int) -> None:
    if not batches:
        raise Refused("there is no batch to compare the models on")
    there = len(batches[0]["tokens"])
    if not 0 <= rows <= there:
        raise Refused(f"--jacobian-rows is {rows}; a batch has {there} rows, and 0 leaves the Jacobians out")
    if rows % rules.shards("batch"):
        raise Refused(f"--jacobian-rows is {rows}; the mesh cuts rows in {rules.shards('batch')}")
    if iterations < 2:
        raise Refused(f"--jacobian-iterations is {iterations}; at least 2 are needed to see how far they have come")


def _notes(target: ModelConfig, rows: int) -> list[str]:
    if target.exit is None or (target.moe is None and not rows):
        return []
    return ["tokens leave the target's stack early, so its layers have no router figures and no Jacobians here"]


Side = tuple[ModelConfig, Tree, Intermediates | None]


def _stretches(
    source: Side, target: Side, plan: Plan | None, sums: Totals, batch: Batch, rules: Rules,
    options: tuple[int, int, int], say: Callable[[str], None],
) -> tuple[dict[str, Any] | None, tuple[dict[Pass, float], dict[Pass, float]]]:  # fmt: skip
    """How the singular values were found, and the values by (layer, pass) of source and target."""
    rows, iterations, seed = options
    wanted: list[list[Pass]] = [[], []]
    if rows and target[2] is not None:
        wanted[1] = [(layer, 0) for layer in range(len(target[0].depth))]
    if rows and source[2] is not None and plan is not None:
        wanted[0] = list(dict.fromkeys(passes_stood_for(plan, source[0]).values()))
    if not any(wanted):
        return None, ({}, {})
    values: list[dict[Pass, float]] = []
    distances, factor = [0.0], 1.0
    real = max(float(sums.real), 1.0)
    weights = np.asarray(sums.source_weight) / real, np.asarray(sums.target_weight)[:, None] / real
    for (config, variables, inside), passes, weight in zip((source, target), wanted, weights, strict=True):
        if inside is None or not passes:
            values.append({})
            continue
        strength = strengths(config, variables)
        steps = [Step(layer, index, strength[layer][index] * float(weight[layer, index]))
                 for layer, index in passes]  # fmt: skip
        segment_ids = jnp.asarray(batch["segment_ids"][:rows, : inside.states.shape[3]])
        found = layer_singular_values(config, variables, inside, segment_ids, steps, rules=rules, iterations=iterations,
                                seed=seed, say=say)  # fmt: skip
        values.append({at: float(np.max(one.value)) for at, one in zip(passes, found, strict=True)})
        distances += [float(np.max(one.distance)) for one in found]
        factor = max(factor, *(float(np.max(one.factor)) for one in found))
    how = {"rows": rows, "tokens": segment_ids.shape[1], "iterations": iterations, "seed": seed,
           "distance": max(distances), "at_most_times": factor, "probability": PROBABILITY}  # fmt: skip
    return how, (values[0], values[1])


def strengths(config: ModelConfig, variables: Tree) -> list[list[float]]:
    """By layer and pass the factor of Delta: gain, times alpha of the pass, times the midpoint stack's own step."""
    alpha = (1.0,) if config.adaptive is None else config.adaptive.alpha
    gains = gains_of(config, variables).tolist()
    return [[gain * step * strength for strength in alpha] for gain, step in zip(gains, own_steps(config), strict=True)]


def own_steps(config: ModelConfig) -> list[float]:
    """By layer the factor that the stack itself has for Delta: 1 but in the midpoint stack."""
    depth = len(config.depth)
    if config.stack.kind != "midpoint":
        return [1.0] * depth
    return [float(step) for step in coefficients(depth, config.stack.mixing, config.stack.step).delta]


def _layers(
    source: ModelConfig, target: ModelConfig, plan: Plan | None, sums: Totals,
    stretches: tuple[dict[Pass, float], dict[Pass, float]], between: WeightSpread,
) -> list[dict[str, Any]]:  # fmt: skip
    """One object a target layer; None for what there is not, or what k_exec did not run."""
    real = max(float(sums.real), 1.0)
    stood = {} if plan is None else passes_stood_for(plan, source)
    place_of = {target: place for place, target in enumerate(stood)}
    after, step = own_steps(target), own_steps(source)

    def mean(values: Any, place: int | None) -> float | None:
        return None if values is None or place is None else float(values[place]) / real

    def of_pass(ratios: Any, at: Pass | None) -> float | None:
        return None if ratios is None or at is None else float(step[at[0]] * ratios[at]) / real

    layers = []
    for layer, kind in enumerate(target.depth.types):
        entry, at, place = None if plan is None else plan.entries[layer], stood.get(layer), place_of.get(layer)
        own, beside = sums.target_routing, sums.source_routing
        layers.append({
            "target": layer, "type": kind,
            "source": None if entry is None else entry.source, "copy": None if entry is None else entry.copy,
            "coefficient": None if entry is None else entry.coefficient,
            "delta_ratio": after[layer] * float(sums.target_ratio[layer]) / real,
            "source_delta_ratio": of_pass(sums.source_ratio, at),
            "source_fixed_delta_ratio": of_pass(sums.source_fixed_ratio, at),
            "delta_ratio_cut": float(sums.target_delta[layer]) >= AT_CUT * real,
            "source_delta_ratio_cut": None if at is None else float(sums.source_delta[at]) >= AT_CUT * real,
            "spread": None if at is None else float(between.spread[at]),
            "jacobian": stretches[1].get((layer, 0)), "source_jacobian": None if at is None else stretches[0].get(at),
            "router_entropy": mean(own and own.entropy, layer),
            "source_router_entropy": mean(beside and beside.entropy, place),
            "router_kl": mean(sums.router_kl, place),
            "null_rate": mean(own and own.null_rate, layer),
            "source_null_rate": mean(beside and beside.null_rate, place),
        })  # fmt: skip
    return layers
