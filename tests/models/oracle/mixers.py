"""The mixers `D`, `G`, `A` and `B` of one row, token by token, and the gates that adaptive depth looks at."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from tests.models.oracle.basics import rms_norm, rotate, sigmoid, silu, softmax, softplus, unit


class Gates(NamedTuple):
    """What the halting head sees of a mixer, each [t]: mean write gate, mean output gate, spread of query norms."""

    write: np.ndarray
    output: np.ndarray
    spread: np.ndarray


def project(p, name, x):
    """x [t, d] by the weight [d, h, k] of that name: [t, h, k]."""
    return np.einsum("td,dhk->thk", x, p[name]["w"]) + p[name].get("b", 0.0)


def head_spread(queries):
    """Standard deviation (n - 1) over heads of |query|: [t, h, k] -> [t]."""
    return np.linalg.norm(queries, axis=-1).std(axis=-1, ddof=1)


def causal_conv(p, x, segment_ids):
    """SiLU of the depthwise convolution over the last inputs of the same document; the last tap is the token's own."""
    out, taps = np.zeros_like(x), p["w"].shape[0]
    for t in range(x.shape[0]):
        for tap in range(taps):
            s = t - (taps - 1) + tap
            if s >= 0 and segment_ids[s] == segment_ids[t]:
                out[t] += p["w"][tap] * x[s]
        out[t] += p.get("b", 0)
    return silu(out)


def write_strength(config, p, x):
    """beta [t, hv] of a D layer."""
    return config.beta_max * sigmoid(x @ p["beta"]["w"] + p["beta"].get("b", 0))


