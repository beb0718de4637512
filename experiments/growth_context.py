"""Is a child on text its source? Sources of growth_pays under each `context` of adaptive depth, and what grows of them.

    python -m experiments.growth_context [--contexts all,alive] [--text FILE …] [--seeds 0,1,2] [--work DIR]
    python -m experiments.growth_context --render            # page anew from OUTPUT/growth_context.json

- A later pass of an `alive` source sees living tokens alone; the copy that it becomes sees all (docs/depth.md).
- The source of half of the budget of `experiments.growth_pays`, its rate and its recipe; nothing is trained on.
- Writes growth_context.json and .md to --output; those of the same study are rewritten, others refused. Interrupted,
  the same command goes on.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.pages import page_writer
from experiments.study_command import add_study_flags, read_seeds, run
from experiments.text_files import add_text_flag, refuse_short

if TYPE_CHECKING:
    from experiments.pays_study.context import ContextStudy, Of
    from experiments.workers import Workers

NAME = "growth_context"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--scale", default="small", help="minutes: a try; small: two cores; accelerator (default small)")
    p.add_argument("--contexts", default="all,alive", help="separated by commas (default all,alive)")
    add_text_flag(p)
    add_study_flags(p, NAME, "0,1,2")
    return p


def configured(arguments: argparse.Namespace) -> tuple[ContextStudy, str]:
    """The study that the words name, and a hash of its text; raises `Refused` for words that make none."""
    from experiments.pays_study.context import scaled
    from gt_jax.text.data import open_data

    study = scaled(arguments.scale, tuple(arguments.contexts.split(",")), read_seeds(arguments.seeds),
                   tuple(arguments.text))  # fmt: skip
    text, count = open_data(study.setting.data(0, 1, study.text)), study.setting.held_out_batches
    refuse_short(text, {"held-out": count, "tuning": count})
    return study, text.content_hash()


def make(work: Path, wanted: Of) -> dict[str, Any]:
    """One unit: a source and its child at growth."""
    from experiments.pays_study.engine import child_at_growth
    from experiments.pays_study.study import SOURCE, Wanted

    study = wanted.study
    setting = study.setting.replace(context=wanted.context)
    source = Wanted(setting, SOURCE, wanted.seed, study.rate, setting.middle)
    place = work / wanted.context
    place.mkdir(parents=True, exist_ok=True)
    found = child_at_growth(place, study.text, source, setting.recipes[0])
    return {"task": "text", "model": wanted.context, "seed": wanted.seed, "rate": study.rate, **found,
            "line": f"{found['nats']:.4f} nats, its child {found['gap_percent']:+.2f} %"}  # fmt: skip


def all_rows(study: ContextStudy, workers: Workers) -> list[dict[str, Any]]:
    """The rows of every context at every seed."""
    from experiments.pays_study.context import Of

    wanted = [Of(study, context, seed) for context in study.contexts for seed in study.seeds]
    return list(workers.all({one.name: one for one in wanted}).values())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, or only render it, and print its page."""
    from experiments.pays_study.context import markdown, summary

    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(words)
    made = functools.partial(make, arguments.work)
    return run(NAME, arguments, words, lambda: configured(arguments), made, all_rows, summary,
               page_writer(NAME, markdown), arguments.text)  # fmt: skip


if __name__ == "__main__":
    from gt_jax.errors import run_command

    run_command(main)
