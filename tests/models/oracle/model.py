"""The whole model once more, in plain numpy float64, from the reference text and the names of the parameters.

Nothing here is shared with the library but its configuration dataclasses. The streams are always [b, t, n, d], n = 1
without hyper-connections. Where the reference can be read in two ways, the reading is an argument: by `skip_enters` a
skip of the lambda stack is added to the stream before x <- a x + b x0 (so does modded-nanogpt), or after it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tests.models.oracle import hyper
from tests.models.oracle.adaptive import Delta, Depth, adaptive_depth, one_pass
from tests.models.oracle.basics import block, float64, rms_norm
from tests.models.oracle.embedding import add_memory, embed
from tests.models.oracle.mixers import (
    Gates,
    attention,
    attention_gates,
    deltanet,
    deltanet_gates,
    gsa,
    gsa_gates,
    resolvent,
    resolvent_gates,
)
from tests.models.oracle.mlp import dense, mixture

SkipEnters = Literal["before_mixing", "after_mixing"]


@dataclass(frozen=True)
class Result:
    """What the model answers; `real` [b, t] marks the tokens that are no padding."""

    logits: np.ndarray
    mtp_logits: np.ndarray | None
    memory: tuple[np.ndarray, np.ndarray] | None
    real: np.ndarray
    depths: list[Depth] = field(repr=False)

    def _means(self, name):
        return np.stack([[passes[self.real].mean() for passes in getattr(d, name)] for d in self.depths])

    @property
    def survival(self):
        """Mean weight of pass p over the real tokens: [l, p]."""
        return self._means("weight")

    @property
    def alive(self):
        """Share of the real tokens that are at or above the threshold in pass p: [l, p]."""
        return self._means("alive")

    @property
    def expected_k(self):
        return self.survival.sum(1)

    @property
    def executed(self):
        return np.array([d.executed for d in self.depths])

    @property
    def auxiliary(self):
        """MoE losses of the executed passes of each layer: [l]."""
        return np.array([d.auxiliary for d in self.depths])


def logits(
    config,
    variables,
    tokens,
    segment_ids=None,
    *,
    forced=None,
    memory=None,
    skip_enters: SkipEnters = "before_mixing",
) -> Result:
    """tokens and segment_ids (0 padding, then documents) [b, t]; memory (value [b, d], segment [b])."""
    assert config.exit is None and "S" not in config.depth.types, "the oracle does not cover these"
    params, statistics = float64(variables["params"]), float64(variables.get("statistics", {}))
    tokens = np.asarray(tokens)
    segment_ids = np.ones_like(tokens) if segment_ids is None else np.asarray(segment_ids)
    embedded = embed(config.embedding, params["embedding"], statistics.get("embedding"), tokens, config.norm_epsilon)
    x = streams(config, embedded)
    if config.memory is not None and memory is not None:
        x = add_memory(config.memory, params["memory"], x, segment_ids, memory)

    layers = []
    for index, kind in enumerate(config.depth.types):
        segment, row, slot = config.depth.position(index)
        path = f"segment{segment}", f"layer{slot}"
        weights = block(params[path[0]][path[1]], row)
        ema = block(statistics[path[0]][path[1]], row)["mixer"]["variance_ema"] if kind == "G" else None
        layers.append(Layer(config, kind, weights, ema, segment_ids, forced))
    x, depths = run_stack(config.stack, layers, params, x, skip_enters)

    hidden = rms_norm(x.mean(2), params["final_norm"]["scale"], config.norm_epsilon)
    return Result(
        logits=hidden @ params["unembedding"]["w"],
        mtp_logits=predict_second_next(config, params, statistics, hidden, embedded, segment_ids),
        memory=None if config.memory is None else (x[:, -1, config.memory.stream], segment_ids[:, -1]),
        real=segment_ids > 0,
        depths=depths,
    )


def streams(config, x):
    """[b, t, d] -> [b, t, n, d]: stream 0 is x, the others are 0."""
    out = np.zeros((*x.shape[:2], 1 if config.hyper is None else config.hyper.streams, x.shape[2]))
    out[:, :, 0] = x
    return out


def run_stack(config, layers, params, x, skip_enters):
    """The layers in order, by the stack's rule; returns the last streams and what each layer did."""
    outputs, depths, start, before = [], [], x, None
    for index, layer in enumerate(layers):
        if config.kind == "midpoint":
            depth = layer(x)
            change = depth.x - x  # gain Delta(x)
            first = before is None
            after = x + 0.5 * config.step * change if first else (
                config.mixing * before + (1 - config.mixing) * x + 2 * config.step * change)  # fmt: skip
            before, x = x, after
        else:
            if config.kind == "lambda":
                skip = sum(params["skips"][i] * outputs[a] for i, (a, to) in enumerate(config.skips) if to == index)
                a, b = layer.weights["residual_scale"], layer.weights["x0_scale"]
                x = a * (x + skip) + b * start if skip_enters == "before_mixing" else a * x + b * start + skip
            depth = layer(x)
            x = depth.x
        outputs.append(x)
        depths.append(depth)
    if config.kind == "lambda":
        x = x + sum(params["skips"][i] * outputs[a] for i, (a, to) in enumerate(config.skips) if to == len(outputs))
    return x, depths


