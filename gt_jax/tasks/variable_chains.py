"""Variable chains: what is a variable worth that is defined by another one, which is defined by another one …?

    A7 C2 BA DC EB      A = 7, C = 2, B = A, D = C, E = B: behind BA, DC and EB the value is asked, 7, 2, 7

- A definition is the variable and what it is, a digit or a variable. The difficulty is the number of look-ups: behind
  BA 1, that of A, behind EB 2. The values of the chains differ, and the chains take turns in an order drawn at random,
  so that which value is the answer cannot be told without following the chain.
- `order` "forward": a definition stands behind those it needs, and its value is asked right there. "backward": it
  stands before those it needs. "shuffled": definitions stand anywhere. In these two the variables are asked behind them
  all, by ?A, which takes 1 look-up, or ?E, which takes 3: a token has all look-ups before it.
- "forward" needs no depth of a model that can move what its state holds from key to key: reading BA, a D layer gives B
  what it holds for A, and answers a chain of any length in one pass. Of shuffled chains it so answers those whose
  definitions happen to stand forward, 1 in d!, and of backward ones none.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Int64

from gt_jax.tasks.draws import Draws
from gt_jax.tasks.task import DIGITS, LETTERS, Instance, Task

Order = Literal["forward", "backward", "shuffled"]
_ASKED = ord("?")


@dataclasses.dataclass(frozen=True)
class VariableChains(Task):
    """`chains` chains of up to `hardest` look-ups, of variables among the first `letters` letters.

    Variables whose look-ups are `easiest` or more are asked.
    """

    name: ClassVar[str] = "variable_chains"
    hardest: int = 6
    chains: int = 6
    order: Order = "forward"
    letters: int = len(LETTERS)

    @property
    def longest(self) -> int:
        definitions = 2 * self.chains * self._definitions(self.hardest)
        return definitions if self.order == "forward" else definitions + 2 * self.chains * self.hardest

    def _definitions(self, hardest: int) -> int:
        """Those of a chain: forward, the digit's own is not asked."""
        return hardest + 1 if self.order == "forward" else hardest

    @property
    def alphabet(self) -> bytes:
        return LETTERS + DIGITS + (b"" if self.order == "forward" else bytes([_ASKED]))

    def problems(self) -> list[str]:
        wrong = super().problems() + self.at_most("chains", len(DIGITS), "a digit each")
        if self.chains < 2:
            wrong.append(f"chains is {self.chains}; of one chain the value is known, it must be at least 2")
        if self.order not in get_args(Order):
            wrong.append(f"order is {self.order!r}; it must be one of {', '.join(get_args(Order))}")
        wrong += self.at_most("letters", len(LETTERS), "a letter each")
        if self.chains * self._definitions(self.hardest) > self.letters:
            each = f"(hardest {self.hardest} + 1)" if self.order == "forward" else f"hardest {self.hardest}"
            wrong.append(f"chains {self.chains} x {each} variables are more than the {self.letters} letters")
        return wrong

    def draw(self, draws: Draws, hardest: int) -> Instance:
        length = self._definitions(hardest)
        signs = LETTERS[: self.letters], DIGITS
        letters, digits = (np.frombuffer(each, np.uint8).astype(np.int64) for each in signs)
        names = letters[draws.permutation(len(letters))[: self.chains * length]].reshape(self.chains, length)
        values = digits[draws.permutation(len(digits))[: self.chains]]
        means = np.concatenate([values[:, None], names[:, :-1]], axis=1)
        place = _turns(draws, self.chains, length)
        if self.order == "backward":
            place = self.chains * length - 1 - place
        flat = draws.permutation(self.chains * length) if self.order == "shuffled" else place.ravel()
        names, means, depth, worth = (
            _placed(a, flat) for a in (names, means, np.tile(np.arange(length), (self.chains, 1)),
                                       np.repeat(values, length)))  # fmt: skip
        depth = depth + (self.order != "forward")
        depth = np.where(depth >= self.easiest, depth, 0)
        tokens = np.stack([names, means], axis=1).ravel()
        second = np.array([0, 1])
        if self.order == "forward":
            return Instance.of(tokens, np.outer(worth, second).ravel(), np.outer(depth, second).ravel())
        asked = np.flatnonzero(depth)
        asked = asked[draws.permutation(asked.size)]
        nothing = np.zeros(tokens.size, np.int64)
        questions = np.stack([np.full(asked.size, _ASKED), names[asked]], axis=1).ravel()
        return Instance.of(
            np.concatenate([tokens, questions]), np.concatenate([nothing, np.outer(worth[asked], second).ravel()]),
            np.concatenate([nothing, np.outer(depth[asked], second).ravel()]),
        )


def _turns(draws: Draws, chains: int, length: int) -> Int64[np.ndarray, "chains length"]:
    """Where each chain's definitions stand, the first to the last: rounds in which every chain has one turn.

    Of three chains or more none has two turns in a row: what a neighbour is worth shows without a look-up. Of two, that
    would give each the same turn in every round, which says still more.
    """
    place, last = np.empty((chains, length), np.int64), -1
    for round_ in range(length):
        order = draws.permutation(chains)
        if chains > 2 and order[0] == last:
            order[[0, 1]] = order[[1, 0]]
        place[order, round_] = round_ * chains + np.arange(chains)
        last = int(order[-1])
    return place


def _placed(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    made = np.empty(places.size, np.int64)
    made[places] = values.ravel()
    return made
