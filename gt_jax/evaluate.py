"""`python -m gt_jax.evaluate CHECKPOINT…`: how well does a model predict text that it was not trained on?

    python -m gt_jax.evaluate runs/a
    python -m gt_jax.evaluate runs/a grown --all
    python -m gt_jax.evaluate runs/a --text story.txt --passes counts.json --json

- Nats a token, bits per byte (for any tokenizer, see gt_jax.scoring) and perplexity, each with its 95 % interval
  (gt_jax.intervals), over documents where enough of them are scored, else over stretches of rows.
- Several checkpoints are run on the same rows; the others are compared with the first in pairs, row by row, so that a
  difference far smaller than the intervals of the two can be certain.
- The text is the held-out part of the one that the first checkpoint was trained on, or of the one that is named.
- Several processes share the work: the same command with --coordinator HOST:PORT --processes N --process I in each.
- An adaptive model takes as many passes as it likes; --passes fixes them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gt_jax.configs.data import DataConfig
from gt_jax.configs.model import ModelConfig
from gt_jax.devices.flags import add_device_flags, mesh_of, wrong_process_flags
from gt_jax.devices.processes import Team, joined
from gt_jax.devices.sharding import Rules, mesh_for_rows
from gt_jax.errors import Refused, refuse_all, run_command
from gt_jax.intervals import Interval, ratio_interval, sums_by_unit
from gt_jax.loading import add_text_arguments, data_config, text_config
from gt_jax.models.language_model import fixed_passes, free_passes
from gt_jax.models.layers.adaptive_depth import PassControl
from gt_jax.monitoring.metrics import table
from gt_jax.scoring import Units, byte_lengths, score, targets_of, units_of
from gt_jax.text.batches import Text, open_text
from gt_jax.text.tokenizers import Tokenizer, open_tokenizer
from gt_jax.training.divisibility import indivisible_fields
from gt_jax.verify import Checkpoint, incomparable, open_checkpoint

CONFIDENCE = 0.95
BATCHES = 8
SAME_TEXT = ("text", "tfds", "tfds_dir", "tokenizer", "sequence_length", "held_out")  # what decides what is held out
Passes = tuple[int, ...] | None
Say = Callable[[str], None]


class Covered(NamedTuple):
    """What was scored: by unit the tokens and the bytes that they stand for; the units themselves; counts."""

    units: Units
    tokens: Any
    bytes: Any
    ends: int


def evaluate_checkpoints(
    sources: Sequence[Path], named: dict[str, Any] | None = None, batches: int | None = BATCHES, passes: Passes = None,
    *, say: Say = lambda line: None, mesh: jax.sharding.Mesh | None = None, team: Team | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate checkpoints on the same held-out rows; returns JSON values.

    Args:
        sources: checkpoints or run directories; all of one tokenizer.
        named: DataConfig fields that name other text (None: what the first checkpoint was trained on).
        batches: how many batches of that run's shape, None for all there are.
        passes: of every adaptive model, one number or one a layer; None leaves them to its halting heads.
        mesh: where they run; None takes as many devices as divide a batch.
        team: the processes, each of which calls it; then there is a mesh of the devices of all.

    Raises `Refused` that lists all that keeps them from being evaluated, before anything is computed.
    """
    team = team or Team()
    opened, tokenizer, text = team.agree(lambda: _open(sources, named, batches, passes, mesh))
    first = opened[0]
    rows = text.held_out(batches)
    covered = _covered(units_of(text, rows, tokenizer.end_of_document), targets_of(rows), tokenizer)
    sums = []
    with jax.set_mesh(mesh or mesh_for_rows(text.config.batch_size)):
        for one in opened:
            say(f"{one.path}: {len(rows)} batches")
            control = _control(one.config, passes)
            nats = score(one.config, one.load(), rows, control, Rules())
            sums.append(sums_by_unit(nats, covered.units.number))
    return {
        "text": text.summary(),
        "rows": int(sum((batch["targets"] >= 0).any(axis=1).sum() for batch in rows)),
        "tokens": int(covered.tokens.sum()), "bytes": int(covered.bytes.sum()), "ends": covered.ends,
        "confidence": CONFIDENCE, "units": {"kind": covered.units.kind, "count": len(covered.tokens)},
        "notes": _notes(first, opened[1:], named),
        "models": [_figures(one, nats, covered, passes) for one, nats in zip(opened, sums, strict=True)],
        "differences": [_difference(first, one, nats - sums[0], covered)
                        for one, nats in zip(opened[1:], sums[1:], strict=True)],
    }  # fmt: skip


