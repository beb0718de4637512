"""The text of a compiled program, read: its computations, its instructions, and how often each of them runs.

- A loop runs as often as the compiler says (`known_trip_count`), else as the constant that its condition compares
  its counter with lets it; its body counts as often. Of other loops the body counts once, and they are counted.
- `executed` gives every instruction with the number of its runs, all branches of a conditional among them; `total` adds
  a cost up and takes the costlier branch; `shares` splits that sum by what someone says of each instruction.
- XLA for GPU starts some fusions as it starts collectives: `fusion-start` is read as the fusion that it is.
- Every line is read once, and what a computation costs is computed once: a text of tens of megabytes takes seconds.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

CALLS = ("call", "call-start", "async-start")
_BITS = {"token": 0, "opaque": 0, "pred": 8}  # of other types in their name: f32, bf16, f8e4m3fn
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"(ENTRY )?%?(\S+) \(.*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?(\S+) = (.*)")
_OPERAND = re.compile(r"%([^\s,)]+)")
_PARENTHESIS = re.compile(r"[()]")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([^\s,}]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_SOURCE = re.compile(r'op_name="([^"]*)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SPREAD = re.compile(r"kernel_metadata=\{\n.*?\n\}", re.DOTALL)  # JSON on lines of its own, amid an instruction
_NUMBER = re.compile(r"constant\((-?\d+)\)")
_DEVICES = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")


class Array(NamedTuple):
    """An array in an HLO type: element type, dimensions, and what stands in the braces of its layout."""

    kind: str
    shape: tuple[int, ...]
    layout: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of the elements alone."""
        return self.elements * _bits(self.kind) // 8

    @property
    def laid_out(self) -> int:
        """Bytes with the padding of its tiles: f32[64,64]{1,0:T(8,128)} takes 32 KiB."""
        shape = list(self.shape)
        order, _, rest = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if tile and shape:
            padding = [int(x) for x in tile.group(1).split(",")][::-1]
            for axis, multiple in zip((int(x) for x in order.split(",")), padding, strict=False):
                shape[axis] += -shape[axis] % multiple
        return math.prod(shape) * _bits(self.kind) // 8

    @property
    def in_hbm(self) -> bool:
        """Or in another memory, S(1) and above."""
        return re.search(r"S\([1-9]", self.layout) is None


def _bits(kind: str) -> int:
    return _BITS[kind] if kind in _BITS else int(re.findall(r"\d+", kind)[0])


def arrays(type_text: str) -> tuple[Array, ...]:
    """The arrays of an HLO type, `(f32[2,3]{1,0}, s32[])`: one, or those of a tuple."""
    return tuple(Array(kind, tuple(int(d) for d in re.findall(r"\d+", dims)), layout)
                 for kind, dims, layout in _ARRAY.findall(type_text))  # fmt: skip


def array_bytes(found: Iterable[Array], everywhere: bool = False) -> int:
    """Bytes in HBM (or `everywhere`) of arrays, as they are laid out."""
    return sum(x.laid_out for x in found if everywhere or x.in_hbm)


