"""A JSON-lines file as a part of the data: whole documents, trained on or held out, in packed rows."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from gt_jax.configs.data import DataConfig
from gt_jax.errors import Refused
from gt_jax.text.batches import Batch, stacked
from gt_jax.text.document_rows import DocumentRows
from gt_jax.text.json_lines import Document, read_documents
from gt_jax.text.sources import file_hashes
from gt_jax.text.split import HELD_OUT, TRAINING, TUNING, content_keys, split_whole
from gt_jax.text.tokenizers import Tokenizer

_HELD_OUT_SEED = 0  # whatever the run's seed


class JsonLinesPart:
    """The documents of a file in the shape that `config` says; held-out batches carry the `difficulty` of each answer,
    and the `unit` of each token. `keys` are what documents are told apart by, by part.

    Raises `Refused` for a file that cannot be read, and for one without a document for each part that is asked for.
    """

    unit_kind = "document"

    def __init__(self, path: str, config: DataConfig, tokenizer: Tokenizer) -> None:
        self.path, self.config = path, config
        self._documents = read_documents(path, tokenizer, config.sequence_length)
        keys = content_keys(one.key for one in self._documents)
        sizes = np.array([one.tokens.size for one in self._documents], np.int64)
        self._part = split_whole(sizes, keys, config)
        needed = 3 if config.tuning else 2
        if len(np.unique(self._part)) < needed:
            raise Refused(f"file {path!r} has {len(np.unique(keys))} different documents; there must be at least "
                          f"{needed}, one to train on and one held out{', one for tuning' * (needed == 3)}")
        _, self._units = np.unique(keys, return_inverse=True)
        self.keys = {HELD_OUT: keys[self._part == HELD_OUT], TRAINING: keys[self._part == TRAINING]}

    def training_rows(self) -> DocumentRows:
        """The rows of the training part, endless."""
        return DocumentRows(self._of(TRAINING), self.config.sequence_length, self.config.seed, endless=True)

    def held_out(self, batches: int | None = None) -> list[Batch]:
        """Held-out batches, at most `batches`, with `difficulty` and `unit`: the same whatever the seed, the last one
        padded.

        Fewer rows than there are lie evenly over all of them.
        """
        units = self._units[self._part == HELD_OUT].astype(np.int32)
        return self._batches("held-out", HELD_OUT, batches, units)

    def tuning(self, batches: int | None = None) -> list[Batch]:
        """The batches of the tuning part, likewise."""
        if not self.config.tuning:
            raise Refused("this file has no tuning part; give its DataConfig a share, for example tuning=0.02")
        return self._batches("tuning", TUNING, batches)

    def held_out_units(self, batches: int | None = None) -> list[Int32[np.ndarray, "b t"]]:
        """The unit of every token of `held_out(batches)`: documents of one key, such as one prompt, are one unit."""
        return [batch["unit"] for batch in self.held_out(batches)]

    def content_hash(self) -> str:
        """SHA-256 of the documents' tokens, targets and difficulties."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> str:
        found = hashlib.sha256()
        for one in self._documents:
            for values in (one.tokens, one.targets, one.difficulty):
                found.update(values.size.to_bytes(8, "little") + values.astype("<i4").tobytes())
        return found.hexdigest()

    def files(self) -> list[dict[str, Any]]:
        """{"path", "sha256"} of the file."""
        return file_hashes([self.path])

    def summary(self) -> str:
        """One line: documents, tokens, how many of them are targets, documents held out."""
        targets = sum(int((one.targets >= 0).sum()) for one in self._documents)
        held = int((self._part == HELD_OUT).sum())
        return (f"JSON-lines file {self.path!r}: {len(self._documents):,} documents, "
                f"{sum(one.tokens.size for one in self._documents):,} tokens, {targets:,} of them with a target, "
                f"{held:,} documents held out")

    def _of(self, part: int) -> Sequence[Document]:
        return [one for one, here in zip(self._documents, self._part.tolist(), strict=True) if here == part]

    def _chosen(self, part: int, batches: int | None) -> tuple[DocumentRows, list[int]]:
        """All rows of a part, and the numbers of those that are in so many batches."""
        rows = DocumentRows(self._of(part), self.config.sequence_length, _HELD_OUT_SEED, endless=False)
        count = len(rows) if batches is None else min(batches * self.config.batch_size, len(rows))
        return rows, (np.arange(count) * len(rows) // max(count, 1)).tolist()

    def _batches(
        self, name: str, part: int, batches: int | None, units: Int32[np.ndarray, " n"] | None = None
    ) -> list[Batch]:
        if batches is not None and batches < 1:
            raise Refused(f"{name} batches is {batches}; it must be at least 1")
        rows, chosen = self._chosen(part, batches)
        made = [{**rows[number], **({} if units is None else {"unit": units[rows.documents(number)]})}
                for number in chosen]  # fmt: skip
        return stacked(made, self.config.batch_size)
