"""The training loop: batches in, steps out, metrics one step late so that the device never waits; resumable.

A run directory holds config.json, metrics.jsonl and one folder a checkpoint, RUN/<step>. The checkpoint carries the
data position; resuming drops the metric lines after it, so a killed run ends with the bytes of an uninterrupted one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gt_jax import checkpoint
from gt_jax.alerts import Watch
from gt_jax.config import ModelConfig
from gt_jax.data import Text, open_text
from gt_jax.errors import Failed, Refused, refuse_all
from gt_jax.files import write_whole
from gt_jax.flops import utilisation
from gt_jax.metrics import Recorder
from gt_jax.model import abstract, initialise
from gt_jax.sharding import Rules, with_devices
from gt_jax.tensorboard import TensorBoard, writer_module
from gt_jax.training.config import RunConfig, TrainConfig, differences
from gt_jax.training.optimizer import make_optimizer
from gt_jax.training.state import TrainState, new_state
from gt_jax.training.step import Batch, evaluate, make_evaluation, make_step
from gt_jax.typing import Tree


class Diverged(Failed):
    """The loss or its gradient is no longer a finite number."""


class Trainer(NamedTuple):
    """The compiled pieces of one model's training; models of one shape share them."""

    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
    evaluation: Callable[..., Any]
    new_state: Callable[[Tree], TrainState]


def make_trainer(model: ModelConfig, train: TrainConfig, rules: Rules | None = None) -> Trainer:
    """Optimizer, step and evaluation of a model."""
    rules = rules or Rules()
    optimizer = make_optimizer(train.optimizer, train.steps)
    return Trainer(
        make_step(model, train.price, optimizer, train.steps, rules, train.seed, train.thaw),
        make_evaluation(model, rules),
        lambda variables: new_state(variables, optimizer, train.price),
    )


def fit(
    trainer: Trainer,
    state: TrainState,
    batches: Iterator[Batch],
    steps: int,
    *,
    record: Callable[[int, dict[str, Any]], None],
    due: Callable[[int], bool] = lambda step: False,
    after: Callable[[int, TrainState], None] = lambda step, state: None,
) -> TrainState:
    """Train until `steps` updates are applied; raises `Diverged` at the first loss that is not finite.

    `record(step, metrics)` hears of step k once step k + 1 is under way, or before `after(k, state)`, which runs at the
    steps that are `due`: what a checkpoint follows is recorded before the checkpoint is written.
    """
    pending: tuple[int, dict[str, Any]] | None = None
    for step in range(int(state.step) + 1, steps + 1):
        state, metrics = trainer.step(state, next(batches))
        if pending is not None:
            _report(*pending, record)
        pending = (step, metrics)
        if due(step):
            _report(*pending, record)
            pending = None
            after(step, state)
    if pending is not None:
        _report(*pending, record)
    return state


def _report(step: int, metrics: dict[str, Any], record: Callable[[int, dict[str, Any]], None]) -> None:
    metrics = jax.device_get(metrics)
    record(step, metrics)
    for name in ("total_loss", "gradient_norm"):
        if not math.isfinite(metrics[name]):
            raise Diverged(f"step {step}: {name} is {metrics[name]}; lower --learning-rate, or look at the batch")


def variables_of(state: TrainState) -> Tree:
    """{"params", "statistics"} as the model applies them."""
    return {"params": state.params, "statistics": state.statistics}


