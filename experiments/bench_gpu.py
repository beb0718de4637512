"""How fast are the delta rule and a training step on a GPU, beside flash-linear-attention in the same run?

    python -m experiments.bench_gpu [--parts rule training] [--rounds 10] [--ours-alone] [--json FILE]

* Needs a GPU, and pip install 'gt-jax[cuda,bench-gpu]'. Triton must be 3.7.1 or newer: before it the backward pass of
  flash-linear-attention's delta rule is not right. The versions stand in the result.
* rule: our kernels where this version has them for the card, our XLA path, and FLA, in one process, in turns. A round
  is several calls in a row and a wait; ours are timed by the clock around calls and `block_until_ready`, FLA by CUDA
  events. Each call includes what the host needs to launch it. Outputs are compared first: in bfloat16 they are within
  0.01 of each other (RMS over RMS), or nothing is measured.
* training: the plain form of `small` in bfloat16, 16 rows of 1,024 tokens, float32 weights, AdamW, nothing computed
  again, beside transformers' Qwen3-Next with FLA's delta rule at equal size, eager, under autocast; each in a process
  of its own, in turns. `small` as it is, adaptive, is another and dearer model: its row has no ratio.
* The ratio is ours over theirs in milliseconds, below 1 is faster, of the fastest rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.gpu_measured import theirs
from experiments.gpu_measured.cases import TOKENS, Case, cases, make_inputs
from experiments.gpu_measured.report import row_of, table
from experiments.gpu_measured.timing import Side, differences, rounds
from gt_jax.errors import Failed, refuse_all, run_command, say
from gt_jax.files import local_path, write_atomically
from gt_jax.options import at_least

PARTS = ("rule", "training")
LARGEST_DIFFERENCE = 0.01
XLA, FLA = "xla", "fla"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    p.add_argument("--lengths", nargs="+", type=at_least(2), default=TOKENS, help="tokens of a row of the rule")
    p.add_argument("--rounds", type=at_least(1), default=10)
    p.add_argument("--calls", type=at_least(1), default=10, help="in a round (10)")
    p.add_argument("--batch", type=at_least(1), default=16, help="rows of a training step (16)")
    p.add_argument("--tokens", type=at_least(1), default=1024, help="tokens of such a row (1024)")
    p.add_argument("--ours-alone", action="store_true", help="do not ask for flash-linear-attention")
    p.add_argument("--json", type=local_path, metavar="FILE", help="write the rows there")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, keep; 2 where there is no GPU, or nothing to compare with."""
    options = parser().parse_args(argv)
    found = theirs.versions()
    refuse_all(no_gpu() or ([] if options.ours_alone else theirs.problems(found)), "nothing is measured:")
    rows: list[dict[str, Any]] = []
    if "training" in options.parts:  # first: this process has taken none of the card's memory yet
        from experiments.gpu_measured.training import training_rows

        rows += training_rows(options.batch, options.tokens, options.rounds, options.ours_alone)
    if "rule" in options.parts:
        with_fla = None if options.ours_alone else theirs.side
        for case in cases(tuple(options.lengths)):
            rows += measure(case, options.rounds, options.calls, with_fla)
    from experiments.machine import machine

    result = {"machine": {**machine(), **found}, "rows": rows}
    print("\n".join(table(result)))
    if options.json is not None:
        write_atomically(options.json, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return 0


def no_gpu() -> list[str]:
    """One line where JAX finds no GPU."""
    import os

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs its share of the card
    import jax

    with contextlib.suppress(RuntimeError):
        if jax.devices()[0].platform == "gpu":
            return []
    return ["JAX finds no GPU on this machine; run it where there is one, after pip install 'gt-jax[cuda,bench-gpu]'"]


def measure(
    case: Case, count: int, calls: int, with_fla: Callable[..., Side] | None, dtype: str = "bfloat16"
) -> list[dict[str, Any]]:
    """A row for each pass of a case; raises `Failed` where two sides do not compute the same."""
    from experiments.gpu_measured import ours

    inputs, sides = make_inputs(case), dict[str, Side]()
    for name in ours.there():
        try:
            sides[name] = ours.side(case, inputs, name, dtype)
            sides[name].wait(next(iter(sides[name].calls.values()))())
        except ValueError as error:  # kernels that do not take this card or this shape
            if name == XLA:
                raise
            sides.pop(name, None)
            say(f"{case.name}: without {name}: {str(error).splitlines()[-1].strip(' -')}")
    if with_fla is not None:
        sides[FLA] = with_fla(case, inputs, dtype)
    first = next(iter(sides[XLA].calls))
    off = differences(sides, first, XLA)
    wrong = {name: value for name, value in off.items() if not value <= LARGEST_DIFFERENCE}
    if wrong:
        raise Failed(f"{case.name}: not the same function: {spoken(wrong)} off the XLA path")
    found = []
    for name in sides[XLA].calls:
        found.append(row_of(case, name, rounds(sides, name, count, calls), off))
        say(f"{case.name}, {name}: done")
    return found


def spoken(values: Mapping[str, float]) -> str:
    """`fla 0.3, …`"""
    return ", ".join(f"{name} {value:.2g}" for name, value in values.items())


if __name__ == "__main__":
    run_command(main)
