"""The optimizer of a run: learning rate, schedule, weight decay, gradient clipping."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from gt_jax.configs.json_config import Config


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Config):
    """Learning rate, schedule (fractions of the run), decay, clipping; `scalar_scale` multiplies the scalars' rate,
    `halting_scale` that of the halting heads (of adaptive depth).

    wsd: warm-up, a plateau at `learning_rate`, decay over the last `decay` of the run. It is the default, since a run
    that stands on the plateau can be grown, or trained on, without a rise of the rate.
    """

    learning_rate: float = 3e-3
    schedule: Literal["cosine", "wsd"] = "wsd"
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
        if self.weight_decay < 0:
            wrong.append(f"weight_decay is {self.weight_decay}; it must be at least 0")
        wrong += [f"{name} is {getattr(self, name)}; it multiplies the learning rate and must lie in [0, 1000]"
                  for name in ("scalar_scale", "halting_scale") if not 0 <= getattr(self, name) <= 1000]
        wrong += [f"{name} is {getattr(self, name)}; it must lie in [0, 1)"
                  for name in ("b1", "b2") if not 0 <= getattr(self, name) < 1]
        return wrong

    def boundaries(self, steps: int) -> tuple[int, int, int]:
        """(steps of the rise, the step after which the rate falls, steps of the fall) of a run of `steps` steps.

        A cosine falls from the end of its rise: it has no plateau.
        """
        warm = max(1, round(self.warmup * steps))
        if self.schedule == "cosine":
            return warm, warm, max(1, steps - warm)
        down = max(1, round(self.decay * steps))
        return warm, max(warm, steps - down), down

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of the update that follows `step` updates: what `training.optimizer` computes traced."""
        warm, top, down = self.boundaries(steps)
        if step < warm:
            return self.learning_rate * (1 + (warm - 1) * step / warm) / warm
        done = min(max(step - top, 0) / down, 1.0)
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return self.learning_rate * (self.final + (1 - self.final) * left)
