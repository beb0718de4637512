"""Is the state of a hybrid used, or does attention answer? Needle questions, the state swapped, and what recall costs.

    python -m experiments.recall_hybrids [--part state] [--scale small] [--text FILE …] [--tokenizer FILE]
    python -m experiments.recall_hybrids --part machine|scaling|mixers [--seeds 0,1] [--work runs/recall_hybrids]
    python -m experiments.recall_hybrids --part state --keep          # arms that the stored file has not
    python -m experiments.recall_hybrids --part state --render        # page and picture anew from the stored figures

- state: GroundThink hybrids with the local path dropped for 0, 30, 70 % of the rows, and D/A and D/G, trained on text,
  on needle questions, or on both; then the recurrent state zeroed, and swapped with that of a prompt whose answer
  differs (recall_study/states.py).
- machine: recall, memorisation and parity, whose outcomes are known. scaling: loss over five sizes, fitted, and what
  any three of them would claim. mixers: D, S, A and the resolvent B as token mixers at equal parameters but for theirs.
- Without --text and --tokenizer it reads the standard library's sources, a token a byte, and needles in words.
- Writes recall_PART.json, .md and .png to --output. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.study_command import add_study_flags, read_seeds, run
from experiments.text_files import add_text_flag
from gt_jax.errors import Refused, refuse_all

if TYPE_CHECKING:
    from experiments.workers import Workers

NAME = "recall_hybrids"
PARTS = ("state", "machine", "scaling", "mixers")
SEEDS = {"scaling": "0,1,2"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0].replace("\n", " "))
    p.add_argument("--part", choices=PARTS, default="state", help="what is asked (default state)")
    p.add_argument("--scale", default="small", help="minutes: a try; small: two cores; accelerator (default small)")
    add_text_flag(p)
    p.add_argument("--tokenizer", default="bytes", metavar="FILE", help="its tokens hold the needles' words")
    p.add_argument("--keep", action="store_true",
                   help="of state and mixers: keep the rows of arms that OUTPUT/recall_PART.json has")
    add_study_flags(p, NAME, "")
    return p


def configured(arguments: argparse.Namespace) -> tuple[Any, str]:
    """The study that the words name and a hash of what it reads; raises `Refused` for words that make none."""
    from experiments.recall_study import machine, scaling, study
    from experiments.recall_study.material import content

    seeds = read_seeds(arguments.seeds or SEEDS.get(arguments.part, "0,1"))
    if arguments.part == "machine":
        return machine.scaled(arguments.scale, seeds), ""
    text = tuple(map(str, arguments.text))
    if arguments.part == "scaling":
        sizes = scaling.scaled(arguments.scale, seeds, text, arguments.tokenizer)
        both = {"held-out": sizes.held_out_batches, "tuning": sizes.held_out_batches}
        return sizes, content(text, arguments.tokenizer, sizes.length, sizes.rows, both)
    found = study.scaled(arguments.part, arguments.scale, seeds, text, arguments.tokenizer)
    return found, content(text, arguments.tokenizer, found.row, found.rows, {"held-out": found.held_out_batches})


def make(wanted: Any) -> dict[str, Any]:
    """A unit of whichever part it is."""
    from experiments.recall_study import engine, machine, scaling

    kinds: dict[type, Callable[[Any], dict[str, Any]]] = {machine.Check: machine.make, scaling.Size: scaling.make}
    return kinds.get(type(wanted), engine.make)(wanted)


def all_rows(study: Any, workers: Workers, lent: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """The rows of every unit; `lent` are rows of an earlier run, whose arms are not trained again."""
    from experiments.recall_study.machine import MODELS, Check, MachineStudy
    from experiments.recall_study.scaling import ScalingStudy
    from experiments.recall_study.study import Wanted

    if isinstance(study, ScalingStudy):
        return _sizes(study, workers)
    done = {row["model"] for row in lent}
    wanted = ([Check(study, task, model) for model in MODELS for task in study.tasks]
              if isinstance(study, MachineStudy)
              else [Wanted(study, arm) for arm in study.arms if arm.name not in done])  # fmt: skip
    shared = lambda name: (name.partition("/")[0], name.partition(" ")[2])  # noqa: E731 - one program
    made = workers.all({one.name: one for one in wanted}, alike=shared)
    return [*(row for one in made.values() for row in one["rows"]), *map(dict, lent)]


def _sizes(study: Any, workers: Workers) -> list[dict[str, Any]]:
    """Every size at every rate with the first seed, all of them at once, then the other seeds at the best of them."""
    from experiments.recall_study.scaling import Size

    first, *others = study.seeds
    tried = [Size(study, width, (first,) * len(study.rates), study.rates) for width in study.widths]
    made = workers.all({one.name: one for one in tried})
    best = [min(made[one.name]["rows"], key=lambda row: row["tuning_nats"]) for one in tried]
    if not others:
        return best
    rest = [Size(study, row["width"], tuple(others), (row["rate"],) * len(others)) for row in best]
    more = workers.all({one.name: one for one in rest})
    return best + [row for one in rest for row in more[one.name]["rows"]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a part of the study, or only render it, and print its page."""
    from experiments.recall_study import findings, report, scaling
    from experiments.recall_study.study import unchanged

    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(words)
    if arguments.part == "machine":
        refuse_all([f"--{name} is of the other parts; --part machine makes its own rows" for name, given in
                    (("text", arguments.text), ("tokenizer", arguments.tokenizer != "bytes")) if given],
                   "these arguments do not go together:")  # fmt: skip
    if arguments.keep and arguments.part not in ("state", "mixers"):
        raise Refused(f"--keep keeps arms; --part {arguments.part} has none")
    if arguments.work == Path(f"runs/{NAME}"):
        arguments.work = arguments.work / f"{arguments.part}_{arguments.scale}"
    summaries = {"machine": findings.machine_summary, "scaling": scaling.summary}
    files = [*map(str, arguments.text), *([] if arguments.tokenizer == "bytes" else [arguments.tokenizer])]
    return run(f"recall_{arguments.part}", arguments, words, lambda: configured(arguments), make, all_rows,
               summaries.get(arguments.part, findings.arms_summary), report.write(arguments.part), files,
               unchanged if arguments.keep else None, module=NAME, key="model")  # fmt: skip


if __name__ == "__main__":
    from gt_jax.errors import run_command

    run_command(main)
