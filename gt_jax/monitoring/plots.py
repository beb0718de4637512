"""The pictures of a run: losses around growth, passes per layer, a plan, a verification. PNG, always the same bytes.

matplotlib is imported where a picture is drawn, and drawn on a figure of its own: no pyplot, no display, no state.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gt_jax.growth.plan_entries import Plan
from gt_jax.monitoring.canvas import own_settings, plain_text

Number = float | int | np.number
# Okabe and Ito's palette, told apart by colour-blind readers; the first curve, the source, is dark grey.
COLOURS = ("#333333", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_TYPE_COLOURS = {"D": "#0072B2", "G": "#E69F00", "A": "#D55E00"}
_LIGHT = "G"  # types whose bars are light enough for dark letters
_GREY = "#777777"
_LABEL_GAP = 0.055  # of the height of the axes: one line of text


@own_settings()
def plot_growth(curves: Mapping[str, Sequence[tuple[Number, Number]]], path: str | os.PathLike[str], *,
                growth_at: Number, title: str = "", xlabel: str = "step", ylabel: str = "loss", smooth: int = 0,
                growth_label: str = "growth", ylim: tuple[Number, Number] | None = None) -> None:
    """Curves of (x, y) points with the moment of growth as a vertical line; the name and last value beside each.

    `smooth` > 0 draws the mean over a window of about that many points, and the points themselves faintly behind.
    Points that are not finite are left out. Raises ValueError where no curve has a point.
    """
    drawn = {name: [(float(x), float(y)) for x, y in points if math.isfinite(y)] for name, points in curves.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        raise ValueError(f"no curve has a finite point; curves are {', '.join(curves) or 'none'}")
    figure, axes = new_figure(9.0, 5.0, title)
    axes.axvline(growth_at, color=_GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(plain_text(growth_label), (growth_at, 1), xycoords=("data", "axes fraction"), xytext=(5, -4),
                  textcoords="offset points", va="top", color=_GREY, fontsize=9)
    last = max(x for points in drawn.values() for x, _ in points)
    ends, early = [], 0
    for number, (name, points) in enumerate(drawn.items()):
        colour = COLOURS[number % len(COLOURS)]
        x, y = [point[0] for point in points], [point[1] for point in points]
        line = average(y, smooth)
        if smooth:
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.2, zorder=2)
        axes.plot(x, line, color=colour, linewidth=1.9, zorder=3, marker="o" if len(points) == 1 else None,
                  linestyle="-" if number < len(COLOURS) else "--")
        if x[-1] <= growth_at < last:  # it ends where the others begin: the label goes above its second half
            axes.annotate(f"{plain_text(name)}  {line[-1]:.3f}", (x[-1], max(y[len(y) // 2:])),
                          xytext=(-8, 6 + 14 * early), textcoords="offset points", ha="right", color=colour,
                          fontsize=9.5, zorder=4)
            early += 1
        else:
            ends.append((f"{plain_text(name)}  {line[-1]:.3f}", colour, x[-1], line[-1]))
    if ylim is not None:
        axes.set_ylim(*ylim)
    axes.margins(x=0.01)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    _label_ends(axes, ends)
    save_png(figure, path)


@own_settings()
def plot_plan(plan: Plan, path: str | os.PathLike[str] | io.BytesIO, title: str = "") -> None:
    """A growth plan in three panels: its order, the copies asked for and granted, and the coefficient mass kept.

    In the order each target layer is a field at its source layer, the fuller the stronger, with the number of the pass;
    an empty field is the identity, a dotted frame a dead layer, which the other panels do not count.
    """
    count, depth = len(plan.source_layout), len(plan.entries)
    width = min(26.0, max(7.5, 2.0 + 0.38 * max(depth, 1.6 * count)))
    rows = (0.26 * count + 0.6, 2.2, 2.2)
    figure, order = new_figure(width, 6.2 + 0.26 * count, title or _plan_title(plan), rows)
    passes, mass = figure.axes[1:]
    types = plan.source_layout.types
    colours = [_TYPE_COLOURS.get(kind, COLOURS[3]) for kind in types]
    strongest = max([1.0, *(abs(entry.coefficient) for entry in plan.entries)])
    for target, entry in enumerate(plan.entries):
        strength = min(1.0, abs(entry.coefficient) / strongest)
        order.add_patch(_field(target, entry.source, colours[entry.source], strength, entry.dead))
        if entry.copy and depth <= 64:
            dark = strength < 0.6 or types[entry.source] in _LIGHT
            order.text(target, entry.source, str(entry.copy), ha="center", va="center", fontsize=7.5,
                       color="#222222" if dark else "white")
    order.set_xlim(-0.6, depth - 0.4)
    order.set_ylim(count - 0.4, -0.6)
    _whole_numbers(order.xaxis)
    order.set_xlabel("target layer")
    labels = [f"{kind}{layer}" for layer, kind in enumerate(types)]
    order.set_yticks(range(count), labels)
    order.set_ylabel("source layer")
    asked, masses = [demand.passes for demand in plan.demands], [demand.mass for demand in plan.demands]
    _beside(passes, labels, colours, asked, [float(got) for got in plan.granted], "copies")
    _whole_numbers(passes.yaxis)
    _beside(mass, labels, colours, masses, plan.mass_granted, "sum of coefficients")
    top = max(*masses, *plan.mass_granted, 1e-9)
    mass.set_ylim(0, 1.2 * top)
    for layer, (want, got, kept) in enumerate(zip(masses, plan.mass_granted, plan.mass_kept, strict=True)):
        mass.text(layer, max(want, got) + 0.03 * top, f"{kept:.0%}", ha="center", va="bottom", fontsize=8)
    figure.tight_layout()
    save_png(figure, path)


def _plan_title(plan: Plan) -> str:
    dead = f", {len(plan.dead)} of {len(plan.entries)} layers dead" if plan.dead else ""
    return (f"{plan.kind} plan: {plan.source_layout} to {plan.target_layout}, {plan.total_mass_kept:.0%} of the mass"
            + dead)


_PANELS = (("|dh|/|h|", "delta_ratio"), ("largest singular value", "jacobian"), ("router entropy", "router_entropy"),
           ("router KL (nats)", "router_kl"), ("null picks", "null_rate"))


@own_settings()
def plot_verification(result: Mapping[str, Any], path: str | os.PathLike[str] | io.BytesIO) -> None:
    """What `gt_jax.verify` found, one panel a figure: bars by target layer, marks for the source's passes.

    Panels that the pair has no figures for are left out; the losses of training on, where there are any, come last.
    """
    layers, curve = result["layers"], result.get("curve")
    panels = [(label, name) for label, name in _PANELS if any(one[name] is not None for one in layers)]
    width = min(26.0, max(8.5, 2.0 + 0.42 * len(layers)))
    rows = [1.0] * (len(panels) + (curve is not None))
    figure, _ = new_figure(width, 0.8 + 2.3 * len(rows), _verification_title(result), rows)
    labels = [_layer_label(one) for one in layers]
    for axes, (label, name) in zip(figure.axes, panels, strict=False):
        _by_target(axes, layers, name, label)
        axes.set_xticks(range(len(layers)), labels if axes is figure.axes[len(panels) - 1] else [""] * len(layers))
    last, below = figure.axes[len(panels) - 1], any(one["source"] is not None for one in layers)
    last.set_xlabel("target layer" + (", below it source layer.pass" if below else ""))
    marks = {label: mark for axes in figure.axes[: len(panels)]
             for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if marks:
        last.legend(marks.values(), marks.keys(), ncols=2, loc="upper right", bbox_to_anchor=(1.0, -0.2), frameon=False,
                    fontsize=9)
    if curve is not None:
        axes = figure.axes[-1]
        points = [(step, float(loss)) for step, loss in curve["loss"]]
        axes.plot(*zip(*points, strict=True), color=COLOURS[1], linewidth=1.6, label="training loss")
        axes.axhline(float(result["source_loss"]), color=COLOURS[0], linestyle="--", linewidth=1.2,
                     label="source, held out")
        axes.plot([points[-1][0]], [float(curve["held_out_loss"])], "o", color=COLOURS[2], label="held out, after")
        axes.set_xlabel("steps of training on")
        axes.set_ylabel("loss")
        axes.legend(frameon=False, fontsize=9, ncols=3)
    figure.tight_layout()
    save_png(figure, path)


def _verification_title(result: Mapping[str, Any]) -> str:
    loss, other, gap = (float(result[name]) for name in ("source_loss", "target_loss", "gap"))
    return (f"source loss {loss:.4f}, target {other:.4f}: gap {100 * gap:+.2f} % ({result['verdict']}); "
            f"logit cosine {float(result['cosine']):.4f} ({result['cosine_verdict']})")


def _layer_label(layer: Mapping[str, Any]) -> str:
    beside = "" if layer["source"] is None else f"\n{layer['source']}.{layer['copy']}" if layer["copy"] else "\n-"
    return f"{layer['type']}{layer['target']}{beside}"


def _by_target(axes: Any, layers: Sequence[Mapping[str, Any]], name: str, label: str) -> None:
    """One figure of every target layer as a bar, its source's pass as a diamond, fixed at k_exec as a cross."""
    def points(key: str) -> list[tuple[int, float, str]]:
        found = [(place, float(one[key]), one["type"]) for place, one in enumerate(layers) if one.get(key) is not None]
        return [point for point in found if math.isfinite(point[1])]

    bars, marks, fixed = points(name), points(f"source_{name}"), points(f"source_fixed_{name}")
    axes.bar([x for x, _, _ in bars], [y for _, y, _ in bars], width=0.72, zorder=2,
             color=[_TYPE_COLOURS.get(kind, COLOURS[3]) for *_, kind in bars])
    if marks:
        axes.plot([x for x, _, _ in marks], [y for _, y, _ in marks], linestyle="none", marker="D", markersize=6,
                  markerfacecolor="white", markeredgecolor="#222222", markeredgewidth=1.5, zorder=3,
                  clip_on=False, label="the source's pass")
    if fixed:
        axes.plot([x for x, _, _ in fixed], [y for _, y, _ in fixed], linestyle="none", marker="x", markersize=7,
                  color="#222222", markeredgewidth=1.5, zorder=3, clip_on=False, label="at k_exec")
    heights = [y for _, y, _ in (*bars, *marks, *fixed)]
    if name in ("delta_ratio", "jacobian") and heights and 0 < 20 * min(heights) < max(heights):
        axes.set_yscale("log")  # the first layer of a trained model dwarfs the others
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_ylabel(label)


