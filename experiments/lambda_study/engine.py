"""Trains a variant with all seeds at once, and times the steps of all variants in turns: one call makes one unit."""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lambda_study.study import PLAIN, TIMES, VARIANTS, A, B, LambdaStudy, Wanted
from experiments.recall_study.material import Material, material, training_rows
from experiments.several_seeds import fit, held_out_nats, programs, stacked
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.models.layers.stack import contributions

CURVE = 20


def source_of(study: LambdaStudy) -> Material:
    """The text; raises `Refused` for one that cannot be used."""
    return material(study.text, study.tokenizer, study.length, study.rows)


def make(wanted: Wanted) -> dict[str, Any]:
    """The unit: a row a seed; of `TIMES` the ratio of each variant's step to the plain one's, by round."""
    if wanted.variant == TIMES:
        return times(wanted.study)
    study, name, began = wanted.study, wanted.variant, time.monotonic()
    source = source_of(study)
    config, variant = study.model(name, source.words.size), study.variant(name)
    steps = study.steps_of(name)
    trained = fit(config, seeds=wanted.seeds, rates=wanted.rates, steps=steps,
                  batches=lambda step: batch(study, wanted.seeds, step), scales=variant.scales)  # fmt: skip
    losses = {part: held_out_nats(config, trained.variables, source.batches(part, study.held_out_batches))
              for part in ("tuning", "held-out")}  # fmt: skip
    scalars = learned(study, name, trained.variables["params"])
    every = max(1, steps // CURVE)
    rows = [{"task": "text", "model": name, "seed": seed, "rate": rate, "steps": steps,
             "tuning_nats": losses["tuning"][index], "nats": losses["held-out"][index],
             **{what: values[index] for what, values in scalars.items()},
             "curve": [round(float(value), 4) for value in trained.curve[::every, index]]}
            for index, (seed, rate) in enumerate(zip(wanted.seeds, wanted.rates, strict=True))]  # fmt: skip
    said = ", ".join(f"{row['nats']:.4f}" for row in rows)
    return {"rows": rows, "line": f"{said} in {time.monotonic() - began:.0f} s"}


def batch(study: LambdaStudy, seeds: tuple[int, ...], step: int) -> dict[str, np.ndarray]:
    """The batch of a step, [seeds, rows, t]; a seed's rows do not depend on the others."""
    found = []
    for seed in seeds:
        rows = training_rows(study.text, study.tokenizer, study.length, study.rows, seed)
        taken = [rows[step * study.rows + row] for row in range(study.rows)]
        found.append({name: np.stack([one[name] for one in taken]) for name in taken[0]})
    return stacked(found)


def learned(study: LambdaStudy, name: str, params: Any) -> dict[str, list[Any]]:
    """By seed: a, b and the skips' weights as they were learned, and each layer's factor to the output."""
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    seeds, layers = next(iter(leaves.values())).shape[0], study.layers
    by_name = {path.rpartition("/")[2]: leaf for path, leaf in leaves.items()}
    a = by_name.get(A, np.ones((seeds, layers))).reshape(seeds, layers)
    b = by_name.get(B, np.zeros((seeds, layers))).reshape(seeds, layers)
    skips = study.variant(name).stack.skips
    weights = leaves.get("skips", np.zeros((seeds, 0)))
    reach = [np.asarray(contributions(a[seed], weights[seed], skips)).tolist() for seed in range(seeds)]
    return {"a": a.tolist(), "b": b.tolist(), "skips": weights.tolist(), "contributions": reach}


def times(study: LambdaStudy) -> dict[str, Any]:
    """Seconds of a step of every variant over the plain one's of the same round, all seeds at once, in turns."""
    source, seeds = source_of(study), study.seeds
    given = {key: jnp.asarray(value) for key, value in batch(study, seeds, 0).items()}
    running = {}
    for name in VARIANTS:
        start, step = programs(study.model(name, source.words.size), 1, study.variant(name).scales)
        rates = jnp.full((len(seeds),), study.rates[0], jnp.float32)
        state = start(jnp.asarray(seeds, jnp.uint32), rates, jnp.float32(study.steps))
        running[name] = [step, *step(state, given)]
    rounds = []
    for number in range(study.rounds):
        spent = {}
        for name in VARIANTS[number % len(VARIANTS):] + VARIANTS[: number % len(VARIANTS)]:
            step, state, _ = running[name]
            jax.block_until_ready(state)
            began = time.monotonic()
            state, loss = step(state, given)
            jax.block_until_ready(loss)
            spent[name] = time.monotonic() - began
            running[name] = [step, state, loss]
        rounds.append(spent)
    rows: list[dict[str, Any]] = [
        {"task": TIMES, "model": name, "seed": 0, "ratios": [one[name] / one[PLAIN] for one in rounds],
         "milliseconds": 1e3 * statistics.median(one[name] for one in rounds)} for name in VARIANTS]  # fmt: skip
    said = ", ".join(f"{row['model']} {statistics.median(row['ratios']):.2f}" for row in rows)
    return {"rows": rows, "line": said}


