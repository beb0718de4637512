"""Whole copies from passes asked for: each unit of layers that is copied together gets its mean, rounded.

A unit asks for the mean of its layers' passes. `up`, `down` and `nearest` (a half goes up) round that, at least to 1;
`balance` is the method of the largest remainder over all units towards a depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from gt_jax.errors import Refused
from gt_jax.growth.repetition import MOST_PASSES

ROUNDS = ("up", "down", "nearest", "balance")
_HALF = Fraction(1, 2)


class Unit(NamedTuple):
    """Source layers that are copied together, in order, and the passes that they ask for together."""

    layers: tuple[int, ...]
    passes: Fraction

    @property
    def wanted(self) -> Fraction:
        """The mean of the passes: copies before rounding."""
        return self.passes / len(self.layers)


def unit(layers: Sequence[int], asked: Sequence[Fraction]) -> Unit:
    """The unit of these layers; `asked` holds the passes of every source layer."""
    return Unit(tuple(layers), sum((asked[layer] for layer in layers), Fraction(0)))


def depth(units: Sequence[Unit], copies: Sequence[int]) -> int:
    """Layers that come out."""
    return sum(len(one.layers) * count for one, count in zip(units, copies, strict=True))


def rounded(units: Sequence[Unit], round: str, target_layers: int | None) -> tuple[int, ...]:
    """Copies by unit; raises `Refused` for a `target_layers` that this rounding does not give.

    `balance` spreads `target_layers` (by default the nearest depth to the sum of the passes) in proportion to the
    units' passes, ties to the earlier unit, none above `MOST_PASSES`. The message says which depths can be reached,
    and how.
    """
    copies = _rounded(units, round, target_layers)
    if target_layers is not None and depth(units, copies) != target_layers:
        raise Refused(f"--target-layers {target_layers} is not what --round {round} gives ({depth(units, copies)} "
                      f"layers); {_reachable(units, target_layers)}")
    return copies


def _rounded(units: Sequence[Unit], round: str, target_layers: int | None) -> tuple[int, ...]:
    if round == "balance":
        return _balanced(units, target_layers)
    if round == "up":
        return tuple(math.ceil(one.wanted) for one in units)
    half = _HALF if round == "nearest" else Fraction(0)
    return tuple(max(1, math.floor(one.wanted + half)) for one in units)


def _balanced(units: Sequence[Unit], target_layers: int | None) -> tuple[int, ...]:
    widths = {len(one.layers) for one in units}
    if len(widths) > 1:
        raise Refused("--round balance needs blocks of one length; this layout falls into blocks of "
                      f"{', '.join(map(str, sorted(widths)))} layers")
    (width,) = widths
    total = sum((one.passes for one in units), Fraction(0))
    wanted = width * max(len(units), math.floor(total / width + _HALF)) if target_layers is None else target_layers
    least, most = width * len(units), width * len(units) * MOST_PASSES
    if wanted % width or not least <= wanted <= most:
        raise Refused(f"--target-layers {wanted} cannot be reached: --round balance gives any multiple of {width} "
                      f"from {least} (every layer once) to {most}")
    shares = [one.passes * wanted / (total * width) for one in units]
    copies = [min(MOST_PASSES, max(1, math.floor(share))) for share in shares]
    while (missing := wanted // width - sum(copies)) != 0:
        step = 1 if missing > 0 else -1
        movable = [index for index, count in enumerate(copies) if 1 <= count + step <= MOST_PASSES]
        copies[max(movable, key=lambda index: (step * (shares[index] - copies[index]), -index))] += step
    return tuple(copies)


def _reachable(units: Sequence[Unit], target_layers: int) -> str:
    ways = [f"--round {way} gives {depth(units, _rounded(units, way, None))}" for way in ROUNDS[:3]]
    try:
        _balanced(units, target_layers)
        ways.append(f"--round balance gives {target_layers} with this --target-layers")
    except Refused as error:
        ways.append(str(error))
    return "; ".join(ways)
