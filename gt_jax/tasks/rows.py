"""Instances packed into rows: row i is a function of (task, seed, i), with a split between trained on and held out.

- An instance is held out when the hash of its symbols says so, wherever it is drawn: training draws again until one is
  not, the held-out part until one is. So no seed, no row, no option and no schedule ever trains on a held-out instance.
- A curriculum raises the hardest difficulty linearly over the first `curriculum` rows.
- An instance is never cut: the rest of a row is padding.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from gt_jax.configs.data import ENDLESS
from gt_jax.errors import Refused
from gt_jax.tasks.draws import Draws
from gt_jax.tasks.registry import notation, read_task
from gt_jax.tasks.task import Instance, Task

TRAINING, HELD_OUT, TUNING = range(3)  # parts, and streams of draws
_HASHES = 2**64
_TRIES = 10_000
_PATIENCE = 40.0  # draws times the share of a part after which it has none: wrong in e^-40 of cases
_MOST = 1_000_000  # draws for one instance: some ten seconds

Row = dict[str, Int32[np.ndarray, " t"]]
Ids = Int32[np.ndarray, " 256"]


def part_of(instance: Instance, held_out: float, tuning: float = 0.0) -> int:
    """The part that the symbols' hash falls into: the held-out share, the tuning share behind it, or the rest."""
    digest = hashlib.blake2b(instance.tokens.astype("<i4").tobytes(), digest_size=8).digest()
    place = int.from_bytes(digest, "little")
    if place < held_out * _HASHES:
        return HELD_OUT
    return TUNING if place < (held_out + tuning) * _HASHES else TRAINING


def rises(tasks: Sequence[str], curriculum_rows: int, batch_size: int) -> frozenset[int]:
    """The steps, from 1, whose batch is the first to hold a row of the next difficulty of one of the tasks."""
    found = set()
    for task in map(read_task, tasks):
        harder = task.hardest - task.easiest
        found |= {-(-k * curriculum_rows // harder) // batch_size + 1 for k in range(1, harder + 1) if curriculum_rows}
    return frozenset(found)


class TaskRows:
    """Random access to rows {tokens, targets, segment_ids, difficulty}, int32 [row]; endless.

    `ids` are the tokens of the 256 symbols. Raises `Refused` for rows that hold no instance, for a part of next to
    nothing, and where a part has hardly any instance, since there are too few different ones.
    """

    def __init__(
        self, task: Task, row: int, seed: int, held_out: float, tuning: float = 0.0, part: int = TRAINING,
        curriculum: int = 0, ids: Ids | None = None,
    ) -> None:  # fmt: skip
        if row < task.longest:
            raise Refused(f"rows of {row} tokens are too short for task {notation(task)}, whose instances have up to "
                          f"{task.longest}; train and the evaluating commands have --sequence-length for longer "
                          "ones, or take a smaller task")  # fmt: skip
        self._task, self._row, self._seed, self._shares = task, row, seed, (held_out, tuning)
        self._part, self._curriculum = part, curriculum
        share = (1.0 - held_out - tuning, held_out, tuning)[part]
        if 0 < share < _PATIENCE / _MOST:
            raise Refused(f"a share of {share:g} of task {notation(task)} is too little to find an instance of; at "
                          f"least {_PATIENCE / _MOST:g} is needed, and 0.01 is found in no time")  # fmt: skip
        self._tries = max(_TRIES, math.ceil(_PATIENCE / share)) if share > 0 else _TRIES
        self._ids = np.arange(256, dtype=np.int32) if ids is None else ids
        self._longest = functools.cache(lambda hardest: dataclasses.replace(task, hardest=hardest).longest)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Row:
        row = {"tokens": np.zeros(self._row, np.int32), "targets": np.full(self._row, -1, np.int32),
               "segment_ids": np.zeros(self._row, np.int32), "difficulty": np.zeros(self._row, np.int32)}
        draws, hardest = Draws(self._seed, self._part, int(index)), self.hardest(int(index))
        filled = segment = 0
        while filled + self._longest(hardest) <= self._row:
            instance = self._instance(draws, hardest)
            here, segment = slice(filled, filled + instance.tokens.size), segment + 1
            row["tokens"][here] = self._ids[instance.tokens]
            row["targets"][here] = np.where(instance.targets >= 0, self._ids[instance.targets], -1)
            row["difficulty"][here] = instance.difficulty
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
        for _ in range(self._tries):
            instance = self._task.draw(draws, hardest)
            if part_of(instance, *self._shares) == self._part:
                return instance
        part = ("is trained on", "is held out", "is for tuning")[self._part]
        raise Refused(f"task {notation(self._task)} with difficulties up to {hardest} has too few different instances: "
                      f"none of {self._tries:,} {part}; make it larger")  # fmt: skip
