"""The held-out rows that a figure is taken from, and which of their tokens are independent of which.

- The rows are those of `held_out`: of a text fewer than there are lie evenly over the whole held-out part.
- What is independent is a stretch that was held out as one: a document, or a place of a document of which several
  places are held out. Tokens within one are alike, and so are its rows. Stretches of the same bytes are one: a copy
  says nothing new. Of a task it is an instance, of a JSON-lines file a document.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from gt_jax.errors import Refused
from gt_jax.text.batches import Batch, Text, spread_batches
from gt_jax.text.data import Data
from gt_jax.text.split import content_keys


class HeldOutRows(NamedTuple):
    """Batches, and for each the unit of every token; `kind` is what a unit is: "document", "place", "instance", or
    "unit" of data that has several kinds.
    """

    batches: list[Batch]
    units: list[Int32[np.ndarray, "b t"]]
    kind: str

    def scored_units(self) -> Int32[np.ndarray, " scored"]:
        """The unit of each token that is predicted, in the order of the batches."""
        return np.concatenate([of[batch["targets"] >= 0] for batch, of in zip(self.batches, self.units, strict=True)])


def held_out_rows(data: Text | Data, batches: int | None = None) -> HeldOutRows:
    """`data.held_out(batches)` with the units of its tokens; raises `Refused` for fewer batches than one, and where no
    token of them has a target."""
    found = _text_rows(data, batches) if isinstance(data, Text) else _rows_of_parts(data, batches)
    refuse_nothing_asked(found.batches)
    return found


def _rows_of_parts(data: Data, batches: int | None) -> HeldOutRows:
    found, first = [], 0
    for name, count in data.held_out_counts(batches).items():
        part = data.parts[name]
        one = (_text_rows(part, count) if isinstance(part, Text)
               else HeldOutRows(part.held_out(count), part.held_out_units(count), part.unit_kind))  # fmt: skip
        found.append(one._replace(units=[units + first for units in one.units]))
        first += 1 + max((int(units.max()) for units in one.units), default=-1)
    kinds = {one.kind for one in found}
    return HeldOutRows([batch for one in found for batch in one.batches], [of for one in found for of in one.units],
                       kinds.pop() if len(kinds) == 1 else "unit")


def refuse_nothing_asked(batches: Sequence[Batch]) -> None:
    """Raise `Refused` where no token of the batches is predicted: there is no loss of nothing."""
    if not any((batch["targets"] >= 0).any() for batch in batches):
        rows = sum(len(batch["targets"]) for batch in batches)
        raise Refused(f"nothing is asked in these {rows} held-out rows: no token of them has a target; give more "
                      "--batches, or a task that asks more, such as one with a smaller easiest")  # fmt: skip


def _text_rows(text: Text, batches: int | None) -> HeldOutRows:
    """At most `batches` batches of a text's held-out part, None for all of it; the last one is padded."""
    spans = text.held_out_spans
    numbers, kind = _units(text)
    lengths = np.diff(spans).ravel()
    ends = np.cumsum(lengths)
    # The same rows of a text whose tokens are the numbers of their units, and which is the held-out part alone.
    together = np.stack([ends - lengths, ends], axis=1)
    marked = spread_batches(_Numbers(ends, numbers), together, text.config, batches)
    return HeldOutRows(text.held_out(batches), [batch["tokens"] for batch in marked], kind)


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """The number of the span of each token, spans that end at `ends`; sliced within a span."""

    ends: Int64[np.ndarray, " spans"]
    numbers: Int64[np.ndarray, " spans"]

    def __getitem__(self, place: slice) -> Int64[np.ndarray, " n"]:
        span = np.searchsorted(self.ends, place.start, side="right")
        return np.full(place.stop - place.start, self.numbers[min(span, len(self.numbers) - 1)])


def _units(text: Text) -> tuple[Int64[np.ndarray, " spans"], str]:
    """The unit of each held-out span, and what units are.

    Spans that touch within a document are one unit, and so are copies.
    """
    spans = text.held_out_spans
    starts, stops = spans.T
    apart = (starts[1:] != stops[:-1]) | np.isin(stops[:-1], text.ends)
    numbers = np.concatenate([[0], np.cumsum(apart)])
    documents = np.searchsorted(text.ends, starts, side="right")
    kind = "document" if len(np.unique(documents)) == numbers[-1] + 1 else "place"
    stretches = np.split(spans, np.flatnonzero(apart) + 1)
    keys = content_keys(b"".join(text.tokens[start:stop].tobytes() for start, stop in one) for one in stretches)
    _, first, copy_of = np.unique(keys, return_index=True, return_inverse=True)
    return first[copy_of][numbers], kind
