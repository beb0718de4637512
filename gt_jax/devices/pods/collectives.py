"""What a compiled program sends between devices, and the largest arrays that it makes, from its HLO."""

from __future__ import annotations

from gt_jax.devices.pods.hlo import Instruction, Program

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_NOT_STORED = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call")


def collectives(program: Program) -> dict[str, dict[str, int]]:
    """For each kind: how many are executed, and the bytes of their results on one device."""
    sums: dict[str, dict[str, int]] = {}
    for instruction, times in program.executed():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        row = sums.setdefault(kind, {"count": 0, "bytes": 0})
        row["count"] += times
        row["bytes"] += times * sum(array.bytes for array in instruction.results)
    return sums


def gathers(program: Program) -> list[Instruction]:
    """All all-gathers."""
    return [i for i, _ in program.executed() if i.opcode.removesuffix("-start") == "all-gather"]


def largest(program: Program, count: int = 10) -> list[dict[str, object]]:
    """The largest arrays that instructions make, one row a shape and source, the largest first."""
    rows: dict[tuple[str, str, str], dict[str, object]] = {}
    for name in program.times:
        if name in program.inside_fusions:
            continue
        for instruction in program.computations[name]:
            if instruction.opcode in _NOT_STORED or not instruction.arrays:
                continue
            array = max(instruction.arrays, key=lambda one: one.bytes)
            shape = f"{array.kind}[{','.join(map(str, array.shape))}]"
            row = {"bytes": array.bytes, "shape": shape, "operation": instruction.opcode, "source": instruction.source}
            rows.setdefault((shape, instruction.opcode, instruction.source), row)
    return sorted(rows.values(), key=lambda row: -int(str(row["bytes"])))[:count]
