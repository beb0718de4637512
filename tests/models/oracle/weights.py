"""Random weights of a whole model by the names and shapes of its parameters; no parameter sits at a special value."""

from __future__ import annotations

import numpy as np


def random_variables(config, seed=0, variance_ema=0.002):
    """{"params", "statistics"} of float32 arrays (bytes and lengths are integers)."""
    draw = Draw(config, np.random.default_rng(seed))
    params, statistics = {"embedding": draw.embedding()}, {}
    for index, segment in enumerate(config.depth.segments):
        blocks = [{f"layer{j}": draw.layer(kind) for j, kind in enumerate(segment.pattern)}
                  for _ in range(segment.repeats)]  # fmt: skip
        params[f"segment{index}"] = stacked(blocks)
        emas = {f"layer{j}": {"mixer": {"variance_ema": variance_ema * draw.rng.uniform(0.8, 1.2, segment.repeats)}}
                for j, kind in enumerate(segment.pattern) if kind == "G"}  # fmt: skip
        if emas:
            statistics[f"segment{index}"] = emas
    d = config.width
    params |= {"final_norm": draw.scale(d), "unembedding": {"w": draw.noise(d, config.vocab)}}
    if config.stack.skips:
        params["skips"] = draw.noise(len(config.stack.skips))
    if config.memory is not None:
        params["memory"] = {"strength": draw.noise(), "norm": draw.scale(d) | {"bias": draw.noise(d)},
                            "gate": {"w": draw.noise(d), "b": draw.noise()}}  # fmt: skip
    if config.mtp is not None:
        params["mtp"] = {"fusion": {"w": draw.noise(2, d, d)}, "layer": draw.sublayers("G")}
        statistics["mtp"] = {"layer": {"mixer": {"variance_ema": np.array(variance_ema)}}}
    if "kronecker" in config.embedding.kind:
        statistics["embedding"] = draw.token_bytes()
    return float32({"params": params, "statistics": statistics})


def float32(tree):
    """Rounded, so that the library and the oracle start from the same numbers."""
    if isinstance(tree, dict):
        return {name: float32(leaf) for name, leaf in tree.items()}
    return tree if np.issubdtype(tree.dtype, np.integer) else np.asarray(tree, np.float32)


def stacked(trees):
    """Equal trees -> one whose leaves have a leading axis."""
    first = trees[0]
    if isinstance(first, dict):
        return {name: stacked([tree[name] for tree in trees]) for name in first}
    return np.stack(trees)


