"""`python -m gt_jax.train RUN`: train a model, by default the adaptive `tiny` on the Python library's sources.

python -m gt_jax.train runs/a --preset tiny --steps 400
python -m gt_jax.train runs/a --resume
python -m gt_jax.train runs/b --start grown --steps 200 --text story.txt
python -m gt_jax.train runs/c --preset tiny_3b --model changes.json
python -m gt_jax.train runs/d --start grown --thaw under-served --thaw-steps 200
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from gt_jax.devices.flags import add_mesh_flags, add_process_flags, wrong_process_flags
from gt_jax.devices.precision import add_precision_flag
from gt_jax.devices.program_cache import add_cache_flag, keep_programs
from gt_jax.errors import Refused, refuse_all, run_command, say
from gt_jax.files import local_name, local_path
from gt_jax.options import whole
from gt_jax.training.depth_flags import (
    add_gate_flags,
    add_price_flags,
    depth_misfits,
    hardened,
    with_forced_passes,
    with_gates,
    with_price,
)

UNDER_SERVED = "under-served"


def parser() -> argparse.ArgumentParser:
    """The command line; a flag that is not given leaves the default, or with --resume the run's own value."""
    from gt_jax.configs.model import Remat
    from gt_jax.configs.run import MomentsOf
    from gt_jax.text.flags import add_source_flags

    p = argparse.ArgumentParser(
        prog="python -m gt_jax.train", description="Train a language model that decides its depth."
    )
    p.add_argument("run", type=local_path, help="directory of the run: config, metrics, checkpoints")
    p.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run")
    model = p.add_argument_group("model")
    model.add_argument("--preset", help="tiny (default), small, tiny_3b, 3b, ...; see python -m gt_jax.describe --help")
    model.add_argument("--model", type=local_path, metavar="FILE",
                       help="JSON object of config fields to change, nested as describe --json prints them; null: off")
    model.add_argument("--layout", help="another depth, for example DDDG*3")
    add_gate_flags(model)
    model.add_argument("--plain", action="store_true", help="no adaptive depth: every layer runs once")
    model.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype")
    model.add_argument("--start", type=local_path,
                       help="checkpoint to start from, for example a grown one; brings its own config")
    model.add_argument("--moments", choices=get_args(MomentsOf),
                       help="the optimizer's moments that a run with --start begins with: those that it holds, else "
                       "fresh ones")
    model.add_argument("--remat", choices=get_args(Remat), help="what the backward pass computes again")
    data = p.add_argument_group("data")
    add_source_flags(data, "text files, folders of tokens, or JSON lines in *.jsonl (default: the Python library's "
                     "sources)")  # fmt: skip
    data.add_argument("--curriculum", type=float, metavar="F", help="the hardest difficulty of the tasks rises over "
                      "this fraction of the run (0: all difficulties from the start)")  # fmt: skip
    data.add_argument("--tokenizer", type=local_name, help="bytes, a tokenizer.json, a SentencePiece .model or their "
                      "folder (default: what --start was trained with, else bytes)")  # fmt: skip
    data.add_argument("--sequence-length", type=whole)
    data.add_argument("--batch-size", type=whole, help="rows a step")
    data.add_argument("--held-out", type=float, help="share of the text that is only evaluated on")
    train = p.add_argument_group("training")
    train.add_argument("--steps", type=whole)
    train.add_argument("--seed", type=whole, help="of initial weights and data order")
    train.add_argument("--learning-rate", type=float)
    train.add_argument("--schedule", choices=("cosine", "wsd"))
    train.add_argument("--warmup", type=float, help="fraction of the run")
    train.add_argument("--weight-decay", type=float)
    add_price_flags(train)
    train.add_argument("--thaw", metavar=f"{UNDER_SERVED}|LAYERS",
                       help="at first only these layers train, counted from 0, for example 3,7,11; under-served: the "
                       "copies of the layers to which the growth gave less than they asked for")
    train.add_argument("--thaw-steps", type=whole, metavar="N", help="how long; then everything trains (200)")
    train.add_argument("--evaluate-every", type=whole)
    train.add_argument("--checkpoint-every", type=whole)
    train.add_argument("--keep", type=whole, help="checkpoints kept")
    train.add_argument("--accumulate", type=whole, metavar="N", help="run each batch in N parts, for less memory")
    add_precision_flag(train, None)
    train.add_argument("--tensorboard", action="store_true", help="write RUN/tensorboard too (needs tensorboardX)")
    add_process_flags(p.add_argument_group("several processes, each with its own devices"))
    add_mesh_flags(p.add_argument_group("mesh (default: all devices on data)"))
    add_cache_flag(p)
    return p


