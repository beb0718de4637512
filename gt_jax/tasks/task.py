"""What a generated task is: instances as bytes, some of whose tokens have an answer, each of known difficulty.

- A symbol is one byte, so that every byte-level model can read a task, beside text or alone, and a person too.
- An answer of one symbol is the target of the token that asks; it does not follow in the tokens, for what stands there
  could be used by a later question instead of the steps that it asks for.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Int32

from gt_jax.configs.json_config import Config
from gt_jax.tasks.draws import Draws

LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
DIGITS = b"0123456789"


class Instance(NamedTuple):
    """One instance, int32 [n] each: tokens, the answer (-1 where nothing is asked), its difficulty (0 likewise)."""

    tokens: Int32[np.ndarray, " n"]
    targets: Int32[np.ndarray, " n"]
    difficulty: Int32[np.ndarray, " n"]

    @classmethod
    def of(cls, tokens: Any, targets: Any, difficulty: Any) -> Instance:
        """As int32; difficulty 0 asks nothing, whatever the target there."""
        tokens, targets, difficulty = (np.asarray(a, np.int32) for a in (tokens, targets, difficulty))
        return cls(tokens, np.where(difficulty > 0, targets, -1).astype(np.int32), difficulty)


@dataclasses.dataclass(frozen=True)
class Task(Config, abc.ABC):
    """Difficulties from `easiest` to `hardest`; a task has more fields, and says how long an instance is at most."""

    name: ClassVar[str]
    easiest: int = 1
    hardest: int = 8

    @property
    @abc.abstractmethod
    def longest(self) -> int:
        """Tokens of the longest instance."""

    @property
    @abc.abstractmethod
    def alphabet(self) -> bytes:
        """Every symbol that can stand in an instance, as a question or as an answer."""

    @abc.abstractmethod
    def draw(self, draws: Draws, hardest: int) -> Instance:
        """One instance, of difficulties up to `hardest`, which a curriculum may set below the task's own."""

    def problems(self) -> list[str]:
        wrong = []
        if not 1 <= self.easiest <= self.hardest:
            wrong.append(f"1 <= easiest {self.easiest} <= hardest {self.hardest} does not hold")
        return wrong

    def at_most(self, field: str, most: int, why: str) -> list[str]:
        """A line where the field is beyond what the task can write."""
        value = getattr(self, field)
        return [] if value <= most else [f"{field} is {value}; it can be at most {most}, {why}"]
