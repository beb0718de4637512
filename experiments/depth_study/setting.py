"""What the study of depth on tasks trains: tasks, models, steps, by scale."""

from __future__ import annotations

import dataclasses

from gt_jax.configs.data import DataConfig
from gt_jax.configs.json_config import Config, below
from gt_jax.configs.model import AdaptiveConfig, DeltaNetConfig, GSAConfig, ModelConfig
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.presets import tiny
from gt_jax.configs.price import budget
from gt_jax.configs.run import TrainConfig
from gt_jax.tasks.registry import read_task

SHALLOW, ADAPTIVE, MEAN, MOST = "plain, shallow", "adaptive", "plain, mean depth", "plain, most depth"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting(Config):
    """One task at one size. `opened` is the share of the run in which all passes are forced, before gates decide."""

    task: str
    layout: str = "D"
    width: int = 64
    heads: int = 1
    passes: int = 4
    steps: int = 2000
    rows: int = 32
    rate: float = 3e-3
    curriculum: float = 0.6
    opened: float = 0.7
    pass_price: float = 0.003
    held_out_batches: int = 8

    def problems(self) -> list[str]:
        return below(self, 1, "steps", "rows", "passes", "held_out_batches")

    @property
    def length(self) -> int:
        """Tokens of a row: one instance."""
        return read_task(self.task).longest

    def data(self, seed: int) -> DataConfig:
        """The task's instances; a curriculum over the first part of the run."""
        rows = round(self.curriculum * self.steps) * self.rows
        return DataConfig(tasks=(self.task,), sequence_length=self.length, batch_size=self.rows, seed=seed,
                          curriculum_rows=rows)  # fmt: skip

    def adaptive(self) -> ModelConfig:
        """The model whose layers may run up to `passes` times, each at full strength."""
        gates = AdaptiveConfig(alpha=(1.0,) * self.passes, initial_bias=2.0).seeing_state
        each = self.width // self.heads
        return tiny().replace(
            layout=self.layout, width=self.width, mlp_width=2 * self.width, init_std=0.125, remat="none", adaptive=gates,
            deltanet=DeltaNetConfig(heads=self.heads, value_heads=self.heads, key_width=each, value_width=each,
                                    chunk_size=32),
            gsa=GSAConfig(heads=4, head_width=self.width // 4, indexer_heads=2, indexer_width=8,
                          k_base=self.length, k_min=self.length, k_max=self.length),
        )  # fmt: skip

    def plain(self, times: int) -> ModelConfig:
        """The model without adaptive depth, its layout so many times."""
        plain = self.adaptive().plain
        return plain.replace(layout=f"{self.layout}*{times}")

    def train(self, seed: int) -> TrainConfig:
        """The same for every model; the price is only for the adaptive one."""
        phases = {"forced_until": self.opened, "price_from": self.opened, "clipped_until": self.opened,
                  "forced_ramp": self.curriculum}
        price = budget(None, value=self.pass_price, forced_passes=self.passes, **phases)
        optimizer = OptimizerConfig(learning_rate=self.rate, weight_decay=0.01, halting_scale=10.0)
        return TrainConfig(steps=self.steps, seed=seed, optimizer=optimizer, price=price)
