"""What the table of a family is made of: rows that tie one tensor of theirs to one or more of ours.

- A row says names, how the tensors are joined, and the transform of each; both directions and every shape follow.
- `groups`: their first axis is a run of groups, each with a part of every tensor of ours; 1 is one after the other.
- Tensors of experts are one a row and expert there (`{expert}` in the name), or all in one tensor; ours are always one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gt_jax.configs.model import ModelConfig
from gt_jax.interop.tensor_transforms import Flat, Matrix, Shape, Taps, Transform

EXPERT = "{expert}"


@dataclasses.dataclass(frozen=True)
class PlusOne(Transform):
    """A norm that multiplies by 1 + w there: we hold 1 + w, in float32, with which both compute."""

    def to_ours(self, there: np.ndarray, ours: Shape) -> np.ndarray:
        return there.reshape(ours).astype(np.float32) + np.float32(1)

    def to_origin(self, here: np.ndarray) -> np.ndarray:
        return here - np.float32(1)


SAME, FLAT, LINEAR, MERGED, TAPS, PLUS_ONE = Transform(), Flat(), Matrix(), Matrix(inputs=2), Taps(), PlusOne()


class Row(NamedTuple):
    """`theirs` is the name within a layer (or of the whole at the top), `ours` (path, transform) in the order joined.

    With `cut` the tensor lies there as so many parts of these names, equal but for the last.
    """

    theirs: str
    ours: tuple[tuple[str, Transform], ...]
    groups: int = 1
    cut: tuple[str, ...] = ()


def biases(*rows: Row) -> tuple[Row, ...]:
    """The rows of the biases of projections: `.weight` and `/w` are `.bias` and `/b`, which are vectors there."""
    return tuple(Row(one.theirs.replace(".weight", ".bias"),
                     tuple((path.removesuffix("/w") + "/b", FLAT) for path, _ in one.ours), one.groups)
                 for one in rows)  # fmt: skip


def row(theirs: str, ours: str, transform: Transform = LINEAR) -> Row:
    """A row of one tensor on both sides."""
    return Row(theirs, ((ours, transform),))


class Table(NamedTuple):
    """The rows of a model: at the top, and of a layer by its type, with what comes before the names of a layer."""

    top: tuple[Row, ...]
    layers: Mapping[str, tuple[Row, ...]]
    prefix: str = "model.layers.{layer}."


class Part(NamedTuple):
    """One tensor of ours, or its slice: `place` is the index of the block and of the expert within the leaf."""

    path: str
    place: tuple[int, ...]
    transform: Transform


class Unit(NamedTuple):
    """What is read and written at a time: a tensor of theirs, or an expert's slice of it (`expert`), and its parts."""

    name: str
    expert: int | None
    kind: str
    layer: int | None
    parts: tuple[Part, ...]
    groups: int
    cut: tuple[str, ...] = ()

    def stored(self, leaves: Mapping[str, Shape]) -> dict[str, Shape]:
        """Names and shapes of what lies there, without the axis of the experts."""
        shape = self.shape(leaves)
        if not self.cut:
            return {self.name: shape}
        rows = -(-shape[0] // len(self.cut))
        return {name: (max(0, min(rows, shape[0] - rows * index)), *shape[1:]) for index, name in enumerate(self.cut)}

    def shape(self, leaves: Mapping[str, Shape]) -> Shape:
        """The shape there, from the shapes of our leaves."""
        shapes = [part.transform.origin_shape(leaves[part.path][len(part.place) :]) for part in self.parts]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]

    def to_ours(self, there: np.ndarray, leaves: Mapping[str, Shape]) -> list[np.ndarray]:
        """Their values as those of our parts, views where the transforms give views."""
        shapes = [leaves[part.path][len(part.place) :] for part in self.parts]
        pieces = [there] if len(self.parts) == 1 else _split(
            there, [part.transform.origin_shape(shape) for part, shape in zip(self.parts, shapes, strict=True)],
            self.groups)  # fmt: skip
        return [part.transform.to_ours(piece, shape)
                for part, piece, shape in zip(self.parts, pieces, shapes, strict=True)]

    def to_theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of `to_ours`."""
        pieces = [part.transform.to_origin(value) for part, value in zip(self.parts, ours, strict=True)]
        if len(pieces) == 1:
            return pieces[0]
        grouped = [piece.reshape(self.groups, -1, *piece.shape[1:]) for piece in pieces]
        joined = np.concatenate(grouped, axis=1)
        return joined.reshape(-1, *joined.shape[2:])


def _split(there: np.ndarray, shapes: Sequence[Shape], groups: int) -> list[np.ndarray]:
    grouped = there.reshape(groups, -1, *there.shape[1:])
    sizes = [shape[0] // groups for shape in shapes]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [grouped[:, start : start + size].reshape(shape)
            for start, size, shape in zip(starts, sizes, shapes, strict=True)]


def units(config: ModelConfig, table: Table) -> Iterator[Unit]:
    """Every tensor of a model of this config, the embedding first, then layer by layer."""
    for line in table.top:
        parts = tuple(Part(f"params/{path}", (), transform) for path, transform in line.ours)
        yield Unit(line.theirs, None, line.theirs, None, parts, line.groups)
    experts = 0 if config.moe is None else config.moe.experts
    for layer, kind in enumerate(config.depth.types):
        segment, block, slot = config.depth.position(layer)
        base, prefix = f"params/segment{segment}/layer{slot}/", table.prefix.format(layer=layer)
        for line in table.layers[kind]:
            by_expert = "/experts/" in line.ours[0][0]
            for expert in range(experts) if by_expert else (None,):
                place = (block,) if expert is None else (block, expert)
                parts = tuple(Part(base + path, place, transform) for path, transform in line.ours)
                alone = EXPERT in line.theirs
                name = line.theirs.replace(EXPERT, str(expert)) if alone else line.theirs
                index = None if alone else expert
                cut = tuple(prefix + one for one in line.cut)
                yield Unit(prefix + name, index, line.theirs, layer, parts, line.groups, cut)


def whole_shapes(found: Sequence[Unit], leaves: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shape of every tensor of theirs by name; where experts share one, they are its first axis."""
    made: dict[str, Shape] = {}
    for unit in found:
        for name, shape in unit.stored(leaves).items():
            made[name] = shape if unit.expert is None else (unit.expert + 1, *shape)
    return made


def flat_start(part: Part, leaf: Shape) -> int:
    """Where the values of a part begin within its leaf, in C order."""
    size = math.prod(leaf[len(part.place) :])
    position = 0
    for index, length in zip(part.place, leaf, strict=False):
        position = position * length + index
    return position * size
