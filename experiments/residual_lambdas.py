"""What are learned scalars on the residual path worth: lambdas, x0, skips, backout, at equal steps and at equal time?

    python -m experiments.residual_lambdas [--scale small] [--text FILE …] [--work runs/residual_lambdas]
    python -m experiments.residual_lambdas --render          # page and picture anew from OUTPUT/residual_lambdas.json

- Twelve layers, 8 seeds, the same batches for every variant (lambda_study/study.py): plain; a = 1.1 and b = 0 learned,
  also from a = 1, and with a at b's rate; b alone; the one skip 4 to 7; U-skips; backout.
- All seeds of a variant are one program (several_seeds.py). Steps are timed in turns.
- Writes residual_lambdas.json, .md and .png to --output. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.pages import page_writer
from experiments.study_command import add_study_flags, read_seeds, run
from experiments.text_files import add_text_flag, refuse_short

if TYPE_CHECKING:
    from experiments.lambda_study.study import LambdaStudy
    from experiments.workers import Workers

NAME = "residual_lambdas"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0].replace("\n", " "))
    p.add_argument("--scale", default="small", help="minutes: a try; small: two cores; accelerator (default small)")
    add_text_flag(p)
    p.add_argument("--tokenizer", default="bytes", metavar="FILE", help="default a token a byte")
    add_study_flags(p, NAME, "0,1,2,3,4,5,6,7")
    return p


def configured(arguments: argparse.Namespace) -> tuple[LambdaStudy, str]:
    """The study that the words name and a hash of its text; raises `Refused` for words that make none."""
    from experiments.lambda_study.engine import source_of
    from experiments.lambda_study.study import scaled

    text = tuple(map(str, arguments.text))
    study = scaled(arguments.scale, read_seeds(arguments.seeds), text, arguments.tokenizer)
    opened = source_of(study).text
    refuse_short(opened, {"held-out": study.held_out_batches, "tuning": study.held_out_batches})
    return study, opened.content_hash()


def all_rows(study: LambdaStudy, workers: Workers) -> list[dict[str, Any]]:
    """Every variant at every rate with the first seed, then with all seeds at the best of them; the times of all."""
    from experiments.lambda_study.study import LONGER, PLAIN, TIMES, VARIANTS, Wanted

    first = study.seeds[0]
    tried = [Wanted(study, name, (first,) * len(study.rates), study.rates) for name in VARIANTS]
    made = workers.all({one.name: one for one in tried}, alike=lambda name: name.partition("/")[0])
    best = [min(made[one.name]["rows"], key=lambda row: row["tuning_nats"]) for one in tried]
    rate = {row["model"]: row["rate"] for row in best}
    rate[LONGER] = rate[PLAIN]
    wanted = [Wanted(study, name, study.seeds, (rate[name],) * len(study.seeds)) for name in (*VARIANTS, LONGER)]
    wanted.append(Wanted(study, TIMES))  # last: it finds the programs of all compiled
    more = workers.all({one.name: one for one in wanted}, alike=lambda name: name.partition("/")[0])
    return [row for one in wanted for row in more[one.name]["rows"]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, or only render it, and print its page."""
    from experiments.lambda_study import report
    from experiments.lambda_study.engine import make
    from experiments.lambda_study.findings import summary

    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(words)
    files = [*map(str, arguments.text), *([] if arguments.tokenizer == "bytes" else [arguments.tokenizer])]
    return run(NAME, arguments, words, lambda: configured(arguments), make, all_rows, summary,
               page_writer(NAME, report.markdown, report.draw), files)  # fmt: skip


if __name__ == "__main__":
    from gt_jax.errors import run_command

    run_command(main)
