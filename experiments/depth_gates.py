"""What makes depth used? The recipe of the study of depth on tasks, with one thing changed at a time.

    python -m experiments.depth_gates [--scale small] [--seeds 0,1] [--jobs 2] [--work runs/depth_gates]
    python -m experiments.depth_gates --render               # page anew from OUTPUT/depth_gates.json

Writes depth_gates.json and .md to --output; those of the same study are rewritten, others refused. Interrupted, the
same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.pages import markdown_table, page_writer
from experiments.study_command import add_study_flags, read_seeds, run

if TYPE_CHECKING:
    from experiments.depth_study.variants import GatesStudy, Wanted
    from experiments.workers import Workers

NAME = "depth_gates"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--scale", choices=("minutes", "small", "whole"), default="small",
                   help="minutes: a try; small: what decides most; whole: all variants (default small)")
    add_study_flags(p, NAME, "0,1")
    return p


def configured(arguments: argparse.Namespace) -> GatesStudy:
    """The study that the words name; raises `Refused` for words that make none."""
    from experiments.depth_study.study import SCALES
    from experiments.depth_study.variants import VARIANTS, GatesStudy

    study = GatesStudy(setting=SCALES["minutes" if arguments.scale == "minutes" else "small"][1],
                       seeds=read_seeds(arguments.seeds))  # fmt: skip
    return study.replace(variants=tuple(VARIANTS)) if arguments.scale == "whole" else study


def make(wanted: Wanted) -> dict[str, Any]:
    """One unit: the variant trained and asked."""
    from experiments.depth_study.engine import answered

    setting = wanted.setting
    row = answered(wanted.model(), wanted.train(), setting.data(wanted.seed), setting.held_out_batches)
    return {"task": setting.name, "model": wanted.variant, "seed": wanted.seed, "rate": wanted.rate, **row}


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By variant: right answers and passes by difficulty, correlation, and what is right with one pass; means."""
    from experiments.depth_study.findings import by_difficulty
    from experiments.growth_study.inference import mean

    found = {}
    for variant in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == variant]
        found[variant] = {
            "accuracy": by_difficulty([row["accuracy"] for row in mine]),
            "passes": by_difficulty([row["passes"] for row in mine]),
            "spearman": mean([row["spearman"] or 0.0 for row in mine]),
            "hardest": mean([row["accuracy_hardest"] for row in mine]),
            "hardest, one pass": mean([row["forced"]["1"]["accuracy_hardest"] for row in mine]),
        }
    return found


def markdown(stored: Mapping[str, Any]) -> str:
    """The page: a line a variant."""
    from experiments.depth_study.variants import VARIANTS

    setting, found = stored["config"]["setting"], stored["summary"]
    difficulties = list(next(iter(found.values()))["accuracy"])
    rows = []
    for variant in (name for name in VARIANTS if name in found):
        one = found[variant]
        rows.append([variant, *(f"{100 * one['accuracy'][d]['mean']:.0f}" for d in difficulties),
                     *(f"{one['passes'][d]['mean']:.2f}" for d in difficulties), f"{one['spearman']['mean']:.2f}",
                     f"{100 * (one['hardest']['mean'] - one['hardest, one pass']['mean']):+.0f}"])  # fmt: skip
    head = ["changed", *(f"right at {d}, %" for d in difficulties), *(f"passes at {d}" for d in difficulties),
            "Spearman", "what one pass costs on the hardest third, points"]  # fmt: skip
    lines = [
        "# What makes depth used?", "", f"`{stored['command']}`", "",
        f"`{setting['task']}`, {setting['steps']} steps, rate {stored['config']['rate']:g}; means over "
        f"{len(stored['config']['seeds'])} seeds, {stored['seconds'] / 60:.0f} minutes on "
        f"{stored['machine']['cores']} cores. One thing is changed at a time; a correlation of 0.00 is of gates that "
        "give all tokens the same passes.", "", *markdown_table(rows, head),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def all_rows(study: GatesStudy, workers: Workers) -> list[dict[str, Any]]:
    """The rows of every variant at every seed."""
    from experiments.depth_study.variants import Wanted

    wanted = [Wanted(study.setting, name, seed, study.rate) for name in study.variants for seed in study.seeds]
    return list(workers.all({one.name: one for one in wanted}).values())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, or only render it, and print its page."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(words)
    return run(NAME, arguments, words, lambda: (configured(arguments), ""), make, all_rows, summary,
               page_writer(NAME, markdown))  # fmt: skip


if __name__ == "__main__":
    from gt_jax.errors import run_command

    run_command(main)
