"""What a compiled program sends between devices, and the largest arrays that it makes, from its HLO.

One device receives, of a collective over groups of n devices:

    all-gather          (n - 1) / n of its result
    reduce-scatter      (n - 1) / n of its operand
    all-reduce          2 (n - 1) / n of its result: a reduce-scatter and an all-gather
    all-to-all, permute its result

- XLA for TPU writes a reduce-scatter as an all-reduce whose result only slices are taken of, inside one fusion; it is
  one all the same.
- An asynchronous collective is written several times with one channel: where it starts, in the fusions that it runs
  beside, where it is done. It counts where it starts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gt_jax.devices.pods.hlo import Array, Computation, Instruction, Program
from gt_jax.devices.pods.links import first_group

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_NOT_STORED = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call")
_SAME = ("bitcast", "reshape", "transpose", "copy", "convert")
_START = re.compile(r"async[-_]collective[-_]start")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")


@dataclass(frozen=True)
class Sent:
    """One array of one collective: its kind, bytes of its result and those received by one device, a group of it."""

    kind: str
    bytes: int
    received: int
    group: tuple[int, ...]


def collectives(count: Links) -> dict[str, dict[str, int]]:
    """For each kind: how many are executed, the bytes of their results and those received, on one device.

    A loop of unknown length counts as if it ran once; of a conditional the branch that has more.
    """
    sums: dict[str, dict[str, int]] = {}
    for kind in sorted({one.kind for x in count.sent.values() for one in x}):

        def of(what: Callable[[tuple[Sent, ...]], int], kind: str = kind) -> int:
            return round(count.total(lambda all: what(tuple(one for one in all if one.kind == kind))))

        sums[kind] = {
            "count": of(lambda all: bool(all)),
            "bytes": of(lambda all: sum(one.bytes for one in all)),
            "received": of(lambda all: sum(one.received for one in all)),
        }
    return sums


class Links:
    """The collectives of a program, each where it counts: `sent` by (computation, instruction).

    `seconds(group)` is what a byte takes that each device of a group receives; None: no time is known.
    """

    def __init__(self, program: Program, seconds: Callable[[Sequence[int]], float] | None = None) -> None:
        self.program, self.seconds = program, None if seconds is None else functools.cache(seconds)
        self.sent: dict[tuple[str, str], tuple[Sent, ...]] = {}
        found = [(name, x) for name in program.times for x in program.computations[name] if _is_collective(x)]
        started = {_key(x) for name, x in found if self._starts(name)}
        for name, x in found:
            if self._starts(name) or not self._in_fusion(name) or _key(x) not in started:
                group = tuple(first_group(x, program.devices))
                self.sent[name, x.name] = _sent(program.computations[name], x, group)

    def _in_fusion(self, name: str) -> bool:
        return name in self.program.inside_fusions

    def _starts(self, name: str) -> bool:
        """Whether a computation is that of a fusion which starts an asynchronous collective."""
        caller = self.program.callers.get(name)
        return caller is not None and caller[1].opcode == "fusion" and _START.match(caller[1].name) is not None

    def cost(self, here: Computation, x: Instruction) -> int:
        """Bytes received by one run of an instruction."""
        return sum(one.received for one in self.sent.get((here.name, x.name), ()))

    def time(self, here: Computation, x: Instruction) -> float:
        """Seconds of one run of an instruction on the links, at least; 0 where no time is known."""
        byte = self.seconds or (lambda group: 0.0)
        return sum((one.received * byte(one.group) for one in self.sent.get((here.name, x.name), ())), 0.0)

    def total(self, what: Callable[[tuple[Sent, ...]], int]) -> float | int:
        """`what` of all collectives that one run of the program executes."""
        return self.program.total(lambda here, x: what(self.sent.get((here.name, x.name), ())), through=("fusion",))

    @property
    def received(self) -> int:
        """Bytes that one device receives in one run of the program."""
        return round(self.program.total(self.cost, through=("fusion",)))

    @property
    def least_seconds(self) -> float:
        """How long they take on the links, one after the other; 0 where no time is known."""
        return float(self.program.total(self.time, through=("fusion",)))


def _is_collective(x: Instruction) -> bool:
    return x.opcode.removesuffix("-start") in COLLECTIVES


def _key(x: Instruction) -> tuple[str, str]:
    """What the parts of one asynchronous collective have in common: operation and channel."""
    found = _CHANNEL.search(x.attributes)
    return x.opcode, found[1] if found else x.name


def _sent(here: Computation, x: Instruction, group: tuple[int, ...]) -> tuple[Sent, ...]:
    """Of one run of a collective, array by array."""
    kind = x.opcode.removesuffix("-start")
    slices = _slices(here, x) if kind == "all-reduce" else {}
    return tuple(_one("reduce-scatter", slices[at], group) if at in slices else _one(kind, array, group)
                 for at, array in enumerate(x.results))  # fmt: skip


def _one(kind: str, result: Array, group: tuple[int, ...]) -> Sent:
    n = len(group)
    if kind == "all-gather":
        received = result.bytes * (n - 1) // n
    elif kind == "reduce-scatter":
        received = result.bytes * (n - 1)
    elif kind == "all-reduce":
        received = 2 * result.bytes * (n - 1) // n
    else:
        received = result.bytes
    return Sent(kind, result.bytes, received, group)


def _slices(here: Computation, x: Instruction) -> dict[int, Array]:
    """Of the results of an all-reduce by number, those that nothing is taken of but one slice: that slice."""
    if x.root:
        return {}
    if len(x.results) == 1 and not x.type.startswith("("):
        taken = {0: x.name}
    else:
        elements = [user for user, _ in here.users.get(x.name, ()) if user.opcode == "get-tuple-element"]
        taken = {int(re.search(r"index=(\d+)", user.attributes)[1]): user.name for user in elements}  # type: ignore[index]
    found = {at: _only_slice(here, name) for at, name in taken.items()}
    return {at: array for at, array in found.items() if array is not None}


def _only_slice(here: Computation, name: str) -> Array | None:
    """The one slice that is taken of a value, if nothing else is."""
    users = here.users.get(name, ())
    if len(users) != 1 or users[0][1] != 0:
        return None
    user = users[0][0]
    if user.opcode == "dynamic-slice":
        return user.arrays[0]
    return _only_slice(here, user.name) if user.opcode in _SAME and not user.root else None


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
