"""The training loop: batches in, steps out, metrics one step late so that the device never waits; resumable.

A run directory holds config.json, metrics.jsonl and one folder a checkpoint, RUN/<step>. The checkpoint carries the
data position; resuming drops the metric lines after it, so a killed run ends with the bytes of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.leftovers import refuse_taken_names
from gt_jax.checkpoints.runs import RunCheckpoints
from gt_jax.checkpoints.tree_paths import differences as differences_of_trees
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs.data import BYTES
from gt_jax.configs.lineage import LINEAGE, carried, newest, trainings
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.price import PriceConfig
from gt_jax.configs.run import RunConfig, TrainConfig, read_run_config
from gt_jax.configs.standing import Standing, going_on, plateau_end, standing
from gt_jax.devices.precision import products, rounding
from gt_jax.devices.processes import ProcessGroup
from gt_jax.devices.sharding import Rules, current_sizes, global_batch, with_mesh_devices
from gt_jax.errors import Failed, Refused
from gt_jax.files import explain_full_disk
from gt_jax.models.flops import utilisation
from gt_jax.models.language_model import abstract, initialise
from gt_jax.monitoring.alerts import Watch
from gt_jax.monitoring.metrics import Recorder
from gt_jax.monitoring.tensorboard import TensorBoard, writer_module
from gt_jax.text.batches import Text
from gt_jax.text.data import Data, open_data, short_parts
from gt_jax.text.token_bytes import filled, token_table
from gt_jax.training.budget import BudgetState
from gt_jax.training.divisibility import refuse_indivisible
from gt_jax.training.moments import carried_moments
from gt_jax.training.optimizer import make_optimizer
from gt_jax.training.price import PriceState
from gt_jax.training.run_directory import SameFolder, config_to_train, lock, locked, mark, past, plateau_ends
from gt_jax.training.state import TrainState, new_state
from gt_jax.training.step import Batch, held_out_losses, make_evaluation, make_step
from gt_jax.training.stopping import Interrupted, Termination
from gt_jax.typing import Tree

P = ParamSpec("P")
R = TypeVar("R")


class Diverged(Failed):
    """The loss or its gradient was not a finite number for several steps in a row."""


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
        make_step(model, train.price, optimizer, train.steps, rules, train.seed, train.thaw, train.accumulate),
        make_evaluation(model, rules, train.accumulate),
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
    after: Callable[[int, TrainState, bool], None] = lambda step, state, last: None,
    stop: Callable[[int], bool] = lambda step: False,
    patience: Patience | None = None,
) -> TrainState:
    """Train for `steps` steps in all, or until `stop`; raises `Diverged` at the first bad step, or at `patience`'s end.

    `record(step, metrics)` hears of step k once step k + 1 is under way, or before `after(k, state, last)`, which runs
    at the steps that are `due` and at the last: what a checkpoint follows is recorded before the checkpoint is written.
    """
    borne = patience or Patience(1)
    pending: list[tuple[int, dict[str, Any]]] = []

    def report() -> None:
        while pending:
            number, metrics = pending.pop()
            values = jax.device_get(metrics)
            # "bad" only where it is: nobody reads a column of zeros
            record(number, {name: value for name, value in values.items() if name != "bad" or value})
            borne.see(number, values)

    for step in range(int(state.step) + 1, steps + 1):
        state, metrics = trainer.step(state, next(batches))
        report()
        pending.append((step, metrics))
        last = stop(step)
        if last or due(step):
            report()
            after(step, state, last)
        if last:
            break
    report()
    return state


def telling(step: Callable[P, R], tell: Callable[[str], None]) -> Callable[P, R]:
    """`step`, which says before its first call that it compiles, and after it how long that took."""
    first = [True]

    def told(*args: P.args, **options: P.kwargs) -> R:
        if not first:
            return step(*args, **options)
        first.clear()
        tell("compiling the first step")
        start = time.monotonic()
        result = step(*args, **options)
        tell(f"compiled in {time.monotonic() - start:.0f} s")
        return result

    return told


class Patience:
    """Counts the steps in a row whose loss or gradient is not finite, bears all before the `limit`-th.

    `tell` hears of those; `where(step)` is the position of the text after the step's batch.
    """

    def __init__(
        self, limit: int, tell: Callable[[str], None] | None = None, where: Callable[[int], Any] | None = None
    ) -> None:
        self._limit, self._tell, self._where, self._bad = limit, tell, where, 0

    def see(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Look at a step's metrics; raises `Diverged`."""
        place = None if self._where is None else self._where(step)
        self._bad = self._bad + 1 if metrics["bad"] else 0
        if not self._bad:
            return
        values = ", ".join(f"{name} {float(metrics[name])}" for name in ("total_loss", "gradient_norm"))
        what = f"step {step}: {values}; nothing was learned from its batch"
        what += "" if place is None else f", after which the text is at {place}"
        if self._bad >= self._limit:
            row = f" ({self._bad} in a row)" if self._limit > 1 else ""
            raise Diverged(f"{what}{row}; lower --learning-rate, or look at the text there")
        if self._tell is not None:
            self._tell(what)


