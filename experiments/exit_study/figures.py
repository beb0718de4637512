"""From what was measured to rows and figures: who is faster at equal loss, by seed, with intervals over seeds.

    time      seconds over those of the dense model of all layers, the median over rounds of the ratio in each round
    curve     the least time in which some dense model, or one between two neighbours, has a loss; by seed
    equal     curve(loss of the exit model) / time of the exit model: above 1 the exit model is faster at equal loss
    cut       dense model of the mean depth: loss and time between the two dense models beside `layers_used`

A loss below all of the curve's makes `equal` a lower bound (">"), one above all an upper bound ("<").
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import contract
from experiments.exit_study.study import ExitStudy
from experiments.growth_study.inference import Interval, interval

MODES = ("decoding", "prefill")
Row = Mapping[str, Any]


def rows_of(measured: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a task, model and seed, as the stored file has them; times are medians over rounds."""
    rows = []
    for unit in measured:
        dense = max((row for row in unit["models"] if row["ponder"] is None), key=lambda row: row["layers"])
        for one in unit["models"]:
            row = {"task": unit["source"], "model": one["name"], "seed": unit["seed"]}
            row |= {key: one[key] for key in ("layers", "ponder", "threshold", "own", "rate", "loss", "tuning_loss",
                                              "layers_used", "layers_used_decoding")}  # fmt: skip
            row |= {name: one.get(name, empty) for name, empty in contract.ANSWERS.items()}
            for mode in MODES:
                times, reference = (np.array(each[f"seconds_{mode}"]) for each in (one, dense))
                row[f"seconds_{mode}"] = float(np.median(times))
                row[f"tokens_a_second_{mode}"] = unit["tokens"][mode] / float(np.median(times))
                row[f"time_{mode}"] = float(np.median(times / reference))
            rows.append(row)
    return rows


class Equal(NamedTuple):
    """A ratio of times at equal loss, by seed, and whether it is the ratio itself, at least (">") or at most ("<")."""

    ratios: tuple[float, ...]
    bound: str

    @property
    def interval(self) -> Interval:
        """Over seeds."""
        return interval(self.ratios)

    @property
    def sign(self) -> int:
        """1 where the exit model is faster, -1 where the dense one is, as far as interval and bound can say; else 0."""
        sign = interval([ratio - 1 for ratio in self.ratios]).sign
        return 0 if (sign > 0 and "<" in self.bound) or (sign < 0 and ">" in self.bound) else sign


