"""How many tokens a second does a training step take in, beside the same model in PyTorch, on two CPU cores?

    python -m experiments.bench_training [--size small] [--batch 4] [--tokens 256] [--rounds 3] [--json]
                                                      [--output experiments/results]

* Needs PyTorch and transformers: pip install 'gt-jax[bench]' (wheels for CPUs are enough).
* The comparison is of one model at equal size: the plain form of `small` (layers 3:1, every layer once) as
  `gt_jax.train` trains it beside transformers' Qwen3-Next, dense and with experts; float32, AdamW, gradients clipped,
  the same tokens, nothing rematerialised. What only one of them has: `training_measured/sizes.py`. PyTorch runs eager
  and compiled; the faster one counts. At least 1.0 is asked of the ratio, 1.5 is good.
* `small` as it is, with adaptive depth, is another and dearer model. Its row has no ratio.
* Every contestant is a process of its own on the same processors; within a round they take turns. Compiling and
  warming up are not timed. The losses show that both train.
* --output keeps bench_training_SIZE.json and .md there. A size beside `small`: narrow, a third as wide.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.pages import markdown_table
from experiments.training_measured import sizes
from experiments.training_measured.report import add_common, common_problems, keep, note, spread
from experiments.training_measured.turns import Contestant, Job, Turn
from gt_jax.errors import Failed, refuse_all, run_command
from gt_jax.options import at_least

NEEDED = ("torch", "transformers")
MODELS = ("dense", "experts", "as it is")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and keep; 2 where PyTorch or transformers is not installed."""
    options = parser().parse_args(argv)
    refuse_all(problems(options), "these arguments cannot be measured:")
    report: dict[str, Any] = {"size": options.size, "batch": options.batch, "tokens": options.tokens,
                              "threads": options.threads, "rounds": options.rounds, "steps": options.steps}
    report["models"] = [one_model(name, options) for name in options.models]
    from experiments.machine import machine  # imports jax, which the contestants have ended with

    report["machine"] = machine()
    if options.output is not None:
        keep(options.output / f"bench_training_{options.size}", report, markdown(report))
    print(json.dumps(report, indent=1) if options.json else "\n".join(lines(report)))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(p)
    p.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="which comparisons (all)")
    p.add_argument("--experts", type=at_least(0), default=4, help="of the model with experts, top-2 (4)")
    p.add_argument("--theirs", nargs="+", choices=("eager", "compiled"), default=("eager", "compiled"),
                   help="how PyTorch runs (both)")
    p.add_argument("--theirs-experts", metavar="NAME", help="transformers' way to run experts (its own choice)")
    p.add_argument("--rounds", type=at_least(0), default=3)
    p.add_argument("--steps", type=at_least(0), default=2, help="of a contestant in a round (2)")
    p.add_argument("--threads", type=at_least(0), default=2)
    p.add_argument("--limit", type=float, default=240.0, help="seconds that torch.compile may take (240)")
    return p


def problems(options: argparse.Namespace) -> list[str]:
    """What is wrong with the arguments, or missing."""
    wrong = common_problems(options, ("batch", "rounds", "steps", "threads"), ("output",))
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing and set(options.models) - {"as it is"}:
        wrong.append(f"{' and '.join(missing)} not installed: pip install 'gt-jax[bench]', or leave them out with "
                     "--models 'as it is'")
    return wrong


