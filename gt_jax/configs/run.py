"""What a training run is: steps, evaluation, checkpoints, optimizer, compute price. Stored as RUN/config.json."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

from gt_jax.configs.data import BYTES, DataConfig
from gt_jax.configs.json_config import Config, below
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.price import PriceConfig
from gt_jax.configs.thaw import ThawConfig
from gt_jax.errors import Refused
from gt_jax.files import addresses, read_json
from gt_jax.options import MatmulPrecision

MomentsOf = Literal["fresh", "carried"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """`seed` draws the initial weights; 0 for `evaluate_every` or `checkpoint_every` means only at the end.

    So many `max_nonfinite_steps` in a row, whose loss or gradient is not finite, end the run. With `accumulate` a batch
    runs in so many parts, one after the other. With `thaw` only a few layers train at first. A run that starts from a
    checkpoint begins with the optimizer's `moments` of there, or with fresh ones. `matmul_precision` is JAX's name for
    that of float32 products which name none themselves.
    """

    steps: int = 400
    seed: int = 0
    evaluate_every: int = 50
    evaluation_batches: int = 8
    checkpoint_every: int = 100
    keep: int = 2
    accumulate: int = 1
    max_nonfinite_steps: int = 3
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    price: PriceConfig = dataclasses.field(default_factory=PriceConfig)
    thaw: ThawConfig | None = None
    moments: MomentsOf = "fresh"
    matmul_precision: MatmulPrecision = "default"

    def problems(self) -> list[str]:
        wrong = below(self, 1, "steps", "evaluation_batches", "keep", "accumulate", "max_nonfinite_steps")
        if self.thaw is not None and self.thaw.steps > self.steps:
            wrong.append(f"thaw.steps is {self.thaw.steps}; the run has {self.steps} steps, it can be at most that")
        wrong += [f"{name} is {value}; it must be below 2**{bits}" for name, value, bits in
                  (("steps", self.steps, 31), ("seed", self.seed, 32)) if value >= 2**bits]
        return wrong + below(self, 0, "seed", "evaluate_every", "checkpoint_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """All that determines a run: the same RunConfig, versions, and kind and number of devices give the same bytes."""

    model: ModelConfig
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    start: str | None = None

    def problems(self) -> list[str]:
        wrong = addresses(start=self.start)
        if self.model.vocab < 257 and self.data.tokenizer == BYTES:
            wrong.append(f"model.vocab is {self.model.vocab}; bytes and the end of a document need 257")
        if self.data.batch_size % max(self.train.accumulate, 1):
            wrong.append(f"data.batch_size is {self.data.batch_size}; "
                         f"train.accumulate {self.train.accumulate} does not divide it")
        if self.train.moments == "carried" and self.start is None:
            wrong.append("train.moments is 'carried'; a run without start has none, it must be 'fresh'")
        memory, length = self.model.memory, self.data.sequence_length
        if memory is not None and length > memory.chunk and length % memory.chunk:
            wrong.append(f"data.sequence_length is {length}; with a memory stream it must be whole chunks of "
                         f"model.memory.chunk {memory.chunk}")
        if self.train.thaw is not None:
            wrong += self.train.thaw.misfits(self.model.depth)
            opens = round(self.train.price.gates_opened, 6)  # less is rounding of what an earlier run has opened
            if opens and self.model.adaptive is not None:
                end = math.ceil(self.train.price.forced_until * self.train.steps - 1e-6)
                wrong.append(f"train.thaw (--thaw) holds gates that train.price.gates_opened {opens} is still to open; "
                             f"train without it until that is done, after {end} steps, then --start from there with it")
        return wrong


_PLACES = ("text", "json_lines", "tfds_dir", "tokenizer")


def differences(a: Config, b: Config) -> list[str]:
    """The fields in which two configs differ, `data.seed: 0 and 1`, nested ones by their path.

    Where text and tokenizer lie is no difference: a position in the text knows what they hold by its hash.
    """
    lines = []
    for field in dataclasses.fields(a):  # type: ignore[arg-type]
        if isinstance(a, DataConfig) and field.name in _PLACES:
            continue
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, Config) and isinstance(right, Config):
            lines += [f"{field.name}.{line}" for line in differences(left, right)]
        elif left != right:
            lines.append(f"{field.name}: {left!r} and {right!r}")
    return lines


def read_run_config(run: Path) -> RunConfig:
    """The config of a run directory; raises `Refused` where there is none or it does not parse."""
    file = run / "config.json"
    try:
        data = read_json(file)
    except FileNotFoundError as error:
        raise Refused(f"{run} is no run directory (it has no config.json); start one without --resume") from error
    except (ValueError, NotADirectoryError, IsADirectoryError) as error:
        raise Refused(f"{file} cannot be read as a run's config: {error}") from error
    if not isinstance(data, dict):
        raise Refused(f"{file} cannot be read as a run's config: it is no JSON object")
    try:
        return RunConfig.from_json(data)
    except Refused as error:
        raise Refused(f"{file} cannot be read as a run's config: {error}") from error
