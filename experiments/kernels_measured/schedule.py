"""Reading what the TPU compiler wrote about a kernel: cycles, slots, spills and VMEM of one grid step.

* Cycles are static: the length of the schedule of one grid step, waiting for units included, for memory not. The same
  on every run of one compiler. A loop inside the kernel is in it once.
* Slots are what the step issues to each unit, as a share of what the unit could take in its cycles.
* VMEM is all that the compiler allocates: the buffers of blocks, scratch, the space of spilled registers, its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

REGISTER = 4096  # bytes of a vector register
_TOTAL = re.compile(r"total scheduled bundles:\s+(\d+)")
_BUNDLE = re.compile(r"\s*(?:\d+:)?\s*0x([0-9a-f]+)\s")
_BRANCH = re.compile(r"sbr\.rel \(!(%p\w+)\) target bundleno = (\d+) ")
_EXIT = re.compile(r"(%p\w+) = scmp\.ge\.s32\.totalorder (?:\(\S+\), )?%s\w+, (\d+) /\* loop exit test \*/")
_ALLOCATION = re.compile(r"#(allocation\d+)(_spill)? \[shape = '[^']*', space=vmem, size = (0x[0-9a-f]+)")


class Schedule(NamedTuple):
    """Of one grid step: cycles, shares of slots, bytes stored by spilling, bytes of VMEM and of it for spills."""

    cycles: int
    slots: dict[str, float]
    spilled_bytes: int
    vmem_bytes: int
    spill_space_bytes: int


def read_schedule(folder: Path, kernel: str, counted_loops: bool = False) -> Schedule:
    """The last one written of a kernel; raises RuntimeError if there is none.

    counted_loops: a loop of constant count is that many rounds, in cycles, slots and spills.
    """

    def last(ending: str) -> str:
        files = sorted(path for path in folder.glob(f"*-{kernel}*{ending}.txt") if _belongs(path.name, kernel, ending))
        if not files:
            raise RuntimeError(f"the compiler wrote no {ending} of {kernel} into {folder}")
        return files[-1].read_text(errors="replace")

    cycles = read_cycles(last("schedule-analysis_packed-bundles-post-ra"))
    times = read_rounds(last("packed-bundles-post-ra"), cycles) if counted_loops else None
    cycles = sum(times) if times else cycles
    issued, room = read_units(last("pre-delay_hlo-static-per-bundle-utilization"), times)
    vmem, spills = read_allocations(last("post-ra"))
    slots = {unit: round(issued[unit] / (room[unit] * cycles), 3) for unit in issued}
    return Schedule(cycles, slots, issued["VSTORE:SPILL"] * REGISTER, vmem, spills)


def _belongs(file: str, kernel: str, ending: str) -> bool:
    """`<time>-<kernel>.<copy>-<stage number>-<ending>.txt`, and no longer name, neither of kernel nor of stage."""
    return re.fullmatch(rf"\d+-{re.escape(kernel)}(\.\w+)*-\d+-{re.escape(ending)}\.txt", file) is not None


def read_cycles(analysis: str) -> int:
    """The length of a schedule; raises ValueError if the text does not give it."""
    found = _TOTAL.search(analysis)
    if not found:
        raise ValueError(f"no total of scheduled bundles in {analysis[:200]!r}")
    return int(found.group(1))


def read_rounds(program: str, cycles: int) -> list[int]:
    """How often a grid step runs each of the `cycles` bundles: the counts of the loops around it, the grid's apart.

    A loop goes from the target of a backward branch to the branch; its count is what the branch's condition compares
    its counter with. The grid's loop is the longest.
    """
    counts, loops, at = dict[str, int](), [], -1
    for line in program.splitlines():
        found = _BUNDLE.match(line)
        at = int(found.group(1), 16) if found else at
        counts |= {condition: int(count) for condition, count in _EXIT.findall(line)}
        loops += [(int(target), at, condition) for condition, target in _BRANCH.findall(line) if int(target) <= at]
    inner = sorted(loops, key=lambda loop: loop[1] - loop[0])[:-1]
    times = [1] * cycles
    for start, end, condition in inner:
        if condition not in counts:
            raise ValueError(f"the loop from bundle {start} to {end} has no constant count")
        for bundle in range(start, end + 1):
            times[bundle] *= counts[condition]
    return times


def read_units(table: str, times: Sequence[int] | None = None) -> tuple[dict[str, int], dict[str, int]]:
    """What is issued to each unit in a table of bundles, each run `times`, and how much the unit can take a cycle."""
    lines = table.splitlines()
    start = next((at + 1 for at, line in enumerate(lines) if "UTILIZATION" in line), 0)
    if start < 3:
        raise ValueError(f"no table of units in {table[:200]!r}")
    units, room = lines[1].replace(" ", "").split(","), [int(x) for x in lines[2].split()]
    rows = [[int(x) for x in line.split()] for line in lines[start:] if len(line.split()) == len(units)]
    runs = [1] * len(rows) if times is None else times
    weighted = [[count * often for count in row] for row, often in zip(rows, runs, strict=True)]
    issued = [sum(column) for column in zip(*weighted, strict=True)] if rows else [0] * len(units)
    return dict(zip(units, issued, strict=True)), dict(zip(units, room, strict=True))


def read_allocations(program: str) -> tuple[int, int]:
    """Bytes of VMEM that a kernel allocates, and those of them for spilled registers."""
    sizes = {name + spill: int(size, 16) for name, spill, size in _ALLOCATION.findall(program)}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if name.endswith("_spill"))
