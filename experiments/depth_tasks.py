"""Is depth used? Tasks of known difficulty: do passes follow it, do they matter, and is the same depth without them as
good?

    python -m experiments.depth_tasks [--scale small] [--seeds 0,1,2] [--jobs 2] [--work runs/depth_tasks]
    python -m experiments.depth_tasks --keep                 # what a changed setting changes; other rows are kept
    python -m experiments.depth_tasks --render               # page and picture anew from OUTPUT/depth_tasks.json

- By task: the plain shallow model, the adaptive one, plain ones as deep as its mean and its most passes, each at its
  own rate, the same instances and steps for all (depth_study/setting.py).
- Asked of each: right answers by difficulty; of the adaptive one also passes, their correlation with the difficulty,
  what 1, 2, … passes forced and what a single pass in each layer cost.
- Interrupted, the same command goes on: every trained model is a file in --work. Another configuration is refused.
- Writes depth_tasks.json, .md and .png to --output; those of the same study are rewritten, others refused.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.pages import page_writer
from experiments.study_command import add_study_flags, read_seeds, run

if TYPE_CHECKING:
    from experiments.depth_study.study import Study
    from experiments.workers import Workers


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0].replace("\n", " "))
    p.add_argument("--scale", default="small", help="minutes: a try; small: two cores; accelerator (default small)")
    p.add_argument("--keep", action="store_true",
                   help="keep the rows of OUTPUT/depth_tasks.json whose model, data, training and rates are the same")
    add_study_flags(p, "depth_tasks", "0,1,2")
    return p


def configured(arguments: argparse.Namespace) -> Study:
    """The study that the words name; raises `Refused` for words that make none."""
    from experiments.depth_study.study import scaled

    return scaled(arguments.scale, read_seeds(arguments.seeds))


def all_rows(study: Study, workers: Workers, lent: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """The rows of every model at its best rate, at every seed; rates are chosen by the first seed or few, and the mean
    depth is the first one's.

    `lent` are rows of an earlier run that this study would make the same; none of their models is trained.
    """
    from experiments.depth_study.study import ADAPTIVE, MEAN, MOST, SHALLOW, Wanted

    first, *others = study.seeds
    chosen: list[Wanted] = []
    kept = [dict(row) for row in lent if row["model"] != MEAN]

    def tried(models: Sequence[tuple[Any, str, int]]) -> dict[str, dict[str, Any]]:
        wanted = [[[Wanted(setting, model, times, seed, rate) for seed in study.tuned_at(setting, model)]
                   for rate in study.rates_of(setting, model)] for setting, model, times in models]  # fmt: skip
        made = workers.all({one.name: one for of_model in wanted for at_rate in of_model for one in at_rate})

        def loss(at_rate: Sequence[Wanted]) -> float:
            return statistics.fmean(made[one.name]["tuning_nats"] for one in at_rate)

        best = [min(of_model, key=loss)[0] for of_model in wanted]
        chosen.extend(best)
        return {one.setting.name: made[one.name] for one in best if one.model == ADAPTIVE}

    there = {(row["task"], row["model"]) for row in kept}
    adaptive = tried([(setting, *one) for setting in study.settings
                      for one in ((ADAPTIVE, 1), (MOST, setting.passes), (SHALLOW, 1))
                      if (setting.name, one[0]) not in there])  # fmt: skip
    adaptive |= {row["task"]: row for row in kept if row["model"] == ADAPTIVE and row["seed"] == first}
    depths = [(setting, mean_depth(adaptive[setting.name])) for setting in study.settings]
    for setting, times in depths:
        kept += [dict(row) for row in lent if (row["task"], row["model"]) == (setting.name, MEAN)
                 and row["layers"] == setting.plain(times).layout]  # fmt: skip
    there = {row["task"] for row in kept if row["model"] == MEAN}
    tried([(setting, MEAN, times) for setting, times in depths if setting.name not in there])
    wanted = [one._replace(seed=seed) for one in chosen for seed in (first, *others)]
    return [*workers.all({one.name: one for one in wanted}).values(), *kept]


def mean_depth(row: dict[str, Any]) -> int:
    """How often a plain model has the layout that is as deep as the mean passes of a token that is asked, rounded."""
    passes = list(row["passes"].values())
    return max(1, round(sum(passes) / len(passes)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, or only render it, and print its page."""
    from experiments.depth_study import report
    from experiments.depth_study.engine import make
    from experiments.depth_study.findings import summary
    from experiments.depth_study.study import unchanged

    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(words)

    return run(report.NAME, arguments, words, lambda: (configured(arguments), ""), make, all_rows, summary,
               page_writer(report.NAME, report.markdown, report.draw),
               keeps=unchanged if arguments.keep else None)  # fmt: skip


if __name__ == "__main__":
    from gt_jax.errors import run_command

    run_command(main)
