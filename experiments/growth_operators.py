"""Which way of growing an adaptive checkpoint is best? Every operator from the same sources, with controls.

    python -m experiments.growth_operators --text tinystories.txt [--seeds 0,1,2] [--scale 1] [--work runs/growth]
    python -m experiments.growth_operators --render          # tables and picture anew from OUTPUT/growth_operators.json

- A source a seed: 8 adaptive layers, trained under the compute price and measured. It is grown to 20 layers in memory
  by every operator (growth_study/operators.py), evaluated, and trained on by a fresh optimizer: the same batches, the
  same learning rate, the same steps for all.
- Controls: the source trained on, and the deep model from scratch, at equal tokens and at equal FLOPs
  (growth_study/flops.py says what is counted).
- Interrupted, the same command goes on: every finished unit is a file in --work. Another configuration is refused.
- Passes, gains and rates are chosen on one part of the text, losses taken on another (growth_study/study.py). What may
  be called a difference is in growth_study/inference.py.
- Writes growth_operators.json, .md and .png to --output; those of the same study are rewritten, others refused.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.text_files import text_file
from gt_jax.files import local_path
from gt_jax.options import at_least

if TYPE_CHECKING:
    from experiments.growth_study.study import StudyConfig


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", nargs="+", type=text_file,
                      help="text files; a part of them is held out, another is for tuning")
    what.add_argument("--render", action="store_true", help="train nothing: read the results in --output, and write "
                      "their tables and picture anew")
    p.add_argument("--seeds", default="0,1,2", help="one source each")
    p.add_argument("--scale", type=float, default=1.0, help="times the steps of source and training on")
    p.add_argument("--width", type=at_least(1), default=96, help="of the models")
    p.add_argument("--work", type=local_path, default=Path("runs/growth_operators"),
                   help="folder of the finished units")
    p.add_argument("--output", type=local_path, default=Path("experiments/results"))
    return p


def configured(arguments: argparse.Namespace) -> StudyConfig:
    """The study that the words name; raises `Refused` for words that make none."""
    from experiments.growth_study.study import StudyConfig
    from experiments.study_command import read_seeds
    from gt_jax.errors import Refused

    seeds = read_seeds(arguments.seeds)
    if not 0.02 <= arguments.scale <= 1000:
        raise Refused(f"--scale {arguments.scale} must lie between 0.02 and 1000")
    study = StudyConfig(text=tuple(arguments.text), seeds=seeds, width=arguments.width)
    return study.replace(source_steps=round(arguments.scale * study.source_steps),
                         further_steps=round(arguments.scale * study.further_steps))  # fmt: skip


def study_and_report(study: StudyConfig, work: Path, output: Path, command: Sequence[str]) -> str:
    """Run what is not done yet, write the three results, and return the Markdown text."""
    from experiments import contract
    from experiments.growth_study import report, results
    from experiments.growth_study.engine import Engine
    from experiments.growth_study.run import CONTROLS, LONGER, SCRATCH_FLOPS, Progress, Seed, costs
    from experiments.growth_study.store import Store
    from experiments.study_command import alone
    from gt_jax.text.batches import open_text

    began = time.monotonic()
    content = open_text(study.data(0)).content_hash()
    results.check_output(output, study, content)
    contract.prepare(output)
    store, engine = Store(work, study, content), Engine(study)
    one = costs(study)
    tuning = (len(study.scratch_rates) - 1) * one[SCRATCH_FLOPS] + (len(study.longer_rates) - 1) * one[LONGER]
    progress = Progress(len(study.seeds) * sum(one.values()) + tuning)
    units, rates = {}, None
    with alone(results.NAME, work, output) as look_again:
        for seed in study.seeds:
            units[seed], rates = Seed(engine, study, store, seed, progress).run(rates)
        look_again()
    assert rates is not None and set(CONTROLS) <= set(units[study.seeds[0]])
    about = results.About(study, content, tuple(command), time.monotonic() - began)
    return report.write(output, about, units, rates)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, or only render it, and print its report."""
    import jax

    from experiments.growth_study.report import render
    from gt_jax.devices.sharding import mesh_for_rows
    from gt_jax.errors import refuse_all

    arguments = parser().parse_args(argv)
    if arguments.render:
        named = [name for name in ("seeds", "scale", "width", "work")
                 if getattr(arguments, name) != parser().get_default(name)]  # fmt: skip
        refuse_all([f"--{name} is of a study that is run; --render takes all from the stored one" for name in named],
                   "these arguments do not go together:")  # fmt: skip
        print(render(arguments.output))
        return 0
    words = list(sys.argv[1:] if argv is None else argv)
    with jax.set_mesh(mesh_for_rows(1)):
        print(study_and_report(configured(arguments), arguments.work, arguments.output, words))
    return 0


if __name__ == "__main__":
    from gt_jax.errors import run_command

    run_command(main)
