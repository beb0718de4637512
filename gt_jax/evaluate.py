"""`python -m gt_jax.evaluate CHECKPOINT…`: how well does a model predict text that it was not trained on?

    python -m gt_jax.evaluate runs/a
    python -m gt_jax.evaluate runs/a grown --all
    python -m gt_jax.evaluate runs/a --text story.txt --passes counts.json --json
    python -m gt_jax.evaluate runs/a --task pointer_jumps --picture answers.png

- Nats a token, bits per byte (for any tokenizer, see evaluation.scoring) and perplexity, each with its 95 % interval
  (evaluation.confidence_intervals), over documents, or over places where several are of one document.
- The rows lie evenly over the whole held-out part (evaluation.held_out_rows), so that few rows are of many documents.
- Several checkpoints are run on the same rows; the others are compared with the first in pairs, unit by unit, so that a
  difference far smaller than the intervals of the two can be certain.
- The text is the held-out part of the one that the first checkpoint was trained on, or of the one that is named. So
  are tasks and JSON lines: then intervals are over instances or documents, and of a mix over the units of all parts.
- Several processes share the work: the same command with --coordinator HOST:PORT --processes N --process I in each.
- An adaptive model takes as many passes as it likes; --passes fixes them.
- Where answers have a difficulty, as those of tasks have: right answers and passes by difficulty, their correlation,
  and for an adaptive model that chooses its passes what fewer of them cost, in all layers and in each layer by itself
  (evaluation.answer_table). --picture draws them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gt_jax.devices.flags import add_device_flags, mesh_of, wrong_process_flags
from gt_jax.devices.precision import add_precision_flag, computing
from gt_jax.devices.program_cache import add_cache_flag, keep_programs
from gt_jax.errors import Refused, deliver, refuse_all, run_command, say
from gt_jax.evaluation.loading import HELD_OUT_BATCHES, add_text_arguments, text_config
from gt_jax.files import local_name, local_path
from gt_jax.monitoring.answer_lines import answer_lines, gain_line
from gt_jax.monitoring.metrics import table
from gt_jax.monitoring.picture_file import refuse_picture, write_picture


def report_lines(result: Mapping[str, Any]) -> list[str]:
    """The result as lines for a reader."""
    units = result["units"]
    lines = [
        *(f"note: {note}" for note in result["notes"]),
        result["text"],
        f"scored: {result['rows']:,} rows, {result['tokens']:,} tokens, which stand for {result['bytes']:,} bytes and "
        f"{result['ends']:,} ends of documents",
        f"intervals: {100 * result['confidence']:g} %, over {units['count']} {units['kind']}"
        + "s" * (units["count"] != 1)
        + (" of its text: how far this text varies, not how other texts would" if units["kind"] == "place" else "")
        + (": none, that is too few, or one of them is nearly all, or no loss is finite" if _no_limits(result) else ""),
        "",
        table([[one["checkpoint"], one["step"], _depth(one),
                *(_shown(one[name], digits) for name, digits in FIGURES)] for one in result["models"]],
              ["checkpoint", "step", "passes", "nats a token", "bits per byte", "perplexity"]),
    ]  # fmt: skip
    for one in result["differences"]:
        by_token, by_byte = (_shown(of, _digits(of), "+") for of in (one["nats_per_token"], one["bits_per_byte"]))
        lines.append(f"{one['checkpoint']} against {one['against']}: {by_token} nats a token, {by_byte} bits per byte: "
                     f"{one['verdict']}")  # fmt: skip
    for one in result["models"]:
        for part, answers in one["answers"].items():
            lines += ["", f"{part}, {one['checkpoint']}:", *answer_lines(answers)]
    return lines + [f"{part}, {one['checkpoint']} against {one['against']}: {gain_line(gain)}"
                    for one in result["differences"] for part, gain in one["answers"].items()]  # fmt: skip


def _no_limits(result: Mapping[str, Any]) -> bool:
    return all(one["nats_per_token"]["low"] is None for one in result["models"])


FIGURES = (("nats_per_token", 4), ("bits_per_byte", 4), ("perplexity", 3))


def _shown(figure: Mapping[str, float | str | None], digits: int, sign: str = "") -> str:
    value, low, high = (None if number is None else f"{float(number):{sign}.{digits}f}"
                        for number in (figure["value"], figure["low"], figure["high"]))
    return (value or "-") + (f" ({low} to {high})" if low is not None and high is not None else "")


def _digits(figure: Mapping[str, float | str | None]) -> int:
    """Four decimals of a difference, more where it would be shown as none: its verdict stands beside it."""
    largest = max((abs(one) for one in figure.values() if isinstance(one, float)), default=0.0)
    return 1 - math.floor(math.log10(largest)) if 1e-12 < largest < 1e-3 else 4


DECIDES = {"gates": "by gates", "exit": "once, to the exit", "once": "once"}


def _depth(one: Mapping[str, Any]) -> str:
    """The passes that were fixed, else what decides."""
    return DECIDES.get(one["depth"]) or ",".join(map(str, one["passes"]))


def read_passes(words: str | None, checkpoints: Sequence[Path] = ()) -> tuple[int, ...] | None:
    """`--passes`: a number, one a layer between commas, or a file that `gt_jax.measure` wrote, for its k_exec.

    Raises `Refused` for counts of other layers than those of an adaptive one of the `checkpoints`.
    """
    from gt_jax.checkpoints.opened import open_checkpoint
    from gt_jax.growth import repetition

    if words is None:
        return None
    if re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", words):
        return tuple(map(int, words.split(",")))
    if os.path.exists(words):  # unlike Path's, it takes words that are too long for a name
        counts = repetition.read(words)
        for path in checkpoints:
            if (config := open_checkpoint(path).config).adaptive is not None:
                counts.refuse_another_layout(config.depth)
        return counts.k_exec
    raise Refused(f"--passes {words!r} is no number of passes, no list of them, one a layer, like 2,1,3, and no file "
                  "that gt_jax.measure wrote")  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m gt_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("checkpoint", type=local_path, nargs="+",
                   help="checkpoints or run directories, compared with the first")  # fmt: skip
    add_text_arguments(p)
    p.set_defaults(batches=None)
    p.add_argument("--all", action="store_true", help=f"the whole held-out part (default: {HELD_OUT_BATCHES} batches)")
    p.add_argument("--passes", type=local_name, metavar="N|N,N,…|FILE",
                   help="fixed passes of adaptive models, or a file of measure")
    p.add_argument("--picture", type=local_path, metavar="FILE.png", help="draw right answers and passes by difficulty")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")
    add_precision_flag(p)
    add_device_flags(p)
    add_cache_flag(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and print."""
    arguments = parser().parse_args(argv)
    if arguments.all and arguments.batches is not None:
        raise Refused(f"--all and --batches {arguments.batches} exclude each other; leave one out")
    refuse_all(wrong_process_flags(arguments), "these arguments do not go together:")
    keep_programs(arguments)
    from gt_jax.devices.processes import process_group
    from gt_jax.evaluation.held_out import evaluate_checkpoints

    batches = None if arguments.all else HELD_OUT_BATCHES if arguments.batches is None else arguments.batches
    with process_group(arguments) as group, computing(arguments.matmul_precision, group.first):
        group.agree(lambda: refuse_picture(arguments.picture))
        passes, mesh = group.agree(lambda: (read_passes(arguments.passes, arguments.checkpoint), mesh_of(arguments)))
        result = evaluate_checkpoints(
            arguments.checkpoint, text_config(arguments), batches, passes, mesh=mesh, group=group,
            by_difficulty=arguments.picture is not None,
            say=lambda line: say(line) if group.first else None,
        )  # fmt: skip
        group.on_first(lambda: _show(result, arguments))
    return 0


def _show(result: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    def draw() -> None:
        from gt_jax.monitoring.answer_plots import panel_of, plot_by_difficulty

        panels = [panel_of(answers, f"{part}, {one['checkpoint']}") for one in result["models"]
                  for part, answers in one["answers"].items()]  # fmt: skip
        write_picture(lambda image: plot_by_difficulty(panels, image), arguments.picture)

    deliver(json.dumps(result, allow_nan=False) if arguments.json else "\n".join(report_lines(result)),
            {} if arguments.picture is None else {f"--picture {arguments.picture}": draw})


if __name__ == "__main__":
    run_command(main)
