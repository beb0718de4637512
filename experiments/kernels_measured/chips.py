"""The chips that kernels are compiled for, one TensorCore each.

* Peak, HBM and cores of a chip: Google Cloud TPU documentation (docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e, /tpu7x:
  197, 459, 918, 2307 TFLOP/s of bfloat16; 819, 2765, 1638, 7380 GB/s; 16 GB, 95, 32, 192 GiB). JAX's own table
  (`jax.experimental.pallas.tpu.get_tpu_info`) says the same to 1 %, but for v5p 2460 GB/s.
* VMEM of a core, and the width of its matrix units (four of 128 x 128, or two of 256 x 256): that table.
* FLOP a cycle: 2 a cell, and for 256 x 256 another 2, which no document states: the compiler schedules the bfloat16
  product of two [1024, 1024] in 4,400 cycles for v6e, 488,000 FLOP a cycle, and in 16,600 for v5e, 129,000.
* The clock is not published; it is the peak over the FLOP a cycle, 1.50 1.75 1.75 2.20 GHz.
"""

from __future__ import annotations

from dataclasses import dataclass

from gt_jax.devices.pods.topologies import CHIPS as PODS


@dataclass(frozen=True)
class Chip:
    """One of `cores` TensorCores of a chip, with its share of the HBM. Rates are a second's, sizes in bytes."""

    topology: str
    matrix_unit: int  # width
    cores: int  # a chip
    peak: float  # FLOP/s in bfloat16, float32 sums
    bandwidth: float  # of HBM
    hbm: float
    vmem: int

    @property
    def flops_per_cycle(self) -> int:
        return 4 * 128**2 * 2 if self.matrix_unit == 128 else 2 * 256**2 * 4

    @property
    def clock(self) -> float:
        return self.peak / self.flops_per_cycle


CHIPS = {
    "v5e": Chip("v5e:2x2", 128, 1, 197e12, PODS["v5e"].bandwidth, 16e9, 128 << 20),
    "v5p": Chip("v5p:2x2x1", 128, 2, 459e12 / 2, PODS["v5p"].bandwidth / 2, 95 * 2**30 / 2, 64 << 20),
    "v6e": Chip("v6e:2x2", 256, 1, 918e12, PODS["v6e"].bandwidth, 32 * 2**30, 128 << 20),
    "tpu7x": Chip("tpu7x:2x2x1", 256, 2, 2307e12 / 2, PODS["tpu7x"].bandwidth / 2, 192 * 2**30 / 2, 64 << 20),
}
