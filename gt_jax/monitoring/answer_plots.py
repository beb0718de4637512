"""The picture of accuracy and passes by difficulty: what more passes are good for, and who gets them."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gt_jax.monitoring.canvas import own_settings, plain_text
from gt_jax.monitoring.plots import COLOURS, new_figure, save_png

Curve = Mapping[int, tuple[float, float | None, float | None]]
"""By difficulty: a figure and its limits, None where there are none."""


class Panel(NamedTuple):
    """A row of the picture: curves of right answers, in shares, beside curves of passes a layer."""

    title: str
    accuracy: Mapping[str, Curve]
    passes: Mapping[str, Curve]


def panel_of(table: Mapping[str, Any], title: str) -> Panel:
    """The panel of a stored `evaluation.answer_table`: accuracy free and with passes forced, and passes."""
    limits = table["intervals"]
    free = "free passes" if table["forced"] else "accuracy"
    accuracy = {free: _curve(table["accuracy"], limits["accuracy"])}
    for count, values in table["accuracy_forced"].items():
        accuracy[f"{count} pass{'es' * (count != '1')} forced"] = _curve(values, limits["accuracy_forced"][count])
    rho = table["spearman"]
    said = title if rho is None else f"{title}, Spearman {rho:.2f}"
    return Panel(said, accuracy, {free: _curve(table["passes"], limits["passes"])})


def _curve(values: Mapping[str, Any], limits: Mapping[str, Any]) -> Curve:
    found = {}
    for difficulty, value in values.items():
        low, high = limits[difficulty]
        found[int(difficulty)] = (float(value), low, high)
    return found


@own_settings()
def plot_by_difficulty(panels: Sequence[Panel], path: str | os.PathLike[str] | io.BytesIO) -> None:
    """Over difficulty: right answers in percent, and mean passes a layer, one row a panel; bars are the limits.

    A name has the same colour in both. Raises ValueError where a panel has no point.
    """
    for panel in panels:
        if not any(panel.accuracy.values()):
            raise ValueError(f"{panel.title}: no curve has a point; curves are {', '.join(panel.accuracy) or 'none'}")
    if not panels:
        raise ValueError("there is no panel to draw")
    figure, _ = new_figure(11.0, 4.3 * len(panels), "", (1.0,) * len(panels), columns=2)
    for row, panel in enumerate(panels):
        _draw_panel(panel, *figure.axes[2 * row : 2 * row + 2])
    figure.tight_layout()
    save_png(figure, path)


def _draw_panel(panel: Panel, left: Any, right: Any) -> None:
    names = list(dict.fromkeys([*panel.accuracy, *panel.passes]))
    looks = {name: {"color": COLOURS[n % len(COLOURS)], "linewidth": 2.4 if n == 0 else 1.5,
                    "linestyle": "-" if n < len(COLOURS) else "--", "zorder": 4 if n == 0 else 3}
             for n, name in enumerate(names)}  # fmt: skip
    for axes, curves, scale in ((left, panel.accuracy, 100.0), (right, panel.passes, 1.0)):
        shown = [name for name in curves if curves[name]]
        for place, name in enumerate(shown):
            # a little beside each other, so that limits can be told apart
            _draw(axes, curves[name], scale, 0.05 * (place - (len(shown) - 1) / 2), name, looks[name])
        axes.set_xticks(sorted({difficulty for curve in curves.values() for difficulty in curve}))
        axes.set_xlabel("difficulty")
    left.set_title(plain_text(panel.title), loc="left", fontsize=12, fontweight="bold", pad=10)
    left.set_ylim(-3, 103)
    left.set_ylabel("right answers, %")
    right.set_ylabel("passes a layer")
    right.set_ylim(bottom=0.0)
    left.legend(loc="upper left", bbox_to_anchor=(0.0, -0.15), ncols=3, frameon=False, fontsize=9)


def _draw(axes: Any, curve: Curve, scale: float, shift: float, name: str, look: Mapping[str, Any]) -> None:
    points = [(difficulty + shift, *curve[difficulty]) for difficulty in sorted(curve)]
    points = [point for point in points if math.isfinite(point[1])]
    axes.plot([x for x, *_ in points], [scale * y for _, y, *_ in points], marker="o", markersize=4,
              label=plain_text(name), **look)
    for x, _, low, high in points:
        if low is not None and high is not None:
            axes.plot([x, x], [scale * float(low), scale * float(high)], color=look["color"], linewidth=0.9, alpha=0.55,
                      zorder=2)  # fmt: skip
