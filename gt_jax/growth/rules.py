"""What growth does with each tensor: one ordered table of (path pattern, rule), first match wins.

A path that no row matches is refused, so a new kind of tensor needs a row here before it can be grown.

Carry, that is, how a coefficient c enters the child (GROWTH.md 3; N is the noise, added before scaling):
- weights: every tensor of the mixer and of the MLP becomes c * (W + N), also biases, a_log and the indexer: the growth
  README says "every tensor". Norms and gain are copied, but for a norm that comes last (post-norm), which undoes what
  scales the tensors before it: it becomes c times itself.
- output: c on the two residual-output tensors, or where norms come after them on these; the others become W + N.
- gain: all weights become W + N, and the child's gain is c times the source's: exactly h + c * Delta(h).
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import NamedTuple

from gt_jax.errors import refuse_all

CARRIES = ("weights", "output", "gain")
_LAYER = r"params/segment\d+/layer\d+"

SCALED, OUTPUT, COPIED, GAIN = "scaled", "output", "copied per layer", "gain"
LAST_NORM = "last norm"
STATISTICS, DROPPED, GLOBAL = "statistics", "dropped", "global"

RULES: tuple[tuple[str, str], ...] = (
    (rf"{_LAYER}/halting/.+", DROPPED),
    (rf"{_LAYER}/gain", GAIN),
    (rf"{_LAYER}/(residual_scale|x0_scale)", COPIED),
    (rf"{_LAYER}/(mixer_norm|mlp_norm|mixer/\w+_norm)/(scale|b)", COPIED),
    (rf"{_LAYER}/(mixer|mlp)_post_norm/scale", LAST_NORM),
    (rf"{_LAYER}/(mixer|mlp)_hyper/norm/scale", COPIED),
    (rf"{_LAYER}/(mixer|mlp)_hyper/(pre|post|res)/(w|b|alpha)", SCALED),
    (rf"{_LAYER}/(mixer/output|mlp/((shared|experts)/)?down)/(w|b)", OUTPUT),
    (rf"{_LAYER}/mlp/((shared|experts)/)?(gate|up)/(w|b)", SCALED),
    (rf"{_LAYER}/mlp/(router/(w|b|null_logit)|shared_gate/w)", SCALED),
    (rf"{_LAYER}/mixer/(query|key|value)(_conv)?/(w|b)", SCALED),
    (rf"{_LAYER}/mixer/(gate|value_gate|output_gate|beta|decay)/(w|b)", SCALED),
    (rf"{_LAYER}/mixer/(a_log|dt_bias|skip|head_importance)", SCALED),
    (rf"{_LAYER}/mixer/(state_output/w|state_gate/(w|b))", SCALED),
    (rf"{_LAYER}/mixer/(cue_query|cue_query_bias|state_query)", COPIED),
    (rf"{_LAYER}/mixer/(indexer_(query|key|weight)/w|indexer_bias)", SCALED),
    (r"statistics/segment\d+/layer\d+/.+", STATISTICS),
    (r"statistics/(embedding/token_(bytes|length)|mtp/layer/mixer/variance_ema)", GLOBAL),
    (r"params/(embedding/(table|kronecker/w|norm/scale)|final_norm/scale|unembedding/w)", GLOBAL),
    (r"params/memory/(strength|norm/(scale|bias)|gate/(w|b))", GLOBAL),
    (r"params/mtp/(fusion/w|layer/.+)", GLOBAL),
)
_COMPILED = tuple((re.compile(pattern), rule) for pattern, rule in RULES)
_RESIDUAL_OUTPUT = re.compile(rf"({_LAYER}/(?:mixer(?=/output/)|mlp(?=/.*\bdown/)))/.+")
_STACKED = re.compile(r"(params|statistics)/segment(\d+)/layer(\d+)/(.+)")


class StackedPath(NamedTuple):
    """A stacked tensor's path taken apart: `collection`/segment{segment}/layer{slot}/`name`."""

    collection: str
    segment: int
    slot: int
    name: str

    def __str__(self) -> str:
        return f"{self.collection}/segment{self.segment}/layer{self.slot}/{self.name}"


@dataclasses.dataclass(frozen=True)
class Treatment:
    """What happens to one slice: noise added, then scaled by the coefficient; neither is a plain copy."""

    noisy: bool
    scaled: bool


def rule(path: str) -> str | None:
    """The rule of the first row that matches the whole path, or None."""
    return next((name for pattern, name in _COMPILED if pattern.fullmatch(path)), None)


def stacked_path(path: str) -> StackedPath | None:
    """The parts of a stacked tensor's path, or None for a tensor of the whole model."""
    match = _STACKED.fullmatch(path)
    return StackedPath(match[1], int(match[2]), int(match[3]), match[4]) if match else None


def norm_after(path: str) -> str | None:
    """The path that the norm after a residual-output tensor has, in a layer that has one; None for other tensors."""
    match = _RESIDUAL_OUTPUT.fullmatch(path)
    return f"{match[1]}_post_norm/scale" if match else None


def treatment(rule_name: str, carry: str) -> Treatment:
    """Noise and scale for a rule under a carry (the table of this module's docstring)."""
    last = carry in ("weights", "output")
    scaled = {SCALED: carry == "weights", OUTPUT: last, LAST_NORM: last, GAIN: carry == "gain"}
    return Treatment(noisy=rule_name in (SCALED, OUTPUT), scaled=scaled.get(rule_name, False))


def check_noise(noise_std: float, seed: int) -> None:
    """Raise `Refused` unless noise_std is a finite number >= 0 and the seed fits 32 bits."""
    wrong = []
    if not (math.isfinite(noise_std) and noise_std >= 0):
        wrong.append(f"--noise-std {noise_std}: a finite number, 0 or more, is needed")
    if not 0 <= seed < 2**32:
        wrong.append(f"--seed {seed}: a whole number from 0 to {2**32 - 1} is needed")
    refuse_all(wrong, "the noise is not valid:")