def asked_config(arguments: argparse.Namespace) -> Any:
    """The RunConfig that the words ask for.

    To resume: words that say what the run said when it had fewer steps, or says now, ask for more --steps and nothing
    else, whatever more steps have made of its fractions. So any command that made it can be given again.
    """
    from gt_jax.training.run_directory import trainings_before

    base = default_config(arguments)
    if arguments.resume and arguments.steps is not None:
        for before in (base.train, *trainings_before(arguments.run, base)):
            then = argparse.Namespace(**{**vars(arguments), "steps": before.steps})
            begun = base.replace(train=before)
            with contextlib.suppress(Refused):  # of fractions that the run has now; said below if nothing fits
                if run_config(then, begun) == begun:
                    return base.replace(train=base.train.replace(steps=arguments.steps))
    return run_config(arguments, base)


def run_config(arguments: argparse.Namespace, base: Any) -> Any:
    """`base` (a RunConfig) with the flags that were given."""
    from gt_jax.configs.run import differences
    from gt_jax.text.token_folder import own_tokenizer

    given = {name: value for name, value in vars(arguments).items() if value is not None and value is not False}

    def pick(*names: str) -> dict[str, Any]:
        return {name: given[name] for name in names if name in given}

    model, train = with_model_flags(base.model, arguments), base.train
    if note := hardened(base.model, model, arguments):
        say(note)
    optimizer = train.optimizer.replace(**pick("learning_rate", "schedule", "warmup", "weight_decay"))
    price, optimizer = with_price(train.price, optimizer, arguments)
    price = with_forced_passes(price, arguments.forced_passes, arguments.forced_until, arguments.curriculum)
    optimizer = optimizer.replace(**pick("halting_scale"))
    refuse_all(depth_misfits(model.adaptive, arguments), "the model's depth cannot be steered so:")
    own = pick("steps", "seed", "evaluate_every", "checkpoint_every", "keep", "accumulate", "moments",
               "matmul_precision")  # fmt: skip
    start = {"start": str(Path(given["start"]).resolve())} if "start" in given else {}
    thaw = thaw_config(arguments, train.thaw, start.get("start", base.start))
    train = train.replace(**own, optimizer=optimizer, price=price, thaw=thaw)
    sources = {name: _from_anywhere(name, value) for name, value in named_sources(arguments).items()}
    shape = pick("sequence_length", "batch_size", "held_out", "seed")
    brought = None if start or arguments.resume else own_tokenizer(sources.get("text", ()))
    if (tokenizer := given.get("tokenizer", brought)) is not None:
        shape |= {"tokenizer": _from_anywhere("tokenizer", tokenizer)}
    data = with_curriculum(base.data.replace(**sources, **shape), arguments.curriculum, train.steps)
    begun = start and not arguments.resume and arguments.curriculum is not None and data.curriculum_rows
    if begun and not differences(base.data.replace(batch_size=data.batch_size), data):
        raise Refused(f"--curriculum {arguments.curriculum}: that is over the {data.curriculum_rows:,} rows of the "
                      "training of --start, in which it goes on where that stopped; leave it out, or draw other "
                      "rows with --seed")  # fmt: skip
    return base.replace(model=model, train=train, data=data, **start)


