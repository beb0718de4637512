"""p-hop induction: follow "the token behind my last occurrence" p times (arXiv 2402.09268).

    prev(i) = the largest j < i with x_j = x_i;   hop(i) = prev(i) + 1;   the answer at i is x at hop(hop(… i)), p times

The first sign of an instance is p; every later token is asked whose p hops exist. No letter follows itself: from such a
pair a hop would lead back to where it came from, and p of them would be none.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from gt_jax.tasks.draws import Draws
from gt_jax.tasks.task import LETTERS, Instance, Task

_HOPS = b"0123456789"


@dataclasses.dataclass(frozen=True)
class PHop(Task):
    """`length` letters of `symbols` kinds; p is drawn evenly from easiest .. hardest, one for an instance."""

    name: ClassVar[str] = "p_hop"
    hardest: int = 6
    symbols: int = 4
    length: int = 63

    @property
    def longest(self) -> int:
        return self.length + 1

    @property
    def alphabet(self) -> bytes:
        return LETTERS[: self.symbols] + _HOPS[self.easiest : self.hardest + 1]

    def problems(self) -> list[str]:
        wrong = super().problems() + self.at_most("symbols", len(LETTERS), "a letter each")
        wrong += self.at_most("hardest", len(_HOPS) - 1, "a digit each")
        if self.symbols < 3:
            wrong.append(f"symbols is {self.symbols}; it must be at least 3, two would only alternate")
        if self.length < (self.hardest + 1) * self.symbols:
            wrong.append(f"length is {self.length}; {self.hardest} hops among {self.symbols} letters need at least "
                         f"{(self.hardest + 1) * self.symbols}")
        return wrong

    def draw(self, draws: Draws, hardest: int) -> Instance:
        hops = int(draws.between(self.easiest, hardest, 1)[0])
        steps = draws.between(1, self.symbols - 1, self.length)  # from each letter to another one
        x = np.cumsum(steps) % self.symbols
        hop = np.full(self.length + 1, -1)  # the last place is "nowhere", which leads nowhere
        last: dict[int, int] = {}
        for i, sign in enumerate(x.tolist()):
            hop[i] = last.get(sign, -2) + 1  # -1 where there was none
            last[sign] = i
        at = np.arange(self.length)
        for _ in range(hops):
            at = hop[at]
        letters = np.frombuffer(LETTERS, np.uint8)[x]
        asked = at >= 0
        return Instance.of(
            np.concatenate([[_HOPS[hops]], letters]), np.concatenate([[-1], np.where(asked, letters[at], -1)]),
            np.concatenate([[0], np.where(asked, hops, 0)]),
        )