def variables_of(state: TrainState) -> Tree:
    """{"params", "statistics"} as the model applies them."""
    return {"params": state.params, "statistics": state.statistics}


def train_run(
    run: Path, config: RunConfig, *, resume: bool = False, show: bool = True, rules: Rules | None = None,
    group: ProcessGroup | None = None, tensorboard: bool = False,
) -> TrainState:
    """Train `config` in the directory `run`; with `resume` go on from its newest checkpoint.

    Every process of the `group` calls it, on a mesh of the devices of all; the first one writes and shows. With
    `tensorboard` the metrics go to RUN/tensorboard too. Raises `Refused` when `run` is already a run (without
    `resume`), is none (with it), was of another config but for fewer steps, or is being trained by another job, OSError
    when the disk is full: the last checkpoint stays. Asked to stop, by SIGTERM or Ctrl-C, it saves and
    raises `Interrupted`.
    """
    with contextlib.ExitStack() as stack, products(config.train.matmul_precision):
        return _train_run(stack, run, config, resume, show, rules or Rules(), group or ProcessGroup(), tensorboard)


def _train_run(
    stack: contextlib.ExitStack, run: Path, config: RunConfig, resume: bool, show: bool, rules: Rules,
    group: ProcessGroup, tensorboard: bool,
) -> TrainState:  # fmt: skip
    """`train_run`, with the run's lock on the `stack` from before the first look at what may change."""
    group.agree(lambda: config_to_train(run, config, resume))
    before = config.train
    if resume:
        lock(stack, run)
        before = group.agree(lambda: read_run_config(run)).train
        asked = config
        config = group.agree(lambda: config_to_train(run, asked, resume))
    if tensorboard:
        writer_module()  # refuses where there is none, before the directory is a run
    rows = config.data.batch_size // config.train.accumulate
    refuse_indivisible(config.model, rows, current_sizes(), "the model does not fit this mesh:", rules)
    text = group.agree(lambda: open_data(config.data))
    needed = text.tokenizer.vocab_size
    if needed > config.model.vocab:
        raise Refused(f"model.vocab is {config.model.vocab}; tokenizer {config.data.tokenizer} has ids up to "
                      f"{needed - 1}, so it must be at least {needed}")  # fmt: skip
    trainer = make_trainer(config.model, config.train, rules)
    by_part = text.held_out_by_part(config.train.evaluation_batches)
    held_out = {name: [global_batch(batch, rules) for batch in batches] for name, batches in by_part.items()}
    notes = short_parts(text, config.train.evaluation_batches, by_part)
    top = plateau_end(config.train) if config.train.checkpoint_every else None
    tops = (set() if top is None else {top}) | (group.agree(lambda: plateau_ends(run)) if resume else set())
    steps = RunCheckpoints(run, config.train.keep, notes.append, tops)
    state, lineage, position, told = _start(config, trainer, steps, rules, text)
    stream = group.agree(lambda: text.train(position))
    done, last = int(state.step), config.train.steps
    if not resume:  # all that can be refused has been: from here on the directory is a run
        group.on_first(lambda: checkpoint.prepare_parent(locked(run)))
        lock(stack, run)
        group.agree(lambda: config_to_train(run, config, resume))  # another job may have begun it meanwhile
        group.on_first(lambda: mark(run, config))
    else:
        group.agree(lambda: refuse_taken_names(run, done, last))
        told = going_on(before, config.train, done, run)
        if config.train != before:
            group.on_first(lambda: mark(run, config))
    length, resumed = config.data.sequence_length, done if resume else None
    begun = (position or {}).get("batches", done) - done
    recorder = Recorder(
        run / "metrics.jsonl" if group.first else None, total_steps=config.train.steps,
        tokens_per_step=config.data.batch_size * length, show=show and group.first, resume_step=resumed,
        watch=Watch(config, begun), utilisation=utilisation(config.model, length),
        also=TensorBoard(run / "tensorboard", resumed) if tensorboard and group.first else None,
    )  # fmt: skip
    with explain_full_disk(run), SameFolder(run, group.first) as folder, recorder:
        rounded = rounding(config.train.matmul_precision) if config.model.compute_dtype == "float32" else None
        for note in filter(None, [*notes, *told, text.summary(), rounded]):
            recorder.message(note)
        steps.warn = recorder.message
        train = config.train
        places: dict[int, Any] = {}
        unheard: list[OSError | Failed] = []
        patience = Patience(train.max_nonfinite_steps, recorder.message, places.pop)

        def batches() -> Iterator[Batch]:
            for step, batch in enumerate(stream, int(state.step) + 1):
                places[step] = stream.state()
                yield global_batch(batch, rules)

        def after(step: int, state: TrainState, last: bool) -> None:
            if _due(step, train.evaluate_every, train.steps):
                record(step, held_out_losses(trainer.evaluation, variables_of(state), held_out))
            group.agree(heard)
            if last or step == top or _due(step, train.checkpoint_every, train.steps):
                group.agree(on_disk)
                steps.save_beside(step, state._asdict(), {**_metadata(config, text, stream.state(), state), **lineage})
            if step == top:
                falls = "from here on the learning rate falls; " if train.optimizer.final < 1 else ""
                recorder.message(f"step {step}: {falls}{run / str(step)} stays, to grow or to train on from")
            if last and step < train.steps:
                recorder.message(f"asked to stop: saved after step {step}; the run goes on from there (train --resume)")

        def on_disk() -> None:
            folder.check()
            recorder.sync()

        def due(step: int) -> bool:
            often = train.evaluate_every, train.checkpoint_every
            return step == top or any(_due(step, every, train.steps) for every in often)

        def record(step: int, metrics: dict[str, Any]) -> None:
            try:
                folder.check()
                recorder.log(step, **metrics)
            except (OSError, Failed) as error:
                if group.count == 1:
                    raise
                unheard.append(error)  # the others go on to the next meeting, which comes before any save

        def heard() -> None:
            for error in unheard:
                raise error

        with Termination() as termination:
            try:
                aloud = trainer._replace(step=telling(trainer.step, recorder.message))
                state = fit(aloud, state, batches(), train.steps, record=record, due=due, after=after,
                            stop=termination.asked, patience=patience)  # fmt: skip
            except BaseException:
                steps.leave()
                raise
            steps.wait()
        if termination.interrupted or int(state.step) < train.steps:
            raise Interrupted
        return state


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _metadata(config: RunConfig, text: Text | Data, position: dict[str, Any], state: TrainState) -> dict[str, Any]:
    return {
        "kind": "train",
        "config": config.model.to_json(),
        "run": config.to_json(),
        "text": text.summary(),
        "files": text.files(),
        "data": position,
        "price": float(state.price.value),
    }


