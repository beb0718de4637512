"""The study's page and picture, made from its stored file alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.depth_study.findings import BOUNDS, FIGURES
from experiments.depth_study.study import ADAPTIVE, MODELS
from experiments.growth_study.inference import text_of
from experiments.pages import earlier_runs, markdown_table
from gt_jax.monitoring.answer_plots import Curve, Panel, plot_by_difficulty

NAME = "depth_tasks"


def draw(stored: Mapping[str, Any], path: Path) -> None:
    """The picture of a stored file: a panel a task."""
    plot_by_difficulty([panel(task, found) for task, found in stored["summary"].items()], path)


def panel(task: str, found: Mapping[str, Any]) -> Panel:
    """Right answers and passes by difficulty, means over seeds with their intervals."""
    models = found["models"]
    accuracy = {name: curve(models[name]["accuracy"]) for name in (ADAPTIVE, *(m for m in MODELS if m != ADAPTIVE))}
    for count, figures in models[ADAPTIVE]["accuracy_forced"].items():
        accuracy[f"adaptive, {count} pass{'es' * (count != '1')} forced"] = curve(figures)
    rho = found["figures"]["spearman"]["mean"]
    return Panel(f"{task}: passes follow difficulty with {rho:.2f}", accuracy,
                 {ADAPTIVE: curve(models[ADAPTIVE]["passes"])})  # fmt: skip


def curve(figures: Mapping[str, Any]) -> Curve:
    """A curve over difficulties."""
    return {int(key): (one["mean"], one["low"], one["high"]) for key, one in figures.items()}


def markdown(stored: Mapping[str, Any]) -> str:
    """The page: what was asked of each task, and what was found."""
    seeds = stored["config"]["seeds"]
    lines = [
        "# Is depth used?", "", f"`{stored['command']}`", "",
        f"{len(seeds)} seed{'s' * (len(seeds) != 1)}, {stored['seconds'] / 60:.0f} minutes on "
        f"{stored['machine']['cores']} cores. Figures are means over seeds, in brackets the 95 % interval by Student's "
        "t. Every model trained at the better of the rates, by its loss on the tuning part; figures are of held-out "
        f"instances. ![by difficulty]({NAME}.png)", "",
    ]  # fmt: skip
    for setting in stored["config"]["settings"]:
        name = setting["task"].partition(":")[0]
        found = stored["summary"][name]
        mine = found["models"][ADAPTIVE]
        seeds = len(stored["config"]["seeds"])
        lines += [f"## {setting['task']}", "", *_rates(setting, seeds), *earlier_runs(stored["rows"], name),
                  *_claims(found), "", *_models(found["models"]), "", *_forced(mine), "", *_cuts(mine), ""]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _rates(setting: Mapping[str, Any], all_seeds: int) -> list[str]:
    """How the adaptive model's rate was chosen, where that is another way than the others'."""
    rates, seeds = setting.get("adaptive_rates"), min(all_seeds, setting.get("adaptive_tuned_at", 1))
    if not rates:
        return []
    by = f"its mean loss on the tuning part over the first {seeds} seeds" if seeds > 1 else "its loss at the first seed"
    return [f"The adaptive model's rate is the better of {', '.join(f'{rate:g}' for rate in rates)} by {by}.", ""]


def _claims(found: Mapping[str, Any]) -> list[str]:
    rows, figures = [], found["figures"]
    for name, words in FIGURES.items():
        bound = BOUNDS.get(name)
        pattern = "{:.2f}" if name == "spearman" else "{:+.1f}"
        met = "-" if bound is None else "yes" if found["met"][name] else "no"
        rows.append([words, text_of(figures[name], pattern), "-" if bound is None else f"{bound:g}", met])
    return markdown_table(rows, ["figure", "found", "asked: at least", "met"])


def _models(models: Mapping[str, Any]) -> list[str]:
    difficulties = list(models[ADAPTIVE]["accuracy"])
    rows = [[name, one["layers"], f"{one['rate']:g}",
             *(f"{100 * one['accuracy'][d]['mean']:.0f}" for d in difficulties),
             text_of(_percent(one["accuracy_hardest"]), "{:.1f}"), f"{one['microseconds_a_token']['mean']:.1f}"]
            for name, one in models.items()]  # fmt: skip
    rows.append(["passes of the adaptive one", "", "", *(f"{models[ADAPTIVE]['passes'][d]['mean']:.2f}"
                                                         for d in difficulties), "", ""])
    head = ["right answers, %", "layers", "rate", *(f"d = {d}" for d in difficulties), "hardest third", "µs a token"]
    return markdown_table(rows, head)


def _percent(figure: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value if key == "seeds" or value is None else 100 * value for key, value in figure.items()}


def _forced(adaptive: Mapping[str, Any]) -> list[str]:
    difficulties = list(adaptive["accuracy"])
    rows = [[count, *(f"{100 * figures[d]['mean']:.0f}" for d in difficulties)]
            for count, figures in adaptive["accuracy_forced"].items()]  # fmt: skip
    return markdown_table(rows, ["passes forced: right answers, %", *(f"d = {d}" for d in difficulties)])


def _cuts(adaptive: Mapping[str, Any]) -> list[str]:
    rows = [[str(one["layer"]), one["type"], ", ".join(map(str, one["k_exec"])),
             f"{one['passes_run']['mean']:.2f}", text_of(one["cost"], "{:.1f}")]
            for one in adaptive["cuts"]]  # fmt: skip
    return markdown_table(rows, ["layer", "type", "k_exec by seed", "passes run", "what one pass there costs, points"])
