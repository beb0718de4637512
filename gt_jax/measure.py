"""`python -m gt_jax.measure CHECKPOINT -o layer_repetition_factor.json`: how deep does every layer want to be?

Runs the adaptive model on held-out text and writes, per layer, `k_exec` (the least k after which at most 2 % of the
tokens are still alive), `mean_weight` (of all passes together), `passes_run` (by a token), `passes_computed` (for the
batch), `survival` and the rest of GROWTH 1. The text defaults to the one trained on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gt_jax.checkpoints.folders import parent_made
from gt_jax.devices.precision import add_precision_flag, computing
from gt_jax.devices.program_cache import add_cache_flag, keep_programs
from gt_jax.errors import Failed, Refused, deliver, run_command, say
from gt_jax.files import local_path, write_atomically


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from gt_jax.evaluation.loading import add_text_arguments

    p = argparse.ArgumentParser(
        prog="python -m gt_jax.measure", description="Measure how many passes every layer uses."
    )
    p.add_argument("checkpoint", type=local_path, help="checkpoint or run directory of an adaptive model")
    p.add_argument("-o", "--output", type=local_path, help="JSON file to write (default: standard output)")
    add_text_arguments(p)
    add_precision_flag(p)
    add_cache_flag(p)
    return p


def _refuse_not_finite(checkpoint: Path, result: Mapping[str, Any]) -> None:
    """Raise `Refused` for a model that gives NaN: of NaN, `k_exec` would be all passes, which looks like a count."""
    layers = [one for name, one in result.items() if name != "_meta"]
    if result["_meta"]["loss"] is None:
        raise Refused(f"{checkpoint}: nothing is asked in these held-out rows, so there is no loss; give more "
                      "--batches, or other data")
    numbers = [result["_meta"]["loss"], *(number for one in layers for number in (*one["alive"], *one["survival"]))]
    if not all(map(math.isfinite, numbers)):
        raise Refused(f"{checkpoint}: loss or passes are not finite (NaN or infinite), so there is nothing to count; "
                      "its training diverged, or its weights are damaged")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; an existing output is refused."""
    arguments = parser().parse_args(argv)
    keep_programs(arguments)
    from gt_jax.evaluation.loading import text_config
    from gt_jax.evaluation.measurement import measure_checkpoint
    from gt_jax.monitoring.metrics import json_values

    if arguments.output is not None and os.path.lexists(arguments.output):
        raise Refused(f"{arguments.output} exists; choose another -o")
    with contextlib.nullcontext() if arguments.output is None else parent_made(arguments.output):
        with computing(arguments.matmul_precision):
            result = measure_checkpoint(arguments.checkpoint, text_config(arguments), arguments.batches)
        _refuse_not_finite(arguments.checkpoint, result)
    for note in result["_meta"]["notes"]:
        say(f"note: {note}")
    text = json.dumps(json_values(result), indent=1, allow_nan=False) + "\n"
    if arguments.output is None:
        print(text, end="")
        return 0
    try:
        write_atomically(arguments.output, text, replace=False)
    except OSError as error:  # minutes of work are not lost for that
        deliver(text.rstrip())
        raise Failed(f"-o {arguments.output} could not be written ({error}); the counts are on standard output, in its "
                     "place") from error
    counts = [result[f"layer{i}"]["k_exec"] for i in range(len(result) - 1)]
    figures = ((name, sum(result[f"layer{i}"][name] for i in range(len(counts))) / len(counts))
               for name in ("mean_weight", "passes_run", "passes_computed"))  # fmt: skip
    means = ", ".join(f"{name} {mean:.2f}" for name, mean in figures)
    print(f"k_exec {' '.join(map(str, counts))} (sum {sum(counts)}), mean over layers of {means}: {arguments.output}")
    return 0


if __name__ == "__main__":
    run_command(main)
