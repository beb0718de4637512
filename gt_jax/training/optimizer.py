"""AdamW with warm-up and cosine or WSD decay, gradient clipping, and a group of their own for scalars.

Matrices are decayed; gains, norms, biases, gates of the recurrence and other vectors are not.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import optax

from gt_jax.json_config import Config
from gt_jax.typing import Tree


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Config):
    """Learning rate, schedule (fractions of the run), decay, clipping; `scalar_scale` multiplies the scalars' rate."""

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


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then cosine to `final` of the peak, or constant with a linear fall over the last `decay`."""
    peak, warm = config.learning_rate, max(1, round(config.warmup * steps))
    rise = optax.linear_schedule(peak / warm, peak, warm)
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, max(1, steps - warm), config.final)
        return optax.join_schedules([rise, fall], [warm])
    down = max(1, round(config.decay * steps))
    fall = optax.linear_schedule(peak, peak * config.final, down)
    return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warm, max(warm, steps - down)])


SMALL_MODULES = ("halting", "exit", "memory", "beta", "decay")


def is_scalar(path: str) -> bool:
    """Whether a parameter is a scalar: all that is not a matrix applied by an einsum or an embedding table."""
    parts = path.split("/")
    small = any(part.endswith("_conv") or part in SMALL_MODULES for part in parts)
    return parts[-1] not in ("w", "table") or small


def groups(params: Tree) -> Tree:
    """ "matrix", "scalar" or "residual_scale" for every leaf."""

    def group(path: tuple, _: object) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("/residual_scale"):
            return "residual_scale"
        return "scalar" if is_scalar(name) else "matrix"

    return jax.tree_util.tree_map_with_path(group, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW on matrices and Adam on scalars, those of the lambda stack's residual slower."""
    rate = learning_rate(config, steps)

    def scalar_rate(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        return config.scalar_scale * rate(step)

    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.partition(
            {
                "matrix": optax.adamw(rate, config.b1, config.b2, weight_decay=config.weight_decay),
                "scalar": optax.adam(scalar_rate, config.b1, config.b2),
                # a of the lambda stack acts on the whole stream: 1/100 of the rate of b (modded-nanogpt PR 159)
                "residual_scale": optax.adam(lambda step: 0.01 * scalar_rate(step), config.b1, config.b2),
            },
            groups,
        ),
    )
