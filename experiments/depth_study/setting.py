"""What the study of depth on tasks trains: a task, its models and their training, at one size."""

from __future__ import annotations

import dataclasses
from typing import Literal

from gt_jax.configs.data import DataConfig
from gt_jax.configs.json_config import Config, below
from gt_jax.configs.model import GSAConfig, ModelConfig
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.presets import one_layer
from gt_jax.configs.price import budget
from gt_jax.configs.run import TrainConfig
from gt_jax.tasks.registry import read_task

TUNING = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting(Config):
    """One task at one size: rows of one instance each.

    The hardest difficulty rises over the first `curriculum` of the steps, and with it the passes that are forced, from
    1 to `passes`; all are forced until `opened` of the steps, and the gates decide from then on, at `pass_price` nats a
    pass. Halting heads learn at `halting_scale` times other scalars' rate; passes count by `weights`. Embeddings have
    unit size. The adaptive model is tried at `adaptive_rates`, where there are none at those of the others, with as
    many of the study's first seeds as `adaptive_tuned_at` says.
    """

    task: str
    layout: str = "D"
    width: int = 64
    passes: int = 4
    steps: int = 1400
    rows: int = 32
    curriculum: float = 0.6
    opened: float = 0.7
    pass_price: float = 0.02
    halting_scale: float = 10.0
    weights: Literal["soft", "hard"] = "soft"
    held_out_batches: int = 12
    adaptive_rates: tuple[float, ...] = ()
    adaptive_tuned_at: int = 1

    def problems(self) -> list[str]:
        wrong = below(self, 1, "rows", "held_out_batches", "adaptive_tuned_at") + below(self, 2, "passes", "steps")
        if "*" in self.layout or "," in self.layout:
            wrong.append(f"layout is {self.layout}; it must be one pattern, which plain models repeat")
        if self.width < 8 or self.width % 8:
            wrong.append(f"width is {self.width}; it must be a multiple of 8")
        return wrong

    @property
    def name(self) -> str:
        """The task's name alone."""
        return self.task.partition(":")[0]

    @property
    def length(self) -> int:
        """Tokens of a row: one instance."""
        return read_task(self.task).longest

    def data(self, seed: int) -> DataConfig:
        """The task's instances; a curriculum over the first part of the run."""
        rows = round(self.curriculum * self.steps) * self.rows
        return DataConfig(tasks=(self.task,), sequence_length=self.length, batch_size=self.rows, seed=seed,
                          tuning=TUNING, curriculum_rows=rows)  # fmt: skip

    def adaptive(self) -> ModelConfig:
        """The model whose layers may run up to `passes` times, each at full strength."""
        each = self.width // 4
        base = one_layer()
        assert base.adaptive is not None and base.deltanet is not None
        gates = base.adaptive.hard if self.weights == "hard" else base.adaptive.soft
        attention = GSAConfig(heads=4, head_width=each, indexer_heads=2, indexer_width=8, k_base=self.length,
                              k_min=self.length, k_max=self.length)  # fmt: skip
        return base.replace(
            layout=self.layout, width=self.width, mlp_width=2 * self.width, init_std=self.width**-0.5,
            adaptive=gates.replace(alpha=(1.0,) * self.passes),
            deltanet=base.deltanet.replace(key_width=self.width, value_width=self.width),
            gsa=attention if "G" in self.layout else None,
        )

    def plain(self, times: int) -> ModelConfig:
        """The model without adaptive depth, its layout so many times."""
        plain = self.adaptive().plain
        return plain.replace(layout=self.layout if times == 1 else f"{self.layout}*{times}")

    def train(self, seed: int, rate: float) -> TrainConfig:
        """The same for every model; the price is only for the adaptive one."""
        price = budget(None, value=self.pass_price, forced_passes=self.passes, forced_until=self.opened,
                       forced_ramp=self.curriculum, price_from=self.opened, clipped_until=self.opened)  # fmt: skip
        optimizer = OptimizerConfig(learning_rate=rate, weight_decay=0.01, halting_scale=self.halting_scale)
        return TrainConfig(steps=self.steps, seed=seed, optimizer=optimizer, price=price)
