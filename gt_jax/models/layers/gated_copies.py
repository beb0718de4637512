"""Copies that keep their gates: every layer runs once, each token at the weight that its recurrence would give it.

    copy j of source layer l:  X <- X + gain w_j Delta(X),  w_j = s_j while s_j >= threshold, else 0
                               s_1 = 1,  s_{j+1} = s_j p_j,  p_j the gate of copy j

- It is the pass of adaptive depth (`adaptive_depth.run_pass`), laid out in depth: what a pass hands to the next, s and
  the update that the next gate compares its own with, waits in a register until the next copy of the same source layer,
  whatever layers stand between.
- Registers are given out before anything runs, as few as chains of copies are open at a time: one where the copies of a
  layer stand in a row. They are a carry of the scan over blocks.
- Every token runs every layer: a finished one at weight 0. Forced passes and the cap on p are of adaptive depth, and
  mean nothing here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from gt_jax.configs.model import GatedCopiesConfig
from gt_jax.models.layers.adaptive_depth import Carry, DeltaFn, PassControl, run_pass, stream_mean
from gt_jax.models.layers.mixer import Place
from gt_jax.models.layers.pass_statistics import PassStatistics
from gt_jax.typing import Activations, PerToken, State, Tree

NOWHERE = -1
FREE = PassControl(np.int32(0), np.float32(1.0))  # type: ignore[arg-type]


class Gate(NamedTuple):
    """What copy j hands to copy j + 1: s_{j+1}, and Delta of copy j, without gradient."""

    s: PerToken
    previous: Activations


Registers = tuple[Gate, ...]


class Slots(NamedTuple):
    """By layer: the register that it reads, the one that it writes (`NOWHERE` for none), its pass from 0; int32 [l]."""

    reads: Int[np.ndarray, " l"]
    writes: Int[np.ndarray, " l"]
    passes: Int[np.ndarray, " l"]


@functools.cache
def slots(config: GatedCopiesConfig) -> Slots:
    """Who reads and writes which register: the lowest that is free from a copy that has a next one until that one."""
    last = {source: copy for source, copy in config.copies}
    held: dict[int, int] = {}
    found = []
    for source, copy in config.copies:
        reads = held.pop(source, NOWHERE)
        writes = NOWHERE
        if copy < last[source]:
            writes = held[source] = next(at for at in range(len(held) + 1) if at not in held.values())
        found.append((reads, writes, copy - 1))
    return Slots(*np.asarray(found, np.int32).T)


def empty_registers(x: State, config: GatedCopiesConfig) -> Registers:
    """The registers before the first layer."""
    return (_start(x),) * (int(np.max(slots(config).writes, initial=NOWHERE)) + 1)


def _start(x: State) -> Gate:
    """What a first pass finds: s = 1, and no update before it."""
    h = stream_mean(x)
    return Gate(jnp.ones_like(h[..., 0], jnp.float32), jnp.zeros_like(h))


def read_register(registers: Registers, index: Array, x: State) -> Gate:
    """The register `index`, or a token's start where that is `NOWHERE`."""
    return functools.reduce(lambda found, one: _if(index == one[0], one[1], found), enumerate(registers), _start(x))


def write_register(registers: Registers, index: Array, gate: Gate) -> Registers:
    """The registers with `gate` in the one of `index`."""
    return tuple(_if(index == at, gate, old) for at, old in enumerate(registers))


def _if(here: Array, new: Gate, old: Gate) -> Gate:
    return Gate(*(jnp.where(here, a, b) for a, b in zip(new, old, strict=True)))


def run_copy(
    layer: Any, x: State, gate: Gate, k: Array, config: GatedCopiesConfig, cache: Tree, *, place: Place,
    delta: DeltaFn, gain: Array,
) -> tuple[State, PassStatistics, Tree, Gate]:  # fmt: skip
    """One layer, as pass `k` (from 0) of its source layer: (X, statistics without a pass axis, cache, gate after it).

    `layer` is a bound Linen module with a submodule `halting`; `delta(layer, x, place, cache)` is its update. alpha is
    in the gain.
    """
    carry = Carry(x, gate.s, jnp.zeros_like(gate.s), gate.previous, gate.previous)
    moved, statistics, new_cache = run_pass(
        layer, carry, k, 1.0, cache, place=place, config=config.gate, control=FREE, delta=delta, gain=gain
    )
    return moved.x, statistics, new_cache, Gate(moved.s, moved.previous)


def places_of(config: GatedCopiesConfig, layer: Array) -> Sequence[Array]:
    """(register read, register written, pass from 0) of a traced layer number."""
    return [jax.lax.dynamic_index_in_dim(jnp.asarray(of), layer, keepdims=False) for of in slots(config)]