@dataclass(frozen=True)
class Instruction:
    """A line of HLO; `attributes` is what follows the operands, of a constant or parameter its value or number too."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Of its result."""
        return arrays(self.type)

    @property
    def results(self) -> tuple[Array, ...]:
        """The same, but of what starts something (operands, results, ...): the results."""
        if not self.opcode.endswith("-start") or len(self.arrays) == 1:
            return self.arrays
        if self.opcode == "copy-start":
            return self.arrays[:1]
        several = len(self.operands)
        return self.arrays[several : 2 * several] or self.arrays  # an all-reduce-start is its results alone

    @property
    def source(self) -> str:
        """The layers and functions that it comes from, or ""."""
        found = _SOURCE.search(self.attributes)
        return found[1] if found else ""

    @property
    def number(self) -> int | None:
        """The value of an integer constant, else None."""
        found = _NUMBER.match(self.attributes) if self.opcode == "constant" else None
        return int(found[1]) if found else None

    def named(self, attribute: str) -> str | None:
        """The computation that an attribute names: `body`, `condition`."""
        found = re.search(rf"\b{attribute}=%?([^\s,}}]+)", self.attributes)
        return found[1] if found else None

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it calls: a fusion's, a call's, a reduction's, the branches of a conditional."""
        names = _CALLED.findall(self.attributes)
        for group in _BRANCHES.findall(self.attributes):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        return tuple(names)


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def operand(self, x: Instruction, at: int) -> Instruction:
        """The instruction that makes operand number `at`."""
        return self.instructions[x.operands[at]]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(x for x in self if x.root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By their number."""
        return {int(x.attributes[len("parameter(") :].partition(")")[0]): x for x in self if x.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Of each value, who takes it as which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {}
        for x in self:
            for at, operand in enumerate(x.operands):
                found.setdefault(operand, []).append((x, at))
        return found


Cost = Callable[[Computation, Instruction], float | int]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Program:
    """Computations by name, the name of the first, and on how many devices it runs.

    `taken` says of a conditional in what share of its runs it takes its costliest branch, else its cheapest; None: all.
    """

    computations: dict[str, Computation]
    entry: str
    devices: int = 1
    taken: Callable[[Instruction], float | None] = lambda x: None

    def executed(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction that runs, those inside fusions too, and how often."""
        for name, times in self.times.items():
            for instruction in self.computations[name]:
                yield instruction, times

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """How often each computation runs that does; a reduction's and a loop's condition are not counted."""
        calls = {name: list(self._calls(name)) for name in self.computations}
        times = {self.entry: 1}
        for name in self._callers_first(calls):
            for callee, runs in calls[name]:
                times[callee] = times.get(callee, 0) + times[name] * runs
        return times

    @functools.cached_property
    def unknown_loops(self) -> int:
        """How many loops run whose length the text does not give."""
        loops = [x for name in self.times for x in self.computations[name] if x.opcode == "while"]
        return sum(self.length(x) is None for x in loops)

    @functools.cached_property
    def inside_fusions(self) -> frozenset[str]:
        """Computations whose instructions make no array of their own."""
        return frozenset(one for x, _ in self.executed() if x.opcode == "fusion" for one in x.called)

    def length(self, x: Instruction) -> int | None:
        """How often a loop runs; None where the text does not say."""
        if found := _TRIPS.search(x.attributes):
            return int(found[1])
        return _compared(self, self.computations[x.named("condition") or ""])

    def total(self, cost: Cost, loop_length: float | int = 1, through: tuple[str, ...] = ()) -> float | int:
        """`cost(computation, instruction)` of one run, added up over calls and operations `through` which it looks.

        Loops count as often as they run, those of unknown length `loop_length` times; a conditional is its costlier
        branch, as often as it is `taken`.
        """
        return sum(self.shares(cost, lambda here, x: None, loop_length, through).values())

    def shares(
        self, cost: Cost, key: Callable[[Computation, Instruction], K], loop_length: float | int = 1,
        through: tuple[str, ...] = (),
    ) -> dict[K, float | int]:  # fmt: skip
        """`total`, by what `key(computation, instruction)` says of each instruction that costs something."""

        @functools.cache
        def of(name: str) -> dict[K, float | int]:
            sums: dict[K, float | int] = {}
            here = self.computations[name]
            for x in here:
                for times, inner in inside(x):
                    for one, value in of(inner).items():
                        sums[one] = sums.get(one, 0) + times * value
                if not descends(x) and (own := cost(here, x)):
                    one = key(here, x)
                    sums[one] = sums.get(one, 0) + own
            return sums

        def descends(x: Instruction) -> bool:
            return x.opcode in ("while", "conditional", *CALLS, *through)

        def inside(x: Instruction) -> list[tuple[float | int, str]]:
            if x.opcode == "while":
                length = self.length(x)
                return [(loop_length if length is None else length, x.named("body") or "")]
            if x.opcode == "conditional":
                branches = sorted(x.called, key=lambda name: sum(of(name).values()))
                share = self.taken(x)
                return [(1, branches[-1])] if share is None else [(share, branches[-1]), (1 - share, branches[0])]
            return [(1, name) for name in x.called] if descends(x) else []

        return of(self.entry)

    @functools.cached_property
    def callers(self) -> dict[str, tuple[str, Instruction]]:
        """Of each computation that runs, (computation, instruction) of one that calls it; the entry has none."""
        found: dict[str, tuple[str, Instruction]] = {}
        for name in self.times:
            for x in self.computations[name]:
                for called in (*x.called, x.named("body") if x.opcode == "while" else None):
                    if called is not None:
                        found.setdefault(called, (name, x))
        return found

    def _calls(self, name: str) -> Iterator[tuple[str, int]]:
        """(computation, how often one run of `name` runs it)."""
        for x in self.computations[name]:
            if x.opcode == "while":
                length = self.length(x)
                yield x.named("body") or "", 1 if length is None else length
            elif x.opcode in (*CALLS, "fusion", "conditional") or "calls=" in x.attributes:
                yield from ((one, 1) for one in x.called if one in self.computations)

    def _callers_first(self, calls: dict[str, list[tuple[str, int]]]) -> list[str]:
        """The computations that run, each after all that call it."""
        done: dict[str, None] = {}

        def visit(name: str) -> None:
            for callee, _ in calls[name]:
                if callee not in done:
                    visit(callee)
            done[name] = None

        visit(self.entry)
        return list(done)[::-1]


def read(text: str) -> Program:
    """Parse the optimised HLO of a program; raises ValueError for a text without entry."""
    computations: dict[str, Computation] = {}
    entry, current, devices = "", None, 1
    for line in _SPREAD.sub("kernel_metadata={}", text).splitlines():
        if line.startswith("HloModule "):
            devices = math.prod(int(count) for count in _DEVICES.findall(line))
        elif not line.startswith(" "):
            head = _HEAD.match(line)
            current = computations.setdefault(head[2], Computation(head[2], {})) if head else None
            entry = head[2] if head and head[1] else entry
        elif current is not None and (instruction := parse_instruction(line)):
            current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("this is no HLO module: it has no ENTRY")
    return Program(computations, entry, devices)


def parse_instruction(line: str) -> Instruction | None:
    """`%name = type opcode(%operands), attributes`, or None for another line."""
    found = _LINE.match(line)
    if not found:
        return None
    root, name, rest = found.groups()
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    if opcode in ("constant", "parameter"):
        return Instruction(name, kind, opcode, (), rest, bool(root))
    inside = rest[len(opcode) :]
    end = _closing(inside) + 1
    if opcode == "fusion-start":
        opcode, kind = "fusion", _started(kind)
    return Instruction(name, kind, opcode, tuple(_OPERAND.findall(inside[:end])), inside[end:], bool(root))


def _closing(text: str) -> int:
    """Where the parenthesis that `text` starts with closes."""
    depth = 0
    for found in _PARENTHESIS.finditer(text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text) - 1


def _started(kind: str) -> str:
    """The results in the type `((operands), results, context)` of what was started."""
    inside = kind[1:-1]
    return inside[_closing(inside) + 1 :].lstrip(", ").rpartition(", ")[0]


def _compared(program: Program, condition: Computation) -> int | None:
    """The constant N of a condition `counter < N`, as `scan` makes them; the comparison may be in a fusion."""
    end, values = condition.root, condition.instructions
    if end.opcode == "fusion":
        inside = program.computations[end.called[0]]
        given = {parameter.name: values[end.operands[at]] for at, parameter in inside.parameters.items()}
        end, values = inside.root, {**inside.instructions, **given}
    if end.opcode != "compare" or "direction=LT" not in end.attributes:
        return None
    bound = values.get(end.operands[1])
    return None if bound is None else bound.number
