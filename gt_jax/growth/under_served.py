"""Which source layers got less than they asked for from a growth, and which target layers are their children."""

from __future__ import annotations

import math
from typing import NamedTuple

from gt_jax.growth.plan_entries import Plan, share

_ROUNDING = 1e-6


class UnderServed(NamedTuple):
    """Source layer `source` asked for `asked` copies, got `granted` and `mass_kept` of its coefficients' sum.

    `children` are the target layers that are copies of it, from 0.
    """

    source: int
    asked: float
    granted: int
    mass_kept: float
    children: tuple[int, ...]

    def __str__(self) -> str:
        return (f"source layer {self.source} asked for {self.asked:g} copies, got {self.granted}, keeps "
                f"{self.mass_kept:.0%} of its coefficient mass (target layers {', '.join(map(str, self.children))})")


def under_served(plan: Plan) -> tuple[UnderServed, ...]:
    """The source layers with fewer copies or less coefficient mass than they asked for, and copies to train.

    A layer that got no copy at all has nothing that could make up for it, and is not among them. Dead copies count
    here: where the recurrence's own pass is next to nothing, nothing is missing.
    """
    found = []
    for source, (demand, granted) in enumerate(zip(plan.demands, plan.copies, strict=True)):
        asked = demand.passes
        kept = share(math.fsum(entry.coefficient for entry in plan.entries if entry.source == source), demand.mass)
        children = tuple(target for target, entry in enumerate(plan.entries)
                         if entry.source == source and entry.copy > 0)
        if children and (granted < asked - _ROUNDING or kept < 1 - _ROUNDING):
            found.append(UnderServed(source, asked, granted, kept, children))
    return tuple(found)
