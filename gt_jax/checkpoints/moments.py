"""Where a checkpoint holds the optimizer's moments of each parameter.

- A training run stores its whole optimizer: `optimizer/…/nu/segment0/…`, the running means of the gradient (mu) and of
  its square (nu) by parameter, and `count`, the updates they have seen.
- A grown model stores what of these its parameters begin with, under names of their own that no optimizer's structure
  changes: `moments/second/segment0/…` and `moments/updates`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

SECOND, UPDATES = "moments/second", "moments/updates"
_OPTIMIZER = re.compile(r"(optimizer/.+)/(mu|nu)/(.+)")
_COPY = re.compile(r"optimizer/copies/(.+)")


class Moments(NamedTuple):
    """Names of stored tensors by parameter (`segment0/layer0/gain`): means of gradients, of their squares, float32
    copies of narrower weights; and the name of the count of updates."""

    first: dict[str, str]
    second: dict[str, str]
    copies: dict[str, str]
    updates: str

    def lacking(self, parameters: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
        """Parameters, of these by name, whose second moment is not stored in their shape."""
        return [name for name, leaf in parameters.items()
                if name not in self.second or stored[self.second[name]].shape != tuple(leaf.shape)]


def stored_moments(stored: Iterable[str]) -> Moments | None:
    """What of it is among these tensors; None without second moments or their count."""
    names = set(stored)
    first, second, copies, updates = dict[str, str](), dict[str, str](), dict[str, str](), UPDATES
    for name in sorted(names):
        if name.startswith(f"{SECOND}/"):
            second[name.removeprefix(f"{SECOND}/")] = name
        elif found := _OPTIMIZER.fullmatch(name):
            (first if found[2] == "mu" else second)[found[3]] = name
            updates = f"{found[1]}/count"  # all groups of parameters have seen the same
        elif found := _COPY.fullmatch(name):
            copies[found[1]] = name
    return Moments(first, second, copies, updates) if second and updates in names else None
