"""TPU pods by name, `v5p:4x4x4`: which there are, how many devices they have, what each device's memory holds.

`parse` knows GPUs too, which are in `gpus`.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gt_jax.devices.pods import between_slices, gpus, links
from gt_jax.errors import Failed, Refused

GIB = 1 << 30
ENVIRONMENT = {  # in which the TPU's compiler runs on a machine without a TPU, for any of them
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Chip:
    """One generation: memory of a chip in GiB, JAX devices on it, numbers in a shape, largest shape, bytes/s of HBM.

    Source: Google Cloud's TPU documentation, "System architecture" of each generation.
    """

    memory_gib: int
    devices: int
    dimensions: int
    largest: tuple[int, ...]
    bandwidth: float

    @property
    def device_memory(self) -> int:
        """Bytes of one JAX device."""
        return self.memory_gib * GIB // self.devices


CHIPS = {
    "v5e": Chip(16, 1, 2, (16, 16), 819e9),
    "v5p": Chip(95, 1, 3, (16, 16, 24), 2765e9),
    "v6e": Chip(32, 1, 2, (16, 16), 1638e9),
    "tpu7x": Chip(192, 2, 3, (16, 24, 24), 7380e9),
}
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
EXAMPLES = {"v5p": "2x2x1, 2x2x2, 2x2x4, 2x4x4 and multiples of 4 such as 4x4x4, 4x4x8, 8x8x8, 8x16x16"}


def shapes(kind: str) -> str:
    """Which shapes a generation comes in, in words."""
    if CHIPS[kind].dimensions == 2:
        return ", ".join("x".join(map(str, shape)) for shape in FLAT)
    return EXAMPLES["v5p"] + ", up to " + "x".join(map(str, CHIPS[kind].largest))


@dataclass(frozen=True)
class Topology:
    """A pod, or several slices that are one each: generation and shape in chips."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    assumed = links.ASSUMED

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def devices(self) -> int:
        return self.slices * math.prod(self.shape) * self.chip.devices

    @property
    def slice_rate(self) -> float:
        """Bytes a second that one device receives from other slices."""
        return between_slices.RATES[self.kind] / self.chip.devices

    @property
    def a_chip(self) -> int:
        """Devices of a chip."""
        return self.chip.devices

    @property
    def device_memory(self) -> int:
        """Bytes of one device."""
        return self.chip.device_memory

    @property
    def bandwidth(self) -> float:
        """Bytes a second between a device and its HBM."""
        return self.chip.bandwidth / self.chip.devices

    def use_compiler(self) -> None:
        """`use_compiler`, refused where there is none."""
        if importlib.util.find_spec("libtpu") is None:
            raise Refused("the TPU compiler is not installed: pip install 'gt-jax[tpu]'")
        use_compiler()

    def stand_ins(self) -> list[Any]:
        """Stand-ins for the devices, good for compiling; raises `Failed` where the compiler refuses the name."""
        return devices_of(self)

    def axis_rates(self, mesh: Any) -> dict[str, tuple[float, int]]:
        """Of each axis of a mesh: bytes/s that one device receives along it, axes of the torus that it spans."""
        return links.axis_rates(self.kind, self.shape, mesh)

    def link_seconds(self, devices: Sequence[Any]) -> Callable[[Sequence[int]], float]:
        """seconds(group) a byte that each device of a group, by number, receives; `devices` in the program's order."""
        return links.link_seconds(self.kind, self.shape, devices)


def parse(text: str, slices: int = 1) -> Topology | gpus.Cluster:
    """`v5p:4x4x4`, so many slices of it, or `h100:8`, as what it names; raises `Refused` with the names there are."""
    if slices < 1:
        raise Refused(f"--slices is {slices}; it must be at least 1")
    if (cluster := gpus.parse(text)) is not None:
        if slices > 1:
            raise Refused(f"--slices {slices} is of TPUs; {text} names all its cards")
        return cluster
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", text)
    if not found or found[1] not in CHIPS:
        every = "; ".join(f"{kind}:SHAPE with {shapes(kind)}" for kind in CHIPS)
        raise Refused(f"--topology {text!r} does not exist; there are {every}; {gpus.names()}")
    kind, shape = found[1], tuple(map(int, found[2].split("x")))
    if not _exists(CHIPS[kind], shape):
        raise Refused(f"--topology {text!r} does not exist; {kind} comes as {shapes(kind)}")
    return Topology(kind, shape, slices)


def _exists(chip: Chip, shape: tuple[int, ...]) -> bool:
    if chip.dimensions == 2:
        return shape in FLAT
    if shape in ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)):
        return True
    whole = len(shape) == 3 and all(size > 0 and size % 4 == 0 for size in shape)
    return whole and all(a <= b for a, b in zip(sorted(shape), sorted(chip.largest), strict=True))


def use_compiler() -> None:
    """Let the TPU's compiler run on a machine without a TPU; has to be called before JAX is imported."""
    os.environ |= ENVIRONMENT


def devices_of(topology: Topology) -> list[Any]:
    """Stand-ins for the devices of the pod, good for compiling; raises `Failed` where the compiler refuses the name."""
    import jax
    from jax.experimental import topologies

    more: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(topology.shape) == 1 else {}  # else four
    more |= {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **more).devices)
    except jax.errors.JaxRuntimeError as error:
        raise Failed(f"the TPU compiler does not know {topology.name}: {error}") from error