class Draw:
    """Random parts of one model."""

    def __init__(self, config, rng):
        self.config, self.rng = config, rng

    def noise(self, *shape, around=0.0, scale=0.3):
        return around + scale * self.rng.standard_normal(shape)

    def scale(self, width):
        return {"scale": self.noise(width, around=1.0)}

    def weight(self, *shape, bias=()):
        return {"w": self.noise(*shape)} | ({"b": self.noise(*bias)} if bias else {})

    def output(self, *shape, bias=()):
        """What enters the stream is small, so that rounding does not grow from pass to pass."""
        return {"w": self.noise(*shape, scale=0.1)} | ({"b": self.noise(*bias, scale=0.1)} if bias else {})

    def embedding(self):
        c, out = self.config, {}
        if "table" in c.embedding.kind:
            out["table"] = self.noise(c.vocab, c.width, scale=1.0)
        if "kronecker" in c.embedding.kind:
            out |= {"kronecker": self.weight(256, c.embedding.token_bytes, c.width), "norm": self.scale(c.width)}
        return out

    def token_bytes(self):
        """The bytes of every token; token 0 has none."""
        vocab, longest = self.config.vocab, self.config.embedding.token_bytes
        length = self.rng.integers(1, longest + 1, vocab).astype(np.int32)
        length[0] = 0
        text = self.rng.integers(0, 256, (vocab, longest)).astype(np.uint8)
        text[np.arange(longest)[None] >= length[:, None]] = 0
        return {"token_bytes": text, "token_length": length}

    def layer(self, kind):
        """A layer of the stack: its sublayers, gain, halting head and what the lambda stack adds."""
        out = self.sublayers(kind) | {"gain": self.noise(around=1.0, scale=0.1)}
        adaptive = self.config.adaptive
        if adaptive is not None:
            e, f = adaptive.embedding, adaptive.hidden
            out["halting"] = {"embedding": self.noise(e), "hidden": self.weight(5 + e, f, bias=(f,)),
                              "output": {"w": self.noise(f, 1), "b": self.noise(1)}}  # fmt: skip
        if self.config.stack.kind == "lambda":
            out |= {"residual_scale": self.noise(around=1.0), "x0_scale": self.noise()}
        return out

    def sublayers(self, kind):
        d = self.config.width
        post = "_post" if kind == "A" and self.config.attention.post_norm else ""
        out = {f"mixer{post}_norm": self.scale(d), f"mlp{post}_norm": self.scale(d), "mlp": self.mlp()}
        out["mixer"] = {"D": self.deltanet, "G": self.gsa, "A": self.attention, "B": self.resolvent}[kind]()
        if self.config.hyper is not None:
            out |= {"mixer_hyper": self.hyper(), "mlp_hyper": self.hyper()}
        return out

    def hyper(self):
        d, n = self.config.width, self.config.hyper.streams
        shapes = {"pre": (n,), "post": (n,), "res": (n, n)}
        return {"norm": self.scale(n * d)} | {
            name: {"w": self.noise(n, d, int(np.prod(shape))), "b": self.noise(*shape), "alpha": self.noise(around=0.2)}
            for name, shape in shapes.items()
        }

    def mlp(self):
        d, f, moe = self.config.width, self.config.mlp_width, self.config.moe
        dense = {"gate": self.weight(d, f), "up": self.weight(d, f), "down": self.output(f, d)}
        if moe is None:
            return dense
        e, f = moe.experts, moe.expert_width
        experts = {"gate": self.weight(e, d, f), "up": self.weight(e, d, f), "down": self.output(e, f, d)}
        router = self.weight(d, e, bias=(e,)) | {"null_logit": self.noise()} if moe.router_bias else self.weight(d, e)
        gate = {"shared_gate": self.weight(d, 1)} if moe.shared_gate else {}
        return {"shared": dense, "experts": experts, "router": router} | gate

    def deltanet(self):
        """Heads decay from hardly to wholly, so that both long memory and the decay floor are met."""
        c, d = self.config.deltanet, self.config.width
        key, value = (c.heads, c.key_width), (c.value_heads, c.value_width)
        out = {"query": self.weight(d, *key), "key": self.weight(d, *key), "value": self.weight(d, *value),
               "gate": self.weight(d, *value), "output": self.output(*value, d),
               "beta": self.weight(d, c.value_heads, bias=value[:1] if c.head_gate_bias else ()),
               "decay": self.weight(d, c.value_heads, bias=value[:1] if c.head_gate_bias else ()),
               "a_log": np.log(np.geomspace(0.05, 16, c.value_heads)), "dt_bias": self.noise(c.value_heads),
               "output_norm": self.scale(c.value_width)}  # fmt: skip
        for name, shape in (("query_conv", key), ("key_conv", key), ("value_conv", value)):
            out[name] = self.weight(c.conv_width, *shape, bias=shape if c.conv_bias else ())
        return out | ({"skip": self.noise(c.value_heads, around=1.0)} if c.skip else {})

    def gsa(self):
        c, d = self.config.gsa, self.config.width
        heads, indexer = (c.heads, c.head_width), (c.indexer_heads, c.indexer_width)
        out = {name: self.weight(d, *heads) for name in ("query", "key", "value", "value_gate", "output_gate")}
        out |= {name: self.weight(d, *indexer) for name in ("indexer_query", "indexer_key")}
        return out | {"indexer_weight": self.weight(d, c.indexer_heads), "indexer_bias": self.noise(c.indexer_heads),
                      "head_importance": self.noise(c.heads), "output": self.output(*heads, d)}  # fmt: skip

    def attention(self):
        c, d = self.config.attention, self.config.width
        heads, keys = (c.heads, c.head_width), (c.kv_heads, c.head_width)

        def inward(shape):
            return self.weight(d, *shape, bias=shape if c.bias else ())

        out = {"query": inward(heads), "key": inward(keys), "value": inward(keys),
               "output": self.output(*heads, d, bias=(d,) if c.bias else ())}  # fmt: skip
        for name, shape in (("query_norm", heads), ("key_norm", keys)):
            if c.qk_norm != "none":
                out[name] = {"scale": self.noise(*(shape if c.qk_norm == "all" else shape[1:]), around=1.0)}
        return out | ({"output_gate": inward(heads)} if c.gate else {})

    def resolvent(self):
        c, d = self.config.resolvent, self.config.width
        out = {"potential": self.weight(d, c.heads), "broadening": self.noise(c.heads),
               "scale": self.noise(c.heads, around=1.0), "output": self.output(c.heads, 2, d)}  # fmt: skip
        return out | ({"coupling": self.noise(c.heads, around=1.0)} if c.coupling == "learned" else {})