def curve(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (time, loss) the points that no faster one beats, by time: the losses fall."""
    kept: list[tuple[float, float]] = []
    for time, loss in sorted(points):
        if not kept or loss < kept[-1][1]:
            kept.append((time, loss))
    return kept


def time_at(points: Sequence[tuple[float, float]], loss: float) -> tuple[float, str]:
    """The time at which the curve has this loss, linear between its points; beyond its ends the end, and the bound."""
    kept = curve(points)
    if loss >= kept[0][1]:
        return kept[0][0], "<" if loss > kept[0][1] else ""
    for (time, higher), (later, lower) in itertools.pairwise(kept):
        if loss >= lower:
            return time + (later - time) * (higher - loss) / (higher - lower), ""
    return kept[-1][0], ">"


def equal(dense: Sequence[Sequence[Row]], mine: Sequence[Row], mode: str, loss: str = "loss") -> Equal:
    """`dense` are the dense models of each seed, `mine` the exit model's row of each."""
    found = [time_at([(row[f"time_{mode}"], row[loss]) for row in models], one[loss])
             for models, one in zip(dense, mine, strict=True)]  # fmt: skip
    bounds = {bound for _, bound in found if bound}
    ratios = tuple(time / one[f"time_{mode}"] for (time, _), one in zip(found, mine, strict=True))
    return Equal(ratios, bounds.pop() if len(bounds) == 1 else "<>" if bounds else "")


def cut(dense: Sequence[Row], mine: Row, key: str) -> float:
    """A figure of the dense model of the mean depth, linear between the trained depths."""
    by_depth = sorted((row["layers"], row[key]) for row in dense)
    depths, values = zip(*by_depth, strict=True)
    return float(np.interp(mine["layers_used"], depths, values))


def summary(study: ExitStudy, rows: Sequence[Row], tuning: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of every source; "dropped" are models that were not measured at every seed."""
    found: dict[str, Any] = {}
    for task in study.sources:
        mine = [row for row in rows if row["task"] == task]
        by_model: dict[str, list[Row]] = {}
        for row in mine:
            by_model.setdefault(row["model"], []).append(row)
        whole = {name: sorted(of, key=lambda row: row["seed"]) for name, of in by_model.items()
                 if {row["seed"] for row in of} == set(study.seeds)}  # fmt: skip
        wanted = {model.at(at) for model in study.models for at in study.measured_at(model)}
        found[task] = {**_of_task(study, whole), "dropped": sorted(wanted - set(whole)), "tuning": tuning[task]}
    return found


def _of_task(study: ExitStudy, models: Mapping[str, list[Row]]) -> dict[str, Any]:
    dense = {name: of for name, of in models.items() if of[0]["ponder"] is None}
    full = next(of for of in dense.values() if of[0]["layers"] == study.layers)
    by_seed = [[of[index] for of in dense.values()] for index in range(len(study.seeds))]
    figures = {name: _figures(of, full) for name, of in models.items()}
    for name, of in models.items():
        if of[0]["ponder"] is not None:
            figures[name] |= _against_cuts(by_seed, of)
    exits = {name: of for name, of in models.items() if name not in dense}
    return {
        "models": figures,
        "chosen": {mode: _chosen(study, exits, full, by_seed, mode) for mode in MODES} if exits else {},
        "own": _own(study, models),
    }


def _figures(mine: Sequence[Row], full: Sequence[Row]) -> dict[str, Any]:
    """Of one model, over seeds: its own figures, and against the dense model of all layers."""
    first = mine[0]
    found: dict[str, Any] = {key: first[key] for key in ("layers", "ponder", "threshold", "own", "rate")}
    found |= {key: _over([row[key] for row in mine]) for key in ("loss", "tuning_loss", "layers_used",
                                                                "layers_used_decoding")}  # fmt: skip
    pairs = list(zip(mine, full, strict=True))
    found["loss_minus_dense"] = _over([a["loss"] - b["loss"] for a, b in pairs])
    for mode in MODES:
        found[f"tokens_a_second_{mode}"] = _over([row[f"tokens_a_second_{mode}"] for row in mine])
        found[f"speed_{mode}"] = _over([1 / row[f"time_{mode}"] for row in mine])
    if first["accuracy"]:
        found["accuracy"] = _over([float(np.mean(list(row["accuracy"].values()))) for row in mine])
        ranks = [row["spearman"] for row in mine]
        found["spearman"] = None if None in ranks else _over(ranks)
    return found


def _against_cuts(dense: Sequence[Sequence[Row]], mine: Sequence[Row]) -> dict[str, Any]:
    """Of an exit model: the ratio of times at equal loss, and against the dense model of its mean depth."""
    pairs = list(zip(dense, mine, strict=True))
    found: dict[str, Any] = {"loss_minus_cut": _over([one["loss"] - cut(of, one, "loss") for of, one in pairs])}
    for mode in MODES:
        ratio = equal(dense, mine, mode)
        found[f"equal_{mode}"] = {**_over(ratio.ratios), "bound": ratio.bound, "sign": ratio.sign}
        found[f"speed_against_cut_{mode}"] = _over([cut(of, one, f"time_{mode}") / one[f"time_{mode}"]
                                                    for of, one in pairs])  # fmt: skip
    return found


def _chosen(study: ExitStudy, exits: Mapping[str, list[Row]], full: Sequence[Row], dense: Sequence[Sequence[Row]],
            mode: str) -> dict[str, Any]:  # fmt: skip
    """The pairs that the tuning part chooses: the fastest as good as the dense model, the best along the curve."""
    level = float(np.mean([row["tuning_loss"] for row in full])) * (1 + study.equal)
    losses = {name: float(np.mean([row["tuning_loss"] for row in of])) for name, of in exits.items()}
    times = {name: float(np.mean([row[f"time_{mode}"] for row in of])) for name, of in exits.items()}
    good = [name for name, loss in losses.items() if loss <= level]
    ratios = {name: equal(dense, of, mode, "tuning_loss").interval.mean for name, of in exits.items()}
    return {"as_good": len(good), "of": len(exits), "fastest": min(good, key=times.__getitem__) if good else None,
            "nearest": min(losses, key=losses.__getitem__),
            "curve": max(ratios, key=ratios.__getitem__)}  # fmt: skip


def _own(study: ExitStudy, models: Mapping[str, list[Row]]) -> list[dict[str, Any]]:
    """Models trained at the threshold that they are measured at, minus those that were trained at the common one."""
    found = []
    for model in study.models:
        if not model.own or model.threshold not in study.thresholds or model.ponder not in study.ponders:
            continue
        other = f"{model._replace(threshold=study.threshold, own=False).name}, threshold {model.threshold:g}"
        if model.name in models and other in models:
            pairs = list(zip(models[model.name], models[other], strict=True))
            minus = {key: _over([a[key] - b[key] for a, b in pairs]) for key in ("loss", "layers_used")}
            found.append({"model": model.name, "other": other, **minus})
    return found


def _over(values: Sequence[float]) -> dict[str, Any]:
    """An interval over seeds, as JSON."""
    return interval(values)._asdict()