def deltanet(config, p, x, segment_ids, epsilon):
    """`D`: x [t, d] -> [t, d]."""
    q = unit(rotate(causal_conv(p["query_conv"], project(p, "query", x), segment_ids), config.rope))
    k = unit(rotate(causal_conv(p["key_conv"], project(p, "key", x), segment_ids), config.rope))
    v = causal_conv(p["value_conv"], project(p, "value", x), segment_ids)
    gate = project(p, "gate", x)
    beta = write_strength(config, p, x)
    g = -np.exp(p["a_log"]) * softplus(x @ p["decay"]["w"] + p["decay"].get("b", 0) + p["dt_bias"])
    if config.decay_floor is not None:
        g = np.maximum(g, config.decay_floor)
    scale = config.key_width**-0.5 if config.read_scale is None else config.read_scale
    share = config.value_heads // config.heads
    epsilon = epsilon if config.output_epsilon is None else config.output_epsilon
    out = np.zeros_like(x)
    for h in range(config.value_heads):
        for t in range(x.shape[0]):
            if t == 0 or segment_ids[t] != segment_ids[t - 1]:
                state = np.zeros((config.key_width, config.value_width))
            query, key, value = q[t, h // share], k[t, h // share], v[t, h]
            decayed = np.exp(g[t, h]) * state
            state = decayed + np.outer(key, beta[t, h] * (value - decayed.T @ key))
            read = state.T @ query * scale
            if config.skip:
                read = read + p["skip"][h] * (query @ key) * value
            read = rms_norm(read, p["output_norm"]["scale"], epsilon)
            read = gate[t, h] * silu(read) if config.activation_on == "output" else silu(gate[t, h]) * read
            out[t] += read @ p["output"]["w"][h]
    return out


def deltanet_gates(config, p, x):
    """The gates of `D`: beta, the output gate's logits, the query projection before its convolution."""
    logits = project(p, "gate", x).reshape(x.shape[0], -1)
    return Gates(write_strength(config, p, x).mean(-1), sigmoid(logits).mean(-1), head_spread(project(p, "query", x)))


def indexer_scores(config, p, x):
    """score[h, t, s], for every pair of tokens, visible or not."""
    query, key, weight = project(p, "indexer_query", x), project(p, "indexer_key", x), indexer_weight(p, x)
    scale = config.indexer_width**-0.5 if config.score_scale is None else config.score_scale
    t = x.shape[0]
    out = np.zeros((config.heads, t, t))
    for h in range(config.heads):
        i = h // (config.heads // config.indexer_heads)
        score = weight[:, i, None] * sigmoid(query[:, i] @ key[:, i].T * scale + p["indexer_bias"][i])
        out[h] = score * sigmoid(p["head_importance"][h])
    return out


def indexer_weight(p, x):
    return sigmoid(x @ p["indexer_weight"]["w"])


def selected_keys(config, scores, t, segment_ids, variance_ema):
    """The keys that token t attends to, given its scores of one head over the whole row [T]."""
    visible = [s for s in range(t + 1) if segment_ids[s] == segment_ids[t]]
    if config.variance == "visible":
        variance = np.var(scores[visible])
    else:
        masked = np.zeros_like(scores)
        masked[visible] = scores[visible]
        variance = np.var(masked)
    budget = config.k_base if variance_ema == 0 else math.floor(config.k_base * variance / variance_ema)
    budget = min(max(budget, config.k_min), config.k_max, len(visible))
    sinks, rest = visible[: config.sinks], visible[config.sinks :]
    ranked = sinks + sorted(rest, key=lambda s: (-scores[s], s))
    return sorted(ranked[:budget])


def gsa(config, p, x, segment_ids, variance_ema):
    """`G`: x [t, d] -> ([t, d], the selected keys of every [head][token])."""
    q = rotate(project(p, "query", x), config.rope, config.rope_base)
    k = rotate(project(p, "key", x), config.rope, config.rope_base)
    v = project(p, "value", x) * sigmoid(project(p, "value_gate", x))
    gate = sigmoid(project(p, "output_gate", x))
    scores = indexer_scores(config, p, x)
    out, chosen = np.zeros_like(x), []
    for h in range(config.heads):
        chosen.append([])
        for t in range(x.shape[0]):
            keys = selected_keys(config, scores[h, t], t, segment_ids, variance_ema)
            logits = k[keys, h] @ q[t, h] / np.sqrt(config.head_width)
            attention = np.exp(logits - logits.max())
            read = attention @ v[keys, h] / attention.sum()
            out[t] += (read * gate[t, h]) @ p["output"]["w"][h]
            chosen[h].append(keys)
    return out, chosen


def gsa_gates(config, p, x):
    """The gates of `G`: the indexer's weight w, the output gate, the query projection before its rotation."""
    logits = project(p, "output_gate", x).reshape(x.shape[0], -1)
    return Gates(indexer_weight(p, x).mean(-1), sigmoid(logits).mean(-1), head_spread(project(p, "query", x)))


def normed_heads(config, p, name, x, epsilon):
    """Queries or keys [t, h, w], normed as the config says."""
    heads = project(p, name, x)
    if config.qk_norm == "none":
        return heads
    scale = p[f"{name}_norm"]["scale"]
    if config.qk_norm == "head":
        return rms_norm(heads, scale, epsilon)
    return rms_norm(heads.reshape(x.shape[0], -1), scale.ravel(), epsilon).reshape(heads.shape)


def attention(config, p, x, segment_ids, epsilon):
    """`A`: x [t, d] -> [t, d]."""
    q, k = (normed_heads(config, p, name, x, epsilon) for name in ("query", "key"))
    if config.rope != "none":
        turned = round(config.head_width * config.rope_share)
        q, k = (np.concatenate([rotate(part[..., :turned], config.rope, config.rope_base), part[..., turned:]], axis=-1)
                for part in (q, k))  # fmt: skip
    v = project(p, "value", x)
    place = np.arange(x.shape[0])
    seen = (place[:, None] >= place) & (segment_ids[:, None] == segment_ids)
    if config.window is not None:
        seen &= place[:, None] - place < config.window
    out = np.zeros_like(x)
    for h in range(config.heads):
        own = h * config.kv_heads // config.heads
        logits = np.where(seen, q[:, h] @ k[:, own].T / np.sqrt(config.head_width), -np.inf)
        read = softmax(logits) @ v[:, own]
        if config.gate:
            read = read * sigmoid(project(p, "output_gate", x)[:, h])
        out += read @ p["output"]["w"][h]
    return out + p["output"].get("b", 0.0)


def attention_gates(config, p, x):
    """The gates of `A`: everything is written, the output gate (1 without one), the query projection."""
    ones, output = np.ones(x.shape[0]), np.ones(x.shape[0])
    if config.gate:
        output = sigmoid(project(p, "output_gate", x).reshape(x.shape[0], -1)).mean(-1)
    return Gates(ones, output, head_spread(project(p, "query", x)))


def resolvent(config, p, x, segment_ids):
    """`B`: x [t, d] -> [t, d]."""
    v = np.clip(x @ p["potential"]["w"], -config.bound, config.bound)
    z = 1j * (softplus(p["broadening"]) + 1e-6)
    beside = sigmoid(p["coupling"]) if config.coupling == "learned" else 1.0
    out, g = np.zeros_like(x), 0.0
    for t in range(x.shape[0]):
        if t == 0 or segment_ids[t] != segment_ids[t - 1]:
            g = 0.0
        g = 1 / (v[t] - 2 - z - beside**2 * g)
        out[t] = np.einsum("rh,hrd->d", p["scale"] * np.stack([g.real, g.imag]), p["output"]["w"])
    return out


def resolvent_gates(config, p, x):
    """The gates of `B`: everything is written and read, the potential before it is clipped."""
    ones = np.ones(x.shape[0])
    return Gates(ones, ones, head_spread((x @ p["potential"]["w"])[..., None]))
