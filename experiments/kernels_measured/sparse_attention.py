"""Gated sparse attention: each of its four kernels alone, one causal row with survivors in every tile.

A unit is an attention head and a pair of tiles of queries and keys. Loops inside a kernel are in its schedule once: the
passes of `select` (20 to 25), and the loop that cuts ties, which has no steps where nothing is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from experiments.kernels_measured.cases import Case, Kernel
from pallas_kernels.sparse_attention.tpu import standalone

SIZES: dict[str, Any] = {"heads": 16, "width": 128, "indexer_heads": 4, "indexer_width": 32}
LENGTH = 8192


def cases() -> list[Case]:
    """The kernels in the order in which they run."""
    return [_case(kernel) for kernel in standalone.kernels(1, LENGTH, **SIZES)]


def _case(kernel: standalone.Kernel) -> Case:
    leaves, tree = jax.tree.flatten(kernel.arguments)
    name = kernel.name.removeprefix("sparse_attention_")

    def run(*flat: Any) -> Any:
        return kernel.run(*jax.tree.unflatten(tree, flat))

    def of(chip: Any) -> Callable[..., Any]:
        return run

    units = SIZES["heads"] * kernel.tiles / kernel.steps
    row = Kernel(name, kernel.name, kernel.steps, units, kernel.flops, kernel.least_bytes, kernel.moved_bytes)
    return Case(
        name=name,
        operation="sparse attention",
        unit="head and pair of tiles",
        arguments=[(leaf.shape, str(leaf.dtype)) for leaf in leaves],
        run=of,
        beside=None,
        kernels=lambda chip: [row],
    )
