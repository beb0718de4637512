"""What does a checkpoint every 50 steps cost a training run, and how large is one?

    python -m experiments.bench_checkpoints [--size small] [--every 50] [--steps 5] [--rounds 3]
                                                         [--workdir DIR] [--json] [--output experiments/results]

* One process trains as `python -m gt_jax.train` does (`training.loop.fit`), in stretches of a few steps. In every
  second stretch a checkpoint is saved after the first step, by `RunCheckpoints.save_beside`, and the clock stops when
  it is whole on the disk: what a save costs, wherever it costs it, is the difference of the two stretches.
* overhead = seconds a save costs / (--every * seconds of a step without). Below 3 % is asked at `small`. With --steps
  as large as --every it is that run itself, and takes as long.
* The model is the plain form of the size in float32: the adaptive one has the same weights and slower steps, so that
  its overhead is smaller.
* Beside it: how long the loop stands still in the call (copying the state), and a save while nothing trains, with its
  processor time.
* --output keeps bench_checkpoints_SIZE.json and .md there. WORKDIR, a temporary folder if not given, should lie on the
  disk that runs are written to; what is made there is deleted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.training_measured import sizes
from experiments.training_measured.report import add_common, common_problems, keep, note, seconds, spread
from gt_jax.errors import refuse_all, run_command
from gt_jax.files import local_path
from gt_jax.options import at_least

ASKED = 0.03


class Stretch(NamedTuple):
    """Seconds of a few steps and of a save among them, the part of it in which the loop stood still, all threads'."""

    seconds: float
    blocked: float
    processor_seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and keep."""
    options = parser().parse_args(argv)
    refuse_all(problems(options), "these arguments cannot be measured:")
    workdir = Path(tempfile.mkdtemp(prefix="bench_checkpoints", dir=options.workdir))
    try:
        report = measure(options, workdir)
    finally:
        shutil.rmtree(workdir)
    if options.output is not None:
        keep(options.output / f"bench_checkpoints_{options.size}", report, markdown(report))
    print(json.dumps(report, indent=1) if options.json else "\n".join(lines(report)))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(p)
    p.add_argument("--every", type=at_least(0), default=50, help="steps from save to save that the overhead is of (50)")
    p.add_argument("--steps", type=at_least(0), default=5, help="of a stretch (5); the writing should end within them")
    p.add_argument("--rounds", type=at_least(0), default=3, help="stretches with and without a save (3)")
    p.add_argument("--workdir", type=local_path, help="folder to save in")
    return p


def problems(options: argparse.Namespace) -> list[str]:
    """What is wrong with the arguments."""
    return common_problems(options, ("every", "steps", "rounds", "batch"), ("workdir", "output"))


class Run:
    """A model in training and its checkpoints, at some step."""

    def __init__(self, options: argparse.Namespace, root: Path) -> None:
        from experiments.training_measured.ours import train_config
        from gt_jax.checkpoints.runs import RunCheckpoints
        from gt_jax.models.language_model import initialise
        from gt_jax.training.loop import make_trainer

        config = sizes.plain_form(options.size, 0)
        self._trainer = make_trainer(config, train_config())
        self._state = self._trainer.new_state(initialise(config, 0))
        self._batches = batches(config.vocab, options.batch, options.tokens)
        self._metadata = {"kind": "train", "config": config.to_json()}
        self.root, self._checkpoints = root, RunCheckpoints(root)
        self.losses: list[float] = []

    def stretch(self, steps: int, save: bool) -> Stretch:
        """So many more steps, a save begun after the first of them."""
        import jax

        from gt_jax.training.loop import fit

        blocked, done = 0.0, int(self._state.step)

        def after(step: int, state: Any, last: bool) -> None:
            nonlocal blocked
            start = time.perf_counter()
            self._checkpoints.save_beside(step, state._asdict(), self._metadata)
            blocked = time.perf_counter() - start

        def record(step: int, metrics: Mapping[str, Any]) -> None:
            self.losses.append(float(metrics["loss"]))

        start, used = time.perf_counter(), time.process_time()
        self._state = fit(self._trainer, self._state, self._batches, done + steps, record=record,
                          due=lambda step: save and step == done + 1, after=after)  # fmt: skip
        jax.block_until_ready(self._state)
        self._checkpoints.wait()
        return Stretch(time.perf_counter() - start, blocked, time.process_time() - used)

    def save_alone(self) -> Stretch:
        """A save while nothing trains."""
        start, used = time.perf_counter(), time.process_time()
        self._checkpoints.save_beside(0, self._state._asdict(), self._metadata)
        blocked = time.perf_counter() - start
        self._checkpoints.wait()
        return Stretch(time.perf_counter() - start, blocked, time.process_time() - used)


def batches(vocab: int, rows: int, tokens: int) -> Iterator[dict[str, Any]]:
    """What to train on, without end."""
    for step in itertools.count():
        drawn = sizes.rows_of_tokens(vocab, rows, tokens, step)
        yield {"tokens": drawn[:, :-1], "targets": drawn[:, 1:], "segment_ids": drawn[:, 1:] * 0 + 1}


def measure(options: argparse.Namespace, workdir: Path) -> dict[str, Any]:
    """Everything the report says."""
    import jax

    from experiments.machine import machine
    from gt_jax.devices.sharding import mesh_for_rows

    without: list[Stretch] = []
    saving: list[Stretch] = []
    with jax.set_mesh(mesh_for_rows(1)):
        note("compiling and warming up")
        run = Run(options, workdir / "run")
        run.stretch(2, save=False)
        alone = [run.save_alone()]
        size = sum(file.stat().st_size for file in run.root.rglob("*") if file.is_file())
        for number in range(options.rounds):
            for save in (False, True) if number % 2 == 0 else (True, False):
                (saving if save else without).append(run.stretch(options.steps, save))
            note(f"round {number + 1} of {options.rounds}: {without[-1].seconds:.2f} s for {options.steps} steps, "
                 f"{saving[-1].seconds:.2f} s with a save")
    step = statistics.median(one.seconds for one in without) / options.steps
    costs = [one.seconds - other.seconds for one, other in zip(saving, without, strict=True)]
    processor = [one.processor_seconds - other.processor_seconds for one, other in zip(saving, without, strict=True)]
    return {
        "size": options.size, "batch": options.batch, "tokens": options.tokens, "every": options.every,
        "steps": options.steps, "rounds": options.rounds, "bytes": size, "step_seconds": step,
        "save_seconds": spread(costs), "save_processor_seconds": spread(processor),
        "blocked_seconds": spread([one.blocked for one in saving]),
        "overhead": spread([cost / (options.every * step) for cost in costs]),
        "alone": alone[0]._asdict(), "losses": [run.losses[0], run.losses[-1]],
        "without": [one._asdict() for one in without], "saving": [one._asdict() for one in saving],
        "machine": machine(),
    }  # fmt: skip


HEAD = ("of a save", "median", "least", "most")


def rows(report: Mapping[str, Any]) -> list[list[str]]:
    """What a save costs."""
    percent = {name: f"{100 * value:.2f} %" for name, value in report["overhead"].items()}
    return [
        ["overhead", percent["median"], percent["least"], percent["most"]],
        seconds("seconds it costs", report["save_seconds"]),
        seconds("of them the loop stands still", report["blocked_seconds"]),
        seconds("processor seconds", report["save_processor_seconds"]),
        ["while nothing trains", f"{report['alone']['seconds']:.2f}", "", ""],
    ]


def said(report: Mapping[str, Any]) -> str:
    """What was measured, in a sentence."""
    return (f"A save of {report['bytes'] / 1e9:.2f} GB every {report['every']} steps of `{report['size']}`, "
            f"{report['batch']} rows of {report['tokens']} tokens, {report['step_seconds']:.2f} s a step; below "
            f"{100 * ASKED:.0f} % is asked; {report['rounds']} rounds of {report['steps']} steps; "
            f"{report['machine']['processor']}, {report['machine']['cores']} cores, jax {report['machine']['jax']}")


def lines(report: Mapping[str, Any]) -> list[str]:
    """The result for a reader."""
    from gt_jax.monitoring.metrics import table

    return [said(report), table(rows(report), list(HEAD))]


def markdown(report: Mapping[str, Any]) -> list[str]:
    """The result for the repository."""
    from experiments.pages import markdown_table

    return ["# What checkpoints cost a run", "", said(report) + ".", "", *markdown_table(rows(report), HEAD)]


if __name__ == "__main__":
    run_command(main)
