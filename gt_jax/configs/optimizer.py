"""The optimizer of a run: learning rate, schedule, weight decay, gradient clipping."""

from __future__ import annotations

import dataclasses
from typing import Literal

from gt_jax.configs.json_config import Config


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Config):
    """Learning rate, schedule (fractions of the run), decay, clipping; `scalar_scale` multiplies the scalars' rate,
    `halting_scale` that of the halting heads (of adaptive depth)."""

    learning_rate: float = 3e-3
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    final: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.95
    scalar_scale: float = 1.0
    halting_scale: float = 1.0

    def problems(self) -> list[str]:
        wrong = []
        if self.learning_rate <= 0:
            wrong.append(f"learning_rate is {self.learning_rate}; it must be positive")
        for name in ("warmup", "decay", "final"):
            if not 0 <= getattr(self, name) <= 1:
                wrong.append(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        if self.clip <= 0:
            wrong.append(f"clip is {self.clip}; it must be positive")
        return wrong
