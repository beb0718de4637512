"""Word problems of a group: what is the product of the elements so far? Asked at every element; difficulty its number.

Z2 is parity, which one D layer with beta up to 2 can track; S3 is solvable, A5 is not (arXiv 2404.08819): a control for
what recurrence along the sequence does by itself.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Int64

from gt_jax.tasks.draws import Draws
from gt_jax.tasks.task import DIGITS, LETTERS, Instance, Task

Group = Literal["Z2", "S3", "A5"]
_SIGNS = LETTERS + DIGITS  # A5 has 60 elements


@dataclasses.dataclass(frozen=True)
class GroupWords(Task):
    """Words of `hardest` elements of `group`."""

    name: ClassVar[str] = "group_words"
    hardest: int = 16
    group: Group = "S3"

    @property
    def longest(self) -> int:
        return self.hardest

    @property
    def alphabet(self) -> bytes:
        return _SIGNS[: len(products(self.group))]

    def problems(self) -> list[str]:
        known = get_args(Group)
        return super().problems() + (
            [] if self.group in known else [f"group is {self.group!r}; it must be one of {', '.join(known)}"])

    def draw(self, draws: Draws, hardest: int) -> Instance:
        table = products(self.group)
        word = draws.below(len(table), hardest)
        so_far = list(itertools.accumulate(word.tolist(), lambda a, b: int(table[a, b])))
        signs = np.frombuffer(_SIGNS, np.uint8)
        depth = np.arange(1, hardest + 1)
        return Instance.of(signs[word], signs[so_far], np.where(depth >= self.easiest, depth, 0))


@functools.cache
def products(group: Group) -> Int64[np.ndarray, "n n"]:
    """The group's table: [a, b] is first a, then b."""
    size = {"Z2": 2, "S3": 3, "A5": 5}[group]
    elements = list(itertools.permutations(range(size)))
    if group == "A5":
        elements = [p for p in elements if not _odd(p)]
    number = {element: index for index, element in enumerate(elements)}
    return np.array([[number[tuple(b[i] for i in a)] for b in elements] for a in elements])


def _odd(permutation: tuple[int, ...]) -> bool:
    pairs = itertools.combinations(permutation, 2)
    return sum(a > b for a, b in pairs) % 2 == 1
