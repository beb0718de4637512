"""`python -m gt_jax.calibrate SRC GROWN DST`: fit the gains of a grown model to its source, a few dozen numbers.

- DST is GROWN with other `gain` parameters; every other tensor of the model is the same, byte for byte. (Of a run that
  trained a grown model on, the model is taken and the optimizer is not.)
- The gains are fitted on the training part of the text, the losses are of its held-out part, which the fit never sees.
- Devices share both models and the rows (--data, --fsdp, --tensor), several processes too: the same command with
  --coordinator HOST:PORT --processes N --process I in each. A fit holds the columns of one batch, however many batches.
- The mathematics and what the objectives mean: gt_jax.growth.calibration.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gt_jax.devices.flags import add_device_flags, mesh_of, wrong_process_flags
from gt_jax.devices.precision import add_precision_flag, computing
from gt_jax.devices.program_cache import add_cache_flag, keep_programs
from gt_jax.errors import Failed, Refused, deliver, refuse_all, run_command, say
from gt_jax.files import local_path
from gt_jax.options import whole

if TYPE_CHECKING:
    from gt_jax.configs.data import Weight
    from gt_jax.devices.processes import ProcessGroup


def calibrate(
    source: Path, grown: Path, target: Path, *, text: Sequence[str] = (), tfds: str | None = None,
    tfds_dir: str | None = None, json_lines: Sequence[str] = (), tasks: Sequence[str] = (), mix: Sequence[Weight] = (),
    tokenizer: str | None = None, sequence_length: int | None = None, batches: int = 8,
    progress: Callable[[str], None] | None = None, group: ProcessGroup | None = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Fit on `batches` training batches, write `target`, and return the object it keeps under `calibrated`.

    `options` are those of `calibrate_gains`: objective, iterations, ridge. Raises `Refused`, with nothing written, for
    checkpoints that do not belong together, text that cannot be read, rows that the mesh does not divide, and a target
    that exists. Both models are laid out over the mesh of the context; every process of a `group` calls it.
    """
    from gt_jax.checkpoints import checkpoint
    from gt_jax.checkpoints.folders import UNFINISHED, parent_made
    from gt_jax.checkpoints.leftovers import clear_save
    from gt_jax.checkpoints.lock import only_writer
    from gt_jax.devices.processes import ProcessGroup

    group = group or ProcessGroup()
    named_places = group.agree(lambda: [str(checkpoint.resolve(path)) for path in (source, grown)])
    # one step of a run for all that follows, in every process: a newer one may come between
    places = [Path(place) for place in group.gather(named_places)[0]]
    pair = group.agree(lambda: _belonging(source, grown, target, batches, places))
    named: dict[str, Any] = {"text": tuple(text), "tfds": tfds, "tfds_dir": tfds_dir, "json_lines": tuple(json_lines),
                             "tasks": tuple(tasks), "mix": tuple(mix), "tokenizer": tokenizer,
                             "sequence_length": sequence_length}
    with contextlib.ExitStack() as stack:
        group.agree(lambda: stack.enter_context(parent_made(target)))
        group.on_first(lambda: _refuse_other_values(pair.grown, grown, places[0]))
        stack.enter_context(only_writer(target))  # before the minutes of the fit: of two jobs one would fit for nothing
        group.on_first(lambda: clear_save(target.with_name(target.name + UNFINISHED)))
        return _fitted(source, grown, target, pair, named, batches, progress or (lambda line: None), group, **options)


class _Pair(NamedTuple):
    """Two checkpoints that belong together: where they are, the plan between them, and the metadata of each."""

    places: Sequence[Path]
    plan: Any
    source: dict[str, Any]
    grown: dict[str, Any]


