"""All the data of a run: text, generated tasks and JSON-lines answers, alone or mixed; `open_data` opens what is named.

Plain text alone is a `Text`. Anything else is `Data`, of which the commands use what they use of a `Text`, and which
has `parts`, each with held-out batches of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from gt_jax.configs.data import TEXT, DataConfig
from gt_jax.errors import say_once
from gt_jax.tasks.registry import read_task
from gt_jax.text.batches import Batch, RandomRows, Text, TrainStream, identity, open_text, position_after
from gt_jax.text.json_lines_part import JsonLinesPart
from gt_jax.text.mixed_rows import MixedRows, quotas
from gt_jax.text.split import HELD_OUT, TRAINING
from gt_jax.text.task_part import TaskPart
from gt_jax.text.tokenizers import Tokenizer, open_tokenizer


@runtime_checkable
class Answers(Protocol):
    """A part that is no text: a task or a JSON-lines file.

    Its held-out batches carry `difficulty`, int32 [b, t], 0 where nothing is asked or no difficulty is known.
    `held_out_units` are the numbers of the tokens' instances or documents.
    """

    unit_kind: str

    @property
    def config(self) -> DataConfig: ...

    def training_rows(self) -> RandomRows: ...

    def held_out(self, batches: int | None = None) -> list[Batch]: ...

    def tuning(self, batches: int | None = None) -> list[Batch]: ...

    def content_hash(self) -> str: ...

    def files(self) -> list[dict[str, Any]]: ...

    def summary(self) -> str: ...

    def held_out_units(self, batches: int | None = None) -> list[Int32[np.ndarray, "b t"]]: ...


Part = Text | Answers


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """Parts by their names, and how they are mixed; `open_data` makes it."""

    config: DataConfig
    tokenizer: Tokenizer
    parts: Mapping[str, Part]

    def train(self, state: Mapping[str, Any] | None = None) -> TrainStream:
        """The training batches from the beginning, or from where `state` was taken."""
        rows = MixedRows([part.training_rows() for part in self.parts.values()], self.config.shares, self.config.seed)
        stream = TrainStream(rows, self.config, self._identity, self.files)
        if state is not None:
            stream.restore(state)
        return stream

    def held_out(self, batches: int | None = None) -> list[Batch]:
        """The held-out batches of the parts one after the other, `held_out_counts` of each; None: all of each."""
        return [batch for of_part in self.held_out_by_part(batches).values() for batch in of_part]

    def held_out_by_part(self, batches: int | None = None) -> dict[str, list[Batch]]:
        """The same by the names of the parts."""
        return {name: self.parts[name].held_out(count) for name, count in self.held_out_counts(batches).items()}

    def tuning(self, batches: int | None = None) -> list[Batch]:
        """The batches of the tuning parts, likewise."""
        counts = self.held_out_counts(batches)
        return [batch for name, part in self.parts.items() for batch in part.tuning(counts[name])]

    def held_out_counts(self, batches: int | None) -> dict[str, int | None]:
        """How many of `batches` batches are of each part: as it is mixed, but at least one."""
        if batches is None or batches < 1:  # which each part refuses
            return dict.fromkeys(self.parts, batches)
        return {**quotas(self.config.shares, batches, least=1)}

    def content_hash(self) -> str:
        """SHA-256 of the contents of the parts, their shares and the curriculum."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> str:
        shares = self.config.shares
        parts = [[name, part.content_hash(), shares[name]] for name, part in self.parts.items()]
        return hashlib.sha256(json.dumps([parts, self.config.curriculum_rows]).encode()).hexdigest()

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        parts = {name: part.content_hash() for name, part in self.parts.items()}
        return {**identity(self.config, self.content_hash()), "parts": parts}

    def position_after(self, positions: Iterable[Any]) -> dict[str, Any] | None:
        """`position_after` of what a position in this data is a position in."""
        return position_after(self._identity, positions)

    def files(self) -> list[dict[str, Any]]:
        """{"path", "sha256"} of every file, text first."""
        return [file for part in self.parts.values() for file in part.files()]

    def summary(self) -> str:
        """One line: the parts, each with its share of the rows where there are several."""
        if len(self.parts) == 1:
            return next(iter(self.parts.values())).summary()
        shares = self.config.shares
        return "; ".join(f"{100 * shares[name]:.4g} % {part.summary()}" for name, part in self.parts.items())


def short_parts(data: Text | Data, batches: int, held_out: Mapping[str, Sequence[Batch]]) -> list[str]:
    """Of each part that has fewer held-out rows than its weight asks for in `batches` batches, one line.

    It counts for less than its weight in a mean over `held_out`, which is `data.held_out_by_part(batches)`. Nothing is
    mixed, and asked, where there is one part.
    """
    if isinstance(data, Text) or len(data.parts) < 2:
        return []
    asked = {name: (count or 0) * data.config.batch_size for name, count in data.held_out_counts(batches).items()}
    rows = {name: sum(int((batch["targets"] >= 0).any(axis=1).sum()) for batch in of_part)
            for name, of_part in held_out.items()}  # fmt: skip
    return [f"{name} has {rows[name]} held-out rows of the {count} that its weight asks for, so it counts for less in "
            "these figures; fewer batches ask for fewer" for name, count in asked.items() if rows[name] < count]


def open_data(config: DataConfig) -> Text | Data:
    """Everything that `config` names, a `Text` where that is plain text alone.

    Raises `Refused` for what cannot be used, and for a part that a mix gives less than a row in 10,000.
    """
    if not (config.tasks or config.json_lines):
        return open_text(config)
    tokenizer, shares = open_tokenizer(config.tokenizer), config.shares
    parts: dict[str, Part] = {TEXT: open_text(config)} if TEXT in config.parts else {}
    for words in config.tasks:
        task = read_task(words)
        parts[task.name] = TaskPart(task, config, tokenizer, round(config.curriculum_rows * shares[task.name]))
    answers = {Path(path).stem: JsonLinesPart(path, config, tokenizer) for path in config.json_lines}
    for line in known_elsewhere(answers):
        say_once(f"note: {line}")
    return Data(config, tokenizer, parts | answers)


def known_elsewhere(parts: Mapping[str, JsonLinesPart]) -> list[str]:
    """A line for each file of whose held-out documents some are trained on in another: each is split by itself."""
    found = []
    for name, part in parts.items():
        held_out = np.unique(part.keys[HELD_OUT])
        for other in (other for other in parts if other != name):
            if count := int(np.isin(held_out, parts[other].keys[TRAINING]).sum()):
                found.append(f"{count} of {len(held_out)} held-out documents of {name} are trained on in {other}, "
                             f"which is split by itself: held-out figures of {name} are of known answers; leave them "
                             f"out of {other}, or put both in one file")
    return found