def with_model_flags(model: Any, arguments: argparse.Namespace) -> Any:
    """`model` (a ModelConfig) with --model, --layout, --remat, --dtype, --plain, --gates and --weights.

    Raises `Refused` where one of them would change a field that the file of --model names.
    """
    from gt_jax.configs.json_config import changed_by_file, refuse_overruled

    given = {"layout": ("layout", arguments.layout), "remat": ("remat", arguments.remat),
             "dtype": ("compute_dtype", arguments.dtype)}  # fmt: skip
    fields = {field: value for field, value in given.values() if value is not None}
    said = {f"--{flag} {value}": {field: value} for flag, (field, value) in given.items() if value is not None}
    if arguments.model is not None:
        layout = {} if arguments.layout is None else {"layout": arguments.layout}  # the file's fields must fit it
        model = changed_by_file(model, arguments.model, **layout)
    model = model.replace(**fields)
    if arguments.plain:
        model = model.plain
        said["--plain"] = model.to_json()
    for flag, sees, weights in (("gates", arguments.gates, None), ("weights", None, arguments.weights)):
        model = with_gates(model, sees, weights)
        if sees or weights:
            said[f"--{flag} {sees or weights}"] = model.to_json()
    refuse_overruled(arguments.model, said)
    return model


def named_sources(arguments: argparse.Namespace) -> dict[str, Any]:
    """`source_fields`; to resume a run, of the sources that are named alone: the others are what they were."""
    from gt_jax.text.flags import source_fields

    found = source_fields(arguments)
    if not arguments.resume:
        return found
    named = {"text": arguments.text, "json_lines": arguments.text, "tasks": arguments.task, "tfds": arguments.tfds,
             "tfds_dir": arguments.tfds_dir, "mix": arguments.mix}  # fmt: skip
    return {name: value for name, value in found.items() if named.get(name)}


def _from_anywhere(name: str, value: Any) -> Any:
    """A field of the data that names files, with their whole paths: they are read again from other folders."""
    from gt_jax.configs.data import BYTES

    if name in ("text", "json_lines"):
        return tuple(map(os.path.abspath, value))
    return os.path.abspath(value) if name in ("tfds_dir", "tokenizer") and value and value != BYTES else value


def with_curriculum(data: Any, fraction: float | None, steps: int) -> Any:
    """`data` (a DataConfig) with the rows that --curriculum means in a run of so many steps, as it is without it."""
    if fraction is None:
        return data
    if not 0 <= fraction <= 1:
        raise Refused(f"--curriculum is {fraction}; it is a fraction of the run, from 0 to 1, for example 0.3")
    if not data.tasks:
        raise Refused("--curriculum lets the difficulty of tasks rise; name one with --task")
    return data.replace(curriculum_rows=round(fraction * steps * data.batch_size))


def thaw_config(arguments: argparse.Namespace, stored: Any, start: str | None) -> Any:
    """The ThawConfig that --thaw and --thaw-steps ask for, else `stored`; raises `Refused` where they do not fit."""
    from gt_jax.configs.thaw import ThawConfig

    steps = {} if arguments.thaw_steps is None else {"steps": arguments.thaw_steps}
    if arguments.thaw is None:
        if steps and stored is None:
            raise Refused(f"--thaw-steps is how long --thaw lasts; give --thaw {UNDER_SERVED}, or --thaw 3,7,11")
        return stored.replace(**steps) if steps else stored
    if stored is not None:
        steps = {"steps": stored.steps, **steps}
    if arguments.thaw == UNDER_SERVED:
        return ThawConfig(layers=under_served_children(start), **steps)
    if not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", arguments.thaw):
        raise Refused(f"--thaw {arguments.thaw!r} is neither {UNDER_SERVED} nor layers from 0, for example 3,7,11")
    return ThawConfig(layers=tuple(map(int, arguments.thaw.split(","))), **steps)


