"""What is lost when gates are let go? Models that have learned a task with forced passes, freed in several ways.

    python -m experiments.freed_gates [--scale small] [--variants all] [--seeds 0,1,2] [--jobs 2] [--work DIR]
    python -m experiments.freed_gates --render               # page and picture anew from OUTPUT/freed_gates.json

- Variable chains: all passes are forced until they are learned; then gates decide at the price of a pass, for nearly
  as many steps again. All variants of a seed go on from the same model (freed_study/study.py).
- Asked on the way and at the end: held-out loss, right answers and passes by difficulty, their correlation.
- Interrupted, the same command goes on. Writes freed_gates.json, .md and .png to --output.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.growth_study.inference import text_of
from experiments.pages import markdown_table, page_writer
from experiments.study_command import add_study_flags, read_seeds, run

if TYPE_CHECKING:
    from experiments.freed_study.study import FreedStudy
    from experiments.workers import Workers

NAME = "freed_gates"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    p.add_argument("--scale", choices=("minutes", "small"), default="small", help="minutes: a try (default small)")
    p.add_argument("--variants", choices=("two", "all"), default="two", help="soft and hard weights, or with other "
                   "rates and prices (default two)")  # fmt: skip
    add_study_flags(p, NAME, "0,1,2")
    return p


def configured(arguments: argparse.Namespace) -> FreedStudy:
    """The study that the words name; raises `Refused` for words that make none."""
    from experiments.freed_study.study import scaled

    return scaled(arguments.scale, read_seeds(arguments.seeds), arguments.variants == "all")


def all_rows(study: FreedStudy, workers: Workers) -> list[dict[str, Any]]:
    """The rows of every seed: as it was when its gates were let go, and every variant."""
    from experiments.freed_study.engine import units

    rows: list[dict[str, Any]] = []
    for wanted in units(study):
        rows += workers.all({one.name: one for one in wanted}).values()
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By variant: held-out loss and right answers at the end, correlation; means over seeds with intervals."""
    from experiments.freed_study.study import last
    from experiments.growth_study.inference import mean

    found = {}
    for variant in dict.fromkeys(row["model"] for row in rows):
        ends = [last(row) for row in rows if row["model"] == variant]
        names = ("nats", "accuracy_all", "spearman")
        found[variant] = {name: mean([end[name] or 0.0 for end in ends]) for name in names}
    return found


def markdown(stored: Mapping[str, Any]) -> str:
    """The page: a line a variant and seed, its curve from left to right."""
    from experiments.freed_study.study import FORCED, VARIANTS, FreedStudy

    study = FreedStudy.from_json(stored["config"])
    setting = study.setting
    hardest = max(stored["rows"][0]["accuracy"], key=int)
    head = ["weights", "seed", "when freed", *(f"+{step - study.forced_steps}" for step in study.looked_at),
            f"right at {hardest}, %", *(f"passes at {d}" for d in stored["rows"][0]["passes"]), "Spearman"]  # fmt: skip
    freed = {row["seed"]: row["curve"][-1]["nats"] for row in stored["rows"] if row["model"] == FORCED}
    lines = []
    for variant in (name for name in VARIANTS if name in study.variants):
        for row in (row for row in stored["rows"] if row["model"] == variant):
            lines.append([variant, str(row["seed"]), f"{freed[row['seed']]:.4f}",
                          *(f"{one['nats']:.4f}" for one in row["curve"]), f"{100 * row['accuracy'][hardest]:.1f}",
                          *(f"{value:.2f}" for value in row["passes"].values()),
                          "-" if row["spearman"] is None else f"{row['spearman']:.2f}"])  # fmt: skip
    return "\n".join([
        "# What is lost when gates are let go?", "", f"`{stored['command']}`", "",
        f"`{setting.task}`: {study.forced_steps} steps with {setting.passes} passes forced (from 1 on while the "
        f"difficulty rises), then {setting.steps - study.forced_steps} steps in which gates decide at "
        f"{setting.pass_price:g} nats a pass, halting heads at {setting.halting_scale:g} times the rate "
        f"{study.rate:g} where nothing else is said. The rate falls over the last fifth. Held-out loss, nats an "
        "answer, when the gates are let go and so many steps later; the rest at the end. "
        f"{stored['seconds'] / 60:.0f} minutes on {stored['machine']['cores']} cores.", "",
        *markdown_table(lines, head), "", *_ends(stored["summary"]), "",
        f"![Held-out loss after the gates are let go]({NAME}.png)",
    ]) + "\n"  # fmt: skip


def _ends(found: Mapping[str, Any]) -> list[str]:
    """A line a variant: means over seeds at the end, with intervals."""
    return [f"- {variant}: at the end {text_of(one['nats'], '{:.4f}')} nats, "
            f"{100 * one['accuracy_all']['mean']:.1f} % of all questions right, Spearman's correlation "
            f"{text_of(one['spearman'], '{:.2f}')}"
            for variant, one in found.items() if variant != "forced"]  # fmt: skip


def draw(stored: Mapping[str, Any], path: Path) -> None:
    """Held-out loss over steps since the gates were let go, a line a seed; PNG."""
    from experiments.freed_study.study import FORCED, VARIANTS, FreedStudy
    from gt_jax.monitoring.plots import COLOURS, new_figure, save_png

    study = FreedStudy.from_json(stored["config"])
    figure, axes = new_figure(7.2, 4.4, "Held-out loss after the gates are let go")
    freed = {row["seed"]: row["curve"][-1]["nats"] for row in stored["rows"] if row["model"] == FORCED}
    for variant, colour in zip((name for name in VARIANTS if name in study.variants), COLOURS, strict=False):
        for number, row in enumerate(row for row in stored["rows"] if row["model"] == variant):
            steps = [0, *(one["step"] - study.forced_steps for one in row["curve"])]
            nats = [freed[row["seed"]], *(one["nats"] for one in row["curve"])]
            axes.plot(steps, nats, color=colour, marker="o", markersize=3, label=None if number else variant)
    axes.set_yscale("log")
    axes.set_xlabel("steps since then")
    axes.set_ylabel("nats an answer")
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save_png(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, or only render it, and print its page."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(words)
    from experiments.freed_study.engine import make

    return run(NAME, arguments, words, lambda: (configured(arguments), ""), functools.partial(make, arguments.work),
               all_rows, summary, page_writer(NAME, markdown, draw))  # fmt: skip


if __name__ == "__main__":
    from gt_jax.errors import run_command

    run_command(main)
