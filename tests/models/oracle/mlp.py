"""SwiGLU, and the mixture of experts with null experts beside a shared one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.models.oracle.basics import sigmoid, silu, softmax


class MLPResult(NamedTuple):
    """y [b, t, d]; over the real tokens: auxiliary loss, share of null picks, share of the real picks by expert [e]."""

    y: np.ndarray
    auxiliary: float = 0.0
    null_rate: float = 0.0
    experts: np.ndarray | None = None


def swiglu(gate, up, down, x):
    return (silu(x @ gate) * (x @ up)) @ down


def dense(p, x):
    return MLPResult(swiglu(p["gate"]["w"], p["up"]["w"], p["down"]["w"], x))


def mixture(config, p, x, real):
    """x [b, t, d]; `real` [b, t] marks the tokens that count in the loss and the rates.

    The reference writes the null loss as (null_rate - rho)^2 with rho the share of real slots; the target can only be
    the share of null slots, 1 - rho. At rho 0.5 both are the same.
    """
    y = dense(p["shared"], x).y
    if config.shared_gate:
        y = y * sigmoid(x @ p["shared_gate"]["w"])
    logits = x @ p["router"]["w"] + p["router"].get("b", 0)
    nulls = np.full((*x.shape[:2], config.null_experts), p["router"].get("null_logit", 0))
    slots = np.concatenate([logits, nulls], axis=-1)
    probability = softmax(slots)
    picks = np.argsort(-probability, axis=-1, kind="stable")[..., : config.top_k]
    for row, t in np.ndindex(*x.shape[:2]):
        experts = [i for i in picks[row, t] if i < config.experts]
        total = sum(probability[row, t, i] for i in experts) if config.normalise else 1.0
        for i in experts:
            gate, up, down = (p["experts"][name]["w"][i] for name in ("gate", "up", "down"))
            y[row, t] += probability[row, t, i] / total * swiglu(gate, up, down, x[row, t])
    counts = np.bincount(picks[real].ravel(), minlength=slots.shape[-1])[: config.experts]
    share = counts / max(counts.sum(), 1)
    null_rate = 1 - counts.sum() / (config.top_k * real.sum())
    largest = slots.max(-1)
    log_sum = largest + np.log(np.exp(slots - largest[..., None]).sum(-1))
    auxiliary = (
        config.balance_loss * config.experts * share @ softmax(logits)[real].mean(0)
        + config.router_z_loss * (log_sum[real] ** 2).mean()
        + config.null_loss * (null_rate - (1 - config.real_share)) ** 2
    )
    return MLPResult(y, auxiliary, null_rate, share)
