"""The held-out rows that a figure is taken from, and which of their tokens are independent of which.

- Fewer rows than there are lie evenly over the whole held-out part, row i of n being row floor(i N / n) of its N. The
  first n rows would be the successive rows of a few pieces: the sample of a few documents.
- What is independent is a stretch that was held out as one: a document, or a place of a document of which several
  places are held out. Tokens within one are alike, and so are its rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from gt_jax.errors import Refused
from gt_jax.text.batches import Batch, PackedRows, Row, Text

SEED = 0  # of `Text.held_out`, so that all the rows are its rows


class HeldOutRows(NamedTuple):
    """Batches, and for each the unit of every token; `kind` is what a unit is, "document" or "place"."""

    batches: list[Batch]
    units: list[Int32[np.ndarray, "b t"]]
    kind: str

    def scored_units(self) -> Int32[np.ndarray, "scored"]:
        """The unit of each token that is predicted, in the order of the batches."""
        return np.concatenate([of[batch["targets"] >= 0] for batch, of in zip(self.batches, self.units, strict=True)])


def held_out_rows(text: Text, batches: int | None = None) -> HeldOutRows:
    """At most `batches` batches of a text's held-out part, None for all of it; the last one is padded.

    Raises `Refused` for fewer batches than one.
    """
    if batches is not None and batches < 1:
        raise Refused(f"held-out batches is {batches}; it must be at least 1")
    length, size, spans = text.config.sequence_length, text.config.batch_size, text.held_out_spans
    numbers, kind = _units(text)
    lengths = np.diff(spans).ravel()
    ends = np.cumsum(lengths)
    # The same rows of a text whose tokens are the numbers of their units, and which is the held-out part alone.
    together = np.stack([ends - lengths, ends], axis=1)
    rows = PackedRows(text.tokens, spans, length, SEED, endless=False)
    marked = PackedRows(np.repeat(numbers, lengths).astype(np.uint32), together, length, SEED, endless=False)
    count = len(rows) if batches is None else min(batches * size, len(rows))
    chosen = np.arange(count) * len(rows) // count
    found, units = [], []
    for first in range(0, count, size):
        part = [int(row) for row in chosen[first:first + size]]
        found.append(_stacked([rows[row] for row in part], size))
        units.append(_stacked([marked[row] for row in part], size)["tokens"])
    return HeldOutRows(found, units, kind)


def _units(text: Text) -> tuple[Int64[np.ndarray, "spans"], str]:
    """The unit of each held-out span, and what units are: spans that touch within a document are one unit."""
    starts, stops = text.held_out_spans.T
    end = text.tokenizer.end_of_document
    apart = (starts[1:] != stops[:-1]) | (text.tokens[stops[:-1] - 1] == end)
    numbers = np.concatenate([[0], np.cumsum(apart)])
    documents = np.searchsorted(np.flatnonzero(text.tokens == end), starts)
    return numbers, "document" if len(np.unique(documents)) == numbers[-1] + 1 else "place"


def _stacked(rows: list[Row], size: int) -> Batch:
    """Rows as a batch of `size`; missing ones are padding."""
    missing = {"tokens": 0, "targets": -1, "segment_ids": 0}
    return {name: np.stack([*(row[name] for row in rows), *[np.full_like(rows[0][name], value)] * (size - len(rows))])
            for name, value in missing.items()}
