"""A generated task as a part of the data: its rows in the tokens of a tokenizer, trained on or held out.

A symbol of a task is one byte, and one token too: with another tokenizer than bytes it is the token that stands for
just this byte, so that an answer stays one token. A tokenizer that has none for a symbol is refused.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np
from jaxtyping import Int32

from gt_jax.configs.data import DataConfig
from gt_jax.errors import Refused, say_once
from gt_jax.tasks.registry import notation
from gt_jax.tasks.rows import HELD_OUT, TUNING, Ids, TaskRows
from gt_jax.tasks.task import Task
from gt_jax.text.batches import Batch, stacked
from gt_jax.text.split import content_keys
from gt_jax.text.tokenizers import Tokenizer

WHOLE = 512  # rows of the held-out part where all of it is asked for; there is no end to it
FEW = 0.01  # a held-out share below which drawing instances of it takes seconds, then hours
_HELD_OUT_SEED = 0  # whatever the run's seed


class TaskPart:
    """A task in the shape that `config` says; its held-out batches carry the `difficulty` of each answer."""

    unit_kind = "instance"

    def __init__(self, task: Task, config: DataConfig, tokenizer: Tokenizer, curriculum: int = 0) -> None:
        self.task, self.config, self.tokenizer = task, config, tokenizer
        self._curriculum, self._ids = curriculum, symbol_ids(task, tokenizer, config.tokenizer)
        # A held-out instance takes 1 / held_out draws to find, and its rows are asked for again.
        self._row = functools.lru_cache(maxsize=4 * WHOLE)(lambda part, index: self._rows(part)[index])
        if config.held_out < FEW:
            say_once(f"note: {config.held_out:g} of task {task.name} is held out, so each instance that is asked of it "
                     f"takes some {1 / config.held_out:,.0f} draws; training with a larger --held-out begins sooner")
        self.training_rows()[0], self._row(HELD_OUT, 0)  # where a curriculum has the fewest different instances

    def training_rows(self) -> TaskRows:
        """The rows of the training part, endless."""
        c = self.config
        return TaskRows(self.task, c.sequence_length, c.seed, c.held_out, c.tuning, curriculum=self._curriculum,
                        ids=self._ids)  # fmt: skip

    def held_out(self, batches: int | None = None) -> list[Batch]:
        """Held-out batches, `WHOLE` rows for None: the same whatever the seed, with `difficulty` int32 [b, t]."""
        return self._batches("held-out", HELD_OUT, batches)

    def tuning(self, batches: int | None = None) -> list[Batch]:
        """The batches of the tuning part, likewise."""
        if not self.config.tuning:
            raise Refused("this task has no tuning part; give its DataConfig a share, for example tuning=0.02")
        return self._batches("tuning", TUNING, batches)

    def held_out_units(self, batches: int | None = None) -> list[Int32[np.ndarray, "b t"]]:
        """The number of the instance of every token of `held_out(batches)`: instances are independent, copies one."""
        keys = [instance_keys(batch["tokens"], batch["segment_ids"]) for batch in self.held_out(batches)]
        _, numbers = np.unique(np.concatenate(keys), return_inverse=True)
        cuts = np.cumsum([len(one) for one in keys])[:-1]
        return np.split(numbers.reshape(-1, keys[0].shape[1]).astype(np.int32), cuts)

    def content_hash(self) -> str:
        """SHA-256 of the task with all of its options."""
        return hashlib.sha256(notation(self.task).encode()).hexdigest()

    def files(self) -> list[dict[str, Any]]:
        """No file is read."""
        return []

    def summary(self) -> str:
        """One line: the task with its options."""
        return f"task {notation(self.task)}, {100 * self.config.held_out:g} % of its instances held out"

    def _rows(self, part: int) -> TaskRows:
        c = self.config
        return TaskRows(self.task, c.sequence_length, _HELD_OUT_SEED, c.held_out, c.tuning, part, ids=self._ids)

    def _batches(self, name: str, part: int, batches: int | None) -> list[Batch]:
        if batches is not None and batches < 1:
            raise Refused(f"{name} batches is {batches}; it must be at least 1")
        size = self.config.batch_size
        return stacked([self._row(part, i) for i in range(WHOLE if batches is None else batches * size)], size)


def instance_keys(tokens: Int32[np.ndarray, "b t"], segment_ids: Int32[np.ndarray, "b t"]) -> np.ndarray:
    """The key of each token's instance: a hash of the tokens of its segment, uint64 [b, t]."""
    found = np.zeros(tokens.shape, np.uint64)
    for row, ids, keys in zip(tokens, segment_ids, found, strict=True):
        names = np.unique(ids)
        of = content_keys(row[ids == name].astype("<i4").tobytes() for name in names.tolist())
        keys[:] = of[np.searchsorted(names, ids)]
    return found


def symbol_ids(task: Task, tokenizer: Tokenizer, name: str) -> Ids:
    """The token of each of the 256 symbols, 0 for those that the task does not use.

    Raises `Refused` naming the symbols of the task that the tokenizer has no token for.
    """
    found: dict[bytes, int] = {}
    for number, text in enumerate(tokenizer.texts()):
        found.setdefault(text, number)
    symbols = [bytes([symbol]) for symbol in task.alphabet]
    missing = [symbol for symbol in symbols if symbol not in found]
    if missing:
        shown = ", ".join(repr(symbol.decode("latin-1")) for symbol in missing[:10])
        raise Refused(f"task {task.name} needs a token for each of its {len(symbols)} symbols; tokenizer {name} has "
                      f"none for {len(missing)} of them ({shown}); take fewer symbols, or train with --tokenizer bytes")
    ids = np.zeros(256, np.int32)
    ids[list(task.alphabet)] = [found[symbol] for symbol in symbols]
    return ids
