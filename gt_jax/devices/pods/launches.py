"""How many kernels and copies does a GPU execute in one run of a compiled program? Counted in its optimised HLO.

- A fusion is a kernel, so is whatever stands alone: a product, a copy, a collective. Loops count as often as they run.
- The condition of a loop whose length the compiler knows is not computed; that of another is, once per run counted.
- Of a conditional the branch that has more; the kernel that makes its predicate is one of those before it.
- What is free: tuples and their elements, bitcasts, constants, and the end of what began elsewhere (`-done`).

XLA puts neighbours into command buffers (CUDA graphs), which cost one launch by the host each; the kernels in them are
executed one by one all the same, and are what is counted here.
"""

from __future__ import annotations

import re

from gt_jax.devices.pods.hlo import Computation, Instruction, Program

_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier", "domain",
    "add-dependency",
}  # fmt: skip
_NO_KERNEL = re.compile(r'custom_call_target="(AllocateBuffer|PinnedBuffer|CreateBuffer|Sharding)"')


def launched(here: Computation, x: Instruction) -> int:
    """1 where an instruction that calls nothing, a fusion apart, is executed on the device; for `Program.shares`."""
    if x.opcode in _FREE or x.opcode.endswith("-done"):
        return 0
    return 0 if x.opcode == "custom-call" and _NO_KERNEL.search(x.attributes) else 1


def count_launches(program: Program) -> dict[str, int]:
    """{"kernels": all that the device executes, "copies": those that copy an array, "conditionals", "loops"} of a run.

    Conditionals and loops by how often they are met.
    """
    kernels = program.shares(launched, lambda here, x: x.opcode in ("copy", "copy-start"))
    runs: dict[str, int] = {"conditional": 0, "while": 0}
    for x, times in program.executed():
        if x.opcode in runs:
            runs[x.opcode] += times
    return {
        "kernels": round(sum(kernels.values())), "copies": round(kernels.get(True, 0)),
        "conditionals": runs["conditional"], "loops": runs["while"],
    }  # fmt: skip
