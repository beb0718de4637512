"""`python -m gt_jax.measure CHECKPOINT -o layer_repetition_factor.json`: how deep does every layer want to be?

Runs the adaptive model on held-out text and writes, per layer, `k_exec` (the least k after which at most 2 % of the
tokens are still alive), `mean_weight` (of all passes together), `passes_run` (by a token), `passes_computed` (for the
batch), `survival` and the rest of GROWTH 1. The text defaults to the one trained on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from gt_jax.errors import Refused, run_command, say
from gt_jax.files import write_atomically


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from gt_jax.evaluation.loading import add_text_arguments

    p = argparse.ArgumentParser(
        prog="python -m gt_jax.measure", description="Measure how many passes every layer uses."
    )
    p.add_argument("checkpoint", type=Path, help="checkpoint or run directory of an adaptive model")
    p.add_argument("-o", "--output", type=Path, help="JSON file to write (default: standard output)")
    add_text_arguments(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; an existing output is refused."""
    arguments = parser().parse_args(argv)
    from gt_jax.evaluation.loading import text_config
    from gt_jax.evaluation.measurement import measure_checkpoint

    if arguments.output is not None:
        from gt_jax.checkpoints.checkpoint import prepare_parent

        if arguments.output.exists():
            raise Refused(f"{arguments.output} exists; choose another -o")
        prepare_parent(arguments.output)
    result = measure_checkpoint(arguments.checkpoint, text_config(arguments), arguments.batches)
    for note in result["_meta"]["notes"]:
        say(f"note: {note}")
    text = json.dumps(result, indent=1) + "\n"
    if arguments.output is None:
        print(text, end="")
        return 0
    write_atomically(arguments.output, text)
    counts = [result[f"layer{i}"]["k_exec"] for i in range(len(result) - 1)]
    figures = ((name, sum(result[f"layer{i}"][name] for i in range(len(counts))) / len(counts))
               for name in ("mean_weight", "passes_run", "passes_computed"))  # fmt: skip
    means = ", ".join(f"{name} {mean:.2f}" for name, mean in figures)
    print(f"k_exec {' '.join(map(str, counts))} (sum {sum(counts)}), mean over layers of {means}: {arguments.output}")
    return 0


if __name__ == "__main__":
    run_command(main)
