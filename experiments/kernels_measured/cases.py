"""What an operation has to say about itself to stand in the report; see `gated_delta_rule` for one that does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.kernels_measured.chips import Chip


@dataclass(frozen=True)
class Kernel:
    """One Pallas kernel of a case, called once in it.

    in_dump: its `name=` in `pallas_call`, by which the compiler's files and the HLO call it.
    steps: of its grid; the static cycles are those of one.
    units_per_step: of work in a grid step, in `Case.unit`; a loop inside the kernel is in its schedule once, unless
        `counted_loops` says that all of them but the grid's have constant counts: then it is in it that often.
    flops: useful ones of the whole call, from the equations.
    least_bytes: to and from HBM: arguments, results and what is kept for the backward pass, once each.
    moved_bytes: by the blocks of all steps; None where the kernel takes every operand and result once.
    """

    name: str
    in_dump: str
    steps: int
    units_per_step: float
    flops: float
    least_bytes: float
    moved_bytes: float | None = None
    counted_loops: bool = False


@dataclass(frozen=True)
class Case:
    """An operation at one shape.

    unit: of work, as "chunk and value head".
    arguments: shape and dtype of each, on one device.
    run: for a chip, the function of these that uses the kernels; `beside` is the same by plain XLA, None for a part of
        an operation that has no counterpart there.
    kernels: for a chip, those in `run`.
    loop_length: of the loops of `beside` whose length depends on the data, or on the step of another loop; the mean.
    """

    name: str
    operation: str
    unit: str
    arguments: Sequence[tuple[tuple[int, ...], str]]
    run: Callable[[Chip], Callable[..., Any]]
    beside: Callable[..., Any] | None
    kernels: Callable[[Chip], Sequence[Kernel]]
    loop_length: float = 1
