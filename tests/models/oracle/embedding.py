"""What enters the stack: the tokens, and the memory of the chunk before."""

from __future__ import annotations

import numpy as np

from tests.models.oracle.basics import layer_norm, rms_norm, sigmoid, softplus


def kronecker_code(token_bytes, length, positions):
    """M[byte, position] = 1/sqrt(length), less its mean, over its standard deviation (n - 1): [256, positions]."""
    m = np.zeros((256, positions))
    for position in range(length):
        m[token_bytes[position], position] = length**-0.5
    return (m - m.mean()) / (m.std(ddof=1) + 1e-6)


def embed(config, p, statistics, tokens, epsilon):
    """tokens [b, t] -> [b, t, d]; `statistics` holds the bytes of the tokens (Kronecker kinds)."""
    total = 0
    if "kronecker" in config.kind:
        weight = p["kronecker"]["w"]
        out = np.zeros((*tokens.shape, weight.shape[-1]))
        for at in np.ndindex(*tokens.shape):
            token_bytes, length = (statistics[name][tokens[at]] for name in ("token_bytes", "token_length"))
            code = kronecker_code(token_bytes, int(length), weight.shape[1])
            out[at] = code.reshape(-1) @ weight.reshape(-1, weight.shape[-1])
        total = total + rms_norm(out, p["norm"]["scale"], epsilon)
    if "table" in config.kind:
        total = total + p["table"][tokens]
    return total


def add_memory(config, p, x, segment_ids, memory):
    """Stream `config.stream` of x [b, t, n, d] += softplus(r) sigmoid(w.x_0 + b) LayerNorm(memory).

    `memory` is (value [b, d], segment [b]); it enters the tokens of its own document.
    """
    value, segment = memory
    strength = softplus(p["strength"]) * sigmoid(x[:, :, 0] @ p["gate"]["w"] + p["gate"]["b"])
    strength = strength * (segment_ids == np.asarray(segment)[:, None])
    normed = layer_norm(np.asarray(value, np.float64), p["norm"]["scale"], p["norm"]["bias"])
    x = x.copy()
    x[:, :, config.stream] += strength[..., None] * normed[:, None]
    return x
