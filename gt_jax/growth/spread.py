"""How much of what the source's passes add no mean strength can give, as the pass counts say it, in one line."""

from __future__ import annotations

import math

from gt_jax.growth.plan_entries import Plan
from gt_jax.growth.repetition import Repetition

SMALL = 0.001  # of the whole: not worth a second half of the line


def whole_spread(counts: Repetition) -> float | None:
    """The spread of all passes together, each by the mean square of what it adds; None where it was not measured."""
    pairs = [(share, size) for layer in counts.layers if layer.spread is not None and layer.update_square is not None
             for share, size in zip(layer.spread, layer.update_square, strict=True)]
    total = math.fsum(size for _, size in pairs)
    return math.fsum(share * size for share, size in pairs) / total if total > 0 else None


def spread_line(counts: Repetition | None, plan: Plan, whole_passes: bool = False) -> str | None:
    """What the plan makes of it, for a reader; None where nothing was measured.

    `whole_passes`: the source gives a token a pass whole or not at all (weights "hard").
    """
    if counts is None or (whole := whole_spread(counts)) is None:
        return None
    said = f"spread: {100 * whole:.2g} % of what the source's passes add (mean squares) differs between tokens"
    if plan.keeps_gates:
        return f"{said}; the gates keep it"
    if whole < SMALL:
        return f"{said}; mean strengths miss that little, --keep-gates nothing"
    _, layer, index = max(
        (share * size, layer, index) for layer, one in enumerate(counts.layers)
        for index, (share, size) in enumerate(zip(one.spread or (), one.update_square or (), strict=True)))
    if plan.options.get("coefficient") == "schedule":
        return f"{said}, most of it in pass {index + 1} of layer {layer}; --keep-gates keeps it"
    more = "; whole passes for all tokens, as the source's are for some: --coefficient schedule" if whole_passes else ""
    return (f"{said}, most of it in pass {index + 1} of layer {layer}; mean strengths cannot give it, --keep-gates "
            f"keeps it{more}")
