"""What the rows of the recall studies say: means over seeds, paired differences, and whether the answer follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.growth_study.inference import mean
from experiments.recall_study.machine import MODELS, NEGATIVE, NOISY, PARITY, RECALL
from experiments.recall_study.states import INTACT, SWAPPED
from experiments.recall_study.study import MIXED, TEXT

Row = Mapping[str, Any]
FOLLOWS_BOUND = 80.0
"""Of 100 answers so many were asked to follow the swapped state, in a hybrid that is trained on recall."""


def arms_summary(rows: Sequence[Row]) -> dict[str, Any]:
    """By arm: bits per byte and its cost against text alone, right answers, and the state test, means over seeds."""
    by: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["model"], row["seed"])):
        by.setdefault(row["model"], []).append(row)
    return {name: _arm(each, by) for name, each in by.items()}


def _arm(rows: Sequence[Row], by: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    first = rows[0]
    plain = [each for each in by.values() if each[0]["task"] == TEXT
             and all(each[0][name] == first[name] for name in ("layout", "drop", "window"))]  # fmt: skip
    stages = {stage: {place: mean([100 * row["accuracy"][stage][place] for row in rows]) for place in places}
              for stage, places in first["accuracy"].items()}  # fmt: skip
    state = {cut: {mode: {what: mean([100 * row["state"][cut][mode][what]["value"] for row in rows])
                          for what in ("stays", "follows", "costs")} for mode in modes}
             for cut, modes in first["state"].items()}  # fmt: skip
    found = {"training": first["task"], "layout": first["layout"], "drop": first["drop"], "rate": first["rate"],
             "steps": first["steps"], "seeds": len(rows), "bits_per_byte": mean([row["bits_per_byte"] for row in rows]),
             "accuracy": stages, "state": state}  # fmt: skip
    if "parameters" in first:
        found["parameters"] = first["parameters"]
    if plain and first["task"] == MIXED:  # of needles alone it would say what no text at all costs
        found["costs_in_text"] = mean([row["bits_per_byte"] - other["bits_per_byte"]
                                       for row, other in zip(rows, plain[0], strict=True)])  # fmt: skip
    return found


def right_at(arm: Mapping[str, Any]) -> float:
    """Right answers of 100 at the hardest stage with the intact cache, cut at the question."""
    return float(arm["state"]["question"][INTACT]["stays"]["mean"])


def follows_at(arm: Mapping[str, Any], cut: str = "question") -> float:
    """Answers of 100 that follow the swapped state."""
    return float(arm["state"][cut][SWAPPED]["follows"]["mean"])


def machine_summary(rows: Sequence[Row]) -> dict[str, Any]:
    """`models`: right answers of 100 by task and model; `known`: the known outcomes and whether each came out."""
    tasks = sorted({row["task"] for row in rows})
    right = {task: {model: mean([100 * row["accuracy"] for row in rows if (row["task"], row["model"]) == (task, model)])
                    for model in MODELS} for task in tasks}  # fmt: skip
    known: dict[str, bool] = {}
    for task in (task for task in (RECALL, NOISY) if task in right):
        known |= {f"{model} solves {task} (90 of 100)": right[task][model]["mean"] >= 90 for model in ("D", "G", "A")}
    if PARITY in right:
        known["D guesses parity (below 60 of 100)"] = right[PARITY]["D"]["mean"] < 60
        known["D with beta to 2 does not (90 of 100)"] = right[PARITY][NEGATIVE]["mean"] >= 90
    return {"models": right, "known": known}