def under_served_children(start: str | None) -> tuple[int, ...]:
    """The target layers to train first, by the plan that the starting checkpoint carries; named on stderr."""
    from gt_jax.checkpoints.opened import open_checkpoint
    from gt_jax.growth.provenance import stored_plan
    from gt_jax.growth.under_served import under_served

    if start is None:
        raise Refused(f"--thaw {UNDER_SERVED} reads the plan of a grown checkpoint; name it with --start")
    found = under_served(stored_plan(open_checkpoint(start).metadata, start))
    if not found:
        raise Refused(f"--thaw {UNDER_SERVED}: the plan of {start} gave every layer what it asked for; leave out "
                      "--thaw, or name target layers, for example --thaw 3,7,11")
    for one in found:
        say(f"thaw: {one}")
    return tuple(sorted(layer for one in found for layer in one.children))


def default_config(arguments: argparse.Namespace) -> Any:
    """What a run is before its flags: its own config when resuming, else the preset's or the starting checkpoint's."""
    from gt_jax.checkpoints.opened import open_checkpoint
    from gt_jax.configs.data import DataConfig
    from gt_jax.configs.lineage import trainings
    from gt_jax.configs.presets import preset
    from gt_jax.configs.run import MomentsOf, RunConfig, TrainConfig, read_run_config
    from gt_jax.configs.standing import gone_on, standing, with_opening
    from gt_jax.configs.tokenizer_file import known_tokenizer
    from gt_jax.models.language_model import abstract
    from gt_jax.text.token_folder import own_tokenizer
    from gt_jax.text.tokenizers import chosen_tokenizer
    from gt_jax.training.moments import lacking_moments

    if arguments.resume:
        stored = read_run_config(arguments.run)
        if arguments.preset is not None and with_model_flags(preset(arguments.preset), arguments) != stored.model:
            raise Refused(f"{arguments.run} does not train preset {arguments.preset}; leave --preset out to resume it")
        return resumed(stored, arguments)
    if arguments.start is None:
        return RunConfig(model=preset("tiny" if arguments.preset is None else arguments.preset))
    if arguments.preset is not None or arguments.layout or arguments.plain or arguments.model or arguments.gates:
        raise Refused("--start brings its own model; leave out --preset, --model, --layout, --gates and --plain")
    place, start = str(arguments.start), open_checkpoint(arguments.start)
    named = arguments.tokenizer
    if named is None and known_tokenizer(start.metadata) is None:  # as of one converted without: that of the tokens
        named = _from_anywhere("tokenizer", own_tokenizer(named_sources(arguments).get("text", ())))
    tokenizer = chosen_tokenizer(start.metadata, named, f"--start {arguments.start}")
    model, runs = start.config, trainings(start.metadata)
    moments: MomentsOf = "fresh" if lacking_moments(abstract(model)["params"], start.tensors) else "carried"
    moments = arguments.moments or moments
    if not runs:
        train = with_opening(TrainConfig(moments=moments), start.metadata)
        return RunConfig(model=model, train=train, data=DataConfig(tokenizer=tokenizer), start=place)
    before, at = RunConfig.from_json(runs[0]["run"]), standing(start.metadata)
    train = TrainConfig(optimizer=before.train.optimizer, price=before.train.price, moments=moments)
    if at is not None:
        steps = TrainConfig.steps if arguments.steps is None else arguments.steps
        train = gone_on(before.train, at.step, steps, arguments.learning_rate, moments)
    train = with_opening(train, start.metadata)
    return RunConfig(model=model, data=before.data.replace(tokenizer=tokenizer), train=train, start=place)


