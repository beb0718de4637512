"""What do gates give on text? The rules that steer depth, and a plain model at equal steps and at equal FLOPs.

    python -m experiments.text_gates [--scale small] [--text FILE …] [--seeds 0,1,2] [--jobs 2] [--work DIR]
    python -m experiments.text_gates --render                # page anew from OUTPUT/text_gates.json

- Compared (text_study/study.py): every layer once; the gates and the rule of the presets `tiny` and `small`; gates that
  see the state, under rule `budget` with a target and with a price of a pass. Each at its own learning rate.
- Asked of each: held-out loss, passes and weight, what every layer run once costs, FLOPs and processor time a step.
- Writes text_gates.json and .md to --output; those of the same study are rewritten, others refused. Interrupted, the
  same command goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.pages import page_writer
from experiments.study_command import add_study_flags, read_seeds, run
from experiments.text_files import add_text_flag, refuse_short
from gt_jax.errors import Failed

if TYPE_CHECKING:
    from experiments.text_study.study import TextGates
    from experiments.workers import Workers

NAME = "text_gates"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--scale", default="small", help="minutes: a try; small: two cores; accelerator (default small)")
    add_text_flag(p)
    add_study_flags(p, NAME, "0,1,2")
    return p


def configured(arguments: argparse.Namespace) -> tuple[TextGates, str]:
    """The study that the words name, and a hash of its text; raises `Refused` for words that make none."""
    from experiments.text_study.study import scaled
    from gt_jax.text.data import open_data

    study = scaled(arguments.scale, read_seeds(arguments.seeds), tuple(arguments.text))
    text = open_data(study.data(0))
    refuse_short(text, {"held-out": study.held_out_batches, "tuning": study.held_out_batches})
    return study, text.content_hash()


def all_rows(study: TextGates, workers: Workers) -> list[dict[str, Any]]:
    """The rows of every model at every seed, at the rate that is best at the first.

    The plain model of equal FLOPs has as many steps as cost what the presets' rule did at the first seed. It is trained
    where an adaptive model has the lower mean loss at equal steps; else more steps need not be asked.
    """
    from experiments.text_study.engine import step_flops
    from experiments.text_study.study import DEFAULT, EQUAL, PLAIN, Wanted

    first = study.seeds[0]

    def made(wanted: Sequence[Wanted]) -> dict[Wanted, dict[str, Any]]:
        found = workers.all({one.name: one for one in wanted})
        return {one: found[one.name] for one in wanted}

    def settled(models: Sequence[str], tried: Mapping[Wanted, dict[str, Any]]) -> dict[Wanted, dict[str, Any]]:
        """Of all seeds, each model at the best of its rates at which none diverges."""
        lost = {(one.model, one.rate) for one, row in tried.items() if row.get("diverged")}
        while True:
            best: list[Wanted] = []
            for model in models:
                left = [one for one in tried if one.model == model and (model, one.rate) not in lost]
                if not left:
                    raise Failed(f"{model} diverged at every rate that was tried, each time at some seed")
                best.append(min(left, key=lambda one: tried[one]["tuning_nats"]))
            found = made([one._replace(seed=seed) for one in best for seed in study.seeds])
            gone = {(one.model, one.rate) for one, row in found.items() if row.get("diverged")}
            if not gone:
                return found
            lost |= gone

    tried = made([Wanted(study, model, first, rate, study.steps) for model in (PLAIN, *study.adaptive)
                  for rate in study.rates])  # fmt: skip
    chosen = settled((PLAIN, *study.adaptive), tried)

    def loss(model: str) -> float:
        return statistics.fmean(row["nats"] for one, row in chosen.items() if one.model == model)

    if loss(PLAIN) <= min(map(loss, study.adaptive)):
        return list(chosen.values())
    plain = study.model(PLAIN)
    step = step_flops(study, plain, [1.0] * len(plain.depth))
    spent = next(row["flops"] for one, row in chosen.items() if (one.model, one.seed) == (DEFAULT, first))
    steps = max(2, round(spent / step))
    longer = settled((EQUAL,), made([Wanted(study, EQUAL, first, rate, steps) for rate in study.rates]))
    return [*chosen.values(), *longer.values()]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, or only render it, and print its page."""
    from experiments.text_study.engine import make
    from experiments.text_study.findings import markdown, summary

    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(words)
    return run(NAME, arguments, words, lambda: configured(arguments), make, all_rows, summary,
               page_writer(NAME, markdown), arguments.text)  # fmt: skip


if __name__ == "__main__":
    from gt_jax.errors import run_command

    run_command(main)
