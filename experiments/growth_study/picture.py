"""The picture: losses after growth, gaps at growth, and loss against training FLOPs, with the controls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.growth_study.engine import Losses
from experiments.growth_study.operators import BLOCK, CALIBRATED, DEALT, ONCE, OPERATORS, README
from experiments.growth_study.results import Units, of
from experiments.growth_study.run import CONTROLS, SCRATCH_TOKENS
from experiments.growth_study.study import StudyConfig
from gt_jax.monitoring.canvas import own_settings

_GREY = "#b5b5b5"
_CONTROLS = ("#333333", "#999999", "#44AA77", "#7A5195", "#56B4E9")
_SHOWN = {BLOCK: "#0072B2", DEALT: "#009E73", README: "#D55E00", ONCE: "#CC79A7", CALIBRATED: "#E69F00"}


def curve(units: Units, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps [points], held-out losses [seeds, points]) of a contender; seeds with fewer points cut all."""
    runs = [sorted((int(step), Losses(**one).mean) for step, one in unit[name]["losses"].items())
            for unit in units.values()]  # fmt: skip
    count = min(map(len, runs))
    return np.mean([[step for step, _ in run[:count]] for run in runs], axis=0), np.array(
        [[loss for _, loss in run[:count]] for run in runs])  # fmt: skip


def drawn(found: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Those that have a curve at every seed: a run that diverged has a first loss only."""
    return [name for name in names if not any(found[name]["diverged"])]


@own_settings()
def draw(study: StudyConfig, units: Units, found: Mapping[str, Any], path: Path) -> None:
    """Three panels, PNG; the same figures give the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(19, 6.4), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
    _after(panels[0], study, units, found)
    _gaps(panels[1], found)
    _compute(panels[2], study, units, found)
    figure.savefig(path, format="png", metadata={"Software": None})


def _after(axes: Any, study: StudyConfig, units: Units, found: Mapping[str, Any]) -> None:
    thousand = study.tokens_per_step / 1e3
    level = float(np.mean([one["source"]["loss"] for one in units.values()]))
    for name in drawn(found, (one.name for one in OPERATORS)):
        steps, losses = curve(units, name)
        known = name in _SHOWN
        axes.plot(steps * thousand, losses.mean(axis=0), color=_SHOWN.get(name, _GREY), marker="o", markersize=3,
                  linewidth=2 if known else 1, label=name if known else None, zorder=3 if known else 2)  # fmt: skip
    axes.axhline(level, color="#333333", linestyle=(0, (4, 3)), linewidth=1.2, label="the source's loss")
    axes.set_ylim(top=1.12 * level)
    axes.set_title("After growth, means of the seeds (grey: the other operators)", loc="left", fontweight="bold")
    axes.set_xlabel("thousand bytes after growth")
    axes.set_ylabel("held-out loss, nats a byte")
    axes.legend(frameon=False, fontsize=9)


def _gaps(axes: Any, found: Mapping[str, Any]) -> None:
    order = sorted((one.name for one in OPERATORS), key=lambda name: -of(found, name, "gap").mean)
    gaps = [of(found, name, "gap") for name in order]
    means = [gap.mean for gap in gaps]
    whiskers = np.array([0.0 if gap.high is None else gap.high - gap.mean for gap in gaps])
    axes.barh(range(len(order)), means, xerr=whiskers, color=[_SHOWN.get(name, _GREY) for name in order],
              error_kw={"linewidth": 1.0, "capsize": 2.5})  # fmt: skip
    axes.axvline(1.0, color="#333333", linestyle=(0, (4, 3)), linewidth=1.0)
    axes.set_yticks(range(len(order)), [f"{name}  {mean:+.2f}" for name, mean in zip(order, means, strict=True)],
                    fontsize=8.5)  # fmt: skip
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_title("Gap at growth, % of the source's loss (line: 1 %)", loc="left", fontweight="bold")
    axes.set_xlabel(f"%, linear up to 1, then logarithmic; whiskers: 95 % intervals, {gaps[0].seeds} seeds")


def _compute(axes: Any, study: StudyConfig, units: Units, found: Mapping[str, Any]) -> None:
    before = float(np.mean([one["source"]["flops"] for one in units.values()])) / 1e12
    names = drawn(found, (*_SHOWN, *CONTROLS))
    colours = {**_SHOWN, **dict(zip(CONTROLS, _CONTROLS, strict=True))}
    for name in names:
        steps, losses = curve(units, name)
        start = 0.0 if name.startswith("from scratch") else before
        mine = of(found, name, "flops").mean - start
        fit = of(found, name, "growth").mean
        x = start + fit + steps / steps[-1] * (mine - fit)
        axes.plot(x, losses.mean(axis=0), color=colours[name], marker="o", markersize=3, linewidth=1.8, label=name)
        axes.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=colours[name], alpha=0.12, linewidth=0)
    level = float(np.mean([one["source"]["loss"] for one in units.values()]))
    axes.plot([before], [level], color="#333333", marker="*", markersize=13, linestyle="none", label="the source")
    last = float(np.mean([one[SCRATCH_TOKENS]["final"] for one in units.values()]))
    axes.set_ylim(0.97 * min(last, level, *(of(found, name, "final").mean for name in names)), 1.25 * level)
    axes.set_title("Loss against all FLOPs", loc="left", fontweight="bold")
    axes.set_xlabel("FLOPs, 1e12: training, measuring, calibration; bands: smallest to largest seed")
    axes.set_ylabel("held-out loss, nats a byte")
    axes.legend(frameon=False, fontsize=8.5)
