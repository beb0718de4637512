"""Is a model whose tokens leave the stack early faster, at equal held-out loss, than dense models trained as long?

    python -m experiments.early_exit --scale small --jobs 2 [--text FILE …] [--task WORDS …] --output runs/results
    python -m experiments.early_exit --render --output runs/results

- Models for text and for each task: dense ones of several depths, and with exits (`ModelConfig.exit`), one a ponder
  weight, each measured at every threshold of the grid; a few are trained at the threshold that they are measured at.
- Every model has its own learning rate, tuned on a part of the data that judges nothing. Losses are held-out.
- Wall time of decoding at batch 1 and of batched prefill: rounds that take turns over all models, on one core.
- Interrupted, the same command goes on: every finished unit is a file in --work. Another configuration is refused.
- Writes early_exit.json, .md and .png to --output; those of the same study are rewritten, others refused.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.text_files import add_text_flag
from gt_jax.files import local_path
from gt_jax.options import at_least

if TYPE_CHECKING:
    from experiments.exit_study.study import ExitStudy

MODULE, NAME = "experiments.early_exit", "early_exit"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--scale", default="small", help="minutes, small or accelerator (small)")
    add_text_flag(p)
    p.add_argument("--task", nargs="*", default=None, help="tasks beside the text (the scale's: at small none)")
    p.add_argument("--seeds", default=None, help="whole numbers such as 0,1,2 (the scale's)")
    p.add_argument("--jobs", type=at_least(0), default=1, help="processes, each held to a core (1)")
    p.add_argument("--work", type=local_path, default=None, help="folder of the finished units (runs/early_exit_SCALE)")
    p.add_argument("--output", type=local_path, default=Path("experiments/results"))
    p.add_argument("--render", action="store_true", help="train nothing: make figures, tables and picture anew from "
                   "the rows that are stored in --output")
    return p


def configured(arguments: argparse.Namespace) -> ExitStudy:
    """The study that the words name; raises `Refused` for words that make none."""
    from experiments.exit_study.study import at_scale
    from experiments.study_command import read_seeds
    from gt_jax.errors import Refused

    seeds = None if arguments.seeds is None else read_seeds(arguments.seeds)
    cores = os.cpu_count() or 1
    if not 1 <= arguments.jobs <= cores:
        raise Refused(f"--jobs {arguments.jobs} must lie between 1 and the {cores} cores of this machine")
    return at_scale(arguments.scale, arguments.text, arguments.task, seeds)


def study_and_report(study: ExitStudy, work: Path, output: Path, jobs: int, command: str) -> str:
    """Run what is not done yet, write the three results, and return the Markdown text."""
    from experiments import contract
    from experiments.exit_study import figures, report, run
    from experiments.exit_study.train import content
    from experiments.machine import machine
    from experiments.study_command import alone, say
    from experiments.units import Units

    hashed = content(study)
    contract.check_output(output, NAME, study.named(), hashed)
    contract.prepare(output)
    units = Units(work, study, hashed)
    with alone(NAME, work, output) as look_again:
        measured, tuning = run.everything(units, study, jobs, say)
        look_again()
    rows = figures.rows_of(measured)
    return report.write(output, contract.stored(
        command=command, config=study.named(), machine=machine(), seconds=units.seconds, rows=rows,
        summary=figures.summary(study, rows, tuning), content=hashed,
    ))  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, or only render it, and print its report."""
    from gt_jax.errors import refuse_all

    arguments = parser().parse_args(argv)
    if arguments.render:
        from experiments.exit_study.report import render

        named = [name for name in ("scale", "text", "task", "seeds", "jobs", "work")
                 if getattr(arguments, name) != parser().get_default(name)]  # fmt: skip
        refuse_all([f"--{name} is of a study that is run; --render takes all from the stored one" for name in named],
                   "these arguments do not go together:")  # fmt: skip
        print(render(arguments.output))
        return 0
    from experiments.contract import command_line
    from experiments.workers import hold_to_one_core

    study = configured(arguments)
    if arguments.jobs == 1 and study.scale != "accelerator":
        hold_to_one_core(0)  # as a worker does, so that times mean the same
    work = arguments.work or Path(f"runs/{NAME}_{study.scale}")
    words = command_line(MODULE, sys.argv[1:] if argv is None else argv, arguments.text)
    print(study_and_report(study, work, arguments.output, arguments.jobs, words))
    return 0


if __name__ == "__main__":
    from gt_jax.errors import run_command

    run_command(main)