class _Begun(NamedTuple):
    """What a run begins or goes on with: its state, what its checkpoints keep of its past, the position in the text,
    and what there is to say about all three."""

    state: TrainState
    lineage: dict[str, Any]
    position: dict[str, Any] | None
    told: list[str]


def _start(
    config: RunConfig, trainer: Trainer, steps: RunCheckpoints, rules: Rules, text: Text | Data
) -> _Begun:
    """The run's newest checkpoint; before there is one, `config.start` or fresh weights.

    From `config.start` the text goes on where the newest training in its lineage stopped that read the same text in the
    same rows, and an adaptive model's price where it was; so do the optimizer's moments where they are carried.
    """
    shapes = abstract(config.model, rules)
    state = jax.eval_shape(trainer.new_state, shapes)
    # the optimizer's moments are laid out like the parameters; scalars are whole everywhere
    restored = steps.restore_latest(jax.tree.map(with_mesh_devices, state._asdict()))
    if restored is not None:
        _, tree, metadata = restored
        return _Begun(TrainState(**tree), past(metadata, config), metadata.get("data"), [])
    if config.start is None:
        fresh = initialise(config.model, config.train.seed, rules)
        return _Begun(trainer.new_state(with_token_bytes(fresh, config, text)), {}, None, [])
    group, named = ProcessGroup(), config.start
    # one step of a run for its lineage and its values, in every process: a newer one may come between
    start = group.gather(group.agree(lambda: str(checkpoint.resolve(named))))[0]
    stored, metadata = checkpoint.describe(start)
    position = text.position_after(run.get("data") for run in trainings(metadata))
    begun = trainer.new_state(checkpoint.load(start, shapes))
    told = _continuing(config, position, standing(metadata))
    told.append(f"the optimizer's moments are {config.train.moments}")
    if config.train.moments == "carried":
        begun = begun._replace(optimizer=carried_moments(begun.optimizer, begun.params, start, stored))
    if config.model.adaptive is not None:
        price, words = _price_of(start, stored, metadata, begun.price, config.train.price)
        begun, told = begun._replace(price=price), [*told, words, *_outlasting(config.train)]
    return _Begun(begun, {LINEAGE: carried(metadata)}, position, told)


