"""Hyper-connections: how a sublayer reads the residual streams and writes them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.models.oracle.basics import rms_norm, sigmoid


class Coefficients(NamedTuple):
    pre: np.ndarray  # [b, t, n]
    post: np.ndarray  # [b, t, n]
    res: np.ndarray  # [b, t, n, n], the row is the stream that is written


def sinkhorn(logits, rounds, floor):
    """[..., n, n] -> the matrix whose rows, then columns, were divided by their sums `rounds` times."""
    m = np.maximum(np.exp(logits - logits.max(-1, keepdims=True)), floor)
    for _ in range(rounds):
        m = m / m.sum(-1, keepdims=True)
        m = m / m.sum(-2, keepdims=True)
    return m


def coefficients(config, p, x, epsilon):
    """From the streams x [b, t, n, d]."""
    b, t, n, d = x.shape
    z = rms_norm(x.reshape(b, t, n * d), p["norm"]["scale"], epsilon)

    def affine(name):
        product = z @ p[name]["w"].reshape(n * d, -1)
        return p[name]["alpha"] * product.reshape(b, t, *p[name]["b"].shape) + p[name]["b"]

    res = sinkhorn(affine("res"), config.sinkhorn_rounds, config.sinkhorn_floor)
    return Coefficients(sigmoid(affine("pre")), 2 * sigmoid(affine("post")), res)


def read(c, x):
    """What the sublayer sees: sum_n pre_n x_n, [b, t, d]."""
    return np.einsum("btn,btnd->btd", c.pre, x)


def write(c, x, y):
    """res x + post (outer) y, [b, t, n, d]."""
    return np.einsum("btij,btjd->btid", c.res, x) + c.post[..., None] * y[:, :, None, :]
