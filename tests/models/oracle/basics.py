"""What every part of the oracle stands on: activations, norms, rotary embedding, weights as float64."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def float64(tree):
    """The nested dict with every floating leaf as a float64 numpy array; integers keep their type."""
    if isinstance(tree, Mapping):
        return {name: float64(leaf) for name, leaf in tree.items()}
    leaf = np.asarray(tree)
    return leaf if np.issubdtype(leaf.dtype, np.integer) else leaf.astype(np.float64)


def block(tree, index):
    """Block `index` of a segment's stacked parameters."""
    return {name: block(leaf, index) if isinstance(leaf, dict) else leaf[index] for name, leaf in tree.items()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(0, x)


def gelu(x):
    """The tanh approximation."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    """Along the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms_norm(x, scale, epsilon):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def layer_norm(x, scale, bias, epsilon=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * scale + bias


def unit(x):
    """x / |x| along the last axis."""
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def rotate(x, kind, base=10000.0):
    """Rotary embedding of x [t, h, w] by the index in the row.

    standard: the pair (i, i + w/2) turns by base^(-2i/w). origin: the pair (2i, 2i+1) by base^(-2((2i) mod (w/2))/w).
    """
    if kind == "none":
        return x
    width = x.shape[-1]
    out = np.zeros_like(x)
    for i in range(width // 2):
        if kind == "standard":
            first, second, exponent = i, i + width // 2, 2 * i / width
        else:
            first, second, exponent = 2 * i, 2 * i + 1, 2 * ((2 * i) % (width // 2)) / width
        for position in range(x.shape[0]):
            angle = position * base**-exponent
            a, b = x[position, :, first], x[position, :, second]
            out[position, :, first] = a * np.cos(angle) - b * np.sin(angle)
            out[position, :, second] = a * np.sin(angle) + b * np.cos(angle)
    return out
