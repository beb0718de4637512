"""What of a mesh needs no JAX: the names of its axes, and how many slices its devices belong to.

A slice is a set of TPU chips whose links join them; a network joins slices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from gt_jax.errors import Refused

MESH_AXES = ("data", "fsdp", "expert", "tensor")


def slice_count(devices: Iterable[Any]) -> int:
    """How many slices devices belong to, 1 where they know of none; raises `Refused` for slices of different sizes."""
    held = Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(set(held.values())) > 1:
        sizes = ", ".join(str(held[one]) for one in sorted(held))
        raise Refused(f"the devices are of {len(held)} slices, {sizes} of each; as many of every slice are needed")
    return len(held)
