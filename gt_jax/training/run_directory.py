"""A run's directory: which config may be trained in it, who may write it, and the mark that makes it one.

A run that is resumed has its own config, but for its number of steps, which may grow (`configs.standing.longer`).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.folders import Damaged, refuse_inside, refuse_step_of_run, refuse_temporary_name
from gt_jax.checkpoints.lock import lock_file, only_writer
from gt_jax.checkpoints.runs import RunCheckpoints
from gt_jax.configs.lineage import LINEAGE, earlier
from gt_jax.configs.run import RunConfig, TrainConfig, differences, read_run_config
from gt_jax.configs.standing import longer, plateau_end
from gt_jax.errors import Failed, Refused, refuse_all
from gt_jax.files import explain_full_disk, refuse_address, unfinished_name, write_atomically

SHORTER = "shorter"
"""What the checkpoints of a run that was given more steps call its training as it was before, each time: a list."""


def config_to_train(run: Path, config: RunConfig, resume: bool) -> RunConfig:
    """The config that `run` is trained by; raises `Refused` for a directory that is taken, or for another config."""
    refuse_address(run)
    left = {lock_file(locked(run)).name, unfinished_name(run / "config.json").name,
            "config.json.tmp"}  # by a kill, before the directory was a run; the last one up to version 0.2.0
    if resume:
        stored = read_run_config(run)
        config = _as_lengthened(run, config, stored)
        if config.train.steps > stored.train.steps:
            asked = stored.train.replace(steps=config.train.steps)
            if config.train == asked:
                asked = longer(stored.train, config.train.steps)
                config = config.replace(train=asked)
            stored = stored.replace(train=asked)  # what else was asked for differs from the run as it is, not stretched
        wrong = differences(stored, config)
        refuse_all(wrong, f"{run} was started with another config (there and here; more --steps than there are is the "
                   f"one change that a run takes, and --start {run} begins another run from it):")
        return config
    if os.path.lexists(run) and (not run.is_dir() or any(path.name not in left for path in run.iterdir())):
        raise Refused(f"{run} exists; resume it with --resume, or give another directory")
    refuse_temporary_name(run)
    refuse_inside(run)
    refuse_step_of_run(run)
    return config


def _as_lengthened(run: Path, config: RunConfig, stored: RunConfig) -> RunConfig:
    """`config`, what it says as the run did when it had fewer steps taken for what more steps made of that.

    So the command that made a run longer can be given again, as it is after a kill.
    """
    steps, now = config.train.steps, stored.train.to_json()
    if steps < stored.train.steps or config.train == stored.train.replace(steps=steps):
        return config
    asked = {**config.train.to_json(), "steps": stored.train.steps}
    if any(_is_either(asked, before.to_json(), now) for before in trainings_before(run, stored)):
        return config.replace(train=stored.train.replace(steps=steps))
    return config


def trainings_before(run: Path, stored: RunConfig) -> list[TrainConfig]:
    """What `run`, now `stored`, was trained by when it had fewer steps, each time it was given more."""
    found: list[TrainConfig] = []
    for step in reversed(RunCheckpoints(run).steps()):
        with contextlib.suppress(Refused, OSError):  # whoever reads it says so
            known = map(TrainConfig.from_json, _shorter(checkpoint.describe(run / str(step))[1], stored))
            found += [one for one in known if one not in found]
    return found


def past(metadata: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """What the next checkpoints of a run keep of what came before its training as it is: nothing that is empty."""
    kept = {LINEAGE: earlier(metadata), SHORTER: _shorter(metadata, config)}
    return {name: value for name, value in kept.items() if value}


def _shorter(metadata: Mapping[str, Any], config: RunConfig) -> list[dict[str, Any]]:
    """The trainings, as JSON, that `config` was before its run was given more steps, as a checkpoint of it says."""
    then = metadata.get("run")
    found = [*metadata.get(SHORTER, ()), *([] if then is None else [RunConfig.from_json(then).train.to_json()])]
    return [one for one in found if TrainConfig.from_json(one) != config.train]


def _is_either(asked: Any, before: Any, now: Any) -> bool:
    """Whether every value of a JSON object is that of one of the two others."""
    if not isinstance(asked, dict) or not isinstance(before, dict) or not isinstance(now, dict):
        return asked in (before, now)
    return all(_is_either(value, before.get(name), now.get(name)) for name, value in asked.items())


def locked(run: Path) -> Path:
    """What is locked of a run: a name inside it, for the folder above may not be writable."""
    return run / "run"


def lock(stack: contextlib.ExitStack, run: Path) -> None:
    """Be the only job that writes this run."""
    with explain_full_disk(run, "do it again"):
        stack.enter_context(only_writer(locked(run)))


class SameFolder:
    """The folder of a run, told from another in its place: a save would make anew one that was moved or removed.

    As a context it says so where that is what made another error. Other processes than the first look at nothing.
    """

    def __init__(self, run: Path, first: bool = True) -> None:
        self._run, self._began = run, _identity(run) if first else None

    def check(self) -> None:
        """Raises `Failed` where the run's folder is not the one that it began in."""
        if self._began is not None and _identity(self._run) != self._began:
            raise Failed(f"{self._run} is not the folder any more that this run began in: it was moved or removed. "
                         "Nothing more is written there; what was written went with the folder")  # fmt: skip

    def __enter__(self) -> SameFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, Failed):
            try:
                self.check()
            except Failed as moved:
                raise moved from error


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def mark(run: Path, config: RunConfig) -> None:
    """Write RUN/config.json, the mark of a run directory, whole or not at all, as `write_atomically`."""
    file = run / "config.json"
    with explain_full_disk(run, "start it again"):
        checkpoint.prepare_parent(file)
        write_atomically(file, json.dumps(config.to_json(), indent=1) + "\n")


def plateau_ends(run: Path) -> set[int]:
    """The saved steps that ended the plateau of the run as it was when they were saved: with fewer steps, perhaps."""
    found = set()
    for step in RunCheckpoints(run).steps():
        with contextlib.suppress(Damaged):  # whoever reads it says so
            stored = checkpoint.describe(run / str(step))[1].get("run")
            if stored is not None and plateau_end(RunConfig.from_json(stored).train) == step:
                found.add(step)
    return found