def resumed(stored: Any, arguments: argparse.Namespace) -> Any:
    """`stored` (a RunConfig) with text and tokenizer where its newest step has them: its own copy of the tokenizer
    where the file is another or not there, the text where it lay when that step was trained.

    Raises `Refused` where other text is named for a run without a step: nothing would know that it is the same. And for
    a tokenizer of other tokens.
    """
    from gt_jax.checkpoints.folders import Damaged
    from gt_jax.checkpoints.opened import open_checkpoint
    from gt_jax.configs.data import DataConfig
    from gt_jax.configs.lineage import TOKENIZER_FILE
    from gt_jax.configs.tokenizer_file import read_tokenizer_file
    from gt_jax.text.tokenizers import chosen_tokenizer

    named = {**named_sources(arguments), **({"tokenizer": arguments.tokenizer} if arguments.tokenizer else {})}
    moved = [name for name in ("text", "json_lines", "tfds_dir", "tokenizer") if name in named
             and _from_anywhere(name, named[name]) != _from_anywhere(name, getattr(stored.data, name))]  # fmt: skip
    try:
        metadata = open_checkpoint(arguments.run).metadata
    except Damaged as error:
        if "tokenizer" in moved:
            raise Refused(f"--tokenizer {arguments.tokenizer}: {error}, so nothing says whether its tokens are those "
                          "of the run; leave it out") from error
        return stored  # an older step may be whole: the training finds it
    except Refused:
        if moved:
            raise Refused(f"{arguments.run} has no step yet that would know whether data.{', data.'.join(moved)} hold "
                          "what they did; name them as it was started, or start another run") from None  # fmt: skip
        return stored
    if arguments.tokenizer is not None:  # a position in a task knows nothing of the tokens that its symbols are
        chosen_tokenizer(metadata, arguments.tokenizer, arguments.run)
    data = DataConfig.from_json(metadata["run"]["data"]) if isinstance(metadata.get("run"), dict) else stored.data
    if (file := metadata.get(TOKENIZER_FILE)) is not None:
        try:
            own = read_tokenizer_file(data.tokenizer).sha256 == file["sha256"]
        except Refused:
            own = False
        data = data.replace(tokenizer=data.tokenizer if own else file["path"])
    return stored.replace(data=stored.data.replace(text=data.text, json_lines=data.json_lines, tfds_dir=data.tfds_dir,
                                                   tokenizer=data.tokenizer))  # fmt: skip


def start_folder(arguments: argparse.Namespace) -> str | None:
    """The one step that --start names, for config, plan, lineage and values: its run may save a newer one meanwhile.

    To resume, --start may be given again: it is the step that the run began with.
    """
    from gt_jax.checkpoints.folders import resolve
    from gt_jax.configs.run import read_run_config

    if arguments.start is None:
        return None
    given = Path(arguments.start).resolve()
    begun = read_run_config(arguments.run).start if arguments.resume else None
    if begun is not None and given in (Path(begun), Path(begun).parent):
        return begun
    return str(resolve(given).resolve())


def main(argv: Sequence[str] | None = None) -> int:
    """Train; 0 when the last step is done and saved."""
    arguments = parser().parse_args(argv)
    refuse_all(wrong_process_flags(arguments), "these arguments do not go together:")
    keep_programs(arguments)
    from gt_jax.devices.processes import process_group

    with process_group(arguments) as group:
        return _train(arguments, group)


def _train(arguments: argparse.Namespace, group: Any) -> int:
    """Everything after the command line, in each process of the group."""
    import jax

    from gt_jax.devices.meshes import MESH_AXES
    from gt_jax.devices.sharding import make_mesh
    from gt_jax.training.loop import train_run
    from gt_jax.training.stopping import Interrupted

    arguments.start = group.gather(group.agree(lambda: start_folder(arguments)))[0]
    config = group.agree(lambda: asked_config(arguments))
    asked = {axis: getattr(arguments, f"mesh_{axis}") for axis in MESH_AXES}
    given = {axis: size for axis, size in asked.items() if size is not None}
    mesh = group.agree(lambda: make_mesh(**given))
    with jax.set_mesh(mesh), contextlib.suppress(Interrupted):  # asked to stop, and saved: that is done, too
        train_run(
            arguments.run, config, resume=arguments.resume, group=group, tensorboard=arguments.tensorboard
        )
    return 0


if __name__ == "__main__":
    run_command(main)