def _field(x: int, y: int, colour: str, strength: float, dead: bool) -> Any:
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.45, y - 0.42), 0.9, 0.84, facecolor=to_rgba(colour, strength), edgecolor=colour,
                     linewidth=1.0, linestyle=":" if dead else "-", zorder=2)


def _beside(axes: Any, labels: Sequence[str], colours: Sequence[str], asked: Sequence[float], got: Sequence[float],
            what: str) -> None:
    """What each layer asked for, as an empty bar, beside what it got."""
    places = list(range(len(labels)))
    left = axes.bar([place - 0.2 for place in places], asked, width=0.38, facecolor="white", edgecolor=list(colours),
                    linewidth=1.4, zorder=2)
    right = axes.bar([place + 0.2 for place in places], got, width=0.38, color=list(colours), edgecolor=list(colours),
                     linewidth=1.4, zorder=2)
    axes.set_xticks(places, labels)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.set_ylabel(what)
    axes.legend([left, right], ["asked for", "granted"], loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2,
                frameon=False, fontsize=9, borderaxespad=0.1)


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def new_figure(width: float, height: float, title: str, rows: Sequence[float] = (1.0,),
               columns: int = 1) -> tuple[Any, Any]:
    """A figure and the first of its axes, row by row; `rows` are their heights to each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(rows), columns, height_ratios=list(rows))
    for place in range(len(rows) * columns):
        axes = figure.add_subplot(grid[place])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.axes[0].set_title(plain_text(title), loc="left", fontsize=12, fontweight="bold", pad=10)
    return figure, figure.axes[0]


def average(values: Sequence[float], points: int) -> list[float]:
    """The mean over a window of about `points`; unchanged for 0.

    Even-sided where the curve begins, so that neither a steep start nor the jump at growth is smoothed away; one-sided
    where it ends, so that the last value is a mean too. Each window is added up for itself: of running sums a spike of
    1e16 would take all that is small behind it along.
    """
    result = []
    for place in range(len(values)):
        half = min(points // 2, place)
        first, stop = place - half, min(place + half + 1, len(values))
        result.append(sum(values[first:stop]) / (stop - first))
    return result


def _label_ends(axes: Any, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Labels in the right margin beside the ends of the curves, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    wanted = [min(1.0, max(0.0, (y - low) / (high - low))) for *_, y in ends]
    order = sorted(range(len(ends)), key=lambda i: wanted[i])
    placed = _spread([wanted[i] for i in order], _LABEL_GAP)
    for i, height in zip(order, placed, strict=True):
        label, colour, x, y = ends[i]
        axes.annotate(label, (x, y), xycoords="data", xytext=(1.03, height), textcoords="axes fraction", color=colour,
                      va="center", fontsize=9.5, annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.5,
                                  "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)})


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as needed to be at least `gap` apart."""
    groups: list[list[float]] = []  # [centre, members]; groups that touch are merged around their common centre
    for height in heights:
        groups.append([height, 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            centre, members = groups.pop()
            before, count = groups.pop()
            groups.append([(before * count + centre * members) / (count + members), count + members])
    return [centre + gap * (n - (members - 1) / 2) for centre, members in groups for n in range(int(members))]


def save_png(figure: Any, path: str | os.PathLike[str] | io.BytesIO) -> None:
    """Write a figure without version and date: the same picture is the same bytes."""
    figure.savefig(path, format="png", bbox_inches="tight", pad_inches=0.15, metadata={"Software": None})
