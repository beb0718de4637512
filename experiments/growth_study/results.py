"""From the units of all seeds to the three results: figures with their spread, tables, and what they say.

Spread is over seeds: smallest .. largest. Seeds share nothing but the text; operators of one seed share source, batches
and held-out text, so that operators are compared by their differences seed by seed.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.growth_study.engine import Losses
from experiments.growth_study.operators import OPERATORS
from experiments.growth_study.run import CONTROLS, SCRATCH_TOKENS
from experiments.growth_study.store import check_same
from experiments.growth_study.study import StudyConfig
from gt_jax.errors import Refused

NAME = "growth_operators"
Units = Mapping[int, Mapping[str, Any]]


class About(NamedTuple):
    """Where the figures come from."""

    study: StudyConfig
    content: str
    command: tuple[str, ...]
    seconds: float


class Spread(NamedTuple):
    """Of one figure over seeds; `reached` of `seeds` have it (others never got there)."""

    mean: float
    low: float
    high: float
    sd: float
    reached: int
    seeds: int

    def text(self, pattern: str = "{:.4f}") -> str:
        """`mean (low .. high)`, with the count of seeds where not all have it."""
        if not self.reached:
            return "never"
        parts = [pattern.format(value) for value in (self.mean, self.low, self.high)]
        whole = parts[0] if self.seeds == 1 else f"{parts[0]} ({parts[1]} .. {parts[2]})"
        return whole if self.reached == self.seeds else f"{whole}, {self.reached} of {self.seeds} seeds"


def spread(values: Sequence[float | None]) -> Spread:
    """Mean, smallest, largest and standard deviation of the values that are there."""
    there = [value for value in values if value is not None]
    if not there:
        return Spread(0.0, 0.0, 0.0, 0.0, 0, len(values))
    sd = statistics.stdev(there) if len(there) > 1 else 0.0
    return Spread(statistics.fmean(there), min(there), max(there), sd, len(there), len(values))


def paired_error(one: Losses, other: Losses) -> float:
    """Standard error, nats a byte, of the difference of two mean losses on the same batches."""
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
    """For every operator and control: each figure by seed. Gaps in %, tokens in thousands, FLOPs in 1e12."""
    thousand = study.tokens_per_step / 1e3
    total = (study.source_steps + study.further_steps) * thousand
    found: dict[str, dict[str, Any]] = {}
    for name in (*(one.name for one in OPERATORS), *CONTROLS):
        rows: dict[str, list[Any]] = {}
        for one in units.values():
            source, unit = one["source"], one[name]
            scratch = one[SCRATCH_TOKENS]["final"]
            row: dict[str, Any] = {"final": unit["final"], "seconds": unit["seconds"] + unit.get("seconds_growth", 0.0)}
            row["flops"] = (unit["flops"] + unit.get("flops_growth", 0.0)) / 1e12
            if not name.startswith("from scratch"):
                first = Losses(**unit["losses"]["0"])
                row["flops"] += source["flops"] / 1e12
                row["gap"] = 100 * (first.mean / source["loss"] - 1)
                row["gap_error"] = 100 * paired_error(first, Losses(**source["adaptive"])) / source["loss"]
                back, there = reached(unit, source["loss"]), reached(unit, scratch)
                row["back"] = None if back is None else back * thousand
                row["there"] = None if there is None else there * thousand
                row["share"] = None if there is None else there * thousand / total
                row["share_all"] = None if there is None else (there + study.source_steps) * thousand / total
            for key, value in row.items():
                rows.setdefault(key, []).append(value)
        about = next(iter(units.values()))[name]
        layers = [one[name]["layers"] for one in units.values()]
        found[name] = {"layers": layers, "parameters": about["parameters"], "seeds": rows,
                       "diverged": [bool(one[name]["diverged"]) for one in units.values()]}  # fmt: skip
    for one in found.values():
        one["spread"] = {key: spread(values)._asdict() for key, values in one["seeds"].items()}
    return found


def of(found: Mapping[str, Any], name: str, key: str) -> Spread:
    """One figure of one contender."""
    return Spread(**found[name]["spread"][key])


def paired(found: Mapping[str, Any], name: str, other: str, key: str = "final") -> Spread:
    """name - other, seed by seed."""
    mine, theirs = found[name]["seeds"][key], found[other]["seeds"][key]
    return spread([a - b for a, b in zip(mine, theirs, strict=True)])


def best(found: Mapping[str, Any], key: str, names: Sequence[str], by: Callable[[float], float] = float) -> str:
    """The name with the smallest mean of a figure (of `by` of it)."""
    return min(names, key=lambda name: by(of(found, name, key).mean))


def check_output(output: Path, study: StudyConfig, content: str) -> None:
    """Refuse an --output that holds another study's results, before any work is done."""
    file = output / f"{NAME}.json"
    if file.exists():
        check_same(file, {"config": named(study).to_json(), "content": content}, named(study))
    if output.exists() and not output.is_dir():
        raise Refused(f"--output {output} is a file; name a folder")


def named(study: StudyConfig) -> StudyConfig:
    """The study with its files by name: results say nothing of the machine's folders."""
    return study.replace(text=tuple(Path(name).name for name in study.text))
