"""What the rows of the study say: means over seeds by task and model, and the claims beside their bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.depth_study.study import ADAPTIVE, MEAN, MODELS, MOST, SHALLOW
from experiments.growth_study.inference import mean

Row = Mapping[str, Any]
FIGURES = {
    "spearman": "Spearman's correlation of a token's passes with its difficulty",
    "one pass forced costs": "what one pass forced costs on the hardest third, points",
    "above the shallow": "the adaptive model above the plain shallow one on the hardest third, points",
    "against mean depth": "the adaptive model less a plain one of its mean depth, all answers, points",
    "against most depth": "the adaptive model less a plain one of its most depth, all answers, points",
}  # fmt: skip
BOUNDS = {"spearman": 0.7, "one pass forced costs": 30.0, "above the shallow": 30.0, "against mean depth": -2.0}
"""What each was asked to be at least."""


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """By task: `models` (means over seeds), `figures` (the claims) and `met`, each claim against its bound."""
    return {task: _of_task([row for row in rows if row["task"] == task]) for task in sorted({r["task"] for r in rows})}


def _of_task(rows: Sequence[Row]) -> dict[str, Any]:
    by_model = {model: sorted((row for row in rows if row["model"] == model), key=lambda row: row["seed"])
                for model in MODELS}  # fmt: skip
    mine = by_model[ADAPTIVE]

    def paired(figure: Callable[[Row, Row], float], model: str) -> list[float]:
        return [figure(a, b) for a, b in zip(mine, by_model[model], strict=True)]

    def above(key: str) -> Callable[[Row, Row], float]:
        return lambda a, b: 100 * (a[key] - b[key])

    figures = {
        "spearman": mean([row["spearman"] or 0.0 for row in mine]),  # none where all tokens run as many passes
        "one pass forced costs": mean([100 * (row["accuracy_hardest"] - row["forced"]["1"]["accuracy_hardest"])
                                       for row in mine]),
        "above the shallow": mean(paired(above("accuracy_hardest"), SHALLOW)),
        "against mean depth": mean(paired(above("accuracy_all"), MEAN)),
        "against most depth": mean(paired(above("accuracy_all"), MOST)),
    }  # fmt: skip
    return {"models": {model: _of_model(rows) for model, rows in by_model.items()}, "figures": figures,
            "met": {name: bool(figures[name]["mean"] >= bound) for name, bound in BOUNDS.items()}}  # fmt: skip


def _of_model(rows: Sequence[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {"layers": rows[0]["layers"], "rate": rows[0]["rate"], "seeds": len(rows)}
    for key in ("accuracy", "passes"):
        found[key] = by_difficulty([row[key] for row in rows])
    for key in ("accuracy_all", "accuracy_hardest", "nats", "microseconds_a_token", "seconds"):
        found[key] = mean([row[key] for row in rows])
    counts = rows[0]["accuracy_forced"]
    found["accuracy_forced"] = {k: by_difficulty([row["accuracy_forced"][k] for row in rows]) for k in counts}
    found["cuts"] = [{"layer": one["layer"], "type": one["type"],
                      "passes_run": mean([row["cuts"][i]["passes_run"] for row in rows]),
                      "k_exec": [row["cuts"][i]["k_exec"] for row in rows],
                      "cost": mean([100 * row["cuts"][i]["cost"]["value"] for row in rows])}
                     for i, one in enumerate(rows[0]["cuts"])]  # fmt: skip
    return found


def by_difficulty(figures: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means over seeds of figures by difficulty."""
    return {key: mean([one[key] for one in figures]) for key in figures[0]}