def _continuing(config: RunConfig, position: dict[str, Any] | None, at: Standing | None) -> list[str]:
    """Where in the text and in its schedule a run begins that starts from a checkpoint."""
    told = [f"the text begins at its beginning: no training of {config.start} read this text in these rows"]
    if position is not None:
        told = [f"the text goes on after {position['batches']} batches, where the training of {config.start} stopped"]
    if at is None:
        return told
    optimizer, steps = config.train.optimizer, config.train.steps
    warm, top, _ = optimizer.boundaries(steps)
    then = f"and falls after step {top}" if optimizer.final < 1 else "and stays there"
    told.append(f"the training of {config.start} stood {at.line()}; here it is {optimizer.learning_rate:.3g} after a "
                f"warm-up of {warm} step{'s' * (warm != 1)}, {then}")  # fmt: skip
    if at.phase == "decay" and optimizer.learning_rate > 1.01 * at.learning_rate:
        told.append("the rate rises again: what its decay had won is lost first")
    return told


def _outlasting(train: TrainConfig) -> list[str]:
    """What is left of the price's phases when the run ends."""
    left = {"passes are forced": train.price.forced_until, "the price has not begun": train.price.price_from}
    return [f"{words} to the end of the run; the {round((until - 1) * train.steps)} steps that are left then come in "
            "the run that starts from it" for words, until in left.items() if until > 1][:1]  # fmt: skip


def _price_of(
    start: str, stored: Mapping[str, Any], metadata: Mapping[str, Any], fresh: PriceState | BudgetState,
    price: PriceConfig,
) -> tuple[PriceState | BudgetState, str]:  # fmt: skip
    """The compute price to begin with, and words about it: that of the training checkpoint `start`, if it holds one;
    else, of a model made from one, lambda as it was there; else a fresh one. A price that is given is what it is."""
    if price.target is None:
        return fresh, f"a pass costs {price.value:.3g} nats"
    wanted = {"price": jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), fresh)}
    if not differences_of_trees(flatten(wanted), stored):
        return checkpoint.load(start, jax.tree.map(with_mesh_devices, wanted))["price"], "the compute price goes on"
    value, run = newest(metadata, "price"), newest(metadata, "run")
    before = RunConfig.from_json(run) if run else None
    if before is not None and before.model.adaptive is not None and before.train.price.rule != price.rule:
        return fresh, f"the compute price begins anew: that of {start} is of rule {before.train.price.rule!r}"
    if isinstance(value, float) and isinstance(fresh, PriceState) and price.lowest <= value <= price.highest:
        return fresh._replace(value=jnp.full_like(fresh.value, value)), f"the compute price goes on at {value:.3g}"
    return fresh, f"the compute price begins anew: {start} holds none"


def with_token_bytes(variables: Tree, config: RunConfig, text: Text | Data) -> Tree:
    """The variables of a fresh model, its Kronecker embedding told the bytes of the tokenizer's tokens."""
    embedding = config.model.embedding
    if embedding.kind == "table" or config.data.tokenizer == BYTES:
        return variables
    texts = filled(text.tokenizer.texts(), config.model.vocab)
    tables = dict(zip(("token_bytes", "token_length"), token_table(texts, embedding.token_bytes), strict=True))
    old = variables["statistics"]["embedding"]
    new = {name: jax.device_put(table, old[name].sharding) for name, table in tables.items()}
    return {**variables, "statistics": {**variables["statistics"], "embedding": {**old, **new}}}
