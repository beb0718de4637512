"""What the study of growth compares, at one size: a source, the deep model that it becomes, and their training.

All contenders of a setting cost the same, the budget B, and lower their rate once, over the last `decay` of B:

    source trained on   source to the last of the points, then adaptive to B
    grown at f          source for f B, grown from the plateau of its rate, then plain to B
    from scratch        the deep model for all of B; of a task also with a curriculum as short as a source's
    shallow             where asked for: the source's layers, once each, from scratch for all of B
    stacked at f        beside it: such a source for f B, its whole stack put on itself, then plain to B
    started at f        beside it: the deep model from scratch for what that source leaves of B

The source's curriculum, forced passes and the freeing of its gates all happen within its own part.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Literal

from experiments.depth_study.setting import TUNING
from experiments.depth_study.setting import Setting as DepthSetting
from experiments.pays_study.recipes import DEALT, EXPECTED, FULL, LAYER, NEW, ONCE, README, Recipe
from experiments.seeds_and_rates import wrong_rates
from gt_jax.configs.data import DataConfig
from gt_jax.configs.json_config import Config, below
from gt_jax.configs.layout import parse
from gt_jax.configs.model import AdaptiveConfig, DeltaNetConfig, GSAConfig, ModelConfig
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.presets import tiny
from gt_jax.configs.price import PriceConfig, budget
from gt_jax.configs.run import TrainConfig
from gt_jax.configs.standing import gone_on
from gt_jax.growth.retrofit import closed
from gt_jax.tasks.registry import read_task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting(Config, abc.ABC):
    """`budget` are the steps of the deep model that cost B; `points` the shares of B after which sources are grown.

    With `shallow` the source's layers, each run once, are trained from scratch too; on text in place of the controls.
    Without `adapts` nothing else is: no adaptive source is trained, and none grown.

    Sources and the models from scratch are tried at `rates`, with as many of the study's first seeds as `tuned_at`
    says; what is grown goes on at its source's rate, or where there are `child_rates`, at the best of these. Curves
    have about `evaluations` points; `decay` is the share of B over which the rate falls.
    """

    name: str
    budget: int
    points: tuple[float, ...] = (0.25, 0.5, 0.75)
    rates: tuple[float, ...] = (2e-3, 4e-3)
    tuned_at: int = 1
    decay: float = 0.2
    evaluations: int = 6
    held_out_batches: int = 6
    shallow: bool = False
    adapts: bool = True
    child_rates: tuple[float, ...] = ()

    def problems(self) -> list[str]:
        wrong = below(self, 10, "budget") + below(self, 1, "evaluations", "held_out_batches", "tuned_at")
        rising = list(self.points) == sorted(set(self.points))
        if not self.points or not rising or min(self.points) <= 0 or max(self.points) >= 1:
            wrong.append(f"points are {list(self.points)}; rising shares of the budget are needed, above 0 and below 1")
        wrong += wrong_rates(self.rates)
        if self.child_rates and min(self.child_rates) <= 0:
            wrong.append(f"child_rates are {list(self.child_rates)}; positive learning rates are needed, or none")
        if not (self.adapts or self.shallow):
            wrong.append("adapts is false; shallow must be true then, or nothing is grown")
        if not 0 < self.decay < 1:
            wrong.append(f"decay is {self.decay}; it must lie between 0 and 1")
        return wrong

    @property
    def middle(self) -> float:
        """The point at which rates are tried and controls grown."""
        return self.points[len(self.points) // 2]

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Tokens of a row."""

    @property
    @abc.abstractmethod
    def batch(self) -> int:
        """Rows of a batch."""

    @property
    @abc.abstractmethod
    def source(self) -> ModelConfig:
        """The adaptive model."""

    @property
    @abc.abstractmethod
    def deep(self) -> ModelConfig:
        """The plain model that it grows to, also from scratch."""

    @property
    @abc.abstractmethod
    def free_passes(self) -> float:
        """The passes a layer that a step of the source is planned to compute where its gates are free."""

    @property
    @abc.abstractmethod
    def recipes(self) -> tuple[Recipe, ...]:
        """Ways of growing, of which the one that is best on the tuning part is trained on."""

    @property
    @abc.abstractmethod
    def controls(self) -> tuple[Recipe, ...]:
        """Other ways, from the source of the `middle`."""

    @property
    def harder(self) -> tuple[str, ...]:
        """The difficulties that children are asked and no source was trained on."""
        return ()

    @abc.abstractmethod
    def data(self, seed: int, steps: int, text: tuple[str, ...], deep: bool = False) -> DataConfig:
        """What a source of `steps` steps reads, or the deep model; a curriculum is over within them."""

    def further_data(self, seed: int, steps: int, text: tuple[str, ...]) -> tuple[DataConfig, int]:
        """What follows for whatever is made of a source of `steps` steps, and after how many batches."""
        return self.data(seed, steps, text), steps

    def scratch_curricula(self) -> tuple[float | None, ...]:
        """The curricula of the model from scratch that are tried; None is that of the data."""
        return (None,)

    def scratch_data(self, seed: int, text: tuple[str, ...], curriculum: float | None) -> DataConfig:
        """What the model from scratch reads, with one of its curricula."""
        return self.data(seed, self.budget, text, deep=True)

    @abc.abstractmethod
    def price(self, part: float) -> PriceConfig:
        """The price of a source whose own part is the first `part` of its schedule."""

    @property
    def halting_scale(self) -> float:
        """How fast halting heads learn, in rates of other scalars."""
        return 10.0

    def optimizer(self, rate: float) -> OptimizerConfig:
        """The same for every model."""
        return OptimizerConfig(learning_rate=rate, decay=self.decay, weight_decay=0.01,
                               halting_scale=self.halting_scale)  # fmt: skip

    def source_train(self, steps: int, rate: float) -> TrainConfig:
        """The training whose plateau lasts for `steps` steps: the source stops there, its rate has not fallen."""
        optimizer, total = self.optimizer(rate), steps + 1
        while optimizer.boundaries(total)[1] < steps:
            total += 1
        return TrainConfig(steps=total, optimizer=optimizer, price=self.price(steps / total))

    def scratch_train(self, rate: float, steps: int) -> TrainConfig:
        """All of the budget, `steps` steps."""
        return TrainConfig(steps=steps, optimizer=self.optimizer(rate))

    def fall(self, point: float) -> float:
        """The share of the steps after `point` of B over which the rate falls, so that it does over `decay` of B."""
        return min(1.0, self.decay / (1 - point))

    def further(self, source_steps: int, rate: float, steps: int, decay: float) -> TrainConfig:
        """`steps` steps that follow the source's as those of `train --start` do: at its rate, its price gone on with.

        The rate falls over the last `decay` of them.
        """
        train = gone_on(self.source_train(source_steps, rate), source_steps, steps, moments="carried")
        return train.replace(optimizer=train.optimizer.replace(decay=decay))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSetting(Setting):
    """A task, as the study of depth trains it; the deep model has each of its layers `times` times in a row.

    With `deeper` the deep model and everything after growth is of this task, which asks for more than the source does.
    The model from scratch is tried with each of `curricula`, shares of B over which the hardest difficulty rises: a
    source of half the budget has met everything in half the steps, and the deep model shall not be held back.
    """

    of: DepthSetting
    times: int = 4
    deeper: str = ""
    curricula: tuple[float, ...] = (0.6, 0.3)

    def problems(self) -> list[str]:
        wrong = super().problems() + below(self, 2, "times")
        if not self.curricula or min(self.curricula) < 0 or max(self.curricula) > 1:
            wrong.append(f"curricula are {list(self.curricula)}; one or more shares from 0 to 1 are needed")
        if self.deeper and read_task(self.deeper).name != read_task(self.of.task).name:
            wrong.append(f"deeper is {self.deeper}; it must be the source's task {self.of.task}, with harder questions")
        return wrong

    @property
    def _harder(self) -> DepthSetting:
        return self.of.replace(task=self.deeper or self.of.task)

    @property
    def length(self) -> int:
        return self._harder.length

    @property
    def batch(self) -> int:
        return self.of.rows

    @property
    def source(self) -> ModelConfig:
        return self._harder.adaptive()

    @property
    def deep(self) -> ModelConfig:
        types = "".join(kind * self.times for kind in self.source.depth.types)
        return self.source.plain.replace(layout=runs(types))

    @property
    def free_passes(self) -> float:
        return float(self.of.passes)

    @property
    def halting_scale(self) -> float:
        return self.of.halting_scale

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        return FULL, EXPECTED

    @property
    def controls(self) -> tuple[Recipe, ...]:
        return (NEW._replace(kind=LAYER),)

    @property
    def harder(self) -> tuple[str, ...]:
        known, asked = read_task(self.of.task).hardest, read_task(self._harder.task).hardest
        return tuple(map(str, range(known + 1, asked + 1)))

    def data(self, seed: int, steps: int, text: tuple[str, ...], deep: bool = False) -> DataConfig:
        # rows of one length for all, so that a step of the source costs what it costs wherever it is taken
        of = self._harder if deep else self.of
        return of.replace(steps=max(2, steps)).data(seed).replace(sequence_length=self.length)

    def scratch_curricula(self) -> tuple[float | None, ...]:
        return tuple(None if one == self.of.curriculum else one for one in self.curricula)

    def scratch_data(self, seed: int, text: tuple[str, ...], curriculum: float | None) -> DataConfig:
        share = self.of.curriculum if curriculum is None else curriculum
        return super().scratch_data(seed, text, None).replace(curriculum_rows=round(share * self.budget) * self.batch)

    def further_data(self, seed: int, steps: int, text: tuple[str, ...]) -> tuple[DataConfig, int]:
        if not self.deeper:
            return super().further_data(seed, steps, text)
        return self.data(seed, steps, text, deep=True).replace(curriculum_rows=0), 0

    def price(self, part: float) -> PriceConfig:
        of, opened = self.of, self.of.opened * part
        return budget(None, value=of.pass_price, forced_passes=of.passes, forced_until=opened,
                      forced_ramp=of.curriculum * part, price_from=opened, clipped_until=opened)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSetting(Setting):
    """Text, of which a source of `layout` runs `depth` passes a layer in the mean, and grows to `target_layers`.

    A step of it is planned to cost `planned` passes a layer, buckets of rows and audits among them: under `context`
    "alive" living tokens alone are computed in later passes, so that a step costs about what its passes do. Each layer
    is run once for the first `opened` of its part; then its gates, closed until there, are free.
    """

    layout: str = "DDDG"
    target_layers: int = 12
    width: int = 64
    heads: int = 4
    rows: int = 8
    tokens: int = 128
    depth: float = 1.3
    planned: float = 2.0
    opened: float = 0.0
    context: Literal["all", "alive"] = "alive"

    @property
    def length(self) -> int:
        return self.tokens

    @property
    def batch(self) -> int:
        return self.rows

    @property
    def source(self) -> ModelConfig:
        heads, head = self.heads, self.width // self.heads
        gates = AdaptiveConfig(initial_bias=0.0, context=self.context).seeing_state
        gates = closed(gates) if self.opened else gates
        return tiny().replace(
            layout=self.layout, width=self.width, mlp_width=2 * self.width, remat="none", adaptive=gates,
            deltanet=DeltaNetConfig(heads=heads, value_heads=heads, key_width=head, value_width=head, chunk_size=32),
            gsa=GSAConfig(heads=heads, head_width=head, indexer_heads=2, indexer_width=16, k_base=64, k_min=16,
                          k_max=128),
        )  # fmt: skip

    @property
    def deep(self) -> ModelConfig:
        pattern = parse(self.layout).segments[0].pattern
        return self.source.plain.replace(layout=f"{pattern}*{self.target_layers // len(pattern)}")

    @property
    def free_passes(self) -> float:
        return self.planned

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        return (DEALT,)

    @property
    def controls(self) -> tuple[Recipe, ...]:
        return () if self.shallow else (README, ONCE, NEW)

    def problems(self) -> list[str]:
        wrong, segments = super().problems(), parse(self.layout).segments
        if len(segments) > 1 or self.target_layers % len(segments[0].pattern):
            wrong.append(f"layout {self.layout} does not repeat to target_layers {self.target_layers}")
        if not 0 <= self.opened < 1:
            wrong.append(f"opened is {self.opened}; it must be at least 0 and below 1")
        if self.width % (2 * self.heads):
            wrong.append(f"width is {self.width}; it must be a multiple of {2 * self.heads}, two of each head")
        return wrong

    def data(self, seed: int, steps: int, text: tuple[str, ...], deep: bool = False) -> DataConfig:
        return DataConfig(text=text, sequence_length=self.tokens, batch_size=self.rows, seed=seed, tuning=TUNING)

    def price(self, part: float) -> PriceConfig:
        until = self.opened * part
        return budget(self.depth, target_of="passes_run", forced_passes=1 if until else 0, forced_until=until,
                      price_from=until, clipped_until=until)  # fmt: skip


def runs(types: str) -> str:
    """Types as a layout of runs: DDDDGG is D*4,G*2."""
    found: list[str] = []
    for place, kind in enumerate(types):
        if place and types[place - 1] == kind:
            continue
        length = len(types[place:]) - len(types[place:].lstrip(kind))
        found.append(kind if length == 1 else f"{kind}*{length}")
    return ",".join(found)
