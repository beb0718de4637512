"""What the rows of the study say: every variant against plain, at equal steps and equal wall time, paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.growth_study.inference import mean
from experiments.lambda_study.study import LONGER, PLAIN, TIMES, VARIANTS

Row = Mapping[str, Any]


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """By variant: losses, the difference from plain at equal steps and at equal time, and the scalars it learned."""
    by = {name: sorted((row for row in rows if row["model"] == name and row["task"] != TIMES),
                       key=lambda row: row["seed"]) for name in (*VARIANTS, LONGER)}  # fmt: skip
    ratios = {row["model"]: row["ratios"] for row in rows if row["task"] == TIMES}
    milliseconds = {row["model"]: row["milliseconds"] for row in rows if row["task"] == TIMES}
    plain, longer = by[PLAIN], by[LONGER]
    found: dict[str, Any] = {}
    for name in VARIANTS:
        mine, ratio = by[name], statistics.median(ratios[name])
        at_once = [row["nats"] - other["nats"] for row, other in zip(mine, plain, strict=True)]
        read = [between(short, long, ratio) for short, long in zip(plain, longer, strict=True)]
        in_time = [row["nats"] - value for row, value in zip(mine, read, strict=True)]
        found[name] = {
            "rate": mine[0]["rate"], "nats": mean([row["nats"] for row in mine]), "ratio": ratio,
            "ratio_between": [min(ratios[name]), max(ratios[name])], "milliseconds": milliseconds[name],
            "at_equal_steps": mean(at_once), "at_equal_time": mean(in_time),
            **{what: [mean([row[what][layer] for row in mine]) for layer in range(len(mine[0][what]))]
               for what in ("a", "b", "skips", "contributions")},
        }  # fmt: skip
    return {"variants": found, "more_steps": mean([long["nats"] - short["nats"]
                                                   for short, long in zip(plain, longer, strict=True)])}  # fmt: skip


def between(short: Row, long: Row, ratio: float) -> float:
    """The plain loss after `ratio` times the steps of `short`: linear in log steps, on beyond those of `long`.

    A variant that is faster than plain, by what was measured, is compared with plain at its own steps.
    """
    share = math.log(max(ratio, 1.0)) / math.log(long["steps"] / short["steps"])
    return float(short["nats"] + share * (long["nats"] - short["nats"]))


def farthest(found: Mapping[str, Any], what: str) -> float:
    """How far a scalar of a variant moved from where plain has it, the farthest layer's mean."""
    start = 0.0 if what in ("b", "skips") else 1.0
    values = [one["mean"] - start for one in found[what]]
    return float(max(values, key=abs)) if values else 0.0


def smallest_told(found: Mapping[str, Any]) -> float | None:
    """Half the width of the widest interval at equal steps: an effect below it would not have been seen. None of one
    seed, which has no interval."""
    halves = [(one["at_equal_steps"]["high"] - one["at_equal_steps"]["low"]) / 2 for name, one in found.items()
              if name != PLAIN and one["at_equal_steps"]["low"] is not None]  # fmt: skip
    return float(np.max(halves)) if halves else None