def one_model(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One comparison: each contestant's speed, and the ratio in each round to the faster way of PyTorch."""
    config = sizes.as_it_is(options.size)
    by = ["ours"]
    if name != "as it is":
        config = sizes.plain_form(options.size, options.experts if name == "experts" else 0)
        by += options.theirs
    jobs = [Job(one, config, options.batch, options.tokens, options.threads, options.theirs_experts) for one in by]
    failures: dict[str, str] = {}
    with contextlib.ExitStack() as running:
        ready = []
        for job in jobs:  # one after the other: compiling together would only take longer
            contestant = running.enter_context(Contestant(job))
            note(f"{name}: {job.by} warms up")
            try:
                started = time.perf_counter()
                first = contestant.turn(2, options.limit if job.by == "compiled" else None)
            except Failed as error:
                if job.by != "compiled":
                    raise
                failures[job.by] = str(error)
                contestant.__exit__(None, None, None)
                continue
            ready.append((contestant, first, time.perf_counter() - started))
        turns: dict[str, list[Turn]] = {contestant.job.by: [] for contestant, *_ in ready}
        for number in range(options.rounds):
            for contestant, *_ in ready if number % 2 == 0 else reversed(ready):
                turns[contestant.job.by].append(contestant.turn(options.steps))
            note(f"{name}: round {number + 1} of {options.rounds}: " + ", ".join(
                f"{one} {found[-1].seconds / options.steps:.2f} s a step" for one, found in turns.items()))
        tokens = options.batch * options.tokens * options.steps
        sides = {contestant.job.by: {**contestant.about(), **speed(turns[contestant.job.by], tokens, options.steps),
                                     "warm_up_seconds": warm, "first_loss": first.losses[0]}
                 for contestant, first, warm in ready}  # fmt: skip
    return {"model": name, "config": config.to_json(), "sides": sides, "failures": failures, **compared(turns)}


def speed(turns: Sequence[Turn], tokens: int, steps: int) -> dict[str, Any]:
    """Tokens a second over the rounds, processor seconds a step, the last loss."""
    return {"tokens_a_second": spread([tokens / turn.seconds for turn in turns]),
            "processor_seconds": statistics.median(turn.processor_seconds for turn in turns) / steps,
            "last_loss": turns[-1].losses[-1]}


def compared(turns: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """`fastest` of PyTorch's ways by its median, and its seconds over ours, round by round; nothing where it is not."""
    theirs = {by: statistics.median(turn.seconds for turn in found) for by, found in turns.items() if by != "ours"}
    if not theirs:
        return {}
    fastest = min(theirs, key=lambda by: theirs[by])
    ratios = [one.seconds / own.seconds for one, own in zip(turns[fastest], turns["ours"], strict=True)]
    return {"fastest": fastest, "ratio": spread(ratios)}


def rows(report: Mapping[str, Any]) -> list[list[str]]:
    """One row a contestant."""
    found = []
    for model in report["models"]:
        for by, side in model["sides"].items():
            rate, ratio = side["tokens_a_second"], ""
            if by == "ours" and "ratio" in model:
                ratio = "{median:.2f} ({least:.2f} to {most:.2f})".format(**model["ratio"])
            who = by if by == "ours" else f"PyTorch, {by}"
            passes = f", {side['passes']:.1f} passes a layer" if model["model"] == "as it is" else ""
            found.append([model["model"] + passes, who, f"{side['parameters'] / 1e6:.1f} M",
                          f"{rate['median']:.0f} ({rate['least']:.0f} to {rate['most']:.0f})",
                          f"{side['processor_seconds']:.2f}", f"{side['first_loss']:.2f} to {side['last_loss']:.2f}",
                          ratio])  # fmt: skip
    return found


HEAD = ("model", "by", "parameters", "tokens/s", "processor s/step", "loss", "ratio")


def said(report: Mapping[str, Any]) -> str:
    """What was measured, in a sentence."""
    with_what = {side["by"] for model in report["models"] for side in model["sides"].values()}
    words = [f"Training step of `{report['size']}` in float32, {report['batch']} rows of {report['tokens']} tokens, "
             f"{report['threads']} threads, {report['rounds']} rounds of {report['steps']} steps",
             report["machine"]["processor"], *sorted(with_what)]
    return "; ".join(words)


def lines(report: Mapping[str, Any]) -> list[str]:
    """The result for a reader."""
    from gt_jax.monitoring.metrics import table

    failed = [f"{model['model']}: {words}" for model in report["models"] for words in model["failures"].values()]
    return [said(report), table(rows(report), list(HEAD)), *failed]


def markdown(report: Mapping[str, Any]) -> list[str]:
    """The result for the repository."""
    failed = [f"\n{model['model']}: {words}" for model in report["models"] for words in model["failures"].values()]
    body = markdown_table(rows(report), HEAD)
    return ["# Training on a CPU, beside PyTorch", "", said(report) + ".", "", *body, *failed]


if __name__ == "__main__":
    run_command(main)
