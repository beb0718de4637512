"""The study of a source's context: its config, its units, and what its rows say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.growth_study.inference import mean, text_of
from experiments.pages import markdown_table
from experiments.pays_study.setting import TextSetting
from experiments.pays_study.study import SCALES, TEXT
from gt_jax.configs.json_config import Config
from gt_jax.errors import Refused

CONTEXTS = ("all", "alive")


@dataclasses.dataclass(frozen=True)
class ContextStudy(Config):
    """The text setting of growth_pays, the contexts that its sources are trained with, their rate, and the seeds."""

    setting: TextSetting = TEXT
    contexts: tuple[str, ...] = CONTEXTS
    rate: float = 2e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    text: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        if self.contexts and set(self.contexts) <= set(CONTEXTS):
            return []
        return [f"contexts are {list(self.contexts)}; one or more of {', '.join(CONTEXTS)} are needed"]


class Of(NamedTuple):
    """One unit: a source of a context and seed."""

    study: ContextStudy
    context: str
    seed: int

    @property
    def name(self) -> str:
        """Where the unit is kept."""
        return f"seed{self.seed}/{self.context}"


def scaled(scale: str, contexts: tuple[str, ...], seeds: tuple[int, ...], text: tuple[str, ...]) -> ContextStudy:
    """The study of a scale; raises `Refused` for one that is not known."""
    settings = {"minutes": SCALES["minutes"][1][0], "small": TEXT, "accelerator": SCALES["accelerator"][1][0]}
    if scale not in settings:
        raise Refused(f"--scale {scale} is not known; the scales are {', '.join(settings)}")
    return ContextStudy(setting=settings[scale], contexts=contexts, seeds=seeds, text=text)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By context, means over seeds."""
    figures = ("nats", "child_nats", "gap_percent", "spread_percent", "passes_run", "passes_computed", "mean_weight")
    by = {context: [row for row in rows if row["model"] == context] for context in CONTEXTS}
    return {context: {"gaps": [row["gap_percent"] for row in found],
                      **{name: mean([row[name] for row in found]) for name in figures}}
            for context, found in by.items() if found}  # fmt: skip


def markdown(stored: Mapping[str, Any]) -> str:
    """The page: a line a context."""
    setting, found = stored["config"]["setting"], stored["summary"]
    rows = [[f"`{context}`", text_of(one["nats"], "{:.4f}"), text_of(one["child_nats"], "{:.4f}"),
             text_of(one["gap_percent"], "{:+.2f}"), ", ".join(f"{gap:+.2f}" for gap in one["gaps"]),
             f"{one['spread_percent']['mean']:.2f}", f"{one['passes_run']['mean']:.2f}",
             f"{one['passes_computed']['mean']:.2f}", f"{one['mean_weight']['mean']:.2f}"]
            for context, one in found.items()]  # fmt: skip
    head = ["context of the source", "its loss", "its child's, at growth", "gap, %", "by seed", "spread, %",
            "passes run", "passes computed", "mean weight"]  # fmt: skip
    seeds = len(stored["config"]["seeds"])
    return "\n".join([
        "# Is a child on text its source?", "", f"`{stored['command']}`", "",
        f"{setting['layout']} of width {setting['width']}, {stored['rows'][0]['steps']} steps at a target of "
        f"{setting['depth']:g} passes a layer, grown to {setting['target_layers']} layers by "
        f"\"{stored['rows'][0]['recipe']}\", not trained on. {seeds} seed{'s' * (seeds != 1)}, "
        f"{stored['seconds'] / 60:.0f} minutes on {stored['machine']['cores']} cores; means over seeds, in brackets "
        "the 95 % interval by Student's t; held-out losses in nats a byte.", "", *markdown_table(rows, head),
    ]) + "\n"  # fmt: skip
