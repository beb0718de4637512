"""A model of the study trained, at one learning rate: its weights in a file, its loss on the tuning part in a unit."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.exit_study.study import ExitStudy, Model
from experiments.growth_study.engine import NO_LOSS, paced
from experiments.growth_study.study import separation
from experiments.text_files import refuse_short
from gt_jax.checkpoints.folders import prepare_parent
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.price import PriceConfig
from gt_jax.devices.sharding import Rules, model_inputs
from gt_jax.files import write_atomically
from gt_jax.models.language_model import LanguageModel, abstract
from gt_jax.text.batches import Text
from gt_jax.text.data import Data, open_data
from gt_jax.training.loop import Diverged, Trainer, fit, variables_of
from gt_jax.training.optimizer import make_optimizer
from gt_jax.training.state import new_state
from gt_jax.training.step import Batch, make_evaluation, make_step
from gt_jax.typing import Tree


class Material(NamedTuple):
    """The data of one source and seed: `evaluation` is of the held-out part."""

    data: Text | Data
    tuning: Sequence[Batch]
    evaluation: Sequence[Batch]


class Losses(NamedTuple):
    """Nats a target, and the mean number of layers that a token runs."""

    loss: float
    layers_used: float


@functools.lru_cache(maxsize=4)
def material(study: ExitStudy, source: str, seed: int) -> Material:
    """Open a source's data; raises `Refused` for too little of it, or files whose held-out part is trained on too."""
    data = open_data(study.data(source, seed))
    refuse_short(data, {"tuning": study.tuning_batches, "held-out": study.evaluation_batches})
    if isinstance(data, Text) and study.text:  # Python's library repeats itself, which the report says
        separation(data)
    return Material(data, data.tuning(study.tuning_batches), data.held_out(study.evaluation_batches))


def content(study: ExitStudy) -> str:
    """A hash of all that the study reads; whatever can be refused about the data is refused here."""
    found = {source: material(study, source, study.seeds[0]).data.content_hash() for source in study.sources}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


@functools.lru_cache(maxsize=64)
def program(config: ModelConfig) -> Trainer:
    """Step and new state of a model, compiled once in this process, whatever its learning rate."""
    optimizer = paced(make_optimizer(OptimizerConfig(learning_rate=1.0, schedule="wsd", warmup=0.0, final=1.0), 1))
    step = make_step(config, PriceConfig(), optimizer, 2, Rules())
    return Trainer(step, evaluation(config), lambda variables: new_state(variables, optimizer, PriceConfig()))


@functools.lru_cache(maxsize=64)
def evaluation(config: ModelConfig) -> Any:
    """The forward pass and the loss of a batch, compiled once in this process for each shape."""
    return make_evaluation(config, Rules())


@functools.lru_cache(maxsize=64)
def fresh(config: ModelConfig) -> Any:
    """Fresh variables of a key, compiled once for all models of one shape."""
    network = LanguageModel(config)
    return jax.jit(lambda key: dict(network.init(key, jnp.zeros((1, 2), jnp.int32))))


def losses(config: ModelConfig, variables: Tree, batches: Sequence[Batch]) -> Losses:
    """Loss and layers used on these batches; a loss that is no number sorts last."""
    seen = jax.device_get([evaluation(config)(variables, model_inputs(batch), None) for batch in batches])
    total, count = sum(float(one[0]) for one in seen), sum(float(one[1]) for one in seen)
    real = np.array([float((batch["segment_ids"] > 0).sum()) for batch in batches])
    used = np.array([float(np.sum(one[2].alive)) for one in seen])
    loss = total / max(count, 1.0)
    return Losses(loss if np.isfinite(loss) else NO_LOSS, float((used * real).sum() / real.sum()))


def trained(study: ExitStudy, work: Path, source: str, seed: int, model: Model, rate: float) -> dict[str, Any]:
    """Train and keep the weights in the file `work`; a loss that is not finite is a result too."""
    config, data = study.config(model, model.threshold), material(study, source, seed)
    one, steps = program(config), study.training_steps(source)
    shape = study.config(model if model.ponder is None else model._replace(ponder=0.0), model.threshold)
    state = one.new_state(fresh(shape)(jax.random.key(seed)))
    optimizer = state.optimizer._replace(steps=jnp.float32(steps), peak=jnp.float32(rate))
    record: dict[str, Any] = {"source": source, "seed": seed, **model._asdict(), "name": model.name, "rate": rate,
                              "diverged": None}  # fmt: skip
    curve: list[float] = []
    began = time.monotonic()
    try:
        state = fit(one, state._replace(optimizer=optimizer), (model_inputs(batch) for batch in data.data.train()),
                    steps, record=lambda step, metrics: curve.append(float(metrics["loss"])))  # fmt: skip
    except Diverged as error:
        return record | {"diverged": str(error), "tuning_loss": NO_LOSS, "seconds": time.monotonic() - began,
                         "line": f"diverged: {error}"}  # fmt: skip
    variables, seconds = variables_of(state), time.monotonic() - began
    found = losses(config, variables, data.tuning)
    keep_weights(work, variables)
    every = max(1, len(curve) // 50)
    return record | {
        "tuning_loss": found.loss, "tuning_layers": found.layers_used, "seconds": seconds,
        "curve": [float(np.mean(curve[at : at + every])) for at in range(0, len(curve), every)],
        "line": f"loss {found.loss:.4f} on the tuning part, {found.layers_used:.2f} layers, {seconds:.0f} s",
    }  # fmt: skip


def keep_weights(file: Path, variables: Tree) -> None:
    """Write a model's arrays, whole; one of an earlier try is replaced."""
    stream = io.BytesIO()
    np.savez(stream, **{name: np.asarray(leaf) for name, leaf in flatten(variables).items()})  # type: ignore[arg-type]
    prepare_parent(file)
    write_atomically(file, stream.getvalue())


def read_weights(file: Path, config: ModelConfig) -> Tree:
    """What `keep_weights` wrote, in the form of the model."""
    shapes = abstract(config)
    with np.load(file) as stored:
        leaves = [jnp.asarray(stored[name]) for name in flatten(shapes)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)
