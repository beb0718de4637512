"""How many floating point operations does a compiled program run? Its matrix products and its kernels, loops counted.

* A product is 2 (a multiply and an add) times the elements of its result times those that each of them sums over, also
  inside fusions. XLA for TPU writes products as convolutions, batched ones as convolutions with holes between the
  elements, so of a window only the positions count that meet an element: neither padding nor holes.
* XLA for GPU leaves large products to NVIDIA's library: custom calls that say what they sum over.
* A kernel counts by the estimate that it gave the compiler (`pl.CostEstimate`). JAX's splash attention gives none; it
  counts by its shapes, the keys before each query.
* What is computed element by element and reductions are not counted, as nowhere in `gt_jax.models.flops`.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from gt_jax.devices.pods.hlo import Computation, Instruction, Program

_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LIBRARY = re.compile(r'custom_call_target="__cublas\$(?:lt\$)?(?:gemm|matmul)[^"]*"')
_SUMMED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_WINDOW_DEFAULTS = (("size", 1), ("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
_GROUPS = re.compile(r"batch_group_count=(\d+)")
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # of queries or their gradients with keys or values
_PALLAS = re.compile(r'custom_call_target="(tpu_custom_call|mosaic_gpu\w*)"')
_ESTIMATE = re.compile(r'"cost_estimate":\{([^}]*)\}')


class Work(NamedTuple):
    """FLOPs of one run; of these by kernels; kernels in the text that gave no estimate, which count nothing."""

    flops: int
    of_kernels: int
    silent_kernels: int


def count_flops(program: Program, loop_length: float | int = 1) -> Work:
    """Of one run of the program; a loop whose length is not in the text counts `loop_length` times.

    Raises ValueError for a product that is written in a way this does not know.
    """
    products, kernels = (round(program.total(cost, loop_length, through=("fusion",)))
                         for cost in (product_flops, kernel_flops))  # fmt: skip
    silent = sum(is_kernel(x) and _ESTIMATE.search(x.attributes) is None and _SPLASH.match(x.name) is None
                 for x, _ in program.executed())  # fmt: skip
    return Work(products + kernels, kernels, silent)


def flops_of(here: Computation, x: Instruction) -> int:
    """Of one product or one kernel, for `Program.shares` through fusions; 0 for other instructions."""
    return product_flops(here, x) + kernel_flops(here, x)


def is_kernel(x: Instruction) -> bool:
    """Whether it runs a Pallas kernel, for a TPU or of Mosaic for a GPU."""
    return x.opcode == "custom-call" and _PALLAS.search(x.attributes) is not None


def kernel_flops(here: Computation, x: Instruction) -> int:
    """Of a kernel by its own estimate, of splash attention by its shapes; 0 for other instructions."""
    splash = _SPLASH.match(x.name) if is_kernel(x) else None
    if splash is None:
        return estimated(x, "flops")
    queries, keys = (here.operand(x, place).arrays[0] for place in (2, 3))
    return _SPLASH_PRODUCTS[splash[1]] * queries.elements * (keys.shape[-2] + 1)


def estimated(x: Instruction, what: str) -> int:
    """`flops` or `bytes_accessed` of a kernel as it told the compiler; 0 where it did not, and for all else."""
    if not is_kernel(x) or (given := _ESTIMATE.search(x.attributes)) is None:
        return 0
    number = re.search(rf'"{what}":"?(\d+)', given[1])
    return int(number[1]) if number else 0


def product_flops(here: Computation, x: Instruction) -> int:
    """Of a `dot`, a library's product or a `convolution`; 0 for other instructions."""
    library = x.opcode == "custom-call" and _LIBRARY.search(x.attributes) is not None
    if x.opcode == "dot" or library:
        contracted = (_SUMMED if library else _CONTRACTED).search(x.attributes)
        shape = here.operand(x, 0).arrays[0].shape
        summed = math.prod(shape[int(d)] for d in re.findall(r"\d+", contracted[1] if contracted else ""))
        return 2 * x.arrays[0].elements * summed
    return _convolution_flops(here, x) if x.opcode == "convolution" else 0


def _convolution_flops(here: Computation, x: Instruction) -> int:
    """2 * rows of the batch * features out * features in, of one group, * (window, result) pairs that meet an element.

    Raises ValueError for one whose dimensions are not labelled.
    """
    if (labels := _LABELS.search(x.attributes)) is None:
        raise ValueError(f"the convolution {x.name} has no dim_labels")
    left = labels[1]
    shapes = [array.shape for array in (here.operand(x, 0).arrays[0], here.operand(x, 1).arrays[0], x.arrays[0])]
    sizes = [dict(zip(*pair, strict=True)) for pair in zip(labels.groups(), shapes, strict=True)]
    groups = _GROUPS.search(x.attributes)
    rows = sizes[0]["b"] // (int(groups[1]) if groups else 1)
    total = 2 * rows * sizes[1]["o"] * sizes[1]["i"]
    spatial = sorted(set(left) - {"b", "f"})
    window = [_of_window(x, key, default, len(spatial)) for key, default in _WINDOW_DEFAULTS]
    for label, *places in zip(spatial, *window, strict=True):
        total *= _meetings(sizes[0][label], sizes[2][label], *places)
    return total


def _of_window(x: Instruction, key: str, default: int, dimensions: int) -> list[int]:
    """`size`, `stride` or another property of a window, of each dimension; of padding what comes before."""
    window = _WINDOW.search(x.attributes)
    given = re.search(rf"\b{key}=(\S+)", window[1]) if window else None
    return [int(one.partition("_")[0]) for one in given[1].split("x")] if given else [default] * dimensions


def _meetings(length: int, results: int, size: int, stride: int, pad: int, holes: int, spread: int) -> int:
    """How many (place in the window, result) pairs of one dimension meet an element of the `length` there are.

    Place k of result r lies at r stride + k spread - pad, element e at e holes; both from 0.
    """
    step = math.gcd(stride, holes)
    count = 0
    for place in range(size):
        start = place * spread - pad
        if start % step:
            continue  # never on an element
        # results r with r stride = -start (mod holes) come every `apart`, and lie between the first and last element
        apart = holes // step
        first = (-start // step * pow(stride // step, -1, apart)) % apart if apart > 1 else 0
        low = max(0, -(start // stride))  # smallest r with start + r stride >= 0
        high = min(results - 1, ((length - 1) * holes - start) // stride)
        first += -(-(max(low, first) - first) // apart) * apart
        count += max(0, (high - first) // apart + 1)
    return count
