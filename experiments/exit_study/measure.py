"""All models of one source and seed, measured beside each other: held-out loss, layers used, and wall time.

Rounds take turns over the models. In round i all of them read the same: one held-out row token by token, at batch 1, in
one compiled loop; and one held-out batch at once, forward pass and loss. The whole process runs on one core.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.exit_study.study import ExitStudy, Model
from experiments.exit_study.train import Material, evaluation, losses, material, read_weights
from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import model_inputs
from gt_jax.evaluation.answers import answers, asked
from gt_jax.evaluation.rank_correlation import spearman
from gt_jax.models.language_model import LanguageModel, apply_network, empty_cache, free_passes
from gt_jax.text.batches import Text
from gt_jax.text.data import Data
from gt_jax.typing import Tree

MODES = ("decoding", "prefill")


class Case(NamedTuple):
    """A trained model as it is measured; `config` is the same for all models of one shape and threshold."""

    model: Model
    threshold: float | None
    config: ModelConfig
    variables: Tree


@functools.lru_cache(maxsize=64)
def reading(config: ModelConfig) -> Callable[..., Any]:
    """The compiled read(variables, tokens [1, t], segment_ids [1, t]) -> mean layers of a token, one read at a time."""
    network = LanguageModel(config)

    @jax.jit
    def read(variables: Tree, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        def step(cache: Tree, token: tuple[jax.Array, jax.Array]) -> tuple[Tree, tuple[jax.Array, jax.Array]]:
            one, ids = token
            output = apply_network(network, variables, one[:, None], ids[:, None], cache=cache)
            return output.cache, (jnp.sum(output.statistics.alive), output.logits)

        _, (used, logits) = jax.lax.scan(step, empty_cache(config, *tokens.shape), (tokens.T, segment_ids.T))
        return jnp.mean(used) + 0 * jnp.sum(logits)

    return read


def cases(study: ExitStudy, weights: Mapping[str, Path]) -> list[Case]:
    """Every model that has weights, at every threshold that it is measured at."""
    found = []
    for model in study.models:
        if model.name not in weights:
            continue
        plain = model if model.ponder is None else model._replace(ponder=0.0)
        variables = read_weights(weights[model.name], study.config(plain, model.threshold))
        found += [Case(model, at, study.config(plain, at), variables) for at in study.measured_at(model)]
    return found


def measured(
    study: ExitStudy, source: str, seed: int, weights: Mapping[str, Path], rates: Mapping[str, float]
) -> dict[str, Any]:
    """One row a model and threshold. Times are seconds, by round: of one row decoded, and of one batch forward."""
    data, rows = material(study, source, seed), []
    everything = cases(study, weights)
    times = timed(study, data, everything)
    for case, found in zip(everything, times, strict=True):
        held, tuning = losses(case.config, case.variables, data.evaluation), losses(case.config, case.variables,
                                                                                     data.tuning)  # fmt: skip
        rows.append({
            "name": case.model.at(case.threshold), **case.model._asdict(), "threshold": case.threshold,
            "rate": rates[case.model.name], "loss": held.loss, "tuning_loss": tuning.loss,
            "layers_used": held.layers_used, **found, **answered(case, data.data, study),
        })  # fmt: skip
    best = min(rows, key=lambda row: row["loss"])
    return {"source": source, "seed": seed, "tokens": {"decoding": study.length(source),
            "prefill": study.rows * study.length(source)}, "models": rows,
            "line": f"{len(rows)} models measured, the lowest loss {best['loss']:.4f} of {best['name']}"}  # fmt: skip


def timed(study: ExitStudy, data: Material, everything: list[Case]) -> list[dict[str, Any]]:
    """Times of every case by mode and round, and the layers that a token ran in decoding."""
    whole = [batch for batch in data.evaluation if (batch["segment_ids"] > 0).all()] or data.evaluation
    batches = [model_inputs(whole[number % len(whole)]) for number in range(study.rounds)]
    rows = [(batch["tokens"][:1], batch["segment_ids"][:1]) for batch in batches]
    found: list[dict[str, Any]] = [{"seconds_decoding": [], "seconds_prefill": [], "used": []} for _ in everything]
    for case in everything:  # compiled, and once more, so that nothing is done for the first time
        for _ in range(2):
            jax.block_until_ready(reading(case.config)(case.variables, *rows[0]))
            jax.block_until_ready(evaluation(case.config)(case.variables, batches[0], None))
    for row, batch in zip(rows, batches, strict=True):
        for case, times in zip(everything, found, strict=True):
            began = time.perf_counter()
            used = jax.block_until_ready(reading(case.config)(case.variables, *row))
            read = time.perf_counter()
            jax.block_until_ready(evaluation(case.config)(case.variables, batch, None))
            times["seconds_prefill"].append(time.perf_counter() - read)
            times["seconds_decoding"].append(read - began)
            times["used"].append(float(used))
    for times in found:
        times["layers_used_decoding"] = float(np.mean(times.pop("used")))
    return found


def answered(case: Case, data: Text | Data, study: ExitStudy) -> dict[str, Any]:
    """Of a task: accuracy and layers used by difficulty of the answer, and their rank correlation. Of text nothing."""
    if isinstance(data, Text):
        return {}
    batches = data.held_out(study.evaluation_batches)
    where = asked(batches)
    said = answers(case.config, case.variables, batches, where, free_passes())
    used = said.passes.sum(axis=0)
    levels = np.unique(where.difficulty).tolist()
    rank = None if case.threshold is None else spearman(used.astype(np.int64), where.difficulty)
    return {
        "accuracy": {str(level): float(said.right[where.difficulty == level].mean()) for level in levels},
        "passes": {str(level): float(used[where.difficulty == level].mean()) for level in levels},
        "spearman": None if rank is None else rank.value,
    }  # fmt: skip
