"""Adaptive depth: several passes of one layer, by either halting rule."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.models.oracle.basics import gelu, sigmoid
from tests.models.oracle.mixers import Gates


class Delta(NamedTuple):
    """One application of a layer: its change of the streams [b, t, n, d], its gates (each [b, t]), its MoE loss."""

    change: np.ndarray
    gates: Gates
    auxiliary: float


class Depth(NamedTuple):
    """What a layer did. Passes that were not executed are zeros."""

    x: np.ndarray
    weight: np.ndarray  # [p, b, t], the s_k that a token's pass k was added with (before alpha)
    alive: np.ndarray  # [p, b, t], s_k >= threshold
    go_on: np.ndarray  # [p, b, t], the probability to continue
    executed: int
    auxiliary: float

    @property
    def expected_k(self):
        return self.weight.sum(0)


def features(x, change, previous, gates):
    """[b, t, 5] from the streams x and their change, and the stream mean of the change of the pass before."""
    h, dh = x.mean(2), change.mean(2)
    rms = lambda a: np.sqrt((a**2).mean(-1))  # noqa: E731
    ratio = np.minimum(rms(dh) / np.maximum(rms(h), 1e-6), 10)
    lengths = np.linalg.norm(dh, axis=-1) * np.linalg.norm(previous, axis=-1)
    cosine = (dh * previous).sum(-1) / np.maximum(lengths, 1e-12)
    return np.stack([ratio, cosine, *gates], axis=-1)


def continue_probability(p, f, floor):
    """sigmoid(MLP([features, layer embedding])), floored: [b, t]."""
    embedding = np.broadcast_to(p["embedding"], (*f.shape[:-1], p["embedding"].size))
    hidden = gelu(np.concatenate([f, embedding], axis=-1) @ p["hidden"]["w"] + p["hidden"]["b"])
    return np.maximum(sigmoid(hidden @ p["output"]["w"] + p["output"]["b"])[..., 0], floor)


def adaptive_depth(config, p, gain, delta, x, real, forced=None):
    """`config.max_passes` passes at most of `delta(x) -> Delta`; `real` [b, t] marks the tokens that are no padding.

    `forced` passes: the probability to continue is 1 before the last of them and 0 after it.
    """
    b, t = real.shape
    weight, go_on = np.zeros((2, config.max_passes, b, t))
    alive = np.zeros((config.max_passes, b, t), bool)
    s, previous, auxiliary, executed = np.ones((b, t)), np.zeros_like(x.mean(2)), 0.0, 0
    for k in range(config.max_passes):
        above = s >= config.threshold
        share = (above & real).sum() / real.sum()
        if share <= (config.batch_share if config.halting == "batch" else 0):
            break
        step = delta(x)
        p_k = continue_probability(p, features(x, step.change, previous, step.gates), config.p_floor)
        if forced is not None:
            p_k = np.full((b, t), 1.0 if k + 1 < forced else 0.0)
        alive[k], go_on[k] = above, p_k
        weight[k] = s if config.halting == "batch" else np.where(above, s, 0)
        x = x + gain * config.alpha[k] * weight[k][..., None, None] * step.change
        previous, auxiliary, executed = step.change.mean(2), auxiliary + step.auxiliary, k + 1
        s = s * p_k
    return Depth(x, weight, alive, go_on, executed, auxiliary)


def one_pass(gain, delta, x, real):
    """The plain form: x + gain Delta(x)."""
    step = delta(x)
    once = np.ones((1, *real.shape))
    return Depth(x + gain * step.change, once, once > 0, 0 * once, 1, step.auxiliary)
