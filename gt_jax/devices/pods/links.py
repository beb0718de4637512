"""How long do a program's collectives take on the links of a pod, at least? By the torus axes that each of them spans.

    seconds = sum over collectives  received * devices of a chip / (links * rate)

`links` are those of the axes of the torus along which the devices of a group differ: two of an axis that the group
fills and that wraps around, else one. What is assumed, and not shown by any measurement here:

- one collective at a time, on all links of the axes it spans, both directions at the published rate;
- an axis wraps around where it is a multiple of 4 (v5p, tpu7x) or 16 long (v5e, v6e);
- what stays on one chip (the two devices of a tpu7x) takes no time.

Source of rates and of where axes wrap: "How to Scale Your Model", part 2, "How to Think About TPUs", ICI bandwidth a
link, one way (jax-ml.github.io/scaling-book); Google Cloud's TPU documentation has 1200 GB/s a chip, both ways, for v5p
and tpu7x, 800 for v6e: 100 a link and direction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gt_jax.devices.meshes import slice_count
from gt_jax.devices.pods import between_slices
from gt_jax.devices.pods.hlo import Instruction

RATES = {"v5e": 4.5e10, "v5p": 9e10, "v6e": 9e10, "tpu7x": 9e10}  # bytes/s of one link in one direction
WRAPS = {"v5e": 16, "v5p": 4, "v6e": 16, "tpu7x": 4}  # an axis of a multiple of so many chips is a ring
ASSUMED = "one collective at a time, on all links of the torus axes it spans, two of a ring, at published rates"

_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LIST = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{\{([\d,]*)\}")
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def first_group(x: Instruction, devices: int) -> list[int]:
    """The devices, by their number in the program, of the first group of a collective; all where it has no groups."""
    if found := _MESH.search(x.attributes):
        return _of_mesh(found[1], found[2], found[3])
    if found := _IOTA.search(x.attributes):
        groups = _ordered(found[2], found[3]).reshape(_numbers(found[1]))
        return [int(one) for one in groups[0]]
    found = _LIST.search(x.attributes) or _PAIRS.search(x.attributes)
    return _numbers(found[1]) if found and found[1] else list(range(devices))


def _of_mesh(sizes: str, order: str | None, over: str) -> list[int]:
    """Of `mesh['a'=2,'b'=4] {'b'}`: those that differ in the named axes alone; `'b':(2)2` is a part of an axis."""
    shape = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    found = _ORDER.match(order or "")
    ids = _ordered(found[1], found[2]) if found else np.arange(math.prod(shape.values()))
    named = {name: (int(before or 1), int(size or shape[name])) for name, before, size in _AXIS.findall(over)}
    split: list[int] = []
    kept: list[slice | int] = []
    for name, size in shape.items():
        before, own = named.get(name, (size, 1))
        split += [before, own, size // (before * own)]
        kept += [0, slice(None) if name in named else 0, 0]
    return [int(one) for one in ids.reshape(split)[tuple(kept)].reshape(-1)]


def _ordered(shape: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def links_of(places: Sequence[Sequence[int]], shape: Sequence[int], wraps: int) -> int:
    """Links that devices at `places` (coordinates of their chips) can use, in a torus of `shape`; 0 on one chip."""
    taken = np.unique(np.array(places), axis=0)
    links = 0
    for axis, length in enumerate(shape):
        along = len(np.unique(taken[:, axis]))
        if along > 1:
            links += 2 if along == length and length % wraps == 0 else 1
    return links


def axis_rates(kind: str, shape: Sequence[int], mesh: Any) -> dict[str, tuple[float, int]]:
    """Of each axis of a mesh: bytes/s that one device receives along it, and how many axes of the torus it spans.

    An axis that also goes from slice to slice is no faster than the network between them, over which each device of a
    slice hands on its part of what they have together.
    """
    slices = slice_count(mesh.devices.flat)
    a_chip = mesh.devices.size // (slices * math.prod(shape))
    found = {}
    for number, axis in enumerate(mesh.axis_names):
        line = np.moveaxis(mesh.devices, number, 0).reshape(mesh.devices.shape[number], -1)[:, 0]
        places = [tuple(device.coords)[: len(shape)] for device in line]
        links = links_of(places, shape, WRAPS[kind])
        spans = sum(len({place[at] for place in places}) > 1 for at in range(len(shape)))
        rate = links * RATES[kind] / a_chip if links else math.inf
        if slices > 1 and len({device.slice_index for device in line}) > 1:
            rate = min(rate, between_slices.RATES[kind] / a_chip * len(line) / slices)
        found[axis] = (rate, spans)
    return found


def link_seconds(kind: str, shape: Sequence[int], devices: Sequence[Any]) -> Callable[[Sequence[int]], float]:
    """seconds(group) a byte that each device of a group, by number, receives; `devices` in the program's order."""
    places = [tuple(device.coords)[: len(shape)] for device in devices]
    a_chip = len(places) // (len(set(places)) * slice_count(devices))

    def seconds(group: Sequence[int]) -> float:
        links = links_of([places[one] for one in group], shape, WRAPS[kind])
        return a_chip / (links * RATES[kind]) if links else 0.0

    return seconds
