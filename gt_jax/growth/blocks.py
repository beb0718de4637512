"""What a plan copies together: one repeat of a segment's pattern, cut where the pattern turns back to a type.

    DDDGDDDG -> DDDG, DDDG      DDGDDG -> DDG, DDG      DDGD -> DDG, D      DDGG, GDDD -> whole

Every type of a block stands in it as one run. So copies can be dealt by type, and the first passes of all layers still
keep the order of the source (`dealing`); and DDDGDDDG grows as DDDG*2 does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from gt_jax.configs.layout import Layout, Segment


class Block(NamedTuple):
    """The segment that a block stands in, its part of the pattern, and its source layers in order."""

    segment: int
    pattern: str
    layers: tuple[int, ...]


def cut(pattern: str) -> tuple[str, ...]:
    """The parts of a pattern: a new one begins where a type comes again after another one."""
    parts = [pattern[0]]
    for kind in pattern[1:]:
        if kind != parts[-1][-1] and kind in parts[-1]:
            parts.append(kind)
        else:
            parts[-1] += kind
    return tuple(parts)


def blocks(layout: Layout) -> tuple[Block, ...]:
    """All blocks of a layout in order; together they hold every layer once."""
    found, first = [], 0
    for index, segment in enumerate(layout.segments):
        for pattern in cut(segment.pattern) * segment.repeats:
            found.append(Block(index, pattern, tuple(range(first, first + len(pattern)))))
            first += len(pattern)
    return tuple(found)


def with_copies(source: Layout, copies: Sequence[int]) -> Layout:
    """The layout in which block b stands copies[b] times.

    A segment stays one segment where its types repeat its first part, or its whole pattern; otherwise every run of
    equal parts is a segment of its own.
    """
    every = list(zip(blocks(source), copies, strict=True))
    segments: list[Segment] = []
    for index, segment in enumerate(source.segments):
        parts = [(block.pattern, count) for block, count in every if block.segment == index]
        segments += _segments(parts, segment.pattern)
    return Layout(tuple(segments))


def _segments(parts: Sequence[tuple[str, int]], whole: str) -> list[Segment]:
    types = "".join(pattern * count for pattern, count in parts)
    for pattern in (parts[0][0], whole):
        repeats = len(types) // len(pattern)
        if types == pattern * repeats:
            return [Segment(pattern, repeats)]
    return [Segment(pattern, sum(count for _, count in run))
            for pattern, run in groupby(parts, key=lambda part: part[0])]
