"""Whole documents packed into rows: an answer never stands in another row than its prompt.

- A document that may be cut, a text longer than a row, is cut into pieces of a row; its targets go on across a cut.
- The pieces, in an order drawn once, go each into the first of the last rows begun that has room. What is left of a row
  is padding. So there is a fixed set of rows, and every epoch is these rows in another order: where a training stands
  is one number.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Int64

from gt_jax.configs.data import ENDLESS
from gt_jax.tasks.draws import Draws
from gt_jax.text.batches import Row
from gt_jax.text.json_lines import Document

_OPEN = 64  # rows that are looked at for room
_PACKING, _EPOCHS = 4, 5  # streams of draws, beside those of tasks and mixes


class DocumentRows:
    """Random access to rows {tokens, targets, segment_ids, difficulty}, int32 [row], of the documents.

    `endless` repeats them in a new order each epoch; otherwise they come once, in the order in which they were packed.
    """

    def __init__(self, documents: Sequence[Document], row: int, seed: int, endless: bool) -> None:
        self._documents, self._row, self._seed, self._endless = documents, row, seed, endless
        pieces = [(number, start) for number, one in enumerate(documents) for start in range(0, one.tokens.size, row)]
        order = Draws(seed, _PACKING, 0).permutation(len(pieces)).tolist()
        self._rows = _packed([pieces[place] for place in order], documents, row)
        self._epoch = functools.lru_cache(maxsize=2)(self._new_epoch)

    def __len__(self) -> int:
        return ENDLESS if self._endless else len(self._rows)

    def __getitem__(self, index: int) -> Row:
        row = {"tokens": np.zeros(self._row, np.int32), "targets": np.full(self._row, -1, np.int32),
               "segment_ids": np.zeros(self._row, np.int32), "difficulty": np.zeros(self._row, np.int32)}
        filled = 0
        for segment, (number, start) in enumerate(self._pieces(int(index)), 1):
            document, stop = self._documents[number], start + self._row
            here = slice(filled, filled + document.tokens[start:stop].size)
            for name in ("tokens", "targets", "difficulty"):
                row[name][here] = getattr(document, name)[start:stop]
            row["segment_ids"][here] = segment
            filled = here.stop
        return row

    def documents(self, index: int) -> Int32[np.ndarray, " t"]:
        """The number of the document of each token of a row; 0 for padding."""
        segments = self[index]["segment_ids"]
        numbers = np.array([0, *(number for number, _ in self._pieces(int(index)))], np.int32)
        return numbers[segments]

    def _pieces(self, index: int) -> list[tuple[int, int]]:
        """The documents of a row, each with where it begins there."""
        if not self._endless:
            return self._rows[index]
        epoch, place = divmod(index, len(self._rows))
        return self._rows[int(self._epoch(epoch)[place])]

    def _new_epoch(self, epoch: int) -> Int64[np.ndarray, " rows"]:
        return Draws(self._seed, _EPOCHS, epoch).permutation(len(self._rows))


def _packed(
    pieces: Sequence[tuple[int, int]], documents: Sequence[Document], row: int
) -> list[list[tuple[int, int]]]:
    """The pieces by rows."""
    rows: list[list[tuple[int, int]]] = []
    room = np.zeros(_OPEN, np.int64)  # of row i at place i mod _OPEN
    for number, start in pieces:
        length = min(row, documents[number].tokens.size - start)
        places = np.flatnonzero(room >= length)
        if places.size:
            last = len(rows) - 1
            place = int(places[0])
            rows[last - (last - place) % _OPEN].append((number, start))
        else:
            place = len(rows) % _OPEN
            rows.append([(number, start)])
            room[place] = row
        room[place] -= length
    return rows
