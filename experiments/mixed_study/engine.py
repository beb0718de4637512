"""Trains one model on the mix, and asks it both: the loss of text, the answers, and how many passes what takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from experiments.growth_study.flops import training_flops
from experiments.mixed_study.study import ADAPTIVE, Wanted
from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules
from gt_jax.evaluation.answer_table import answer_table
from gt_jax.evaluation.scoring import score
from gt_jax.evaluation.token_passes import hidden_and_passes
from gt_jax.models.language_model import LanguageModel, fixed_passes, free_passes, initialise
from gt_jax.text.batches import Batch
from gt_jax.text.data import Data, open_data
from gt_jax.training.loop import fit, make_trainer, variables_of
from gt_jax.training.step import evaluate
from gt_jax.typing import Tree

LAST = 4  # letter of a word, and all that follow it


def make(wanted: Wanted) -> dict[str, Any]:
    """The row: losses of text and answers, right answers by look-ups, FLOPs of training; passes by kind of token."""
    study, config, task = wanted.study, wanted.config, wanted.study.of.name
    data = open_data(wanted.data)
    assert isinstance(data, Data)
    trainer = make_trainer(config, wanted.train)
    state = trainer.new_state(initialise(config, wanted.seed))
    spent, began = [], time.monotonic()

    def record(step: int, metrics: dict[str, Any]) -> None:
        spent.append(step_flops(wanted, np.asarray(metrics["passes_computed"], np.float64)))

    state = fit(trainer, state, data.train(None), wanted.steps, record=record)
    jax.block_until_ready(state.step)
    seconds, variables = time.monotonic() - began, variables_of(state)
    held_out, adaptive = data.held_out_by_part(study.of.held_out_batches), wanted.model == ADAPTIVE
    answers = answer_table(config, variables, held_out[task], forced=None if adaptive else (), cuts=False).to_json()
    nats = evaluate(trainer.evaluation, variables, held_out["text"])
    row = {
        "task": "mix", "model": wanted.model, "seed": wanted.seed, "rate": wanted.rate, "steps": wanted.steps,
        "layers": config.layout, "seconds": round(seconds, 1), "flops": float(np.sum(spent)),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])), "text_nats": nats,
        "tuning_nats": evaluate(trainer.evaluation, variables, data.tuning(study.of.held_out_batches)),
        "answer_nats": answers["nats"],
        **{key: answers[key] for key in ("accuracy", "accuracy_hardest", "accuracy_forced", "passes", "spearman")},
    }  # fmt: skip
    if adaptive:
        row |= _passes(config, variables, held_out["text"], held_out[task], study.shown)
        row["text_nats_forced"] = {str(k): evaluate(trainer.evaluation, variables, held_out["text"], fixed_passes(k))
                                   for k in range(1, study.of.passes + 1)}  # fmt: skip
    said = " ".join(f"{100 * value:.0f}" for value in row["accuracy"].values())
    return row | {"line": f"text {nats:.4f} nats, {said} % right in {seconds:.0f} s"}


def step_flops(wanted: Wanted, passes: Sequence[float] | np.ndarray) -> float:
    """FLOPs of a training step that computes so many passes in each layer [l]."""
    of = wanted.study.of
    return training_flops(wanted.config, of.length, passes) * of.length * of.rows


def _passes(
    config: ModelConfig, variables: Tree, text: Sequence[Batch], task: Sequence[Batch], shown: int
) -> dict[str, Any]:  # fmt: skip
    """Mean passes of text, by the place of the byte that follows in its word too, and of what asks nothing."""
    network = LanguageModel(config, Rules())
    run = jax.jit(lambda tokens, segments: hidden_and_passes(network, variables, tokens, segments, free_passes())[1])

    def of(batch: Batch) -> Int[np.ndarray, "b t"]:
        return np.asarray(run(batch["tokens"], batch["segment_ids"]))[0]

    found = [of(batch) for batch in text]
    scored = np.concatenate([passes[batch["targets"] >= 0] for passes, batch in zip(found, text, strict=True)])
    place = np.concatenate([places(batch["tokens"], batch["targets"])[batch["targets"] >= 0] for batch in text])
    nats = score(config, variables, text, free_passes(), Rules())
    unasked = [of(batch)[(batch["segment_ids"] > 0) & (batch["difficulty"] == 0)] for batch in task]
    # a text of other letters than ASCII's has none at some places
    by_place = {str(one): place == one for one in range(LAST + 1) if (place == one).any()}
    return {
        "text_passes": float(scored.mean()), "unasked_passes": float(np.concatenate(unasked).mean()),
        "text_shares": {str(k): float((scored == k).mean()) for k in range(1, int(scored.max()) + 1)},
        "passes_by_place": {name: float(scored[here].mean()) for name, here in by_place.items()},
        "nats_by_place": {name: float(nats[here].mean()) for name, here in by_place.items()},
        "shown": [{"tokens": row.tolist(), "passes": own.tolist()}
                  for batch, rows in ((text[0], shown), (task[0], shown // 2))
                  for row, own in zip(np.asarray(batch["tokens"])[:rows], of(batch)[:rows], strict=True)],
    }  # fmt: skip


def places(tokens: Int[np.ndarray, "b t"], targets: Int[np.ndarray, "b t"]) -> Int[np.ndarray, "b t"]:
    """Which letter of its word each byte is that is predicted, from 1, `LAST` for all later ones; 0 for no letter.

    Letters are those of ASCII; a word that a row begins within begins there.
    """
    before, now = _letter(tokens), _letter(targets)
    found = np.zeros_like(targets)
    for column in range(targets.shape[1]):
        earlier = found[:, column - 1] if column else before[:, 0].astype(found.dtype)
        further = np.where(before[:, column], np.minimum(earlier, LAST - 1), 0)
        found[:, column] = np.where(now[:, column], 1 + further, 0)
    return found


def _letter(ids: Int[np.ndarray, "b t"]) -> Bool[np.ndarray, "b t"]:
    lower = ids | 32
    return (lower >= ord("a")) & (lower <= ord("z"))
