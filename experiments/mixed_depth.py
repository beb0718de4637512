"""Where does one model spend its passes? Text and look-ups in one mix, and nothing that says which is which.

    python -m experiments.mixed_depth [--scale small] [--text FILE …] [--seeds 0,1,2] [--jobs 2] [--work DIR]
    python -m experiments.mixed_depth --render               # page and picture anew from OUTPUT/mixed_depth.json

- One layer that may run four times, the same layer run once (for as many steps, and for as many FLOPs), and plain
  models of more layers; a third of the rows are text, the others pointer jumps (mixed_study/study.py).
- Asked of each: the loss of held-out text, right answers by look-ups; of the adaptive one the passes of text, of what
  asks nothing and of answers, and the loss of text with 1, 2, … passes forced.
- Interrupted, the same command goes on. Writes mixed_depth.json, .md and .png to --output.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.pages import page_writer
from experiments.study_command import add_study_flags, read_seeds, run
from experiments.text_files import add_text_flag, refuse_short

if TYPE_CHECKING:
    from experiments.mixed_study.study import MixedStudy
    from experiments.workers import Workers

NAME = "mixed_depth"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    p.add_argument("--scale", choices=("minutes", "small"), default="small", help="minutes: a try (default small)")
    add_text_flag(p)
    add_study_flags(p, NAME, "0,1,2")
    return p


def configured(arguments: argparse.Namespace) -> tuple[MixedStudy, str]:
    """The study that the words name, and a hash of what it reads; raises `Refused` for words that make none."""
    from experiments.mixed_study.study import scaled
    from gt_jax.text.data import open_data

    study = scaled(arguments.scale, read_seeds(arguments.seeds), tuple(arguments.text))
    opened = open_data(study.data(0))
    refuse_short(opened, {"held-out": study.of.held_out_batches, "tuning": study.of.held_out_batches})
    return study, opened.content_hash()


def all_rows(study: MixedStudy, workers: Workers) -> list[dict[str, Any]]:
    """The rows of every model at every seed, at the rate that is best at the first few.

    The layer that is run once for as many FLOPs has the steps that cost what the adaptive one's cost at the first seed.
    """
    from experiments.mixed_study.engine import step_flops
    from experiments.mixed_study.study import ADAPTIVE, LONGER, ONCE, Wanted

    def made(wanted: Sequence[Wanted]) -> list[dict[str, Any]]:
        return list(workers.all({one.name: one for one in wanted}).values())

    first, steps = study.seeds[0], study.of.steps
    tried = made([Wanted(study, model, seed, rate, steps) for model in study.layers for rate in study.rates
                  for seed in study.seeds[: study.tuned_at]])  # fmt: skip

    def loss(model: str, rate: float) -> float:
        return statistics.fmean(row["tuning_nats"] for row in tried if (row["model"], row["rate"]) == (model, rate))

    best = {model: min(study.rates, key=functools.partial(loss, model)) for model in study.layers}
    spent = next(row["flops"] for row in tried if (row["model"], row["rate"]) == (ADAPTIVE, best[ADAPTIVE]))
    once = Wanted(study, LONGER, first, best[ONCE], 1)
    longer = max(2, round(spent / step_flops(once, [1.0])))
    wanted = [Wanted(study, model, seed, rate, steps) for model, rate in best.items() for seed in study.seeds]
    return made([*wanted, *(once._replace(seed=seed, steps=longer) for seed in study.seeds)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, or only render it, and print its page."""
    from experiments.mixed_study.engine import make
    from experiments.mixed_study.page import draw, markdown, summary

    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(words)
    return run(NAME, arguments, words, lambda: configured(arguments), make, all_rows, summary,
               page_writer(NAME, markdown, draw), arguments.text)  # fmt: skip


if __name__ == "__main__":
    from gt_jax.errors import run_command

    run_command(main)