def _open(
    sources: Sequence[Path], named: dict[str, Any] | None, batches: int | None, passes: Passes,
    mesh: jax.sharding.Mesh | None,
) -> tuple[list[Checkpoint], Tokenizer, Text]:  # fmt: skip
    """All that can be refused before anything is computed."""
    if batches is not None and batches < 1:
        raise Refused(f"--batches is {batches}; at least one is needed, and --all takes all there are")
    if not sources:
        raise Refused("there is no checkpoint to evaluate; name at least one")
    opened = [open_checkpoint(source) for source in sources]
    first = opened[0]
    data = data_config(first.metadata, named)
    tokenizer = open_tokenizer(data.tokenizer)
    wrong = [problem for other in opened[1:] for problem in incomparable(first, other)]
    for one in opened:
        wrong += _misfits(one, data, passes, tokenizer.vocab_size)
        if mesh is not None:
            uneven = indivisible_fields(one.config, data.batch_size, mesh.shape, Rules())
            wrong += [f"{one.path}: {line}" for line in uneven]
    if passes is not None and all(one.config.adaptive is None for one in opened):
        wrong.append("--passes fixes the passes of adaptive models; here every layer runs once, leave it out")
    refuse_all(wrong, "this cannot be evaluated:")
    return opened, tokenizer, open_text(data)


def _misfits(one: Checkpoint, data: DataConfig, passes: Passes, tokens: int) -> list[str]:
    """Why this checkpoint cannot run on these rows, or not with these passes."""
    config, wrong = one.config, []
    if config.vocab < tokens:
        wrong.append(f"{one.path} has vocab {config.vocab}; the tokens of the text need {tokens}")
    memory = config.memory
    if memory is not None and data.sequence_length > memory.chunk and data.sequence_length % memory.chunk:
        wrong.append(f"{one.path} reads rows in chunks of {memory.chunk}; rows of {data.sequence_length} are not whole")
    if passes is None or config.adaptive is None:
        return wrong
    most, layers = config.adaptive.max_passes, len(config.depth)
    if len(passes) not in (1, layers):
        wrong.append(f"--passes has {len(passes)} numbers; {one.path} has {layers} layers")
    if not all(1 <= count <= most for count in passes):
        wrong.append(f"--passes is {','.join(map(str, passes))}; a layer of {one.path} runs 1 to {most} times")
    return wrong


def _control(config: ModelConfig, passes: Passes) -> PassControl:
    if passes is None or config.adaptive is None:
        return free_passes()
    return fixed_passes(passes[0] if len(passes) == 1 else passes)


def _covered(units: Units, targets: Any, tokenizer: Tokenizer) -> Covered:
    stands_for = byte_lengths(tokenizer)[targets].astype(np.float64)
    tokens = sums_by_unit(np.ones(len(targets)), units.number)
    ends = int(np.count_nonzero(targets == tokenizer.end_of_document))
    return Covered(units, tokens, sums_by_unit(stands_for, units.number), ends)


def _notes(first: Checkpoint, others: Sequence[Checkpoint], named: Mapping[str, Any] | None) -> list[str]:
    """Where the text may not be held out for every model."""
    if named is not None:
        return ["the held-out part of the named text: a model trained on that text with another share held out, or on "
                "another copy of it, may know it"] if others else []  # fmt: skip
    own, notes = data_config(first.metadata, None), []
    for one in others:
        if "run" not in one.metadata:
            continue  # grown or converted: nothing says what it was trained on
        other = data_config(one.metadata, None)
        if any(getattr(own, name) != getattr(other, name) for name in SAME_TEXT):
            notes.append(f"{one.path} was trained on another text, or on rows of another length, than {first.path}: it "
                         "may know what is held out here")  # fmt: skip
    return notes


def _intervals(nats: Any, covered: Covered) -> tuple[Interval, Interval]:
    """Nats a token and bits a byte."""
    return (ratio_interval(nats, covered.tokens, CONFIDENCE),
            ratio_interval(nats / math.log(2), covered.bytes, CONFIDENCE))


def _figures(one: Checkpoint, nats: Any, covered: Covered, passes: Passes) -> dict[str, Any]:
    a_token, a_byte = _intervals(nats, covered)
    fixed = None if passes is None or one.config.adaptive is None else list(passes)
    return {
        "checkpoint": str(one.path), "step": one.metadata.get("step"), "layout": one.config.layout, "passes": fixed,
        "nats_per_token": a_token.to_json(), "bits_per_byte": a_byte.to_json(),
        "perplexity": {name: None if x is None else _exp(x) for name, x in a_token.to_json().items()},
    }  # fmt: skip


