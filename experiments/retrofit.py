"""Does a retrofitted model use its passes, and does it beat training the plain one on, at equal FLOPs?

    python -m experiments.retrofit [--scale minutes|small] [--seeds 0,1,2] [--jobs 2] [--work runs/retrofit]
    python -m experiments.retrofit --render                  # page anew from OUTPUT/retrofit.json

Writes retrofit.json and .md to --output; those of the same study are rewritten, others refused. Interrupted, the same
command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.pages import page_writer
from experiments.study_command import add_study_flags, read_seeds, run

if TYPE_CHECKING:
    from experiments.retrofit_study.study import Study
    from experiments.workers import Workers

NAME = "retrofit"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--scale", default="small", help="minutes: a try; small: two cores (default small)")
    add_study_flags(p, NAME, "0,1,2")
    return p


def configured(arguments: argparse.Namespace) -> Study:
    """The study that the words name; raises `Refused` for words that make none."""
    from experiments.retrofit_study.study import scaled

    return scaled(arguments.scale, read_seeds(arguments.seeds))


def all_rows(study: Study, workers: Workers) -> list[dict[str, Any]]:
    """The rows of every seed."""
    from experiments.retrofit_study.study import Wanted

    wanted = [Wanted(study, seed) for seed in study.seeds]
    found = workers.all({one.name: one for one in wanted})
    return [row for one in found.values() for row in one["rows"]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, or only render it, and print its page."""
    from experiments.retrofit_study.engine import make
    from experiments.retrofit_study.findings import markdown, summary

    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(words)
    return run(NAME, arguments, words, lambda: (configured(arguments), ""), make, all_rows, summary,
               page_writer(NAME, markdown))  # fmt: skip


if __name__ == "__main__":
    from gt_jax.errors import run_command

    run_command(main)
