"""Instances packed into rows: row i is a function of (task, seed, i), with a split between trained on and held out.

- An instance is held out when the hash of its tokens says so, wherever it is drawn: training draws again until one is
  not, the held-out part until one is. So no seed, no row and no schedule ever trains on a held-out instance.
- A curriculum raises the hardest difficulty linearly over the first `curriculum` rows.
"""

from __future__ import annotations

import hashlib
import sys

import numpy as np
from jaxtyping import Int32

from gt_jax.tasks.draws import Draws
from gt_jax.tasks.task import Instance, Task

TRAINING, HELD_OUT = 0, 1  # streams of draws
_HASHES = 2**64

Row = dict[str, Int32[np.ndarray, "t"]]


def is_held_out(instance: Instance, share: float) -> bool:
    """Whether the tokens' hash falls into the held-out `share`."""
    digest = hashlib.blake2b(instance.tokens.astype("<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * _HASHES


class TaskRows:
    """Random access to rows {tokens, targets, segment_ids, difficulty}, int32 [row]; endless."""

    def __init__(self, task: Task, row: int, seed: int, share: float, part: int = TRAINING,
                 curriculum: int = 0) -> None:
        self._task, self._row, self._seed, self._share = task, row, seed, share
        self._part, self._curriculum = part, curriculum

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Row:
        row = {"tokens": np.zeros(self._row, np.int32), "targets": np.full(self._row, -1, np.int32),
               "segment_ids": np.zeros(self._row, np.int32), "difficulty": np.zeros(self._row, np.int32)}
        draws, hardest = Draws(self._seed, self._part, int(index)), self.hardest(int(index))
        filled = segment = 0
        while filled + self._task.longest <= self._row:
            instance = self._instance(draws, hardest)
            here, segment = slice(filled, filled + instance.tokens.size), segment + 1
            for name, values in instance._asdict().items():
                row[name][here] = values
            row["segment_ids"][here] = segment
            filled = here.stop
        return row

    def hardest(self, index: int) -> int:
        """The hardest difficulty of a row."""
        task = self._task
        if index >= self._curriculum:
            return task.hardest
        return task.easiest + (task.hardest - task.easiest) * index // self._curriculum

    def _instance(self, draws: Draws, hardest: int) -> Instance:
        while True:
            instance = self._task.draw(draws, hardest)
            if is_held_out(instance, self._share) == (self._part == HELD_OUT):
                return instance
