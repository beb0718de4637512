"""Mixers computed token by token in float64 numpy from the equations, sharing no code with the layers."""

from __future__ import annotations

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def deltanet(p, x, segment_ids, epsilon=1e-6, beta_max=1.0):
    """`D` on one row: x [t, d] -> [t, d]."""
    t = x.shape[0]

    def conv(weight, values):
        out = np.zeros_like(values)
        taps = weight.shape[0]
        for i in range(t):
            for j in range(taps):
                s = i - (taps - 1) + j
                if s >= 0 and segment_ids[s] == segment_ids[i]:
                    out[i] += weight[j] * values[s]
        return silu(out)

    def unit(values):
        return values / np.sqrt((values**2).sum(-1, keepdims=True) + 1e-6)

    q = unit(conv(p["query_conv"]["w"], np.einsum("td,dhk->thk", x, p["query"]["w"])))
    k = unit(conv(p["key_conv"]["w"], np.einsum("td,dhk->thk", x, p["key"]["w"])))
    v = conv(p["value_conv"]["w"], np.einsum("td,dhv->thv", x, p["value"]["w"]))
    beta = beta_max * sigmoid(x @ p["beta"]["w"] + p["beta"]["b"])
    g = -np.exp(p["a_log"]) * np.log1p(np.exp(x @ p["decay"]["w"] + p["decay"]["b"] + p["dt_bias"]))
    value_heads, group = v.shape[1], v.shape[1] // q.shape[1]
    state = np.zeros((value_heads, q.shape[2], v.shape[2]))
    out = np.zeros_like(x)
    for i in range(t):
        if i and segment_ids[i] != segment_ids[i - 1]:
            state[:] = 0
        read = np.zeros((value_heads, v.shape[2]))
        for h in range(value_heads):
            key, query = k[i, h // group], q[i, h // group]
            state[h] *= np.exp(g[i, h])
            state[h] += beta[i, h] * np.outer(key, v[i, h] - state[h].T @ key)
            read[h] = state[h].T @ query * q.shape[2] ** -0.5
        norm = read / np.sqrt((read**2).mean(-1, keepdims=True) + epsilon) * p["output_norm"]["scale"]
        out[i] = np.einsum("hv,hvd->d", norm * silu(np.einsum("d,dhv->hv", x[i], p["gate"]["w"])), p["output"]["w"])
    return out


def rotate(x, position, base):
    half = x.shape[-1] // 2
    angle = position * base ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], axis=-1)


def gsa(p, config, x, segment_ids, ema):
    """`G` on one row: x [t, d] -> ([t, d], the sets of selected keys by (token, head))."""
    t, heads = x.shape[0], config.heads
    project = lambda name: np.einsum("td,dhk->thk", x, p[name]["w"])  # noqa: E731
    q = np.stack([rotate(row, i, config.rope_base) for i, row in enumerate(project("query"))])
    k = np.stack([rotate(row, i, config.rope_base) for i, row in enumerate(project("key"))])
    v = project("value") * sigmoid(project("value_gate"))
    index_q, index_k = project("indexer_query"), project("indexer_key")
    weight = sigmoid(x @ p["indexer_weight"]["w"])
    importance = sigmoid(p["head_importance"])
    out, chosen = np.zeros_like(x), {}
    for i in range(t):
        visible = [s for s in range(i + 1) if segment_ids[s] == segment_ids[i]]
        read = np.zeros((heads, config.head_width))
        for h in range(heads):
            n = h // (heads // config.indexer_heads)
            logits = index_k[visible, n] @ index_q[i, n] * config.indexer_width**-0.5 + p["indexer_bias"][n]
            score = weight[i, n] * sigmoid(logits) * importance[h]
            budget = config.k_base if ema == 0 else np.floor(config.k_base * score.var() / ema)
            budget = min(int(np.clip(budget, config.k_min, config.k_max)), len(visible))
            order = sorted(range(len(visible)), key=lambda j: (j >= config.sinks, -score[j], j))
            keys = [visible[j] for j in order[:budget]]
            chosen[i, h] = set(keys)
            attention = np.exp(k[keys, h] @ q[i, h] * config.head_width**-0.5)
            read[h] = attention / attention.sum() @ v[keys, h]
        gate = sigmoid(np.einsum("d,dhk->hk", x[i], p["output_gate"]["w"]))
        out[i] = np.einsum("hk,hkd->d", read * gate, p["output"]["w"])
    return out, chosen
