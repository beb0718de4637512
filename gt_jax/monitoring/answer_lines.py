"""A stored `evaluation.answer_table` as lines for a reader: right answers by difficulty, and what fewer passes cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gt_jax.monitoring.metrics import table


def answer_lines(found: Mapping[str, Any]) -> list[str]:
    """Accuracies in percent and costs in points, limits in brackets; passes are means over layers."""
    limits, forced = found["intervals"], found["accuracy_forced"]
    lines = [f"{found['answers']:,} answers of {found['instances']:,} instances, over which the "
             f"{100 * found['confidence']:g} % intervals are"]  # fmt: skip
    headers = ["difficulty", "right, %", *(f"forced {count}" for count in forced), "passes a layer"]
    rows = [[difficulty, _percent(value, limits["accuracy"][difficulty]),
             *(_percent(of[difficulty]) for of in forced.values()),
             _shown(found["passes"][difficulty], limits["passes"][difficulty], "{:.2f}")]
            for difficulty, value in found["accuracy"].items()]  # fmt: skip
    for name, key in (("all", "accuracy_all"), ("hardest", "accuracy_hardest")):
        rows.append([name, _percent(found[key], limits[key]), *(_percent(one[key]) for one in found["forced"].values()),
                     None])  # fmt: skip
    lines += [table(rows, headers), f"hardest: difficulty {', '.join(map(str, found['hardest']))}", _spearman(found)]
    for count, one in found["forced"].items():
        lines.append(f"{count} pass{'es' * (count != '1')} forced: {_costs(one)}")
    return lines + (_cut_lines(found["cuts"]) if found["cuts"] else [])


def gain_line(gain: Mapping[str, Any]) -> str:
    """By how much more of the answers is right than by another model: all, and the hardest third."""
    return (f"{_points(gain['accuracy_all'])} points more answers right, {_points(gain['accuracy_hardest'])} of the "
            "hardest")  # fmt: skip


def _spearman(found: Mapping[str, Any]) -> str:
    if found["spearman"] is None:
        return "Spearman's correlation of passes and difficulty: none, one of them is the same for all answers"
    shown = _shown(found["spearman"], found["intervals"]["spearman"], "{:.3f}")
    return f"Spearman's correlation of passes and difficulty: {shown}"


def _cut_lines(cuts: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [[f"{one['type']}{one['layer']}", one["k_exec"], f"{one['passes_run']:.2f}", _percent(one["accuracy_all"]),
             _points(one["cost"]), _points(one["cost_hardest"])] for one in cuts]  # fmt: skip
    return ["", "one layer run once, the others as they choose:",
            table(rows, ["layer", "k_exec", "passes_run", "right, %", "cost, points", "cost, hardest"])]  # fmt: skip


def _costs(one: Mapping[str, Any]) -> str:
    return f"costs {_points(one['cost'])} points, {_points(one['cost_hardest'])} of the hardest"


def _points(cost: Mapping[str, Any]) -> str:
    value, low, high = (None if cost[name] is None else round(100 * cost[name], 1) + 0.0  # which makes -0.0 a 0.0
                        for name in ("value", "low", "high"))  # fmt: skip
    return _shown(value or 0.0, [low, high], "{:+.1f}")


def _percent(share: float, limits: Sequence[float | None] | None = None) -> str:
    known = None if limits is None else [100 * limit for limit in limits if limit is not None]
    return _shown(100 * share, known or None, "{:.1f}")


def _shown(value: float, limits: Sequence[float | None] | None, form: str) -> str:
    there = [limit for limit in limits or () if limit is not None]
    shown = [form.format(number) for number in (value, *there)]
    return shown[0] + (f" ({shown[1]} to {shown[2]})" if len(shown) == 3 else "")
