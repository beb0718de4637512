"""The curves of runs, side by side in one picture: loss, depth, price, gates, routers, updates, gradients.

A panel that no run has values for is left out: a plain model has no depth to show, a dense one no router. PNG, always
the same bytes, as in gt_jax.monitoring.plots.
"""

from __future__ import annotations

import io
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gt_jax.monitoring.canvas import own_settings, plain_text
from gt_jax.monitoring.plots import COLOURS, average, new_figure, save_png

Record = Mapping[str, Any]


class Panel(NamedTuple):
    """A panel of `plot_runs`: what of a record it draws (a number, or one a layer), smoothed or not."""

    label: str
    values: Callable[[Record], Any]
    log: bool = False
    smooth: bool = False
    dots: str | None = None


def _of_fair(pick: Callable[..., Any]) -> Callable[[Record], Any]:
    """The least or the largest share of an expert in each layer, times the number of experts."""
    def values(record: Record) -> Any:
        shares = record.get("experts")
        return None if not shares or not shares[0] else [pick(layer) * len(layer) for layer in shares]

    return values


_CURVES = (
    Panel("loss (nats a token), held out: dots", operator.methodcaller("get", "loss"), False, True, "held_out_loss"),
    Panel("gradient norm", operator.methodcaller("get", "gradient_norm"), True, True),
    Panel("mean weight of the passes, by layer", operator.methodcaller("get", "mean_weight")),
    Panel("passes run by a token, by layer", operator.methodcaller("get", "passes_run")),
    Panel("passes computed for the batch, by layer", operator.methodcaller("get", "passes_computed")),
    Panel("price of a pass", operator.methodcaller("get", "price")),
    Panel("continue gate p, first pass", operator.methodcaller("get", "gate_mean")),
    Panel("|dh|/|h|, first pass", operator.methodcaller("get", "delta_ratio"), True),
    Panel("|dh|/|h| times gain and strength, first pass", operator.methodcaller("get", "update_ratio"), True),
    Panel("layers used", operator.methodcaller("get", "layers_used"), False, True),
    Panel("router entropy", operator.methodcaller("get", "router_entropy")),
    Panel("null rate", operator.methodcaller("get", "null_rate")),
    Panel("least expert's share of its fair share", _of_fair(min)),
    Panel("largest expert's share of its fair share", _of_fair(max)),
)


@own_settings()
def plot_runs(runs: Mapping[str, Sequence[Record]], path: str | os.PathLike[str] | io.BytesIO, *, title: str = "",
              smooth: int = 0) -> None:
    """The metrics of runs over their steps, a panel a figure, those that no run has left out.

    A value a layer is drawn as thin lines with their mean. `smooth` > 0 draws noisy ones as the mean over about that
    many points, with the points faintly behind. What is not finite is left out. Raises ValueError where there is
    nothing to draw.
    """
    found = {panel: [_points(records, panel.values) for records in runs.values()] for panel in _CURVES}
    drawn = {panel: curves for panel, curves in found.items() if any(len(x) for x, _ in curves)}
    if not drawn:
        raise ValueError(f"no run has a value to draw; runs are {', '.join(runs) or 'none'}")
    rows = -(-len(drawn) // 2)
    figure, first = new_figure(13.0, 0.8 + 2.6 * rows, title, [1.0] * rows, columns=2)
    for axes in figure.axes[len(drawn):]:
        axes.remove()
    for axes, (panel, curves) in zip(figure.axes, drawn.items(), strict=True):
        _draw(axes, panel, curves, list(runs.values()), smooth)
    _legend_of_runs(first, list(runs))
    figure.tight_layout()
    save_png(figure, path)


def _draw(axes: Any, panel: Panel, curves: Sequence[tuple[Any, Any]], runs: Sequence[Sequence[Record]],
          smooth: int) -> None:
    for number, (x, y) in enumerate(curves):
        if len(x):
            _curve(axes, x, y, _colour(number), smooth if panel.smooth else 0, panel.log)
    for number, records in enumerate(runs if panel.dots else ()):
        x, y = _points(records, operator.methodcaller("get", panel.dots))
        axes.plot(x, y, "o", color=_colour(number), markersize=5, markeredgecolor="white", zorder=4)
    if panel.log:
        axes.set_yscale("log")
    axes.set_title(panel.label, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.margins(x=0.01)


def _points(records: Sequence[Record], values: Callable[[Record], Any]) -> tuple[Any, Any]:
    """(steps [n], values [n, layers]) of the records that have the value; what is not finite is NaN, a gap."""
    found = [(record["step"], np.atleast_1d(np.asarray(values(record), np.float64))) for record in records
             if values(record) is not None]
    found = [(step, value) for step, value in found if value.size and np.isfinite(value).any()]
    if not found:
        return np.zeros(0), np.zeros((0, 1))
    steps, rows = zip(*found, strict=True)
    table = np.stack(rows)
    return np.asarray(steps), np.where(np.isfinite(table), table, np.nan)


def _curve(axes: Any, x: Any, y: Any, colour: str, smooth: int, log: bool) -> None:
    """One value a step, smoothed; or several with their mean, where the axis is logarithmic the geometric one."""
    one = y.shape[1] == 1
    if log:  # what is 0 has no place on it
        shown = (y > 0).any(axis=1)
        x, y = x[shown], np.where(y > 0, y, np.nan)[shown]
    if one:
        line = np.asarray(average(y[:, 0].tolist(), smooth))
    else:
        line = np.exp(np.nanmean(np.log(y), axis=1)) if log else np.nanmean(y, axis=1)
    if smooth or not one:
        axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.25, zorder=2)
    axes.plot(x, line, color=colour, linewidth=1.7, zorder=3, marker="o" if len(x) == 1 else None, markersize=4)


def _legend_of_runs(axes: Any, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_colour(number), linewidth=1.9) for number in range(len(names))]
    axes.legend(handles, [plain_text(name) for name in names], frameon=False, fontsize=9)


def _colour(number: int) -> str:
    """Of a run: the palette without its grey, over and over."""
    return COLOURS[1:][number % (len(COLOURS) - 1)]
