"""How many bytes does a compiled program move to and from HBM? Counted in the text of its optimised HLO.

* `cost_analysis()` counts the body of a loop once, whatever the loop's length; here it counts as often as it runs.
* An instruction reads its operands and writes its results; of an operand that it only takes slices of, the slices; of
  a buffer that it updates in place, the update. What lies in another memory, S(1) and above, costs nothing.
* Bytes are those of the layout, padding of its tiles included: f32[64,64]{1,0:T(8,128)} is 32 KiB.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection
from typing import NamedTuple

_BITS = {"token": 0, "pred": 8}  # of other types in their name: f32, bf16, f8e4m3fn
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "domain", "add-dependency",
}  # fmt: skip
_THROUGH = {"bitcast", "convert", "copy", "transpose", "reshape", "negate"}  # element by element: slices stay slices
_SLICES = {"dynamic-slice", "slice", "gather"}
_ARRAY = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?")
_COUNTER = re.compile(r"constant\((\d+)\)")


class Traffic(NamedTuple):
    """Bytes to and from HBM, and to and from anywhere; the number of loops whose length the text does not give."""

    bytes: int
    touched: int
    unknown_loops: int


class Instruction(NamedTuple):
    """A line of HLO."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


def hbm_traffic(text: str, leave_out: Collection[str] = (), loop_length: float = 1) -> Traffic:
    """Of one run of the program whose optimised HLO this is, but for the kernels named `leave_out`.

    A loop whose length is not in the text counts `loop_length` times. Raises ValueError if the text has no entry.
    """
    computations, entry = _computations(text)
    hbm, anywhere = (_Program(computations, entry, leave_out, loop_length, x) for x in (False, True))
    return Traffic(round(hbm.moved(entry)), round(anywhere.moved(entry)), hbm.unknown_loops)


def called_bytes(text: str, kernel: str) -> int:
    """Operands and results of a kernel, as far as they lie in HBM; raises ValueError if it is not called."""
    program = _Program(*_computations(text))
    calls = [(here, x) for here in program.computations.values() for x in here.values() if _calls(x, kernel)]
    if not calls:
        raise ValueError(f"no custom-call of {kernel} in the compiled program")
    return round(sum(program.of(here, x) for here, x in calls))


def _calls(x: Instruction, kernel: str) -> bool:
    return x.opcode == "custom-call" and re.fullmatch(rf"{re.escape(kernel)}(\.\w+)*", x.name) is not None


def array_bytes(type_text: str, everywhere: bool = False) -> int:
    """Bytes in HBM (or `everywhere`) of a type, as it is laid out; the sum over a tuple."""
    return sum(_array_bytes(*found.groups(default="")) for found in _arrays(type_text, everywhere))


def _arrays(type_text: str, everywhere: bool) -> list[re.Match[str]]:
    found = list(_ARRAY.finditer(type_text))
    return [x for x in found if everywhere or not re.search(r"S\([1-9]", x.group(3) or "")]


def _array_bytes(kind: str, dimensions: str, layout: str) -> int:
    bits = _BITS[kind] if kind in _BITS else int(re.findall(r"\d+", kind)[0])
    shape = [int(x) for x in dimensions.split(",") if x]
    order, _, rest = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", rest)
    if tile and shape:
        padding = [int(x) for x in tile.group(1).split(",")][::-1]
        for axis, multiple in zip((int(x) for x in order.split(",")), padding, strict=False):
            shape[axis] += -shape[axis] % multiple
    return math.prod(shape) * bits // 8


def _elements(type_text: str) -> int:
    return sum(math.prod(int(x) for x in found.group(2).split(",") if x) for found in _arrays(type_text, True))


