"""Did a growth keep what was learned? The same batches through two checkpoints, and training on from the second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gt_jax.configs.data import Weight
from gt_jax.configs.lineage import newest, trainings
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.run import RunConfig, TrainConfig
from gt_jax.configs.standing import gone_on, standing, with_opening
from gt_jax.devices.processes import ProcessGroup
from gt_jax.devices.sharding import Rules, current_sizes, global_batch
from gt_jax.errors import Refused, refuse_all
from gt_jax.evaluation.comparison import compare_models
from gt_jax.evaluation.held_out_rows import held_out_rows
from gt_jax.evaluation.loading import data_config, names_text, text_note
from gt_jax.evaluation.model_files import Checkpoint, open_checkpoint
from gt_jax.evaluation.pairs import incomparable, plan_between
from gt_jax.growth.plan import Plan
from gt_jax.monitoring.metrics import json_values
from gt_jax.text.batches import Text
from gt_jax.text.data import Data, open_data
from gt_jax.training.divisibility import indivisible_fields
from gt_jax.training.loop import Diverged, fit, make_trainer, variables_of
from gt_jax.training.step import evaluate
from gt_jax.typing import Tree

Say = Callable[[str], None]


def verify(
    source: Path, target: Path, *, text: Sequence[str] = (), tfds: str | None = None, tfds_dir: str | None = None,
    json_lines: Sequence[str] = (), tasks: Sequence[str] = (), mix: Sequence[Weight] = (),
    tokenizer: str | None = None, sequence_length: int | None = None, batches: int = 8,
    jacobian_rows: int | None = None, jacobian_iterations: int = 20, curve: int = 0, say: Say = lambda line: None,
    group: ProcessGroup | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compare two checkpoints on held-out text (default: the source's own); numbers that are not finite as strings.

    `jacobian_rows` None is as few as the mesh can cut, one on one device; 0 leaves the singular values out. `curve` > 0
    trains the target so many steps more, on the text's training part, with a fresh optimizer. Every process of the
    `group` calls it, on a mesh of the devices of all. Raises `Refused` before anything is computed.
    """
    group = group or ProcessGroup()
    rows = Rules().shards("batch") if jacobian_rows is None else jacobian_rows
    named: dict[str, Any] = {"text": tuple(text), "tfds": tfds, "tfds_dir": tfds_dir, "json_lines": tuple(json_lines),
                             "tasks": tuple(tasks), "mix": tuple(mix), "tokenizer": tokenizer,
                             "sequence_length": sequence_length}

    def prepare() -> tuple[Checkpoint, Checkpoint, Text | Data, TrainConfig | None, Plan | None, str | None]:
        if batches < 1:
            raise Refused(f"--batches is {batches}; at least one is needed")
        if curve < 0:
            raise Refused(f"--curve is {curve}; name a number of steps, 0 trains none")
        shallow, deep = open_checkpoint(source), open_checkpoint(target)
        refuse_all(incomparable(shallow, deep, tokenizer), f"{source} and {target} cannot be compared:")
        reading = open_data(data_config(shallow.metadata, named, source))
        _refuse_rows(reading, shallow, deep, rows, jacobian_iterations)
        train = _training(shallow, deep, curve) if curve else None  # may be refused: before the minutes of work
        return shallow, deep, reading, train, *plan_between(shallow, deep)

    shallow, deep, reading, train, plan, reason = group.agree(prepare)
    held_out, rules, variables = held_out_rows(reading, batches), Rules(), deep.load()
    result = compare_models(
        shallow.config, shallow.load(), deep.config, variables, plan, held_out, rules, say=say,
        jacobian_rows=rows, jacobian_iterations=jacobian_iterations,
    )  # fmt: skip
    known = [text_note(one.metadata, reading, one.path, names_text(named) or one is deep) for one in (shallow, deep)]
    notes = [*(note for note in (reason, *known) if note is not None), *result.pop("notes")]
    more: dict[str, Any] = {}
    if train is not None:
        position = position_of(reading, shallow, deep)
        try:
            more["curve"] = train_curve(deep.config, variables, reading, position, held_out.batches, train, say)
        except Diverged as error:  # what was compared stands
            notes.append(f"there is no curve, training on diverged: {error}")
    whole = {"source": str(source), "target": str(target), "text": reading.summary(), "notes": notes, **result, **more}
    return json_values(whole)


def _refuse_rows(reading: Text | Data, source: Checkpoint, target: Checkpoint, rows: int, iterations: int) -> None:
    size, cuts, wrong = reading.config.batch_size, Rules().shards("batch"), []
    if not 0 <= rows <= size:
        wrong.append(f"--jacobian-rows is {rows}; a batch has {size} rows, and 0 leaves the Jacobians out")
    elif rows % cuts:
        wrong.append(f"--jacobian-rows is {rows}; the mesh cuts rows in {cuts}")
    if iterations < 2:
        wrong.append(f"--jacobian-iterations is {iterations}; at least 2 are needed to see how far they have come")
    for one in (source, target):
        wrong += [f"{one.path}: {line}" for line in indivisible_fields(one.config, size, current_sizes(), Rules())]
    refuse_all(wrong, "this cannot be verified:")


def position_of(reading: Text | Data, source: Checkpoint, target: Checkpoint) -> dict[str, Any] | None:
    """Where a curve of the target begins in the text: after what the target has read of it, else the source."""
    runs = [*trainings(target.metadata), *trainings(source.metadata)]
    return reading.position_after(run.get("data") for run in runs)


def _training(source: Checkpoint, target: Checkpoint, steps: int) -> TrainConfig:
    """That of `steps` steps that go on where the source stood, the default for a source without a run; an adaptive
    target's price is that of its own run, or its source's, or opens the gates of one that was retrofitted last."""
    run, own, at = newest(source.metadata, "run"), newest(target.metadata, "run"), standing(source.metadata)
    train = TrainConfig(steps=steps)
    if run is not None:
        before = RunConfig.from_json(run).train
        train = before.replace(steps=steps, thaw=None) if at is None else gone_on(before, at.step, steps)
    train = train if own is None else train.replace(price=RunConfig.from_json(own).train.price)
    return with_opening(train, target.metadata)


def train_curve(
    config: ModelConfig, variables: Tree, text: Text | Data, position: dict[str, Any] | None, held_out: Sequence[Any],
    train: TrainConfig, say: Say = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Training losses of the steps of `train` with a fresh optimizer on the batches after `position`, and the loss
    after them. The schedule is that over these steps, warm-up included. The variables are used up.
    """
    rules, steps = Rules(), train.steps
    trainer = make_trainer(config, TrainConfig(steps=steps, optimizer=train.optimizer, price=train.price))
    batches = (global_batch(batch, rules) for batch in text.train(position))
    losses: list[list[float]] = []

    def record(step: int, metrics: dict[str, Any]) -> None:
        losses.append([step, float(metrics["loss"])])
        if step % max(1, steps // 10) == 0:
            say(f"training on: step {step}/{steps}, loss {float(metrics['loss']):.4f}")

    state = fit(trainer, trainer.new_state(variables), batches, steps, record=record)
    after = evaluate(trainer.evaluation, variables_of(state), [global_batch(batch, rules) for batch in held_out])
    return {"steps": steps, "learning_rate": train.optimizer.learning_rate, "loss": losses, "held_out_loss": after}
