"""Transforms between the origin's layout of one tensor and ours: exact inverses of each other, element for element.

- A linear weight is [out, in] there; ours is [in, ...] with heads, streams or bytes as axes of their own, head-major.
- `to_ours` and `to_origin` only turn and split axes: they give views, so nothing is copied before it is stored.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """The same axes on both sides. `flat`: a matrix that the origin may also hold as one axis."""

    flat: bool = False

    def origin_shape(self, ours: Shape) -> Shape:
        """The shape there of what has the shape `ours` here."""
        return ours

    def to_ours(self, there: np.ndarray, ours: Shape) -> np.ndarray:
        """An origin tensor as a view of shape `ours`."""
        return there.reshape(ours)

    def to_origin(self, here: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        return here.reshape(self.origin_shape(here.shape))

    def fits(self, there: Shape, ours: Shape) -> bool:
        """Whether an origin tensor has the right shape; a scalar or vector may carry axes of length 1."""
        wanted = self.origin_shape(ours)
        if there == wanted:
            return True
        loose = self.flat or len(_squeezed(wanted)) <= 1
        return loose and _squeezed(there) in (_squeezed(wanted), _squeezed((math.prod(wanted),)))


@dataclasses.dataclass(frozen=True)
class Flat(Transform):
    """[h, k] here, [h * k] there."""

    def origin_shape(self, ours: Shape) -> Shape:
        return (math.prod(ours),)


@dataclasses.dataclass(frozen=True)
class Row(Transform):
    """One output of a linear layer: [*s] here, [1, *s] there."""

    def origin_shape(self, ours: Shape) -> Shape:
        return (1, *ours)


@dataclasses.dataclass(frozen=True)
class Matrix(Transform):
    """[*in, *out] here with `inputs` axes of input, [out, in] there."""

    inputs: int = 1

    def origin_shape(self, ours: Shape) -> Shape:
        return (math.prod(ours[self.inputs :]), math.prod(ours[: self.inputs]))

    def to_ours(self, there: np.ndarray, ours: Shape) -> np.ndarray:
        return there.reshape(self.origin_shape(ours)).T.reshape(ours)

    def to_origin(self, here: np.ndarray) -> np.ndarray:
        return here.reshape(self.origin_shape(here.shape)[::-1]).T


@dataclasses.dataclass(frozen=True)
class Taps(Transform):
    """A depthwise convolution: [taps, h, k] here, [h * k, 1, taps] there."""

    def origin_shape(self, ours: Shape) -> Shape:
        return (math.prod(ours[1:]), 1, ours[0])

    def to_ours(self, there: np.ndarray, ours: Shape) -> np.ndarray:
        return there[:, 0].T.reshape(ours)

    def to_origin(self, here: np.ndarray) -> np.ndarray:
        return here.reshape(here.shape[0], -1).T[:, None]


def _squeezed(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)
