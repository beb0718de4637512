"""The picture: held-out loss against time, decoding and prefill, one row of panels a source; means over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.exit_study.figures import MODES
from experiments.exit_study.findings import WORDS
from experiments.exit_study.study import ExitStudy
from gt_jax.monitoring.canvas import own_settings

COLOURS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")


@own_settings()
def draw(study: ExitStudy, found: Mapping[str, Any], path: Path) -> None:
    """PNG; the same figures give the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(study.sources)
    figure = Figure(figsize=(14, 5.6 * rows), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, len(MODES), squeeze=False)
    for source, line in zip(study.sources, panels, strict=True):
        for mode, axes in zip(MODES, line, strict=True):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e5e5e5", linewidth=0.8)
            axes.set_axisbelow(True)
            _panel(axes, study, found["summary"][source]["models"], mode)
            axes.set_title(f"{source}: {WORDS[mode]}", loc="left", fontweight="bold")
            axes.set_xlabel(f"time over that of the dense model of {study.layers} layers")
            axes.set_ylabel("held-out loss, nats")
    panels[0][0].legend(frameon=False, fontsize=8.5)
    figure.savefig(path, format="png", metadata={"Software": None})


def _panel(axes: Any, study: ExitStudy, models: Mapping[str, Any], mode: str) -> None:
    """Dense models as a black curve, every ponder weight's thresholds as one of its own; diamonds: own threshold."""

    def point(one: Mapping[str, Any]) -> tuple[float, float]:
        return 1 / one[f"speed_{mode}"]["mean"], one["loss"]["mean"]

    dense = sorted((one for one in models.values() if one["ponder"] is None), key=lambda one: one["layers"])
    axes.plot(*zip(*map(point, dense), strict=True), color="#222222", marker="o", linewidth=2, label="dense, by depth")
    for one in dense:
        axes.annotate(f" {one['layers']}", point(one), fontsize=8, va="bottom")
    for number, ponder in enumerate(study.ponders):
        colour = COLOURS[number % len(COLOURS)]
        mine = sorted((one for one in models.values() if one["ponder"] == ponder), key=lambda one: one["threshold"])
        shared, own = ([one for one in mine if one["own"] is kind] for kind in (False, True))
        if shared:
            axes.plot(*zip(*map(point, shared), strict=True), color=colour, marker=".", linewidth=1,
                      label=f"ponder {ponder:g}, thresholds {shared[0]['threshold']:g} to "
                            f"{shared[-1]['threshold']:g}")  # fmt: skip
        if own:
            axes.scatter(*zip(*map(point, own), strict=True), color=colour, marker="D", s=28,
                         label=f"ponder {ponder:g}, trained at its threshold")  # fmt: skip