def _fitted(
    source: Path, grown: Path, target: Path, pair: _Pair, named: Mapping[str, Any], batches: int,
    say: Callable[[str], None], group: ProcessGroup, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Fit and write: `calibrate` behind what it refuses before a value is read, as the only writer of `target`."""
    from gt_jax.checkpoints import checkpoint
    from gt_jax.configs.lineage import LINEAGE, carried
    from gt_jax.devices.sharding import Rules, global_batch
    from gt_jax.evaluation.held_out_rows import refuse_nothing_asked
    from gt_jax.evaluation.loading import data_config, names_text, text_note
    from gt_jax.evaluation.model_files import load
    from gt_jax.growth.calibration import calibrate_gains
    from gt_jax.text.batches import Text
    from gt_jax.text.data import Data, open_data, short_parts
    from gt_jax.text.tokenizers import chosen_tokenizer
    from gt_jax.training.step import evaluate, make_evaluation

    (of_source, of_grown), plan, source_metadata, metadata = pair
    rules = Rules()

    def prepare() -> Text | Data:
        # all that the source was asked in the end: a curriculum begins with what it has long known
        data = data_config(source_metadata, named, source).replace(curriculum_rows=0)
        chosen_tokenizer(metadata, data.tokenizer, grown)
        reading = open_data(data)
        _refuse_mesh(reading.config.batch_size, *pair.places)
        return reading

    reading = group.agree(prepare)
    by_part = reading.held_out_by_part(batches)
    refuse_nothing_asked([batch for of_part in by_part.values() for batch in of_part])
    for note in (text_note(source_metadata, reading, source, names_text(named)),
                 text_note(metadata, reading, grown, True), *short_parts(reading, batches, by_part)):  # fmt: skip
        if note is not None:  # a grown model may have been trained on, on another part of the text
            say(f"note: {note}")
    (shallow, shallow_variables, _), (deep, deep_variables, _) = load(of_source, rules), load(of_grown, rules)
    stream = reading.train()
    fitted = [global_batch(batch, rules) for _, batch in zip(range(batches), stream, strict=False)]
    held_out = [global_batch(batch, rules) for of_part in by_part.values() for batch in of_part]
    say(f"{reading.summary()}; fitting {len(deep.depth)} gains on {len(fitted)} batches")
    result, report = calibrate_gains(
        shallow, shallow_variables, deep, deep_variables, plan, fitted, rules, held_out=held_out, progress=say,
        **options,
    )  # fmt: skip
    run_source, run_target = make_evaluation(shallow, rules), make_evaluation(deep, rules)
    loss, before, after = (evaluate(*pair, held_out) for pair in (
        (run_source, shallow_variables), (run_target, deep_variables), (run_target, result)))  # fmt: skip
    gaps = {f"gap_{when}": of / loss - 1 if loss else None for when, of in (("before", before), ("after", after))}
    losses = {"source": loss, "before": before, "after": after, **gaps}
    if after > before:
        say(f"note: the held-out loss rises from {before:.4f} to {after:.4f}; the {len(fitted)} batches of the fit "
            "say too little of the held-out part: give more --batches, or keep GROWN as it is")
    calibrated = {"source": str(of_source), "grown": str(of_grown),
                  "text": reading.summary(), "files": reading.files(), "data": stream.state(), "batches": batches,
                  "losses": losses, **report}  # fmt: skip
    made = {"config": metadata["config"], "kind": "calibrated", "step": metadata.get("step", 0)}
    try:
        checkpoint.save(target, result, {**made, "calibrated": calibrated, LINEAGE: carried(metadata)}, held=True)
    except (OSError, Failed, Refused):  # minutes of work are not lost for a full disk
        say(f"DST is not written; the gains that were fitted, by layer: {json.dumps(report['gains']['after'])}")
        raise
    return calibrated


def _refuse_mesh(rows: int, *paths: Path) -> None:
    """Raise `Refused` for all that the mesh of the context cannot cut evenly."""
    from gt_jax.devices.sharding import Rules, current_sizes
    from gt_jax.evaluation.model_files import open_checkpoint
    from gt_jax.training.divisibility import indivisible_fields

    wrong = [f"{path}: {line}" for path in paths
             for line in indivisible_fields(open_checkpoint(path).config, rows, current_sizes(), Rules())]
    refuse_all(wrong, "the mesh does not fit:")


def _belonging(source: Path, grown: Path, target: Path, batches: int, places: Sequence[Path]) -> _Pair:
    """SRC and GROWN, which `places` are; raises `Refused` for all that can be wrong before a value is read."""
    from gt_jax.evaluation.model_files import open_checkpoint
    from gt_jax.growth.calibration import mismatches
    from gt_jax.growth.provenance import stored_plan

    if batches < 1:
        raise Refused(f"--batches is {batches}; at least one is needed")
    if os.path.lexists(target):
        raise Refused(f"DST {target} exists; name a new folder")
    for place in places:
        if place in target.resolve().parents:
            raise Refused(f"DST {target} lies inside the checkpoint {place}; choose a place outside of it")
    shallow, deep = (open_checkpoint(place) for place in places)
    plan = stored_plan(deep.metadata, grown)
    refuse_all(mismatches(shallow.config, deep.config, plan), f"{grown} was not grown from {source}:")
    return _Pair(places, plan, shallow.metadata, deep.metadata)


def _refuse_other_values(metadata: dict[str, Any], grown: Path, source: Path) -> None:
    """Raise `Refused` where GROWN's metadata name other values than those in `source`; reads all of them."""
    from gt_jax.configs.lineage import newest
    from gt_jax.growth.provenance import changed_content_hash

    if changed_content_hash(metadata, source) is not None:
        grown_from = newest(metadata, "grown_from")
        raise Refused(f"{grown} was not grown from the values in {source} (their hash differs), but from "
                      f"{grown_from.get('source')} at step {grown_from.get('step')}; give that one")


def report_lines(result: dict[str, Any], target: Path) -> list[str]:
    """The result as lines for a reader."""
    from gt_jax.monitoring.metrics import table

    losses, held, gains = result["losses"], result["held_out"], result["gains"]
    before, after = ("no gap to 0" if (gap := losses[f"gap_{when}"]) is None else f"{100 * gap:+.2f} %"
                     for when in ("before", "after"))  # fmt: skip
    sync = [[one["target"], one["source"], f"{one['before']:.4f}", f"{one['after']:.4f}"] for one in held["sync"]]
    rows = [[layer, f"{before:.4f}", f"{after:.4f}"]
            for layer, (before, after) in enumerate(zip(gains["before"], gains["after"], strict=True))]  # fmt: skip
    return [
        f"held-out loss of the source {losses['source']:.4f}, of the grown model {losses['before']:.4f} "
        f"({before}), calibrated {losses['after']:.4f} ({after})",
        f"KL to the source {held['kl']['before']:.5f} -> {held['kl']['after']:.5f} nats a token",
        f"objective {result['objective']}, {result['iterations']} steps on {result['fitted']['tokens']} tokens of "
        f"{result['text']}",
        "", *table(sync, ["after target layer", "source layer", "distance before", "after"]).splitlines(),
        "", *table(rows, ["layer", "gain before", "after"]).splitlines(), f"written to {target}",
    ]  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from gt_jax.configs.calibration import ITERATIONS, OBJECTIVE, OBJECTIVES, RIDGE
    from gt_jax.evaluation.loading import add_text_arguments

    p = argparse.ArgumentParser(
        prog="python -m gt_jax.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("source", type=local_path, metavar="SRC", help="the adaptive checkpoint")
    p.add_argument("grown", type=local_path, metavar="GROWN", help="the checkpoint grown from it")
    p.add_argument("target", type=local_path, metavar="DST", help="checkpoint to write; must not exist")
    add_text_arguments(p, "the gains are fitted on their training part, the losses are of their held-out part",
                       "training batches to fit on, and held-out batches for the losses")
    p.add_argument("--objective", choices=OBJECTIVES, default=OBJECTIVE,
                   help="kl: predictions; blocks: hidden states where all copies of the layers so far are done; final: "
                   f"hidden state at the end ({OBJECTIVE})")
    p.add_argument("--iterations", type=whole, default=ITERATIONS, metavar="N",
                   help=f"Gauss-Newton steps at most ({ITERATIONS})")
    p.add_argument("--ridge", type=float, default=RIDGE, metavar="R", help=f"damping of a step ({RIDGE})")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")
    add_precision_flag(p)
    add_device_flags(p)
    add_cache_flag(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate and print; 0 when DST is written."""
    arguments = parser().parse_args(argv)
    refuse_all(wrong_process_flags(arguments), "these arguments do not go together:")
    keep_programs(arguments)
    from gt_jax.devices.processes import process_group

    with process_group(arguments) as group, computing(arguments.matmul_precision, group.first):
        _calibrate(arguments, group)
    return 0


def _calibrate(arguments: argparse.Namespace, group: ProcessGroup) -> None:
    """Everything after the command line, in each process of the group; the first one prints."""
    import jax

    from gt_jax.devices.sharding import mesh_for_rows
    from gt_jax.evaluation.loading import text_config

    started = time.monotonic()
    with jax.set_mesh(group.agree(lambda: mesh_of(arguments)) or mesh_for_rows(1)):
        result = calibrate(
            arguments.source, arguments.grown, arguments.target, batches=arguments.batches,
            objective=arguments.objective, iterations=arguments.iterations, ridge=arguments.ridge,
            progress=lambda line: say(line) if group.first else None, group=group,
            **(text_config(arguments) or {}),
        )  # fmt: skip
    shown = {"target": str(arguments.target), **result}
    lines = [json.dumps(shown, allow_nan=False)] if arguments.json else report_lines(result, arguments.target)
    if group.first:
        say(f"{time.monotonic() - started:.0f} seconds")
        deliver("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
