"""What the config of every study says of seeds and rates that are none: one line, or none."""

from __future__ import annotations

from collections.abc import Sequence


def wrong_seeds(seeds: Sequence[int]) -> list[str]:
    """Seeds are different whole numbers from 0: one that stands twice would count twice in a mean."""
    if seeds and len(set(seeds)) == len(seeds) and min(seeds) >= 0:
        return []
    return [f"seeds are {list(seeds)}; one or more different whole numbers from 0 are needed"]


def wrong_rates(rates: Sequence[float]) -> list[str]:
    """Learning rates are positive, and there is one."""
    if rates and min(rates) > 0:
        return []
    return [f"rates are {list(rates)}; one or more positive learning rates are needed"]