def _exp(nats: float) -> float | None:
    """None, JSON's way to say it, where it is beyond float64."""
    return math.exp(nats) if nats < 700 else None


def _difference(first: Checkpoint, other: Checkpoint, nats: Any, covered: Covered) -> dict[str, Any]:
    """What `other` needs more than `first`, unit by unit; a verdict where the limits agree on the sign."""
    a_token, a_byte = _intervals(nats, covered)
    certain = a_token.low is not None and a_token.high is not None and a_token.low * a_token.high > 0
    verdict = ("worse" if a_token.value > 0 else "better") if certain else "not told apart"
    return {
        "checkpoint": str(other.path), "against": str(first.path), "nats_per_token": a_token.to_json(),
        "bits_per_byte": a_byte.to_json(), "verdict": verdict,
    }  # fmt: skip


def report_lines(result: Mapping[str, Any]) -> list[str]:
    """The result as lines for a reader."""
    units = result["units"]
    lines = [
        *(f"note: {note}" for note in result["notes"]),
        result["text"],
        f"scored: {result['rows']:,} rows, {result['tokens']:,} tokens, which stand for {result['bytes']:,} bytes and "
        f"{result['ends']:,} ends of documents",
        f"intervals: {100 * result['confidence']:g} %, over {units['count']} {units['kind']}"
        f"{'es' if units['kind'] == 'stretch' else 's'}"
        + (" of rows: how far this text varies, not how other texts would" if units["kind"] == "stretch" else ""),
        "",
        table([[one["checkpoint"], one["step"], "free" if one["passes"] is None else _listed(one["passes"]),
                *(_shown(one[name], digits) for name, digits in FIGURES)] for one in result["models"]],
              ["checkpoint", "step", "passes", "nats a token", "bits per byte", "perplexity"]),
    ]  # fmt: skip
    for one in result["differences"]:
        by_token, by_byte = (_shown(one[name], 4, "+") for name in ("nats_per_token", "bits_per_byte"))
        lines.append(f"{one['checkpoint']} against {one['against']}: {by_token} nats a token, {by_byte} bits per byte: "
                     f"{one['verdict']}")  # fmt: skip
    return lines


FIGURES = (("nats_per_token", 4), ("bits_per_byte", 4), ("perplexity", 3))


def _shown(figure: Mapping[str, float | None], digits: int, sign: str = "") -> str:
    value, low, high = (None if figure[name] is None else f"{figure[name]:{sign}.{digits}f}"
                        for name in ("value", "low", "high"))
    return (value or "-") + (f" ({low} to {high})" if low is not None and high is not None else "")


def _listed(passes: Sequence[int]) -> str:
    return ",".join(map(str, passes))


def read_passes(words: str | None) -> Passes:
    """`--passes`: a number, one a layer between commas, or a file that `gt_jax.measure` wrote, for its k_exec."""
    from gt_jax.growth import repetition

    if words is None:
        return None
    if re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", words):
        return tuple(map(int, words.split(",")))
    if Path(words).exists():
        return repetition.read(words).k_exec
    raise Refused(f"--passes {words!r} is no number of passes, no list of them, one a layer, like 2,1,3, and no file "
                  "that gt_jax.measure wrote")  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m gt_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("checkpoint", type=Path, nargs="+", help="checkpoints or run directories, compared with the first")
    add_text_arguments(p)
    p.set_defaults(batches=None)
    p.add_argument("--all", action="store_true", help=f"the whole held-out part (default: {BATCHES} batches)")
    p.add_argument("--passes", metavar="N|N,N,…|FILE", help="fixed passes of adaptive models, or a file of measure")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")
    add_device_flags(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and print."""
    arguments = parser().parse_args(argv)
    if arguments.all and arguments.batches is not None:
        raise Refused(f"--all and --batches {arguments.batches} exclude each other; leave one out")
    refuse_all(wrong_process_flags(arguments), "these arguments do not go together:")
    batches = None if arguments.all else BATCHES if arguments.batches is None else arguments.batches
    with joined(arguments) as team:
        passes, mesh = team.agree(lambda: (read_passes(arguments.passes), mesh_of(arguments)))
        result = evaluate_checkpoints(
            arguments.checkpoint, text_config(arguments), batches, passes, mesh=mesh, team=team,
            say=lambda line: print(line, file=sys.stderr, flush=True) if team.first else None,
        )  # fmt: skip
        if team.first:
            print(json.dumps(result, allow_nan=False) if arguments.json else "\n".join(report_lines(result)))
    return 0


if __name__ == "__main__":
    run_command(main)
