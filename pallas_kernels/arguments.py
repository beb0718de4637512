"""What every operation here asks of the kind of its arrays, before it looks at their shapes."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp


class Kinds(NamedTuple):
    """What is wrong, a line each, and whether all are arrays, whose shapes can be looked at."""

    problems: list[str]
    arrays: bool


def check_kinds(floating: Mapping[str, Any], whole: Mapping[str, Any]) -> Kinds:
    """A line for each argument that is no array, empty, or not of floating point or whole numbers; None is left out.

    Whole numbers as values would be multiplied as such and cut off, and ids that are no whole numbers compared so.
    """
    problems, arrays = [], True
    for arguments, kind, right in ((floating, jnp.floating, "float32 or bfloat16"), (whole, jnp.integer, "int32")):
        for name, array in arguments.items():
            if array is None:
                continue
            if not hasattr(array, "dtype"):
                arrays = False
                problems.append(f"{name} must be an array, got {type(array).__name__}")
            elif not jnp.issubdtype(array.dtype, kind):
                problems.append(f"{name} must be {right}, got {array.dtype}")
            elif 0 in array.shape:
                problems.append(f"{name} must have at least one element an axis, got {array.shape}")
    return Kinds(problems, arrays)


def whole_problems(counts: Mapping[str, Any]) -> list[str]:
    """A line for each number that is no whole one: 2.5 keys are none."""
    return [f"{name} {value} must be a whole number" for name, value in counts.items()
            if not isinstance(value, numbers.Integral)]  # fmt: skip
