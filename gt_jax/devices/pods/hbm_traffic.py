"""How many bytes does a compiled program move to and from HBM? Counted in the text of its optimised HLO.

* `cost_analysis()` counts the body of a loop once, whatever the loop's length; here it counts as often as it runs.
* An instruction reads its operands and writes its results; of an operand that it only takes slices of, the slices; of
  a buffer that it updates in place, the update. What lies in another memory, S(1) and above, costs nothing.
* Bytes are those of the layout, padding of its tiles included: f32[64,64]{1,0:T(8,128)} is 32 KiB.
* A kernel reads its operands once, and again what its own estimate of its cost has beyond that.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import NamedTuple

from gt_jax.devices.pods.collectives import COLLECTIVES
from gt_jax.devices.pods.hlo import Computation, Cost, Instruction, Program, array_bytes
from gt_jax.devices.pods.program_flops import estimated

_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "domain", "add-dependency",
}  # fmt: skip
_THROUGH = {"bitcast", "convert", "copy", "transpose", "reshape", "negate"}  # element by element: slices stay slices
_SLICES = {"dynamic-slice", "slice", "gather"}


class Traffic(NamedTuple):
    """Bytes to and from HBM, and to and from anywhere; the number of loops whose length the text does not give."""

    bytes: int
    touched: int
    unknown_loops: int


def hbm_traffic(program: Program, leave_out: Collection[str] = (), loop_length: float | int = 1) -> Traffic:
    """Of one run of the program, but for the kernels named `leave_out`.

    A loop whose length is not in the text counts `loop_length` times; of a conditional the branch that moves more.
    """

    def moved(everywhere: bool) -> int:
        count = _Count(program, everywhere)

        def cost(here: Computation, x: Instruction) -> int:
            if any(_calls(x, kernel) for kernel in leave_out):
                return 0
            return count.of(here, x) + count.again(here, x)

        return round(program.total(cost, loop_length))

    return Traffic(moved(False), moved(True), program.unknown_loops)


def traffic_of(program: Program) -> Cost:
    """What one instruction of the program moves to and from HBM, for `Program.shares`; a fusion as one."""
    count = _Count(program)
    return lambda here, x: count.of(here, x) + count.again(here, x)


def called_bytes(program: Program, kernel: str) -> int:
    """Operands and results of a kernel, as far as they lie in HBM; raises ValueError if it is not called."""
    count = _Count(program)
    calls = [(here, x) for here in program.computations.values() for x in here if _calls(x, kernel)]
    if not calls:
        raise ValueError(f"no custom-call of {kernel} in the compiled program")
    return sum(count.of(here, x) for here, x in calls)


def _calls(x: Instruction, kernel: str) -> bool:
    return x.opcode == "custom-call" and re.fullmatch(rf"{re.escape(kernel)}(\.\w+)*", x.name) is not None


@dataclasses.dataclass(frozen=True)
class _Count:
    program: Program
    everywhere: bool = False

    def of(self, here: Computation, x: Instruction) -> int:
        """By one instruction that calls nothing, a fusion apart."""
        if x.opcode in _FREE or x.opcode.endswith("-done") or 'custom_call_target="AllocateBuffer"' in x.attributes:
            return 0
        if x.opcode.endswith("-start"):
            return self._started(here, x)
        read = sum(self._read(here, x, at, self._size(here[name])) for at, name in enumerate(x.operands))
        return read + self._written(here, x)

    def again(self, here: Computation, x: Instruction) -> int:
        """What a kernel moves by its own estimate beyond its operands and results, each once."""
        stated = estimated(x, "bytes_accessed")
        once = (*x.arrays, *(array for name in x.operands for array in here[name].arrays)) if stated else ()
        return max(0, stated - array_bytes(once, everywhere=True))

    def _size(self, x: Instruction) -> int:
        return array_bytes(x.arrays, self.everywhere)

    def _started(self, here: Computation, x: Instruction) -> int:
        """Of what something else waits for. A copy, also of a slice: once for each end that lies in HBM."""
        if x.opcode.removesuffix("-start") in COLLECTIVES:
            read = sum(self._size(here[name]) for name in x.operands)
            return read + array_bytes(x.results, self.everywhere)
        if self.everywhere:
            return 0  # between memories
        ends = bool(array_bytes(x.results)) + bool(array_bytes(here.operand(x, 0).arrays))
        return ends * array_bytes(x.results, everywhere=True)

    def _read(self, here: Computation, x: Instruction, at: int, whole: int) -> int:
        """What an instruction reads of its operand number `at`, which is `whole` bytes of HBM."""
        if whole and x.opcode in _SLICES:  # the share of its elements: the slice may have another type
            taken, out_of = (sum(array.elements for array in y.arrays) for y in (x, here.operand(x, 0)))
            return whole * taken // max(out_of, 1) if at == 0 else 0
        if x.opcode == "dynamic-update-slice":
            return whole if at == 1 else 0
        if whole and x.opcode == "fusion":
            inside = self.program.computations[x.called[0]]
            return self._read_by_users(inside, inside.parameters[at].name, whole)
        return whole

    def _read_by_users(self, here: Computation, value: str, whole: int) -> int:
        total = 0
        for user, at in here.users.get(value, ()):
            passes_on = user.opcode in _THROUGH and not user.root
            total += self._read_by_users(here, user.name, whole) if passes_on else self._read(here, user, at, whole)
            if total >= whole:
                return whole
        return total

    def _written(self, here: Computation, x: Instruction) -> int:
        if x.opcode == "fusion":
            inside = self.program.computations[x.called[0]]
            root = inside.root
            # a root that is no tuple may still have several results: a kernel that its operand is fused into
            results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root] * len(x.arrays)
        else:
            inside, results = here, [x] * len(x.arrays)
        made = zip(x.arrays, results, strict=True)
        counted = [(array, y) for array, y in made if self.everywhere or array.in_hbm]
        return sum(self._update(inside, y, array.laid_out) for array, y in counted)

    def _update(self, here: Computation, x: Instruction, whole: int) -> int:
        """What is written of a result: all of it, or the slice that was updated in place."""
        if x.opcode == "dynamic-update-slice":
            return array_bytes(here.operand(x, 1).arrays, everywhere=True)
        if x.opcode == "fusion":
            inside = self.program.computations[x.called[0]]
            return self._update(inside, inside.root, whole)
        if x.opcode == "bitcast":
            return self._update(here, here.operand(x, 0), whole)
        return whole
