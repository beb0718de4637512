"""Pointer jumps: a permutation f is written down, then followed from a letter on; the d-th jump takes d look-ups.

    BC.AB.CA. B>> A>> …      f(B) = C, f(A) = B, f(C) = A; then f(B) and f(f(B)), f(A) and f(f(A))

- The d-th jump sign behind a letter s asks f^d(s). No answer stands in the tokens, so it takes d look-ups one behind
  another: the answer of the sign before it has to be known first.
- f is one cycle: with shorter ones f^d would often be f^e of a smaller e. (The spaces are for the reader here.)
- A point ends each pair. Without it no token says which letter of two is the pointer, and a model counts places first.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from gt_jax.tasks.draws import Draws
from gt_jax.tasks.task import LETTERS, Instance, Task

_END, _JUMP = b".>"


@dataclasses.dataclass(frozen=True)
class PointerJumps(Task):
    """A cycle of `symbols` letters, followed from `queries` letters; jumps from the `easiest`-th on are asked."""

    name: ClassVar[str] = "pointer_jumps"
    symbols: int = 16
    queries: int = 4

    @property
    def longest(self) -> int:
        return 3 * self.symbols + (self.hardest + 1) * self.queries

    @property
    def alphabet(self) -> bytes:
        return LETTERS[: self.symbols] + bytes([_END, _JUMP])

    def problems(self) -> list[str]:
        wrong = super().problems() + self.at_most("symbols", len(LETTERS), "a letter each")
        if self.queries < 1:
            wrong.append(f"queries is {self.queries}; it must be at least 1")
        if self.symbols <= self.hardest:
            wrong.append(f"symbols is {self.symbols}; a cycle on which {self.hardest} jumps lead to another letter "
                         f"than fewer do needs more than {self.hardest}")
        return wrong

    def draw(self, draws: Draws, hardest: int) -> Instance:
        cycle, order = draws.permutation(self.symbols), draws.permutation(self.symbols)
        starts = draws.below(self.symbols, self.queries)
        letters = np.frombuffer(LETTERS, np.uint8).astype(np.int64)
        after = cycle[(order + 1) % self.symbols]
        table = np.stack([letters[cycle[order]], letters[after], np.full(self.symbols, _END)], axis=1)
        jumps = np.tile(np.arange(hardest + 1), (self.queries, 1))
        there = letters[cycle[(starts[:, None] + jumps) % self.symbols]]
        asked = np.where(jumps == 0, there, _JUMP)
        nothing = np.zeros(table.size, np.int64)
        return Instance.of(
            np.concatenate([table.ravel(), asked.ravel()]), np.concatenate([nothing, there.ravel()]),
            np.concatenate([nothing, np.where(jumps >= self.easiest, jumps, 0).ravel()]),
        )
