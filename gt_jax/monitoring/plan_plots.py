"""The picture of compiled plans: what each part of the model takes of a step at least, stacked, bound by bound."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence

from gt_jax.monitoring.canvas import own_settings, plain_text
from gt_jax.monitoring.plots import COLOURS, new_figure, save_png

_HATCHES = ("", "//", "..", "xx")  # a second and third round through the colours


@own_settings()
def plot_parts(
    bars: Mapping[str, Mapping[str, float]], path: str | os.PathLike[str] | io.BytesIO, order: Sequence[str],
    title: str = "",
) -> None:  # fmt: skip
    """One stacked bar for each of `bars`, from below in the `order` of the parts, in seconds; its height beside it.

    Raises ValueError where there is no bar.
    """
    if not bars:
        raise ValueError("no bar to draw")
    figure, axes = new_figure(max(7.0, 3.6 + 1.3 * len(bars)), 5.6, title)
    places = list(range(len(bars)))
    below = [0.0] * len(bars)
    for number, part in enumerate(order):
        heights = [of.get(part, 0.0) for of in bars.values()]
        axes.bar(places, heights, 0.62, bottom=below, label=plain_text(part), color=COLOURS[number % len(COLOURS)],
                 hatch=_HATCHES[number // len(COLOURS) % len(_HATCHES)], edgecolor="white", linewidth=0.6)  # fmt: skip
        below = [a + b for a, b in zip(below, heights, strict=True)]
    for place, height in zip(places, below, strict=True):
        axes.annotate(f"{height:.3g} s", (place, height), xytext=(0, 3), textcoords="offset points", ha="center",
                      fontsize=9)  # fmt: skip
    axes.set_ylim(top=1.08 * max(below) or 1.0)  # a height stands above its bar, below the title
    axes.set_xticks(places, [plain_text(name) for name in bars], fontsize=9)
    axes.set_ylabel("least seconds a step")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9)
    save_png(figure, path)
