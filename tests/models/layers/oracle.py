"""Mixers computed token by token in float64 numpy from the equations, sharing no code with the layers."""

from __future__ import annotations

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rotate(x, position, table, base=10000.0):
    """The rows of x [h, w] turned as complex numbers; the origin's table is [f, f] of length w, read at every pair."""
    width = x.shape[-1]
    frequencies = base ** (-2 * np.arange(width // 2) / width)
    if table == "none":
        return x
    if table == "standard":
        turned = (x[:, : width // 2] + 1j * x[:, width // 2 :]) * np.exp(1j * position * frequencies)
        return np.concatenate([turned.real, turned.imag], axis=-1)
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * position * np.tile(frequencies, 2)[0::2])
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def deltanet(p, config, x, segment_ids, epsilon=1e-6):
    """`D` on one row: x [t, d] -> [t, d]."""
    t, epsilon = x.shape[0], epsilon if config.output_epsilon is None else config.output_epsilon

    def conv(parameters, values):
        out = np.zeros_like(values)
        taps = parameters["w"].shape[0]
        for i in range(t):
            for j in range(taps):
                s = i - (taps - 1) + j
                if s >= 0 and segment_ids[s] == segment_ids[i]:
                    out[i] += parameters["w"][j] * values[s]
            if config.conv_bias:
                out[i] += parameters["b"]
        return silu(out)

    def unit(values):
        values = np.stack([rotate(row, i, config.rope) for i, row in enumerate(values)])
        return values / np.sqrt((values**2).sum(-1, keepdims=True) + 1e-6)

    q = unit(conv(p["query_conv"], np.einsum("td,dhk->thk", x, p["query"]["w"])))
    k = unit(conv(p["key_conv"], np.einsum("td,dhk->thk", x, p["key"]["w"])))
    v = conv(p["value_conv"], np.einsum("td,dhv->thv", x, p["value"]["w"]))
    beta_bias, decay_bias = (p[name]["b"] if config.head_gate_bias else 0.0 for name in ("beta", "decay"))
    beta = config.beta_max * sigmoid(x @ p["beta"]["w"] + beta_bias)
    g = -np.exp(p["a_log"]) * np.log1p(np.exp(x @ p["decay"]["w"] + decay_bias + p["dt_bias"]))
    scale = q.shape[2] ** -0.5 if config.read_scale is None else config.read_scale
    value_heads, group = v.shape[1], v.shape[1] // q.shape[1]
    state = np.zeros((value_heads, q.shape[2], v.shape[2]))
    out = np.zeros_like(x)
    for i in range(t):
        if i and segment_ids[i] != segment_ids[i - 1]:
            state[:] = 0
        read = np.zeros((value_heads, v.shape[2]))
        for h in range(value_heads):
            key, query = k[i, h // group], q[i, h // group]
            decay = g[i, h] if config.decay_floor is None else max(g[i, h], config.decay_floor)
            state[h] *= np.exp(decay)
            state[h] += beta[i, h] * np.outer(key, v[i, h] - state[h].T @ key)
            read[h] = state[h].T @ query * scale
            if config.skip:
                read[h] += p["skip"][h] * query.dot(key) * v[i, h]
        norm = read / np.sqrt((read**2).mean(-1, keepdims=True) + epsilon) * p["output_norm"]["scale"]
        gate = np.einsum("d,dhv->hv", x[i], p["gate"]["w"])
        read = norm * silu(gate) if config.activation_on == "gate" else silu(norm) * gate
        out[i] = np.einsum("hv,hvd->d", read, p["output"]["w"])
    return out


def gsa(p, config, x, segment_ids, ema):
    """`G` on one row: x [t, d] -> ([t, d], the sets of selected keys by (token, head))."""
    t, heads = x.shape[0], config.heads
    project = lambda name: np.einsum("td,dhk->thk", x, p[name]["w"])  # noqa: E731
    q = np.stack([rotate(row, i, config.rope, config.rope_base) for i, row in enumerate(project("query"))])
    k = np.stack([rotate(row, i, config.rope, config.rope_base) for i, row in enumerate(project("key"))])
    v = project("value") * sigmoid(project("value_gate"))
    index_q, index_k = project("indexer_query"), project("indexer_key")
    scale = config.indexer_width**-0.5 if config.score_scale is None else config.score_scale
    weight = sigmoid(x @ p["indexer_weight"]["w"])
    importance = sigmoid(p["head_importance"])
    out, chosen = np.zeros_like(x), {}
    for i in range(t):
        visible = [s for s in range(i + 1) if segment_ids[s] == segment_ids[i]]
        read = np.zeros((heads, config.head_width))
        for h in range(heads):
            n = h // (heads // config.indexer_heads)
            logits = index_k[visible, n] @ index_q[i, n] * scale + p["indexer_bias"][n]
            score = weight[i, n] * sigmoid(logits) * importance[h]
            counted = score if config.variance == "visible" else np.append(score, np.zeros(t - len(visible)))
            budget = config.k_base if ema == 0 else np.floor(config.k_base * counted.var() / ema)
            budget = min(int(np.clip(budget, config.k_min, config.k_max)), len(visible))
            order = sorted(range(len(visible)), key=lambda j: (j >= config.sinks, -score[j], j))
            keys = [visible[j] for j in order[:budget]]
            chosen[i, h] = set(keys)
            attention = np.exp(k[keys, h] @ q[i, h] * config.head_width**-0.5)
            read[h] = attention / attention.sum() @ v[keys, h]
        gate = sigmoid(np.einsum("d,dhk->hk", x[i], p["output_gate"]["w"]))
        out[i] = np.einsum("hk,hkd->d", read * gate, p["output"]["w"])
    return out, chosen


def attention(p, config, x, segment_ids, epsilon=1e-6):
    """`A` on one row: x [t, d] -> [t, d]."""
    t, turned = x.shape[0], 0 if config.rope == "none" else int(config.head_width * config.rope_share)

    def heads(name):
        values = np.einsum("td,dhk->thk", x, p[name]["w"]) + p[name].get("b", 0.0)
        axes = {"head": (2,), "all": (1, 2), "none": None}[config.qk_norm]
        if axes:
            mean = (values**2).mean(axes, keepdims=True)
            values = values / np.sqrt(mean + epsilon) * p[f"{name}_norm"]["scale"]
        rows = [rotate(row[:, :turned], i, "standard", config.rope_base) for i, row in enumerate(values)]
        return np.concatenate([np.stack(rows), values[:, :, turned:]], axis=-1)

    q, k, v = heads("query"), heads("key"), np.einsum("td,dhk->thk", x, p["value"]["w"]) + p["value"].get("b", 0.0)
    out = np.zeros_like(x) + p["output"].get("b", 0.0)
    gate_bias = p["output_gate"].get("b", np.zeros(config.heads)) if config.gate else None
    for i in range(t):
        first = 0 if config.window is None else max(0, i - config.window + 1)
        keys = [s for s in range(first, i + 1) if segment_ids[s] == segment_ids[i]]
        for h in range(config.heads):
            n = h // (config.heads // config.kv_heads)
            weight = np.exp(k[keys, n] @ q[i, h] / np.sqrt(config.head_width))
            read = weight / weight.sum() @ v[keys, n]
            if config.gate:
                read = read * sigmoid(x[i] @ p["output_gate"]["w"][:, h] + gate_bias[h])
            out[i] += read @ p["output"]["w"][h]
    return out


def resolvent(p, config, x, segment_ids):
    """`B` on one row: x [t, d] -> [t, d], by the inverse of each document's matrix up to the token."""
    t = x.shape[0]
    beside = sigmoid(p["coupling"]) if config.coupling == "learned" else np.ones(config.heads)
    z = 1j * (np.log1p(np.exp(p["broadening"])) + 1e-6)
    potential = np.clip(x @ p["potential"]["w"], -config.bound, config.bound)
    out = np.zeros_like(x)
    for i in range(t):
        first = min(s for s in range(i + 1) if segment_ids[s] == segment_ids[i])
        size = i - first + 1
        chain = np.eye(size, k=1) + np.eye(size, k=-1)
        for h in range(config.heads):
            matrix = np.diag(potential[first : i + 1, h] - 2 - z[h]) + beside[h] * chain
            g = np.linalg.inv(matrix)[-1, -1]
            out[i] += p["scale"][h] * (g.real * p["output"]["w"][h, 0] + g.imag * p["output"]["w"][h, 1])
    return out
