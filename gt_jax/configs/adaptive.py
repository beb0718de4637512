"""What adaptive depth is: passes of a layer, what halts them, and the layers that passes can become."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

from gt_jax.configs.json_config import Config, below


@dataclasses.dataclass(frozen=True)
class AdaptiveConfig(Config):
    """Adaptive depth: up to `len(alpha)` passes a layer, pass k at strength alpha[k], while s >= `threshold`.

    With `weights` "soft" a pass counts by s, with "hard" whole while s >= threshold and then not at all; the gradient
    is that of s (straight through), of finished tokens too where they are there: under `context` "all".
    `halting` "token": a token below the threshold is finished. "batch" (origin): all go on until at most `batch_share`
    of the tokens are at or above it. `features` says what the halting head sees of the mixer, its write gate, output
    gate and head spread: those of the mixer's own input, or (origin) of the mean over streams before any norm. With
    `state_width` it also sees the token's state, normed and projected to so many numbers; with `by_pass` its embedding
    is one of each pass, so that it knows how many there were. `logit_bound` above 0 keeps a gate's logit within it.
    `context` says whom a token sees in a pass after the first: "all", the finished ones too, or those "alive" in that
    pass; then a pass costs what the share of living tokens is, up to the next of `lengths`: shares of a row that it is
    compiled for, each of them once, the longest first.
    """

    alpha: tuple[float, ...] = (1.0, 0.7, 0.5, 0.35)
    weights: Literal["soft", "hard"] = "soft"
    threshold: float = 0.10
    p_floor: float = 0.01
    hidden: int = 32
    embedding: int = 16
    initial_bias: float = -1.0
    halting: Literal["token", "batch"] = "token"
    batch_share: float = 0.02
    features: Literal["mixer_input", "stream_mean"] = "mixer_input"
    state_width: int = 0
    by_pass: bool = False
    logit_bound: float = 0.0
    context: Literal["all", "alive"] = "all"
    lengths: tuple[float, ...] = (1.0, 0.56, 0.3, 0.16)  # above 1/2, 1/4, 1/8: the fullest row is fuller than the mean

    @property
    def max_passes(self) -> int:
        return len(self.alpha)

    @property
    def seeing_state(self) -> AdaptiveConfig:
        """With halting heads that can tell which token needs how much: they see state and pass, and do not saturate."""
        return self.replace(state_width=16, by_pass=True, logit_bound=5.0)

    @property
    def seeing_features(self) -> AdaptiveConfig:
        """With halting heads that see features of the pass alone (origin)."""
        return self.replace(state_width=0, by_pass=False, logit_bound=0.0)

    @property
    def hard(self) -> AdaptiveConfig:
        """With passes that count whole or not at all, cut where the gates say that another one is as likely as not, by
        gates that start open: behind a cut nothing is learned."""
        return self.replace(weights="hard", threshold=0.5, initial_bias=max(2.0, self.initial_bias))

    @property
    def soft(self) -> AdaptiveConfig:
        """With passes that count as much as the gates leave of a token (origin)."""
        return self.replace(weights="soft", threshold=0.10)

    def problems(self) -> list[str]:
        wrong = below(self, 1, "hidden", "embedding") + below(self, 0, "state_width")
        if not self.alpha or min(self.alpha) <= 0:
            wrong.append(f"alpha is {self.alpha}; it needs positive strengths, for example 1.0, 0.7, 0.5, 0.35")
        if not 0 < self.threshold < 1:
            wrong.append(f"threshold is {self.threshold}; it must lie in (0, 1)")
        if not 0 <= self.p_floor < self.threshold:
            wrong.append(f"p_floor is {self.p_floor}; it must lie in [0, threshold {self.threshold})")
        if not 0 <= self.batch_share < 1:
            wrong.append(f"batch_share is {self.batch_share}; it must lie in [0, 1)")
        falling = all(0 < low < high for high, low in itertools.pairwise(self.lengths))
        if self.lengths[:1] != (1.0,) or not falling:
            wrong.append(f"lengths is {self.lengths}; it must fall from 1.0 and stay above 0, like 1.0, 0.56, 0.3")
        if self.weights == "hard" and self.halting == "batch":
            wrong.append("weights 'hard' needs halting 'token'; under 'batch' no token is finished before all are")
        if self.context == "alive" and self.halting == "batch":
            wrong.append("context 'alive' needs halting 'token'; under 'batch' no token is finished before all are")
        return wrong


@dataclasses.dataclass(frozen=True)
class GatedCopiesConfig(Config):
    """Layers that run once, each at a token's own weight: passes of an adaptive model that became layers of their own.

    `copies` has [source layer, copy] of every layer, copies from 1: the layer is that pass of that layer, and its
    weight follows from the gates of the copies before it. `gate` is what halting heads and threshold are like.
    """

    copies: tuple[tuple[int, ...], ...]
    gate: AdaptiveConfig = AdaptiveConfig()

    def problems(self) -> list[str]:
        wrong, done = [], dict[int, int]()
        for layer, pair in enumerate(self.copies):
            if len(pair) != 2 or min(pair) < 0:
                wrong.append(f"copies[{layer}] is {list(pair)}; it must be [source layer, copy]")
                continue
            source, copy = pair
            if copy != done.get(source, 0) + 1:
                wrong.append(f"copies[{layer}] is copy {copy} of source layer {source}; copy {done.get(source, 0) + 1} "
                             "of it must come first")
            if copy > self.gate.max_passes:
                wrong.append(f"copies[{layer}] is copy {copy} of source layer {source}; gate.alpha has "
                             f"{self.gate.max_passes} passes")
            done[source] = copy
        if self.gate.halting != "token":
            wrong.append(f"gate.halting is {self.gate.halting!r}; it must be 'token': a layer that runs once cannot "
                         "wait for its batch")
        if self.gate.context != "all":
            wrong.append(f"gate.context is {self.gate.context!r}; it must be 'all': every token runs every layer")
        return wrong
