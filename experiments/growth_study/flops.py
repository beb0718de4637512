"""How many FLOPs training costs: the rule, in one place.

forward FLOPs a token = sum over layers of (passes computed) * (matrix products of one pass) + unembedding;
training = 3 x forward (the backward pass is two forward passes), the layers once more where the backward pass computes
them again (`remat`, and every pass under `context` "alive"), and one unembedding more where the price reads the loss
after pass 1 (rule "ouro", without gradient).

- Matrix products of one pass are counted from the config by `profile_components.flops`: projections, MLP, the chunked
  recurrence, attention over the row. Norms, convolutions, gates, halting heads and the optimizer are left out.
- A pass of an adaptive layer counts whole as soon as one token of the batch is alive, for that is what is computed.
- Measuring the passes is one forward pass over the measuring text.
- Calibration: each column of the Jacobian counts three forward passes (the reverse of a reverse pass), and each
  iteration one forward pass of both models for the columns and one for the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from experiments.profile_components import flops
from gt_jax.configs.model import ModelConfig

BACKWARD = 2.0


def pass_flops(config: ModelConfig, tokens: int) -> np.ndarray:
    """Forward FLOPs a token of one pass of each layer, [l]; rows of `tokens` tokens."""
    parts, types = flops(config, tokens), config.depth.types
    rest = sum(parts.get(part, 0.0) for part in ("shared MLP", "experts and router", "hyper-connections")) / len(types)
    mixer = {kind: parts[f"{kind} mixer"] / types.count(kind) for kind in set(types)}
    return np.array([mixer[kind] + rest for kind in types])


def forward_flops(config: ModelConfig, tokens: int, passes: Sequence[float] | np.ndarray | None = None) -> float:
    """Forward FLOPs a token; `passes` [l] computed in each layer, one each where None."""
    layers = pass_flops(config, tokens)
    run = np.ones(len(layers)) if passes is None else np.asarray(passes)
    return float(layers @ run) + 2.0 * config.width * config.vocab


def training_flops(
    config: ModelConfig, tokens: int, passes: Sequence[float] | np.ndarray | None = None, *, reads_first: bool = False
) -> float:
    """FLOPs a token of one training step: (1 + 2) x forward, and what is computed twice; `reads_first`: the loss after
    pass 1, which costs an unembedding."""
    unembedding = 2.0 * config.width * config.vocab
    forward = forward_flops(config, tokens, passes)
    again = forward - unembedding if computes_again(config) else 0.0
    return (1.0 + BACKWARD) * forward + again + (unembedding if reads_first else 0.0)


def computes_again(config: ModelConfig) -> bool:
    """Whether the backward pass computes the layers again."""
    return config.remat != "none" or (config.adaptive is not None and config.adaptive.context == "alive")


def passes_by_step(
    samples: Mapping[int, Sequence[float]], steps: int, forced: Callable[[int], int]
) -> np.ndarray:
    """Passes computed in each layer at steps 1 to `steps`, [steps, l].

    `forced(step)` is the number of forced passes, 0 for free ones; free steps are interpolated between `samples`.
    """
    at = sorted(samples)
    taken = np.array([samples[step] for step in at], np.float64)
    every = np.arange(1, steps + 1)
    free = np.stack([np.interp(every, at, taken[:, layer]) for layer in range(taken.shape[1])], axis=1)
    fixed = np.array([forced(step) for step in every.tolist()], np.float64)
    return np.where(fixed[:, None] > 0, fixed[:, None], free)


def measuring_flops(source: ModelConfig, tokens: int, passes: Sequence[float], seen: int) -> float:
    """FLOPs of measuring the passes on `seen` tokens: reading them once."""
    return seen * forward_flops(source, tokens, passes)


def calibration_flops(
    source: ModelConfig, target: ModelConfig, tokens: int, passes: Sequence[float], seen: int, iterations: int
) -> float:
    """FLOPs of fitting all gains on `seen` tokens, by the rule above."""
    once = forward_flops(source, tokens, passes) + forward_flops(target, tokens)
    columns = 3.0 * len(target.depth) * forward_flops(target, tokens)
    return seen * (iterations * (columns + 2.0 * once) + once)
