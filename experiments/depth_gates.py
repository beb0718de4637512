"""What makes depth used? The recipe of the study of depth on tasks, with one thing changed at a time.

    python -m experiments.depth_gates [--scale small] [--seeds 0,1] [--jobs 2] [--work runs/depth_gates]
    python -m experiments.depth_gates --render               # page anew from OUTPUT/depth_gates.json

Writes depth_gates.json and .md to --output; those of the same study are rewritten, others refused. Interrupted, the
same command goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.depth_study.variants import GatesStudy, Wanted

NAME = "depth_gates"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--scale", choices=("minutes", "small", "whole"), default="small",
                   help="minutes: a try; small: what decides most; whole: all variants (default small)")
    p.add_argument("--seeds", default="0,1", help="one of every variant each")
    p.add_argument("--jobs", type=int, default=1, help="models trained at once, each on a core of its own")
    p.add_argument("--work", type=Path, default=Path("runs/depth_gates"), help="folder of the finished units")
    p.add_argument("--output", type=Path, default=Path("experiments/results"))
    p.add_argument("--render", action="store_true", help="train nothing: the page anew from --output")
    return p


def configured(arguments: argparse.Namespace) -> GatesStudy:
    """The study that the words name; raises `Refused` for words that make none."""
    from experiments.depth_study.study import SCALES
    from experiments.depth_study.variants import VARIANTS, GatesStudy
    from experiments.depth_tasks import read_seeds

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
    from experiments.depth_study.findings import by_difficulty, mean

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
    from experiments.depth_study.report import table
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
        "give all tokens the same passes.", "", *table(head, rows),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, or only render it, and print its page."""
    from experiments import contract
    from experiments.depth_study.variants import Wanted
    from experiments.depth_tasks import without_line
    from experiments.machine import machine
    from experiments.units import Units
    from experiments.workers import Workers
    from gt_jax.files import write_atomically

    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(words)
    output, folders = arguments.output, (str(arguments.work), str(arguments.output))
    if arguments.render:
        stored = contract.read(output / f"{NAME}.json")
    else:
        study = configured(arguments)
        contract.check_output(output, NAME, study, "")
        began = time.monotonic()
        wanted = [Wanted(study.setting, variant, seed, study.rate) for variant in study.variants
                  for seed in study.seeds]  # fmt: skip
        with Workers(Units(arguments.work, study, ""), make, arguments.jobs,
                     lambda line: print(line, file=sys.stderr, flush=True)) as workers:  # fmt: skip
            rows = list(map(without_line, workers.all({one.name: one for one in wanted}).values()))
        stored = contract.stored(command=contract.command_line("experiments.depth_gates", words, folders), config=study,
                                 machine=machine(), seconds=time.monotonic() - began, rows=rows,
                                 summary=summary(rows), content="")  # fmt: skip
        contract.write(output / f"{NAME}.json", stored)
    text = markdown({**stored, "summary": summary(stored["rows"])})
    write_atomically(output / f"{NAME}.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    from gt_jax.errors import run_command

    run_command(main)
