"""Addition of two numbers: each digit of the sum is asked at a place of its own, and shown nowhere.

    0123+0877=....      the answers at the four points are 1, 0, 0, 0

The difficulty of a digit is how many places below it decide its carry: 1 and the run of places next below whose digits
sum to 9, which hand on what they get. A shown digit would tell the carry to the next one.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from gt_jax.tasks.draws import Draws
from gt_jax.tasks.task import DIGITS, Instance, Task

_POINT, _PLUS, _EQUALS = b".+="


@dataclasses.dataclass(frozen=True)
class Addition(Task):
    """Numbers of `digits` digits below a leading 0; half of the places hand a carry on, so that there are long runs."""

    name: ClassVar[str] = "addition"
    digits: int = 12

    @property
    def longest(self) -> int:
        return 3 * (self.digits + 1) + 2

    @property
    def alphabet(self) -> bytes:
        return DIGITS + bytes([_POINT, _PLUS, _EQUALS])

    def problems(self) -> list[str]:
        wrong = super().problems()
        if self.digits < self.hardest:
            wrong.append(f"digits is {self.digits}; a carry through {self.hardest} places needs at least as many")
        return wrong

    def draw(self, draws: Draws, hardest: int) -> Instance:
        a, b = draws.below(10, self.digits), draws.below(10, self.digits)
        hands_on = draws.below(2, self.digits) == 1
        b = np.where(hands_on, 9 - a, b)  # places from the lowest; longer runs than `hardest` are cut
        run = 0
        for place in range(self.digits):
            run = run + 1 if a[place] + b[place] == 9 else 0
            if run >= hardest:
                b[place] = (b[place] + 1 + draws.below(9, 1)[0]) % 10
                run = 0
        depth, sums, carry, run = [], [], 0, 0
        for place in range(self.digits + 1):
            total = carry + (int(a[place] + b[place]) if place < self.digits else 0)
            sums.append(total % 10)
            depth.append(min(run + 1, max(place, 1)))
            handed = place < self.digits and a[place] + b[place] == 9
            carry, run = total // 10, run + 1 if handed else 0
        wide = [np.append(number, 0)[::-1] for number in (a, b)]
        zero = DIGITS[0]
        tokens = np.concatenate([wide[0] + zero, [_PLUS], wide[1] + zero, [_EQUALS], np.full(self.digits + 1, _POINT)])
        before = np.zeros(tokens.size - self.digits - 1, np.int64)
        asked = np.array(depth[::-1])
        asked = np.where(asked >= self.easiest, asked, 0)
        return Instance.of(tokens, np.concatenate([before, np.array(sums[::-1]) + zero]),
                           np.concatenate([before, asked]))
