"""What the parts of a compiled training step cost: HBM bytes, FLOPs and bytes over links, by part and by phase.

A part of the model is known by the named scopes that the compiler keeps of each instruction, a phase by JAX's own: what
is computed again for the backward pass, what is transposed, what the optimizer does ("update"), and the rest, forward.
A fusion counts whole where its name says, though it may hold more than that; what has no name counts where it is
called. The parts add up to the totals of `hbm_traffic`, `count_flops` and `Links`.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import Any

from gt_jax.devices.pods.collectives import Links
from gt_jax.devices.pods.hbm_traffic import traffic_of
from gt_jax.devices.pods.hlo import Computation, Instruction, Program
from gt_jax.devices.pods.launches import launched
from gt_jax.devices.pods.program_flops import flops_of

COPIES, LAYER, OTHER = "saved states and copies", "rest of a layer", "other"
_SCOPES = (  # the first that fits; the scopes are those of gt_jax.models and gt_jax.training
    ("optimizer", r"/optimizer/"),
    ("gradients summed", r"/accumulation/|/closed_call/reshard$"),  # the compiler keeps no more of a scatter's name
    ("loss", r"[/(]loss[/)]"),
    ("hyper-connections", r"/(mixer|mlp)_hyper[./]|/hyper_(read|write)"),
    ("halting", r"[/(]halting/"),
    ("mixer", r"[/(]mixer_([A-Z])/"),  # with its letter
    ("router", r"[/(]mlp/(router|route)/"),
    ("experts", r"[/(]mlp/(\w+/)?experts/|ragged-dot"),
    ("MLP", r"[/(]mlp/"),
    ("embedding", r"/embedding/"),
    ("norms", r"/\w*norm/"),
    ("memory", r"[/(]memory[/)]"),
    ("MTP", r"/mtp/\w+$|/mtp/fusion/"),
)
_PARTS = [(name, re.compile(pattern)) for name, pattern in _SCOPES]
_STACKS = re.compile(
    r"(dynamic_slice|dynamic_update_slice|(un)?stack|squeeze|broadcast_in_dim|copy|concatenate|while)(\[.*)?$"
)
_LAYER = re.compile(r"/layer\d*[./]")
_BORDERS = ("while", "tuple", "parameter", "conditional")
STEPS = 4  # from an instruction without a name to one that has one
_COPY_OPCODES = ("copy", "dynamic-update-slice", "dynamic-slice")  # a copy-start fetches for whom it is near


def by_part(program: Program, links: Links, gpu: bool = False) -> list[dict[str, Any]]:
    """Rows {"part", "phase", "bytes", "flops", "links", "link_seconds"} of one device and step, most bytes first.

    For a GPU "kernels" too, those that it executes.
    """
    places = _Places(program)
    costs = {
        "bytes": program.shares(traffic_of(program), places.of),
        "flops": program.shares(flops_of, places.of, through=("fusion",)),
        "links": program.shares(links.cost, places.of, through=("fusion",)),
        "link_seconds": program.shares(links.time, places.of, through=("fusion",)),
    }
    costs |= {"kernels": program.shares(launched, places.of)} if gpu else {}
    found = {place for sums in costs.values() for place in sums}
    rows = [{"part": part, "phase": phase, **{name: sums.get((part, phase), 0) for name, sums in costs.items()}}
            for part, phase in found]  # fmt: skip
    return sorted(rows, key=lambda row: (-row["bytes"], row["part"], row["phase"]))


def part_of(source: str, opcode: str = "") -> str:
    """The part of the model that an instruction of this name belongs to."""
    for name, pattern in _PARTS:
        if found := pattern.search(source):
            return f"{found[1]} mixers" if name == "mixer" else name
    if opcode in _COPY_OPCODES or _STACKS.search(source):
        return COPIES
    return LAYER if _LAYER.search(source) else OTHER


def phase_of(source: str) -> str:
    """Forward, again, backward or update."""
    if "/optimizer/" in source or "/accumulation/" in source:
        return "update"
    if "rematted_computation" in source:
        return "again"
    return "backward" if "transpose(" in source else "forward"


class _Places:
    """The part and the phase of every instruction of a program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._called = functools.cache(self._caller)

    def of(self, here: Computation, x: Instruction) -> tuple[str, str]:
        source = x.source
        if "jit(" in source:
            return part_of(source, x.opcode), phase_of(source)
        around = self._inside(x) or _near(here, x) or self._called(here.name)  # the compiler's own: no path
        part = part_of(source, x.opcode)
        return part_of(around, x.opcode) if part == OTHER else part, phase_of(around)

    def _inside(self, x: Instruction) -> str:
        """Of a fusion without a path: that of its root, else the commonest in it."""
        if x.opcode != "fusion":
            return ""
        inside = self.program.computations[x.called[0]]
        if "jit(" in inside.root.source:
            return inside.root.source
        paths = Counter(one.source for one in inside if "jit(" in one.source)
        return min(paths, key=lambda path: (-paths[path], path)) if paths else ""

    def _caller(self, name: str) -> str:
        """The path of what calls a computation, or of what stands near that."""
        while (caller := self.program.callers.get(name)) is not None:
            name, x = caller
            if path := x.source if "jit(" in x.source else _near(self.program.computations[name], x):
                return path
        return ""


def _near(here: Computation, x: Instruction) -> str:
    """The path of who takes the result of an instruction, else of what it takes, a few steps away at most."""
    for step in (lambda one: [user for user, _ in here.users.get(one.name, ())],
                 lambda one: [here[name] for name in one.operands if name in here.instructions]):  # fmt: skip
        reached = [x]
        for _ in range(STEPS):
            reached = [found for one in reached for found in step(one) if found.opcode not in _BORDERS]
            if paths := [one.source for one in reached if "jit(" in one.source]:
                return min(paths)
    return ""
