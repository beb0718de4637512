"""The study's page and picture, made from its stored file alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.growth_study.inference import read, text_of, verdict
from experiments.lambda_study.findings import smallest_told
from experiments.lambda_study.study import FREE, FROM_ONE, LAMBDAS, OWN_RATE, PLAIN, U_SKIPS, X0
from experiments.pages import markdown_table
from gt_jax.monitoring.canvas import own_settings
from gt_jax.monitoring.plots import COLOURS, new_figure, save_png

NAME = "residual_lambdas"
PUBLISHED = (range(1, 8), 0.44, 0.84)
"""Of the earlier work: layers 2 to 8, counted from 1, and the least and the largest a there."""


def markdown(stored: Mapping[str, Any]) -> str:
    """The page."""
    config, found = stored["config"], stored["summary"]["variants"]
    seeds = len(config["seeds"])
    text = ", ".join(Path(file).name for file in config["text"]) or "the standard library"
    rows = [[name, f"{one['rate']:g}", text_of(one["nats"], "{:.4f}"),
             "-" if name == PLAIN else text_of(one["at_equal_steps"], "{:+.4f}"),
             f"{one['ratio']:.2f} ({one['ratio_between'][0]:.2f} to {one['ratio_between'][1]:.2f})",
             "-" if name == PLAIN else text_of(one["at_equal_time"], "{:+.4f}")]
            for name, one in found.items()]  # fmt: skip
    others = [name for name in found if name != PLAIN]
    scalars = [[name, *(_range(found[name][what]) for what in ("a", "b", "skips", "contributions"))] for name in others]
    moved = max(abs(one["mean"] - 1.1) for one in found[LAMBDAS]["a"])
    most = found[LAMBDAS]["rate"] / OWN_RATE * config["steps"]
    limits = [f"{rate:g}" for rate in config["rates"]]
    start = found[LAMBDAS]["nats"]["mean"] - found[FROM_ONE]["nats"]["mean"]
    return "\n".join([
        "# What are learned scalars on the residual path worth?", "", f"`{stored['command']}`", "",
        f"{config['layers']} layers of attention and an MLP, width {config['width']}, {config['steps']} steps of "
        f"{config['rows']} rows of {config['length']} tokens of {text}. {seeds} seed{'s' * (seeds != 1)}, "
        f"{stored['seconds'] / 60:.0f} minutes of wall time in all calls, on {stored['machine']['cores']} cores. "
        "Held-out nats a token; in brackets the 95 % interval by Student's t over seeds; differences are paired by "
        f"seed. The rate is the best of {', '.join(limits)} at the first seed, by the tuning part. "
        f"![losses, scalars and contributions]({NAME}.png)", "",
        *markdown_table(rows, ["variant", "rate", "nats", "less plain, equal steps", "time of a step, plain is 1",
                               "less plain, equal time"]), "",
        f"Equal time: plain is trained for {config['longer']:g} times the steps too "
        f"({text_of(stored['summary']['more_steps'], '{:+.4f}')} nats), and read between the two at the variant's "
        "time. Times are medians over rounds in which all variants take turns, all seeds in one step; in brackets the "
        "least and the most of a round.", "",
        f"## What can be told apart, of {2 * len(others)} comparisons at 95 %", "",
        *(f"- {verdict(name, PLAIN, read(found[name]['at_equal_steps']))}; at equal time: "
          f"{verdict(name, PLAIN, read(found[name]['at_equal_time']))}." for name in others), "",
        f"{_seen(smallest_told(found))}Neighbours "
        f"report 0.005 to 0.01 nats of x0, and 0.001 of the start at 1.1. Of the latter *{LAMBDAS}* less *{FROM_ONE}* "
        f"says {start:+.4f} in the mean.", "",
        "## What was learned", "",
        *markdown_table(scalars, ["variant", "a by layer", "b by layer", "weights of skips", "contribution"]), "",
        "Means over seeds, the least and the largest layer. The contribution of a layer to the output is the product "
        "of a over the layers above it, with what goes along skips. "
        f"Where a has 1/{OWN_RATE:.0f} of the rate of b, as was published, it can move by {most:.3f} at most in this "
        f"run, and moved by at most {moved:.3f}: what it says is its start. *{FREE}* gives it b's rate.",
    ]) + "\n"  # fmt: skip


def _seen(effect: float | None) -> str:
    """How small an effect could have been seen; nothing of one seed."""
    if effect is None:
        return ""
    return f"An effect below {effect:.4f} nats could not have been seen in the widest of these. "


def _range(values: list[Mapping[str, float]]) -> str:
    if not values:
        return "-"
    means = [one["mean"] for one in values]
    least, most = min(means), max(means)
    return f"{least:.3f}" if least == most else f"{least:.3f} to {most:.3f}"


@own_settings()
def draw(stored: Mapping[str, Any], path: Path) -> None:
    """Differences from plain with their intervals; a, b and contributions by layer, means over seeds."""
    found = stored["summary"]["variants"]
    others = [name for name in found if name != PLAIN]
    figure, _ = new_figure(12.0, 8.0, "Held-out nats less plain", (1.0, 1.0), columns=2)
    losses, a, b, reach = figure.axes
    for place, name in enumerate(reversed(others)):
        for shift, key, look in ((0.12, "at_equal_steps", "o"), (-0.12, "at_equal_time", "s")):
            one = found[name][key]
            colour = COLOURS[1 if look == "o" else 2]
            if one["low"] is not None:
                losses.plot([one["low"], one["high"]], [place + shift] * 2, color=colour, linewidth=1.5)
            once = {"label": key.replace("_", " ")} if place == 0 else {}
            losses.plot([one["mean"]], [place + shift], look, color=colour, markersize=5, **once)
    losses.set_yticks(range(len(others)), list(reversed(others)), fontsize=8.5)
    losses.axvline(0.0, color="#999999", linewidth=0.8)
    losses.legend(frameon=False, fontsize=8.5)
    layers = range(1, len(found[PLAIN]["a"]) + 1)
    band, least, most = PUBLISHED
    a.fill_between([layer + 1 for layer in band], least, most, color="#dddddd", label="published, layers 2 to 8")
    for number, name in enumerate((LAMBDAS, FROM_ONE, FREE, X0)):
        for axes, what in ((a, "a"), (b, "b")):
            axes.plot(layers, [one["mean"] for one in found[name][what]], color=COLOURS[number + 1], marker=".",
                      label=name)  # fmt: skip
    for number, name in enumerate((LAMBDAS, FREE, U_SKIPS, "skip 4 to 7", "backout")):
        reach.plot(layers, [one["mean"] for one in found[name]["contributions"]], color=COLOURS[number + 1], marker=".",
                   label=name)  # fmt: skip
    for axes, title in ((a, "a by layer"), (b, "b by layer"), (reach, "contribution of each layer to the output")):
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=10)
        axes.set_xticks(list(layers))
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save_png(figure, path)