@dataclass(frozen=True)
class Layer:
    """One layer with its own weights: mixer, then MLP, each read from the streams and written to them."""

    config: object
    kind: str
    weights: dict
    variance_ema: np.ndarray | None
    segment_ids: np.ndarray
    forced: int | None

    def __call__(self, x) -> Depth:
        """All the passes of the layer."""
        real = self.segment_ids > 0
        if self.config.adaptive is None:
            return one_pass(self.weights["gain"], self.delta, x, real)
        halting, gain = self.weights["halting"], self.weights["gain"]
        return adaptive_depth(self.config.adaptive, halting, gain, self.delta, x, real, self.forced)

    def delta(self, x) -> Delta:
        """One pass: MLPblock(MixerBlock(x)) - x."""
        mixed, mixer_input = self._sublayer("mixer", x, self._mix)
        loss = []

        def mlp(y):
            result = self._mlp(y)
            loss.append(result.auxiliary)
            return result.y

        out, _ = self._sublayer("mlp", mixed, mlp)
        adaptive = self.config.adaptive
        raw = adaptive is not None and adaptive.features == "stream_mean"
        return Delta(out - x, self._gates(x.mean(2) if raw else mixer_input), loss[0])

    @property
    def _post(self):
        return self.kind == "A" and self.config.attention.post_norm

    def _norm(self, name, x, post=False):
        """The norm of what enters, or with `post` of what leaves, where the layer has it there; else x."""
        if post != self._post:
            return x
        scale = self.weights[f"{name}_post_norm" if post else f"{name}_norm"]["scale"]
        return rms_norm(x, scale, self.config.norm_epsilon)

    def _sublayer(self, name, x, function):
        """Streams after one sublayer, and what its function saw."""
        if self.config.hyper is None:
            seen = self._norm(name, x[:, :, 0])
            return x + self._norm(name, function(seen), post=True)[:, :, None], seen
        c = hyper.coefficients(self.config.hyper, self.weights[f"{name}_hyper"], x, self.config.norm_epsilon)
        seen = self._norm(name, hyper.read(c, x))
        return hyper.write(c, x, self._norm(name, function(seen), post=True)), seen

    def _mix(self, x):
        p, epsilon = self.weights["mixer"], self.config.norm_epsilon
        if self.kind == "D":
            rows = [deltanet(self.config.deltanet, p, r, i, epsilon) for r, i in zip(x, self.segment_ids, strict=True)]
        elif self.kind == "A":
            given = self.config.attention, p
            rows = [attention(*given, r, i, epsilon) for r, i in zip(x, self.segment_ids, strict=True)]
        elif self.kind == "B":
            rows = [resolvent(self.config.resolvent, p, r, i) for r, i in zip(x, self.segment_ids, strict=True)]
        else:
            ema = self.variance_ema
            rows = [gsa(self.config.gsa, p, r, i, ema)[0] for r, i in zip(x, self.segment_ids, strict=True)]
        return np.stack(rows)

    def _mlp(self, x):
        if self.config.moe is None:
            return dense(self.weights["mlp"], x)
        return mixture(self.config.moe, self.weights["mlp"], x, self.segment_ids > 0)

    def _gates(self, x) -> Gates:
        c = self.config
        known = {"D": (deltanet_gates, c.deltanet), "G": (gsa_gates, c.gsa), "A": (attention_gates, c.attention),
                 "B": (resolvent_gates, c.resolvent)}  # fmt: skip
        function, config = known[self.kind]
        return Gates(*np.stack([function(config, self.weights["mixer"], row) for row in x], axis=1))


def predict_second_next(config, params, statistics, hidden, embedded, segment_ids):
    """Logits of the token after the next; the last position of a row, whose next token is unknown, means nothing."""
    if config.mtp is None:
        return None
    following = np.concatenate([embedded[:, 1:], np.zeros_like(embedded[:, :1])], axis=1)
    fusion = params["mtp"]["fusion"]["w"]
    x = streams(config, hidden @ fusion[0] + following @ fusion[1])
    ema = statistics["mtp"]["layer"]["mixer"]["variance_ema"]
    layer = Layer(config, "G", params["mtp"]["layer"], ema, segment_ids, None)
    x = x + layer.delta(x).change
    return rms_norm(x.mean(2), params["final_norm"]["scale"], config.norm_epsilon) @ params["unembedding"]["w"]
