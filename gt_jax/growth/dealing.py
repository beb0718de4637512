"""Copies of a block's layers dealt into groups of its pattern, so that all first passes keep the source's order.

A block holds one run of every type (`blocks`). Its longest run, the first of equals, takes the order of the recurrence:
layer after layer, each with its passes. The runs before it are dealt pass by pass from the first group on, so that
their first passes stand in the first group. The runs after it are dealt from the last group backwards, their first
passes in the last group: in the recurrence these come after all passes of the layers before them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from gt_jax.growth.blocks import Block
from gt_jax.growth.repetition import MOST_PASSES


class Slot(NamedTuple):
    """One target layer before it has a strength: a copy of `layer` that stands for pass `copy`; 0 for the identity."""

    layer: int
    copy: int


def own_layers(block: Block) -> dict[str, list[int]]:
    """A block's layers by type, types in the order of the pattern."""
    return {kind: [layer for own, layer in zip(block.pattern, block.layers, strict=True) if own == kind]
            for kind in dict.fromkeys(block.pattern)}


def strongest(layers: Sequence[int], asked: Sequence[Fraction], weights: Sequence[Sequence[float]],
              count: int) -> list[Slot]:
    """The first `count` passes that get a slot; `weights` [l][j] is the strength of pass j + 1 of layer l.

    One pass of every layer, then again and again the best of all layers' next passes: one asked for before one that is
    not, strong before weak. A pass gets its slot after the passes before it, so the pass that is ranked is the one
    that will stand there, also where strengths rise from pass to pass.
    """
    def rank(layer: int, j: int) -> tuple[bool, float, int, int]:
        return (j >= asked[layer], -weights[layer][j], j, layer)

    found = [Slot(layer, 1) for layer in layers]
    waiting = [rank(layer, 1) for layer in layers]
    heapq.heapify(waiting)
    while len(found) < count:
        *_, j, layer = heapq.heappop(waiting)
        found.append(Slot(layer, j + 1))
        if j + 1 < MOST_PASSES:
            heapq.heappush(waiting, rank(layer, j + 1))
    return found


def running_groups(most: int, width: int, running: Callable[[int], int]) -> int:
    """Groups, 1 to `most`, as long as at least half of the `width` layers that the next one adds run.

    running(n) is how many layers of n groups do.
    """
    groups = 1
    while groups < most and 2 * (running(groups + 1) - running(groups)) >= width:
        groups += 1
    return groups


def deal(block: Block, hands: Mapping[str, Sequence[Slot]], groups: int) -> list[Slot]:
    """Hands by type, pass 1 of every layer among them, dealt into `groups` of the pattern; a slot left over is idle.

    Idle slots come last, and first for the type that ends the pattern and for those dealt backwards.
    """
    layers = own_layers(block)
    kinds = list(layers)
    longest = max(kinds, key=lambda kind: len(layers[kind]))  # the first of equals
    dealt = {}
    for kind, hand in hands.items():
        before = kinds.index(kind) < kinds.index(longest)
        idle: list[Slot | None] = [None] * (groups * len(layers[kind]) - len(hand))
        if kind == longest:
            order = sorted(hand)
        elif before:
            order = sorted(hand, key=lambda slot: (slot.copy, slot.layer))
        else:
            order = sorted(hand, key=lambda slot: (-slot.copy, slot.layer))
        last = kind == kinds[-1] or not (before or kind == longest)
        dealt[kind] = iter([*idle, *order] if last else [*order, *idle])
    return [next(dealt[kind]) or Slot(own, 0) for _ in range(groups)
            for kind, own in zip(block.pattern, block.layers, strict=True)]
