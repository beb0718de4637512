"""The strength of each copy of a layer: the recurrence's own weight of that pass, and its corrections (GROWTH.md 2).

w_j = alpha_j (schedule) or alpha_j * survival_j (expected). Passes beyond the last alpha go on at the last alpha;
survival beyond the measured passes is 0, and so is a pass of the schedule beyond those asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from gt_jax.growth.plan_entries import share
from gt_jax.growth.repetition import LayerRepetition

COEFFICIENTS = ("schedule", "expected")
CORRECTIONS = ("none", "ratio", "capped", "mass")


def pass_weights(layer: LayerRepetition, alpha: Sequence[float], passes: int, coefficient: str,
                 asked: Fraction | None = None) -> list[float]:
    """w_1..w_passes of one layer.

    `asked`: the schedule gives a pass past these no strength, for the recurrence does not run it. None where a whole
    block repeats, or a list names the copies: there alpha_j holds for all.
    """
    strengths = [alpha[min(j, len(alpha) - 1)] for j in range(passes)]
    if coefficient == "schedule":
        return strengths if asked is None else [w if j < asked else 0.0 for j, w in enumerate(strengths)]
    survival = [*layer.survival, *[0.0] * passes]
    return [strength * survival[j] for j, strength in enumerate(strengths)]


def own_mass(layer: LayerRepetition, alpha: Sequence[float], coefficient: str) -> float:
    """What the recurrence adds over the layer's k_exec passes: sum of w_j."""
    return math.fsum(pass_weights(layer, alpha, layer.k_exec, coefficient))


def strengths(layer: LayerRepetition, alpha: Sequence[float], copies: int, ratio: Fraction, *, coefficient: str,
              correct: str, asked: Fraction | None = None) -> list[float]:
    """Coefficients of copies 1..copies.

    none c = w_j; ratio c = w_j * ratio, with ratio = k_l / mean k of the block of the source that the layer stands in;
    capped c = w_j * min(ratio, 1); mass c = w_j * (sum of w over the k_exec passes) / (sum of w over the copies).
    """
    weights = pass_weights(layer, alpha, copies, coefficient, asked)
    factor = 1.0
    if correct in ("ratio", "capped"):
        factor = float(ratio)
    if correct == "capped":
        factor = min(factor, 1.0)
    if correct == "mass":
        factor = share(own_mass(layer, alpha, coefficient), math.fsum(weights))
    return [weight * factor for weight in weights]
