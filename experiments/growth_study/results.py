"""From the units of all seeds to figures: each by seed, with its interval (inference.py says what it means).

Seeds share nothing but the text; operators of one seed share source, batches and held-out text, so that operators are
compared by their differences seed by seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import contract
from experiments.growth_study.engine import Losses
from experiments.growth_study.flops import measuring_flops
from experiments.growth_study.inference import Interval, Times, interval
from experiments.growth_study.operators import DEALT, OPERATORS
from experiments.growth_study.run import CONTROLS, LONGER, SCRATCH_TOKENS
from experiments.growth_study.study import StudyConfig

NAME = "growth_operators"
TIMES = ("back", "there")
Units = Mapping[int, Mapping[str, Any]]


class About(NamedTuple):
    """Where the figures come from."""

    study: StudyConfig
    content: str
    command: tuple[str, ...]
    seconds: float


def paired_error(one: Losses, other: Losses) -> float:
    """Standard error, nats a byte, of the difference of two mean losses on the same batches, taken as independent."""
    difference = (np.array(one.sums) - np.array(other.sums)) / np.maximum(np.array(one.counts), 1.0)
    return float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else 0.0


def reached(unit: Mapping[str, Any], level: float) -> float | None:
    """Steps until the held-out loss is at most `level`, linear between the points where it was taken; None: never."""
    points = sorted((int(step), Losses(**one).mean) for step, one in unit["losses"].items())
    if points[0][1] <= level:
        return float(points[0][0])
    for (step, loss), (later, lower) in itertools.pairwise(points):
        if lower <= level:
            return step + (later - step) * (loss - level) / (loss - lower)
    return None


def figures(study: StudyConfig, units: Units) -> dict[str, dict[str, Any]]:
    """For every operator and control: each figure by seed. Gaps in %, tokens in thousands, FLOPs in 1e12.

    "flops" is all that led to the model: the source's training, `growth_flops` (measuring and calibrating), and the
    training after it. "back" and "there" are times, None where the run ended, after "trained_on", before them; where
    a model from scratch diverged there is no "there".
    """
    thousand = study.tokens_per_step / 1e3
    grown = {one.name: one for one in OPERATORS}
    missing = any(one[SCRATCH_TOKENS]["diverged"] for one in units.values())  # then it has no final loss to reach
    found: dict[str, dict[str, Any]] = {}
    for name in (*grown, *CONTROLS):
        rows: dict[str, list[Any]] = {}
        for one in units.values():
            source, unit = one["source"], one[name]
            growth = growth_flops(study, source, unit, name) / 1e12
            row: dict[str, Any] = {"final": unit["final"], "seconds": unit["seconds"] + unit.get("seconds_growth", 0.0)}
            row["flops"], row["growth"] = unit["flops"] / 1e12 + growth, growth
            row["trained_on"] = unit["steps"] * thousand
            if not name.startswith("from scratch"):
                first = Losses(**unit["losses"]["0"])
                row["flops"] += source["flops"] / 1e12
                row["gap"] = 100 * (first.mean / source["loss"] - 1)
                row["gap_error"] = 100 * paired_error(first, Losses(**source["adaptive"])) / source["loss"]
                levels = {"back": source["loss"]}
                if not missing:
                    levels["there"] = one[SCRATCH_TOKENS]["final"]
                for key, level in levels.items():
                    steps = reached(unit, level)
                    row[key] = None if steps is None else steps * thousand
            for key, value in row.items():
                rows.setdefault(key, []).append(value)
        found[name] = {
            "layers": [one[name]["layers"] for one in units.values()],
            "parameters": next(iter(units.values()))[name]["parameters"], "seeds": rows,
            "diverged": [bool(one[name]["diverged"]) for one in units.values()],
            "intervals": {key: interval(values)._asdict() for key, values in rows.items() if key not in TIMES},
            "medians": {key: Times(tuple(rows[key]), tuple(rows["trained_on"])).median for key in TIMES if key in rows},
        }  # fmt: skip
    return found


def growth_flops(study: StudyConfig, source: Mapping[str, Any], unit: Mapping[str, Any], name: str) -> float:
    """FLOPs of growing itself: reading the measuring text, where the operator needs counts, and calibration."""
    own = DEALT if name == LONGER else name
    operator = next((one for one in OPERATORS if one.name == own), None)
    if operator is None or operator.plan in ("once", "stack"):
        return 0.0
    return measuring_flops(study.source, study.sequence_length, source["adaptive"]["passes"],
                           study.measuring_batches * study.tokens_per_step) + float(unit["flops_growth"])  # fmt: skip


def of(found: Mapping[str, Any], name: str, key: str) -> Interval:
    """One figure of one contender, over seeds."""
    return Interval(**found[name]["intervals"][key])


def times(found: Mapping[str, Any], name: str, key: str) -> Times:
    """When a contender reached a loss, by seed, in thousand tokens after growth."""
    rows = found[name]["seeds"]
    return Times(tuple(rows[key]), tuple(rows["trained_on"]))


def paired(found: Mapping[str, Any], name: str, other: str, key: str = "final") -> Interval:
    """name - other, seed by seed."""
    mine, theirs = found[name]["seeds"][key], found[other]["seeds"][key]
    return interval([a - b for a, b in zip(mine, theirs, strict=True)])


def check_output(output: Path, study: StudyConfig, content: str) -> None:
    """Refuse an --output that holds another study's results, before any work is done."""
    contract.check_output(output, NAME, named(study), content)


def named(study: StudyConfig) -> StudyConfig:
    """The study with its files by name: results say nothing of the machine's folders."""
    return study.replace(text=tuple(Path(name).name for name in study.text))
