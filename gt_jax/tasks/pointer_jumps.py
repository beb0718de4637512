"""Pointer jumps: a permutation f is written down, then answers f^d(s) are asked; d sequential look-ups.

    BCABCA 2B 1A …      f(B) = C, f(A) = B, f(C) = A; then f^2(B), f(A)

f is one cycle: with shorter ones f^d would often be f^e of a smaller e. (The spaces are for the reader here.)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from gt_jax.tasks.draws import Draws
from gt_jax.tasks.task import LETTERS, Instance, Task

_END = ord(".")
_COUNTS = b"0123456789:;<=>?"  # 0 to 15; no letter


@dataclasses.dataclass(frozen=True)
class PointerJumps(Task):
    """A cycle of `symbols` letters and `queries` questions, the jumps drawn evenly from easiest .. hardest."""

    name: ClassVar[str] = "pointer_jumps"
    symbols: int = 16
    queries: int = 16

    @property
    def longest(self) -> int:
        return 3 * self.symbols + 2 * self.queries

    @property
    def alphabet(self) -> bytes:
        return LETTERS[: self.symbols] + _COUNTS[self.easiest : self.hardest + 1]

    def problems(self) -> list[str]:
        wrong = super().problems() + self.at_most("symbols", len(LETTERS), "a letter each")
        wrong += self.at_most("hardest", len(_COUNTS) - 1, "a sign each")
        if self.queries < 1:
            wrong.append(f"queries is {self.queries}; it must be at least 1")
        if self.symbols <= self.hardest:
            wrong.append(f"symbols is {self.symbols}; a cycle on which {self.hardest} jumps lead to another letter "
                         f"than fewer do needs more than {self.hardest}")
        return wrong

    def draw(self, draws: Draws, hardest: int) -> Instance:
        cycle, order = draws.permutation(self.symbols), draws.permutation(self.symbols)
        jumps = draws.between(self.easiest, hardest, self.queries)
        starts = draws.below(self.symbols, self.queries)
        letters = np.frombuffer(LETTERS, np.uint8)
        table = np.stack([cycle[order], cycle[(order + 1) % self.symbols]], axis=1)
        table = np.concatenate([letters[table], np.full((self.symbols, 1), _END)], axis=1)
        asked = np.stack([np.frombuffer(_COUNTS, np.uint8)[jumps], letters[cycle[starts]]], axis=1)
        answers = letters[cycle[(starts + jumps) % self.symbols]]
        nothing = np.zeros(table.size, np.int64)
        second = np.array([0, 1])
        return Instance.of(
            np.concatenate([table.ravel(), asked.ravel()]),
            np.concatenate([nothing, np.outer(answers, second).ravel()]),
            np.concatenate([nothing, np.outer(jumps, second).ravel()]),
        )
