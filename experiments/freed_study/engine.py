"""Trains the forced part of a seed, kept as a training checkpoint, and goes on from it by a variant."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.freed_study.study import FORCED, FreedStudy, Wanted
from experiments.pays_study.ask import figures
from gt_jax.checkpoints import checkpoint
from gt_jax.models.language_model import initialise
from gt_jax.text.data import open_data
from gt_jax.training.loop import Trainer, fit, make_trainer, variables_of
from gt_jax.training.state import TrainState


def make(work: Path, wanted: Wanted) -> dict[str, Any]:
    """The unit; a variant's has its curve, of which the last point is its end."""
    study, setting = wanted.study, wanted.setting
    place = work / f"seed{wanted.seed}" / "forced.checkpoint"
    trainer = make_trainer(setting.adaptive(), setting.train(wanted.seed, study.rate))
    stream = open_data(setting.data(wanted.seed)).train(None)
    asked = _Asked(wanted)
    if wanted.variant == FORCED:
        state = trainer.new_state(initialise(setting.adaptive(), wanted.seed))
        state = fit(trainer, state, stream, study.forced_steps, record=lambda step, metrics: None)
        asked(study.forced_steps, state)
        if place.exists():  # of a unit that was killed before it was kept
            shutil.rmtree(place)
        checkpoint.save(place, state._asdict(), {"kind": "train", "config": setting.adaptive().to_json(),
                                                 "data": stream.state()})  # fmt: skip
    else:
        state = _forced(place, trainer, wanted)
        stream.restore(checkpoint.describe(place)[1]["data"])
        fit(trainer, state, stream, setting.steps, record=lambda step, metrics: None,
            due=study.looked_at.__contains__, after=lambda step, state, last: asked(step, state))  # fmt: skip
    end = asked.curve[-1]
    return {"task": setting.name, "model": wanted.variant, "seed": wanted.seed, "rate": study.rate,
            "curve": asked.curve, **{name: end[name] for name in ("accuracy", "passes", "spearman")},
            "line": f"{end['nats']:.4f} nats, {100 * end['accuracy_all']:.1f} % right"}  # fmt: skip


class _Asked:
    """The held-out figures of a model at some steps."""

    def __init__(self, wanted: Wanted) -> None:
        self._config = wanted.setting.adaptive()
        self._batches = open_data(wanted.setting.data(0)).held_out(wanted.setting.held_out_batches)
        self.curve: list[dict[str, Any]] = []

    def __call__(self, step: int, state: TrainState) -> None:
        found = figures(self._config, variables_of(state), self._batches)
        names = ("nats", "accuracy_all", "accuracy", "passes", "spearman")
        self.curve.append({"step": step, **{name: found[name] for name in names}})


def _forced(place: Path, trainer: Trainer, wanted: Wanted) -> TrainState:
    """The state in which the forced part ended; the price is the variant's own."""
    new = trainer.new_state(initialise(wanted.setting.adaptive(), wanted.seed))
    there = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), new._asdict())
    found = checkpoint.load(place, {name: part for name, part in there.items() if name != "price"})
    return TrainState(**jax.tree.map(jnp.array, found), price=new.price)


def units(study: FreedStudy) -> list[list[Wanted]]:
    """The forced parts, and then everything that goes on from them."""
    return [[Wanted(study, seed, FORCED) for seed in study.seeds],
            [Wanted(study, seed, variant) for seed in study.seeds for variant in study.variants]]  # fmt: skip
