"""Curves of the study: one column a setting, over all FLOPs above, over all tokens below."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pays_study.findings import is_task, select
from experiments.pays_study.study import GROWN, ON, ON_FORCED, SCRATCH, SHALLOW, SOURCE, STACKED
from gt_jax.monitoring.plots import COLOURS, new_figure, save_png

Row = Mapping[str, Any]
Curve = tuple[np.ndarray, np.ndarray]


def draw(stored: Mapping[str, Any], path: Path) -> None:
    """Two rows of panels of a stored file, PNG; the same figures give the same bytes.

    Bands: from the least to the largest seed.
    """
    rows = stored["rows"]
    names = sorted({row["task"] for row in rows})
    figure, _ = new_figure(6.4 * len(names), 9.6, "", (1.0, 1.0), columns=len(names))
    for place, name in enumerate(names):
        here = [row for row in rows if row["task"] == name]
        for line, over in enumerate(("flops", "tokens")):
            _panel(figure.axes[line * len(names) + place], here, name, over)
    figure.tight_layout()
    save_png(figure, path)


def _panel(axes: Any, rows: Sequence[Row], name: str, over: str) -> None:
    points, ons = (sorted({row["point"] for row in rows if row["kind"] in kinds})
                   for kinds in ((GROWN, STACKED), (ON,)))  # fmt: skip
    right = is_task(rows)
    unit = {"flops": 1e12, "tokens": 1e3}[over]
    shown: list[tuple[str, dict[int, Row], dict[str, Any]]] = [(SCRATCH, select(rows, SCRATCH), {})]
    shown += [(SHALLOW, found, {})] if (found := select(rows, SHALLOW)) else []
    shown += [(f"{STACKED} at {point:g}", found, {}) for point in points if (found := select(rows, STACKED, point))]
    shown += [(f"{SOURCE} to {point:g}", found, {"linestyle": ":"}) for point in points
              if (found := select(rows, SOURCE, point))]  # fmt: skip
    shown += [(f"{ON} from {point:g}", select(rows, ON, point), {}) for point in ons[-1:]]
    shown += [(ON_FORCED, found, {"linestyle": "--"})] if (found := select(rows, ON_FORCED, points[-1])) else []
    shown += [(f"grown at {point:g}", found, {"linewidth": 2.2}) for point in points
              if (found := select(rows, GROWN, point))]  # fmt: skip
    keys: dict[str, None] = {}
    for label, of, _ in shown:
        keys.setdefault(_hue(label, next(iter(of.values()))))
    colours = dict(zip(keys, itertools.cycle(COLOURS)))
    for label, of, look in shown:
        key = _hue(label, next(iter(of.values())))
        curves = [curve(row, over, right) for row in of.values() if row["diverged"] is None]
        if not curves:
            continue
        count = min(len(x) for x, _ in curves)
        x = np.mean([one[0][:count] for one in curves], axis=0) / unit
        y = np.array([one[1][:count] for one in curves])
        axes.plot(x, y.mean(axis=0), color=colours[key], label=label, marker="o", markersize=2.5,
                  **{"linewidth": 1.5, **look})  # fmt: skip
        axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=colours[key], alpha=0.12, linewidth=0)
    if not right:
        axes.set_yscale("log")
    axes.set_title(f"{name}, over all {'FLOPs' if over == 'flops' else 'tokens'}", loc="left", fontweight="bold")
    axes.set_xlabel("FLOPs, 1e12" if over == "flops" else "thousand tokens")
    axes.set_ylabel("right answers, %" if right else "held-out loss, nats a token")
    axes.legend(frameon=False, fontsize=8)


def _hue(label: str, row: Row) -> str:
    """What has one colour: a source and what is grown from it, the source trained on with its passes free or forced."""
    kind = row["kind"]
    if kind in (ON, ON_FORCED):
        return ON
    return str(row["point"]) if kind in (SOURCE, GROWN) else label


def curve(row: Row, over: str, right: bool) -> Curve:
    """(FLOPs or tokens, right answers in percent or loss) of a row, all that led to it counted."""
    x = np.array([one[over] for one in row["curve"]], np.float64)
    y = [100 * one["accuracy_all"] if right else one["nats"] for one in row["curve"]]
    return x, np.array(y, np.float64)