def _computations(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """All computations by name, and the name of the entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?(\S+) \(.*\{$", line)
        if head and not line.startswith(" "):
            current = computations.setdefault(head.group(2), {})
            entry = head.group(2) if head.group(1) else entry
        elif current is not None and (instruction := parse_instruction(line)):
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("this is no HLO module: it has no ENTRY")
    return computations, entry


def parse_instruction(line: str) -> Instruction | None:
    """`%name = type opcode(%operands), attributes`, or None for another line."""
    found = re.match(r"\s+(ROOT )?%?(\S+) = (.*)", line)
    if not found:
        return None
    root, name, rest = found.groups()
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    inside = rest[len(opcode) :]
    end = _closing(inside)
    operands = tuple(re.findall(r"%([^\s,)]+)", inside[: end + 1]))
    if opcode == "constant" or opcode == "parameter":
        return Instruction(name, kind, opcode, (), rest, bool(root))
    return Instruction(name, kind, opcode, operands, inside[end + 1 :], bool(root))


def _closing(text: str) -> int:
    """Where the parenthesis that `text` starts with closes."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return at
    return len(text) - 1


@dataclasses.dataclass
class _Program:
    computations: dict[str, dict[str, Instruction]]
    entry: str
    leave_out: Collection[str] = ()
    loop_length: float = 1
    everywhere: bool = False
    unknown_loops: int = 0

    def moved(self, name: str) -> float:
        """By one run of a computation."""
        here = self.computations[name]
        return sum(self.of(here, instruction) for instruction in here.values())

    def of(self, here: dict[str, Instruction], x: Instruction) -> float:
        """By one instruction."""
        if x.opcode in _FREE or x.opcode.endswith("-done") or 'custom_call_target="AllocateBuffer"' in x.attributes:
            return 0
        if any(_calls(x, kernel) for kernel in self.leave_out):
            return 0
        if x.opcode == "while":
            return self._loop(x)
        if x.opcode == "conditional":
            return max((self.moved(name) for name in self._called(x)), default=0)
        if x.opcode in ("call", "call-start", "async-start"):
            return sum(self.moved(name) for name in self._called(x))
        if x.opcode.endswith("-start"):
            return self._started(here, x)
        read = sum(self._read(here, x, at, self._size(here[name].type)) for at, name in enumerate(x.operands))
        return read + self._written(here, x)

    def _loop(self, x: Instruction) -> float:
        length = self._length(x)
        self.unknown_loops += length is None
        (body,) = re.findall(r"body=%?([^\s,]+)", x.attributes)
        return (self.loop_length if length is None else length) * self.moved(body)

    def _length(self, x: Instruction) -> int | None:
        """Of a loop that counts from 0 to a constant, as `scan` makes them."""
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', x.attributes):
            return int(found.group(1))
        (name,) = re.findall(r"condition=%?([^\s,]+)", x.attributes)
        condition = self.computations[name]
        end = next(y for y in condition.values() if y.root)
        bounds = [_COUNTER.match(condition[operand].attributes) for operand in end.operands if operand in condition]
        known = [int(bound.group(1)) for bound in bounds if bound]
        return known[0] if end.opcode == "compare" and "direction=LT" in end.attributes and len(known) == 1 else None

    def _size(self, type_text: str) -> int:
        return array_bytes(type_text, self.everywhere)

    def _started(self, here: dict[str, Instruction], x: Instruction) -> int:
        """A copy, or the copy of a slice, that something else waits for: once for each end that lies in HBM."""
        if self.everywhere:
            return 0  # between memories
        parts = [found.group() for found in _arrays(x.type, everywhere=True)]
        target = parts[0] if x.opcode == "copy-start" else parts[len(x.operands)]
        ends = bool(array_bytes(target)) + bool(array_bytes(here[x.operands[0]].type))
        return ends * array_bytes(target, everywhere=True)

    @staticmethod
    def _called(x: Instruction) -> list[str]:
        names = re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([^\s,}]+)", x.attributes)
        for group in re.findall(r"branch_computations=\{([^}]*)\}", x.attributes):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        return names

    def _read(self, here: dict[str, Instruction], x: Instruction, at: int, whole: int) -> int:
        """What an instruction reads of its operand number `at`, which is `whole` bytes of HBM."""
        if whole and x.opcode in _SLICES:  # the share of its elements: the slice may have another type
            taken, out_of = (_elements(y) for y in (x.type, here[x.operands[0]].type))
            return whole * taken // max(out_of, 1) if at == 0 else 0
        if x.opcode == "dynamic-update-slice":
            return whole if at == 1 else 0
        if whole and x.opcode == "fusion":
            name = self._called(x)[0]
            parameter = next(y for y in self.computations[name].values() if y.attributes.startswith(f"parameter({at})"))
            return self._read_by_users(name, parameter.name, whole)
        return whole

    def _read_by_users(self, name: str, value: str, whole: int) -> int:
        total = 0
        here = self.computations[name]
        for user in here.values():
            for at in (at for at, operand in enumerate(user.operands) if operand == value):
                passes_on = user.opcode in _THROUGH and not user.root
                total += self._read_by_users(name, user.name, whole) if passes_on else self._read(here, user, at, whole)
        return min(whole, total)

    def _written(self, here: dict[str, Instruction], x: Instruction) -> int:
        sizes = [_array_bytes(*part.groups(default="")) for part in _arrays(x.type, everywhere=True)]
        in_hbm = [self._size(part.group()) > 0 for part in _arrays(x.type, everywhere=True)]
        if x.opcode == "fusion":
            inside = self.computations[self._called(x)[0]]
            root = next(y for y in inside.values() if y.root)
            results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        else:
            inside, results = here, [x] * len(sizes)
        made = zip(sizes, in_hbm, results, strict=True)
        return sum(self._update(inside, result, size) for size, counts, result in made if counts)

    def _update(self, here: dict[str, Instruction], x: Instruction, whole: int) -> int:
        """What is written of a result: all of it, or the slice that was updated in place."""
        if x.opcode == "dynamic-update-slice":
            return array_bytes(here[x.operands[1]].type, everywhere=True)
        if x.opcode == "fusion" and here is not self.computations[self.entry]:
            inside = self.computations[self._called(x)[0]]
            return self._update(inside, next(y for y in inside.values() if y.root), whole)
        if x.opcode == "bitcast":
            return self._update(here, here[x.operands[0]], whole)
        return whole
