"""Does growth pay? A source grown and trained on, against going on with the source and against starting deep.

    python -m experiments.growth_pays [--scale hours] [--text FILE …] [--seeds 0,1,2] [--jobs 2] [--work DIR]
    python -m experiments.growth_pays --keep                 # what a changed setting changes; other rows are kept
    python -m experiments.growth_pays --render               # page and picture anew from OUTPUT/growth_pays.json

- By setting, all at equal total FLOPs, the source's and the growth's included (pays_study/budget.py): the source
  trained on, grown after some of a quarter, half and three quarters of the budget, and the deep model from scratch
  (pays_study/setting.py). Two tasks; at scale `hours` text too, twice, on an accelerator a task whose questions get
  harder after growth.
- Asked of each: held-out loss, and right answers by difficulty, at growth beside the source's, on the way, at the end;
  after a tenth more training against the source trained on.
- Interrupted, the same command goes on: every trained model is a file in --work. Another configuration is refused.
- Writes growth_pays.json, .md and .png to --output; those of the same study are rewritten, others refused.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments import contract
from experiments.pages import page_writer
from experiments.study_command import add_study_flags, read_seeds, run
from experiments.text_files import add_text_flag, refuse_short
from gt_jax.errors import Failed, Refused

if TYPE_CHECKING:
    from experiments.pays_study.setting import Setting
    from experiments.pays_study.study import Study, Wanted
    from experiments.workers import Workers


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0].replace("\n", " "))
    p.add_argument("--scale", default="small", help="minutes: a try; small: the tasks, on two cores; hours: text too, "
                   "as the stored results; tries: where rates of the tasks come from; accelerator (small)")
    add_text_flag(p)
    p.add_argument("--only", default="", help="names of settings, separated by commas; all where none is given")
    p.add_argument("--keep", action="store_true",
                   help="keep the rows of OUTPUT/growth_pays.json whose setting, seeds and text are the same")
    add_study_flags(p, "growth_pays", "0,1,2")
    return p


def configured(arguments: argparse.Namespace) -> Study:
    """The study that the words name; raises `Refused` for words that make none."""
    from experiments.pays_study.study import scaled

    only = tuple(filter(None, arguments.only.split(",")))
    study = scaled(arguments.scale, read_seeds(arguments.seeds), tuple(arguments.text), only)
    if study.text and not study.texts:
        raise Refused(f"--text is of settings of text; these are {', '.join(one.name for one in study.settings)}")
    return study


def content_hash(study: Study) -> str:
    """Of the text that is read; "" where none is. Raises `Refused` for less text than models are judged by."""
    from gt_jax.text.data import open_data

    opened = [open_data(one.data(0, 1, study.text)) for one in study.texts]
    for text, one in zip(opened, study.texts, strict=True):
        refuse_short(text, {"held-out": one.held_out_batches, "tuning": one.held_out_batches})
    return "".join(text.content_hash() for text in opened[:1])


def all_rows(study: Study, workers: Workers, lent: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """The rows of every model at its best rate, at every seed; rates, and curricula, are chosen by the first or few.

    A rate at which a model diverges, at whatever seed, is none: the next best takes its place, at every seed.
    `lent` are rows of an earlier run that this study would make the same; nothing of their settings is trained.
    Raises `Failed` where a model diverges at every rate.
    """
    from experiments.pays_study.study import grown_tries, second_round, tries

    settings = [one for one in study.settings if one.name not in {row["task"] for row in lent}]

    def made(units: Sequence[Wanted]) -> dict[str, dict[str, Any]]:
        return workers.all({one.name: one for one in units})

    tried = {setting.name: tries(setting, study.seeds) for setting in settings}
    found = made([one for of_setting in tried.values() for units in of_setting.values() for at in units for one in at])

    def loss(units: Sequence[Wanted]) -> float:
        return statistics.fmean(found[one.name]["tuning_nats"] for one in units)

    ranked = {name: {kind: [units[0] for units in sorted(at, key=loss)] for kind, at in of_setting.items()}
              for name, of_setting in tried.items()}  # fmt: skip
    best, first = _converging(settings, study.seeds, ranked, made)
    for setting in settings:
        tried_children = grown_tries(setting, study.seeds, best[setting.name])
        found |= made([one for units in tried_children.values() for at in units for one in at])
        best[setting.name] |= {kind: min(units, key=loss)[0] for kind, units in tried_children.items()}
    then = made([one for setting in settings for one in second_round(setting, study.seeds, best[setting.name])])
    return [{**contract.ANSWERS, **row} for row in (*first.values(), *then.values(), *lent)]


def _converging(
    settings: Sequence[Setting], seeds: tuple[int, ...], ranked: Mapping[str, Mapping[str, list[Wanted]]],
    made: Callable[[Sequence[Wanted]], dict[str, dict[str, Any]]],
) -> tuple[dict[str, dict[str, Wanted]], dict[str, dict[str, Any]]]:  # fmt: skip
    """The best of each setting's and kind's `ranked` units at whose rate no seed diverges, and the first round's rows.

    Rates at which one does leave `ranked`.
    """
    from experiments.pays_study.study import first_round

    rates = {(name, kind): ", ".join(f"{rate:g}" for rate in sorted(one.rate for one in units))
             for name, of_setting in ranked.items() for kind, units in of_setting.items()}  # fmt: skip
    while True:
        best = {name: {kind: units[0] for kind, units in of_setting.items()} for name, of_setting in ranked.items()}
        units = [one for setting in settings for one in first_round(setting, seeds, best[setting.name])]
        first = made(units)
        lost = {(one.setting.name, one.kind) for one in units if first[one.name].get("diverged")}
        if not lost:
            return best, first
        for name, kind in sorted(lost):
            ranked[name][kind].pop(0)
            if not ranked[name][kind]:
                raise Failed(f"{name}: {kind} diverged at every rate that was tried ({rates[name, kind]}), each time "
                             "at some seed")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, or only render it, and print its page."""
    from experiments.pays_study import report
    from experiments.pays_study.engine import make
    from experiments.pays_study.findings import summary
    from experiments.pays_study.picture import draw
    from experiments.pays_study.study import unchanged

    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(words)

    def config() -> tuple[Study, str]:
        study = configured(arguments)
        return study, content_hash(study)

    return run(report.NAME, arguments, words, config, functools.partial(make, arguments.work, tuple(arguments.text)),
               all_rows, summary, page_writer(report.NAME, report.markdown, draw), arguments.text,
               unchanged if arguments.keep else None)  # fmt: skip


if __name__ == "__main__":
    from gt_jax.errors import run_command

    run_command(main)
