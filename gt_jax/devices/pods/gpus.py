"""GPUs by name, `h100:8`: cards in boxes of eight, what a program is compiled for where none is there, their links.

Of a group of n devices, k of them in each of m boxes, one byte that each device receives takes at least

    1 / nvlink                                          in one box (m = 1)
    max(1 / nvlink, n / (n - 1) (m - 1) / m / (k nic))  over several: all k of a box fetch what lies outside once

What is assumed, and not shown by any measurement here: one collective at a time, all links at the published rate, one
network card a GPU, no switch that is shared.

Sources: NVIDIA's data sheets of H100 SXM and H200 SXM (bandwidth, NVLink 4: 900 GB/s both ways), of DGX H100 and H200
(eight network cards of 400 Gb/s for eight GPUs), CUDA C programming guide, table of compute capability 9.0 (limits of
threads, registers and shared memory); memory as the driver reports it to a program.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gt_jax.errors import Failed, Refused
from pallas_kernels.ptxas import find_ptxas

BOX = 8  # cards that NVLink joins, all to all
NVLINK = 4.5e11  # bytes/s of one card in one direction
NIC = 5e10  # bytes/s of one network card in one direction
PREALLOCATED = 0.75  # of a card's memory: what JAX takes at its start, unless XLA_PYTHON_CLIENT_MEM_FRACTION says more
ASSUMED = "one collective at a time, NVLink in a box of eight, one network card a GPU between boxes, published rates"
_EXAMPLES = "1, 2, 4, 8 or a multiple of 8, for example h100:1, h100:8, h200:8, h100:64"


@dataclass(frozen=True)
class Card:
    """One kind of GPU: its name to the driver, bytes of memory for a program, bytes/s of HBM."""

    name: str
    memory: int
    bandwidth: float


CARDS = {
    "h100": Card("NVIDIA H100 80GB HBM3", 84_942_979_072, 3.352e12),
    "h200": Card("NVIDIA H200", 150_100_000_000, 4.8e12),
}
_HOPPER = {  # of every card of compute capability 9.0; sizes in bytes
    "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048, "core_count": 132,
    "shared_memory_per_block": 48 << 10, "shared_memory_per_block_optin": 227 << 10,
    "shared_memory_per_core": 228 << 10, "registers_per_core_limit": 1 << 16, "registers_per_block_limit": 1 << 16,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 2**16 - 1, "block_dim_limit_z": 2**16 - 1,
    "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64, "l2_cache_size": 50 << 20,
    "clock_rate_ghz": 1.98, "device_address_bits": 64,
}  # fmt: skip
_CUDA, _CUDNN = "13.0.0", (9, 10, 0)  # what the compiler takes to be installed


@dataclass(frozen=True)
class Cluster:
    """So many cards of one kind."""

    kind: str
    devices: int

    assumed = ASSUMED
    a_chip = 1  # devices of a card
    slice_rate = math.inf  # between slices, of which there is one

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.devices}"

    @property
    def card(self) -> Card:
        return CARDS[self.kind]

    @property
    def device_memory(self) -> int:
        """Bytes of one device."""
        return self.card.memory

    @property
    def bandwidth(self) -> float:
        """Bytes a second between a device and its HBM."""
        return self.card.bandwidth

    def use_compiler(self) -> None:
        """Let the compiler run on a machine without a GPU, or beside one; has to be called before JAX is imported."""
        refuse_without_compiler()
        os.environ["JAX_PLATFORMS"] = "cpu"

    def stand_ins(self) -> list[Any]:
        """Stand-ins for the cards, good for compiling; raises `Failed` where the compiler refuses them."""
        import jax
        from jax.experimental import topologies

        boxes = f"1x{max(1, self.devices // BOX)}x{min(BOX, self.devices)}"  # one slice, its boxes, cards in each
        try:
            made = topologies.get_topology_desc(
                platform="cuda", topology_name=boxes, topology=boxes, target_config=target_config(self.card)
            )
        except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
            raise Failed(f"the compiler for GPUs does not make {self.name}: {error}") from error
        return list(made.devices)

    def axis_rates(self, mesh: Any) -> dict[str, tuple[float, int]]:
        """Of each axis of a mesh: bytes/s that one device receives along it, and 1 where it spans anything."""
        found = {}
        for axis, size in mesh.shape.items():
            line = _along(mesh, axis)
            found[axis] = (1 / seconds_a_byte(line), 1) if size > 1 else (math.inf, 0)
        return found

    def link_seconds(self, devices: Sequence[Any]) -> Callable[[Sequence[int]], float]:
        """seconds(group) a byte that each device of a group, by number, receives; `devices` in the program's order."""
        boxes = [device.id // BOX for device in devices]
        return lambda group: seconds_a_byte([boxes[one] for one in group])


def parse(text: str) -> Cluster | None:
    """`h100:8` as a `Cluster`, None for what names no card; raises `Refused` for a number that there is not."""
    kind, _, number = text.partition(":")
    if kind not in CARDS:
        return None
    count = int(number) if re.fullmatch("0*[1-9][0-9]{0,5}", number) else 0
    if not count or (count % BOX and count not in (1, 2, 4)):
        raise Refused(f"--topology {text!r} does not exist; {kind} comes in boxes of {BOX}: {_EXAMPLES}")
    return Cluster(kind, count)


def names() -> str:
    """Which cards there are, in words."""
    return f"{' and '.join(f'{kind}:N' for kind in CARDS)} with N {_EXAMPLES}"


def seconds_a_byte(boxes: Sequence[int]) -> float:
    """Of a byte that each device of a group receives, the box of each device given; 0 where there is one device."""
    n, held = len(boxes), Counter(boxes)
    if n < 2:
        return 0.0
    m, k = len(held), min(held.values())
    outside = n / (n - 1) * (m - 1) / m / (k * NIC)
    return max(1 / NVLINK, outside) if k < n else 1 / NVLINK


def _along(mesh: Any, axis: str) -> list[int]:
    """The boxes of the devices of the first line along an axis."""
    at = mesh.axis_names.index(axis)
    index = tuple(slice(None) if number == at else 0 for number in range(len(mesh.axis_names)))
    return [device.id // BOX for device in mesh.devices[index]]


def target_config(card: Card) -> str:
    """A `GpuTargetConfigProto` as text: what XLA asks of a card before it compiles for it."""
    facts: Mapping[str, Any] = {
        **_HOPPER, "memory_bandwidth": round(card.bandwidth), "device_memory_size": card.memory,
        "name": _quoted(card.name), "device_vendor": _quoted("NVIDIA Corporation"),
        "driver_version": _quoted(_CUDA), "runtime_version": _quoted(_CUDA),
        "compile_time_toolkit_version": _quoted(_CUDA), "dnn_version": _quoted(".".join(map(str, _CUDNN))),
    }  # fmt: skip
    lines = [f"  {name}: {value}" for name, value in facts.items()]
    lines.append("  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }")
    library = " ".join(f"{part}: {number}" for part, number in zip(("major", "minor", "patch"), _CUDNN, strict=True))
    outside = [f"dnn_version_info {{ {library} }}", 'platform_name: "CUDA"',
               f"device_description_str: {_quoted(card.name)}"]  # fmt: skip
    return "\n".join(["gpu_device_info {", *lines, "}", *outside, ""])


def _quoted(text: str) -> str:
    return f'"{text}"'


def refuse_without_compiler() -> None:
    """Raise `Refused`, with what to install, where JAX's plugin for CUDA or `ptxas` is missing."""
    plugin = next((name for name in ("jax_cuda13_plugin", "jax_cuda12_plugin") if _found(name)), None)
    if plugin is None:
        raise Refused("the compiler for GPUs is not installed: pip install 'gt-jax[cuda]'; no GPU is needed")
    if not find_ptxas():
        version = plugin[len("jax_cuda") :][:2]
        package = "nvidia-cuda-nvcc" if version == "13" else f"nvidia-cuda-nvcc-cu{version}"
        raise Refused(f"ptxas, which makes machine code for GPUs, is not installed: pip install {package}")


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
