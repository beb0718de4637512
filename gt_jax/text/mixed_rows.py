"""Which row of a mix is of which part: a function of (seed, row number), with shares that are exact in the long run.

    of every 10,000 rows a part has 10,000 times its share, rounded so that together they are 10,000;
    the k-th of its q rows there has the key (k + r) / q, r in [0, 1) drawn; the rows stand in the order of their keys

So each part is spread evenly: any window of rows has each part's share but for about two rows. A part's own rows come
in their order, none left out: where in each part a row of the mix is follows from the number of the row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from gt_jax.configs.data import ENDLESS
from gt_jax.errors import Refused
from gt_jax.tasks.draws import Draws
from gt_jax.text.batches import RandomRows, Row

BLOCK = 10_000
_KEYS = ("tokens", "targets", "segment_ids")  # of the batches that are trained on
_STREAM = 3  # of draws, beside those of tasks


def quotas(shares: dict[str, float], rows: int = BLOCK, least: int = 0) -> dict[str, int]:
    """How many of `rows` rows each part has, at least `least`: the rounding that leaves the smallest remainders."""
    exact = {name: rows * share for name, share in shares.items()}
    found = {name: max(least, int(number)) for name, number in exact.items()}
    left = sorted(exact, key=lambda name: found[name] - exact[name])
    for name in left[: max(0, rows - sum(found.values()))]:
        found[name] += 1
    return found


class MixedRows:
    """Random access to the endless rows of a mix, {tokens, targets, segment_ids}.

    Raises `Refused` for a share of less than a row of 10,000.
    """

    def __init__(self, rows: Sequence[RandomRows], shares: dict[str, float], seed: int) -> None:
        counts = quotas(shares)
        for name, count in counts.items():
            if not count:
                raise Refused(f"the weight of {name} in the mix is {shares[name]:g}; it must be at least {1 / BLOCK:g}")
        self._rows, self._seed, self._quotas = rows, seed, tuple(counts.values())
        self._block = functools.lru_cache(maxsize=2)(self._new_block)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Row:
        part, number = self.place(int(index))
        row = self._rows[part][number]
        return {name: row[name] for name in _KEYS}

    def place(self, index: int) -> tuple[int, int]:
        """Which part a row is of, and its number among that part's rows."""
        block, place = divmod(index, BLOCK)
        parts, ranks = self._block(block)
        part = int(parts[place])
        return part, block * self._quotas[part] + int(ranks[place])

    def _new_block(self, block: int) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
        """The part of each row of a block, and its rank among that part's rows there."""
        parts = np.repeat(np.arange(len(self._quotas)), self._quotas)
        ranks = np.concatenate([np.arange(count) for count in self._quotas])
        sizes = np.array(self._quotas, np.float64)[parts]
        order = np.argsort((ranks + Draws(self._seed, _STREAM, block).fractions(BLOCK)) / sizes, kind="stable")
        return parts[order], ranks[order]
