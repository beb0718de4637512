"""The depth notation: `DDDG*5` is the pattern DDDG five times, `D*5,G*3` five D layers and then three G layers.

A segment's parameters are stacked along one leading block axis, so a segment, not a layer, is what compiles.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from itertools import groupby

from gt_jax.errors import Refused

LAYER_TYPES = "DGSA"
MOST = 1 << 16  # blocks of a segment: whoever writes more would wait, or lack the memory to list them
_SEGMENT = re.compile(r"([A-Za-z]+)(?:\*(-?\d+))?")


@dataclasses.dataclass(frozen=True)
class Segment:
    """`repeats` blocks of one `pattern` of layer types."""

    pattern: str
    repeats: int

    def __post_init__(self) -> None:
        unknown = sorted(set(self.pattern) - set(LAYER_TYPES))
        if not self.pattern or unknown:
            wrong = f"unknown layer type {''.join(unknown)!r}" if unknown else "no layer type"
            raise Refused(f"layout pattern {self.pattern!r}: {wrong}; known are {', '.join(LAYER_TYPES)}")
        if not 1 <= self.repeats <= MOST:
            raise Refused(f"layout segment {self.pattern}*{self.repeats}: repeats must be at least 1, at most {MOST}")

    def __str__(self) -> str:
        return f"{self.pattern}*{self.repeats}" if self.repeats > 1 else self.pattern

    def __len__(self) -> int:
        return len(self.pattern) * self.repeats


@dataclasses.dataclass(frozen=True)
class Layout:
    """Segments in order; `str(parse(text)) == text` for canonical text and `len` counts layers."""

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if not self.segments:
            raise Refused("layout: at least one segment is needed, for example DDDG*2")

    def __str__(self) -> str:
        return ",".join(map(str, self.segments))

    def __len__(self) -> int:
        return sum(map(len, self.segments))

    @property
    def types(self) -> str:
        """The layer types by position, for example DDDGDDDG."""
        return "".join(segment.pattern * segment.repeats for segment in self.segments)

    def position(self, layer: int) -> tuple[int, int, int]:
        """(segment, block, slot) of a layer; raises IndexError outside 0..len-1."""
        if layer < 0:
            raise IndexError(f"layer {layer} is negative")
        for index, segment in enumerate(self.segments):
            if layer < len(segment):
                return index, layer // len(segment.pattern), layer % len(segment.pattern)
            layer -= len(segment)
        raise IndexError(f"layout {self} has {len(self)} layers")

    def layer(self, segment: int, block: int, slot: int) -> int:
        """The inverse of `position`."""
        before = sum(len(s) for s in self.segments[:segment])
        return before + block * len(self.segments[segment].pattern) + slot


def parse(text: str) -> Layout:
    """Read the depth notation; raises `Refused` naming the part that is not a segment."""
    segments = []
    for part in text.split(","):
        match = _SEGMENT.fullmatch(part.strip())
        if match is None:
            example = "write a pattern and a count, for example DDDG*5 or D*5,G*3"
            raise Refused(f"layout {text!r}: {part!r} is not a segment; {example}")
        segments.append(Segment(match[1], int(match[2]) if match[2] else 1))
    return Layout(tuple(segments))


def from_types(types: Iterable[str], pattern: str = "DDDG") -> Layout:
    """The notation of a list of layer types: whole repeats of `pattern` if it divides, else runs of one type."""
    text = "".join(types)
    repeats, rest = divmod(len(text), len(pattern))
    if rest == 0 and text == pattern * repeats:
        return Layout((Segment(pattern, repeats),))
    return Layout(tuple(Segment(kind, len(list(run))) for kind, run in groupby(text)))
