"""The units of the study, in the order in which they need each other: rates, then all seeds, then the measuring."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from experiments.exit_study.study import ExitStudy, Model
from experiments.units import Unit, Units
from experiments.workers import Workers
from gt_jax.errors import Failed


def make(units: Units, study: ExitStudy, argument: tuple[str, ...]) -> Unit:
    """A unit: ("train", source, seed, model, rate) or ("measure", source, seed, {model: rate})."""
    from experiments.exit_study.measure import measured
    from experiments.exit_study.train import trained

    what, source, seed, *rest = argument
    if what == "train":
        model, rate = rest
        place = units.path(training(source, seed, model, rate), ".npz")  # type: ignore[arg-type]
        return trained(study, place, source, seed, model, rate)  # type: ignore[arg-type]
    rates: dict[str, float] = rest[0]  # type: ignore[assignment]
    weights = {model.name: units.path(training(source, seed, model, rates[model.name]), ".npz")  # type: ignore[arg-type]
               for model in study.models if model.name in rates}  # fmt: skip
    return measured(study, source, seed, weights, rates)  # type: ignore[arg-type]


def _rates(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def training(source: str, seed: int, model: Model, rate: float) -> str:
    """The name of a training."""
    return f"{source}/seed{seed}/{model.name} at rate {rate:g}"


def everything(
    units: Units, study: ExitStudy, jobs: int, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All units, made or found: what was measured, one a source and seed, and what was tried to tune the rates.

    Tuning is {source: {model: {rate: tuning loss}}}, at the first seed. A model that diverged at a seed is not
    measured at that seed.
    """
    first, *others = study.seeds
    with Workers(units, functools.partial(make, units, study), jobs, say) as workers:

        def trainings(wanted: list[tuple[str, int, Model, float]]) -> list[dict[str, Any]]:
            named = {training(*one): ("train", *one) for one in wanted}
            return list(workers.all(named, alike=lambda name: named[name][3].name).values())

        tried = trainings([(source, first, model, rate) for source in study.sources for model in study.models
                           for rate in study.rates])  # fmt: skip
        tuning: dict[str, Any] = {source: {} for source in study.sources}
        for one in tried:
            tuning[one["source"]].setdefault(one["name"], {})[f"{one['rate']:g}"] = one["tuning_loss"]
        best = {source: {name: float(min(losses, key=losses.__getitem__)) for name, losses in of.items()}
                for source, of in tuning.items()}  # fmt: skip
        done = trainings([(source, seed, model, best[source][model.name]) for source in study.sources
                          for model in study.models for seed in others])  # fmt: skip
        kept = {(one["source"], one["seed"], one["name"]) for one in (*tried, *done)
                if one["diverged"] is None and one["rate"] == best[one["source"]][one["name"]]}  # fmt: skip
        dense = Model(study.layers).name
        lost = [f"{source}, seed {seed}" for source in study.sources for seed in study.seeds
                if (source, seed, dense) not in kept]  # fmt: skip
        if lost:
            raise Failed(f"{dense} diverged at {'; '.join(lost)}, at the best of its rates ({_rates(study.rates)}) by "
                         f"seed {first}: all others are compared with it")  # fmt: skip
        named: dict[str, Any] = {}
        for source in study.sources:
            for seed in study.seeds:
                rates = {name: rate for name, rate in best[source].items() if (source, seed, name) in kept}
                named[f"{source}/seed{seed}/measured"] = ("measure", source, seed, rates)
        measured = workers.all(named)
    return list(measured.values()), tuning
