"""What a compiled program does, read from its HLO text: collectives, loops, large arrays. Text in, numbers out.

An instruction in the body of a loop counts as often as the loop runs; the length of a loop is the constant that its
condition compares with. Loops whose length is not known when compiling count once, and are counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
          "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
NOT_STORED = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|branch_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Instruction:
    """One line of HLO: name, bytes of its result (of each array), operation, and the line."""

    name: str
    sizes: tuple[int, ...]
    shapes: str
    operation: str
    line: str

    @property
    def bytes(self) -> int:
        return sum(self.sizes)

    @property
    def source(self) -> str:
        """The layers and functions that it comes from, or ""."""
        found = _NAME.search(self.line)
        return found[1] if found else ""


@dataclass
class Program:
    """Computations by name, and how often each of them runs."""

    computations: dict[str, list[Instruction]]
    entry: str
    times: dict[str, int] = field(default_factory=dict)
    unknown_loops: int = 0

    def executed(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction that runs, and how often."""
        for name, times in self.times.items():
            for instruction in self.computations[name]:
                yield instruction, times


def array_bytes(text: str) -> tuple[int, ...]:
    """Bytes of each array type in an HLO type, `(f32[2,3]{1,0}, s32[])` -> (24, 4)."""
    return tuple(WIDTHS[kind] * math.prod(dims) for kind, dims in arrays(text))


def arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Element type and dimensions of each array type in an HLO type."""
    found = [(kind, dims) for kind, dims in _ARRAY.findall(text) if kind in WIDTHS]
    return [(kind, tuple(int(d) for d in dims.split(",") if d)) for kind, dims in found]


def read(text: str) -> Program:
    """Parse the HLO text of a compiled program."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            name, kind, operation = found.groups()
            current.append(Instruction(name, array_bytes(kind), kind, operation, line))
    program = Program(computations, entry)
    _count(program, entry, 1)
    return program


def _count(program: Program, name: str, times: int) -> None:
    program.times[name] = program.times.get(name, 0) + times
    for instruction in program.computations.get(name, []):
        called = _called(instruction)
        inner = times
        if instruction.operation == "while":
            length = _length(program, next((one for kind, one in called if kind == "condition"), ""))
            program.unknown_loops += length is None
            inner = times * (length or 1)
        for kind, one in called:
            runs = kind != "to_apply" or instruction.operation == "call"
            if runs and one in program.computations and kind != "condition":
                _count(program, one, inner)


def _called(instruction: Instruction) -> list[tuple[str, str]]:
    """(role, name) of the computations that an instruction calls."""
    found = [(role, (several or one).split(",")) for role, several, one in _CALLED.findall(instruction.line)]
    return [(role, name.strip().lstrip("%")) for role, names in found for name in names]


def _length(program: Program, condition: str) -> int | None:
    """The constant that a loop's condition compares with; None where there is none, or several."""
    lines = [i.line for i in program.computations.get(condition, [])]
    found = {int(n) for line in lines for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", line)}
    return found.pop() if len(found) == 1 else None


def collectives(program: Program) -> dict[str, dict[str, int]]:
    """For each kind: how many are executed, and the bytes of their results on one device."""
    sums: dict[str, dict[str, int]] = {}
    for instruction, times in program.executed():
        kind = instruction.operation.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        sizes = instruction.sizes
        if instruction.operation.endswith("-start") and len(sizes) > 1:  # (operands, results, …)
            sizes = (max(sizes),)
        row = sums.setdefault(kind, {"count": 0, "bytes": 0})
        row["count"] += times
        row["bytes"] += times * sum(sizes)
    return sums


def largest(program: Program, count: int = 10) -> list[dict[str, object]]:
    """The largest arrays that instructions make, one row a shape and source, the largest first."""
    rows: dict[tuple[str, str, str], dict[str, object]] = {}
    inside = {one for i, _ in program.executed() if i.operation == "fusion" for _, one in _called(i)}
    for name in program.times:
        if name in inside:
            continue
        for instruction in program.computations[name]:
            if instruction.operation in NOT_STORED or not instruction.sizes:
                continue
            key = (instruction.shapes.partition("{")[0], instruction.operation, instruction.source)
            rows.setdefault(key, {"bytes": max(instruction.sizes), "shape": key[0], "operation": key[1],
                                  "source": key[2]})  # fmt: skip
    return sorted(rows.values(), key=lambda row: -int(str(row["bytes"])))[:count]


def gathers(program: Program) -> list[Instruction]:
    """All all-gathers."""
    return [i for i, _ in program.executed() if i.operation.removesuffix("-start") == "all-gather"]
