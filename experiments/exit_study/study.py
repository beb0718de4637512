"""What the study is: one frozen config, the models and the data that follow from it.

The data have three parts: models train on the first; learning rates, and the pairs of threshold and ponder weight that
are compared, are chosen on the second, the tuning part; losses are judged on the third, the held-out part, alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.seeds_and_rates import wrong_seeds
from gt_jax.configs.data import TEXT, DataConfig
from gt_jax.configs.json_config import Config, below
from gt_jax.configs.model import DeltaNetConfig, ExitConfig, ModelConfig
from gt_jax.configs.presets import tiny
from gt_jax.errors import Refused
from gt_jax.tasks.registry import read_task

TUNING = 0.05  # share of text and of a task's instances
TASK = "variable_chains:order=backward,hardest=4,chains=2,letters=8"


class Model(NamedTuple):
    """A model to train: dense of `layers` layers, or with exits, its loss weighing N + R by `ponder`.

    `threshold` is the halting sum at which a token leaves, in training; `own` says that the model is measured at this
    threshold alone.
    """

    layers: int
    ponder: float | None = None
    threshold: float | None = None
    own: bool = False

    @property
    def name(self) -> str:
        """As it stands in the tables."""
        if self.ponder is None:
            return f"dense, {self.layers} layer{'s' * (self.layers != 1)}"
        return f"exit, ponder {self.ponder:g}" + (f", trained at {self.threshold:g}" if self.own else "")

    def at(self, threshold: float | None) -> str:
        """The name with the threshold that it is measured at."""
        return self.name if self.ponder is None or self.own else f"{self.name}, threshold {threshold:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitStudy(Config):
    """All that determines the figures.

    Dense models have `layers` layers and those of `cuts`. A model with exits is trained for each of `ponders` at
    `threshold` and measured at each of `thresholds`; for each (ponder, threshold) of `own` one more is trained and
    measured at that threshold alone. `rates` are tried by every model at the first seed, best on the tuning part.
    `steps` are of text, `task_steps` of a task, whose hardest difficulty rises over the share `curriculum` of them.
    `equal` is the share by which a loss may be above the dense model's and count as equal, when pairs are chosen.
    """

    scale: str
    text: tuple[str, ...] = ()
    tasks: tuple[str, ...] = (TASK,)
    seeds: tuple[int, ...] = (0, 1, 2)
    width: int = 64
    heads: int = 4
    layers: int = 6
    cuts: tuple[int, ...] = (1, 2, 3, 4)
    ponders: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    thresholds: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
    threshold: float = 0.95
    own: tuple[tuple[float, ...], ...] = ((0.01, 0.7), (0.03, 0.5))
    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    rows: int = 8
    sequence_length: int = 96
    steps: int = 400
    task_steps: int = 1500
    curriculum: float = 0.4
    evaluation_batches: int = 24
    tuning_batches: int = 16
    rounds: int = 15
    equal: float = 0.005
    compute_dtype: str = "float32"

    def problems(self) -> list[str]:
        wrong = below(self, 1, "rows", "evaluation_batches", "tuning_batches", "rounds", "heads")
        wrong += below(self, 2, "layers", "steps", "task_steps", "sequence_length")
        wrong += wrong_seeds(self.seeds)
        if self.width % (2 * self.heads):
            wrong.append(f"width is {self.width}; it must be a multiple of {2 * self.heads}, heads of an even width")
        if 1 not in self.cuts or max(self.cuts) >= self.layers or len(set(self.cuts)) < len(self.cuts):
            wrong.append(f"cuts are {list(self.cuts)}; 1 and other different depths below {self.layers} are needed, so "
                         "that every mean depth lies between two dense models")  # fmt: skip
        if not self.thresholds or not self.ponders or not self.rates or min(self.rates) <= 0:
            wrong.append("thresholds, ponders and rates need at least one number each, rates above 0")
        if any(len(pair) != 2 for pair in self.own):
            wrong.append(f"own is {self.own}; it must be pairs of a ponder weight and a threshold")
        names = self.sources
        wrong += [f"two sources are named {name}" for name in sorted({n for n in names if names.count(n) > 1})]
        return wrong

    @property
    def sources(self) -> list[str]:
        """What models are trained on: "text" and every task by its name."""
        return [TEXT, *(words.partition(":")[0] for words in self.tasks)]

    @property
    def models(self) -> list[Model]:
        """Everything that is trained, for each source."""
        found = [Model(layers) for layers in sorted({*self.cuts, self.layers})]
        found += [Model(self.layers, ponder, self.threshold) for ponder in self.ponders]
        return found + [Model(self.layers, ponder, threshold, True) for ponder, threshold in self.own]

    def measured_at(self, model: Model) -> Sequence[float | None]:
        """The thresholds a model is measured at; [None] for a dense one."""
        if model.ponder is None or model.threshold is None:
            return [None]
        return [model.threshold] if model.own else self.thresholds

    def config(self, model: Model, threshold: float | None) -> ModelConfig:
        """The network, its tokens leaving at `threshold`. To measure, a model's ponder weight does not matter."""
        head = self.width // self.heads
        leaving = None if model.ponder is None or threshold is None else ExitConfig(threshold, model.ponder)
        return tiny().replace(
            layout=f"D*{model.layers}", width=self.width, mlp_width=2 * self.width, adaptive=None, exit=leaving,
            remat="none", compute_dtype=self.compute_dtype, gsa=None,
            deltanet=DeltaNetConfig(heads=self.heads, value_heads=self.heads, key_width=head, value_width=head,
                                    chunk_size=32),
        )  # fmt: skip

    def length(self, source: str) -> int:
        """Tokens of a row: of a task as many as whole instances fill, so that no model computes padding."""
        if source == TEXT:
            return self.sequence_length
        longest = read_task(self.words(source)).longest
        return longest * max(1, self.sequence_length // longest)

    def training_steps(self, source: str) -> int:
        """Steps of a training."""
        return self.steps if source == TEXT else self.task_steps

    def words(self, source: str) -> str:
        """The task of a source, with its options."""
        return next(words for words in self.tasks if words.partition(":")[0] == source)

    def data(self, source: str, seed: int) -> DataConfig:
        """The data of a source in three parts, which do not depend on the seed."""
        rows = DataConfig(sequence_length=self.length(source), batch_size=self.rows, seed=seed, tuning=TUNING)
        if source == TEXT:
            return rows.replace(text=self.text)
        eased = round(self.curriculum * self.task_steps * self.rows)
        return rows.replace(tasks=(self.words(source),), curriculum_rows=eased)

    def named(self) -> ExitStudy:
        """The study with its files by name: results say nothing of the machine's folders."""
        return self.replace(text=tuple(Path(name).name for name in self.text))


SCALES: Mapping[str, Mapping[str, object]] = {
    "minutes": {"seeds": (0, 1), "width": 32, "heads": 2, "layers": 3, "cuts": (1,), "ponders": (0.01, 0.1),
                "thresholds": (0.7, 0.95), "own": ((0.1, 0.7),), "rates": (4e-3,), "rows": 4, "sequence_length": 64,
                "steps": 30, "task_steps": 30, "evaluation_batches": 8, "tuning_batches": 4, "rounds": 5},
    "small": {"tasks": ()},  # models that have learned a task take longer than two cores have
    "accelerator": {"width": 256, "layers": 12, "cuts": (1, 2, 3, 4, 6, 8), "rates": (1e-3, 2e-3, 4e-3), "rows": 64,
                    "sequence_length": 384, "steps": 3000, "task_steps": 3000,
                    "own": ((0.01, 0.5), (0.01, 0.8), (0.03, 0.7)), "evaluation_batches": 32, "tuning_batches": 16,
                    "rounds": 25, "compute_dtype": "bfloat16"},
}  # fmt: skip


def at_scale(
    scale: str, text: Sequence[str], tasks: Sequence[str] | None = None, seeds: Sequence[int] | None = None
) -> ExitStudy:
    """The study at a scale by name, with its tasks and seeds where none are given.

    Raises `Refused` for another name, an unknown task, or words that make none.
    """
    if scale not in SCALES:
        raise Refused(f"--scale {scale!r} is not known; it is one of {', '.join(SCALES)}")
    given: dict[str, object] = {**SCALES[scale], "scale": scale, "text": tuple(text)}
    if tasks is not None:
        for words in tasks:
            read_task(words)
        given["tasks"] = tuple(tasks)
    if seeds is not None:
        given["seeds"] = tuple(seeds)
    return ExitStudy(**given)  # type: ignore[arg-type]