def train_run(
    run: Path, config: RunConfig, *, resume: bool = False, show: bool = True, rules: Rules | None = None,
    tensorboard: bool = False,
) -> TrainState:  # fmt: skip
    """Train `config` in the directory `run`; with `resume` go on from its newest checkpoint.

    With `tensorboard` the metrics go to RUN/tensorboard too. Raises `Refused` when `run` is already a run (without
    `resume`), is none (with it), or was of another config.
    """
    _check(run, config, resume)
    if tensorboard:
        writer_module()  # refuses where there is none, before the directory is a run
    rules = rules or Rules()
    refuse_all(rules.misfits(config.model, config.data.batch_size), "the model does not fit this mesh:")
    text = open_text(config.data)
    trainer = make_trainer(config.model, config.train, rules)
    held_out = text.held_out(config.train.evaluation_batches)
    notes: list[str] = []
    steps = checkpoint.RunCheckpoints(run, config.train.keep, notes.append)
    state, before = _start(config, trainer, steps, rules)
    stream = text.train(before.get("data"))
    if not resume:
        _mark(run, config)  # all that can be refused has been: from here on the directory is a run
    length, resumed = config.data.sequence_length, int(state.step) if resume else None
    recorder = Recorder(
        run / "metrics.jsonl", total_steps=config.train.steps, tokens_per_step=config.data.batch_size * length,
        show=show, resume_step=resumed, watch=Watch(config), utilisation=utilisation(config.model, length),
        also=TensorBoard(run / "tensorboard", resumed) if tensorboard else None,
    )  # fmt: skip
    with recorder:
        for note in [*notes, text.summary()]:
            recorder.message(note)
        train = config.train

        def after(step: int, state: TrainState) -> None:
            if _due(step, train.evaluate_every, train.steps):
                loss = evaluate(trainer.evaluation, variables_of(state), held_out)
                recorder.log(step, held_out_loss=loss)
            if _due(step, train.checkpoint_every, train.steps):
                here = _metadata(config, text, stream.state(), state)
                steps.save(step, state._asdict(), {**_origin(before), **here})

        def due(step: int) -> bool:
            return any(_due(step, every, train.steps) for every in (train.evaluate_every, train.checkpoint_every))

        def record(step: int, metrics: dict[str, Any]) -> None:
            recorder.log(step, **metrics)

        return fit(trainer, state, stream, train.steps, record=record, due=due, after=after)


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _metadata(config: RunConfig, text: Text, position: dict[str, Any], state: TrainState) -> dict[str, Any]:
    return {
        "kind": "train",
        "config": config.model.to_json(),
        "run": config.to_json(),
        "text": text.summary(),
        "data": position,
        "price": float(state.price.value),
    }


def _origin(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a run that trains a grown model on keeps of it: where it came from, and how it was calibrated."""
    return {name: metadata[name] for name in ("grown_from", "calibrated") if name in metadata}


def _start(
    config: RunConfig, trainer: Trainer, steps: checkpoint.RunCheckpoints, rules: Rules
) -> tuple[TrainState, dict[str, Any]]:
    """The state to go on from, and the metadata it came with.

    The run's newest checkpoint; before there is one, `config.start` or fresh weights.
    """
    shapes = abstract(config.model, rules)
    state = jax.eval_shape(trainer.new_state, shapes)
    # the optimizer's moments are laid out like the parameters; scalars are whole everywhere
    restored = steps.restore_latest(jax.tree.map(with_devices, state._asdict()))
    if restored is not None:
        _, tree, metadata = restored
        return TrainState(**tree), metadata
    if config.start is None:
        return trainer.new_state(initialise(config.model, config.train.seed, rules)), {}
    _, metadata = checkpoint.describe(config.start)
    return trainer.new_state(checkpoint.load(config.start, shapes)), _origin(metadata)


def _check(run: Path, config: RunConfig, resume: bool) -> None:
    """Refuse a directory that is taken, or to resume with another config."""
    if resume:
        wrong = differences(read_run_config(run), config)
        refuse_all(wrong, f"{run} was started with another config (there and here):")
    elif run.exists() and (not run.is_dir() or any(path.name != "config.json.tmp" for path in run.iterdir())):
        raise Refused(f"{run} exists; resume it with --resume, or give another directory")


def _mark(run: Path, config: RunConfig) -> None:
    """Write RUN/config.json, the mark of a run directory, whole or not at all (a kill may leave config.json.tmp)."""
    file = run / "config.json"
    checkpoint.prepare_parent(file)
    write_whole(file, json.dumps(config.to_json(), indent=1) + "\n")


def read_run_config(run: Path) -> RunConfig:
    """The config of a run directory; raises `Refused` where there is none or it does not parse."""
    file = run / "config.json"
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise Refused(f"{run} is no run directory (it has no config.json); start one without --resume") from error
    except (json.JSONDecodeError, UnicodeDecodeError, NotADirectoryError, IsADirectoryError) as error:
        raise Refused(f"{file} cannot be read as a run's config: {error}") from error
    return RunConfig.from_json(data)
