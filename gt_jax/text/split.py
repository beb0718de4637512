"""Which part of a text is trained on, which is held out, which is for tuning: disjoint, and together everything.

Whole documents are drawn, each with the same probability whatever its length, so that a part has the lengths of the
text:

    held out = one document of each of round(held_out * n) groups of the n documents in the order of their lengths,
               the one whose content has the smallest hash

- Tuning documents are drawn in the same way from those that are left, so they change nothing of the held-out part.
- A document of more than a quarter of what is to be held out would be most of a part, or missing in it: of each such
  document the last `held_out` is held out, the `tuning` before that is for tuning, the rest is trained on.
- Documents of the same bytes are one document here, so a copy of a held-out document is held out too.
- Where that leaves a part without a row, or the held-out part in fewer than four places, the text is cut into even
  pieces of at least a row instead, and every (1 / held_out)-th is held out: twenty places where each has four rows,
  four at least. So it is below 20 documents.

Nothing depends on the seed of the run: two runs of one text are compared on the same held-out part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from gt_jax.configs.data import DataConfig

Spans = Int64[np.ndarray, "_ 2"]  # [start, stop) in the flat array of tokens, each inside one document
Ends = Int64[np.ndarray, "documents"]
Stretches = tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]  # where each ends, and the part that it is of

TRAINING, HELD_OUT, TUNING = range(3)
_FEW_DOCUMENTS = 20
_FEW_PLACES = 4
_PLACES = 20  # of an evenly cut text, each of some rows, where it has them: what an interval over places needs
_ROWS_OF_A_PLACE = 4
_LARGEST_EVEN_PIECE = 65536


class Parts(NamedTuple):
    """The spans of each part, in the order of the text."""

    training: Spans
    held_out: Spans
    tuning: Spans


def content_keys(documents: Iterable[bytes]) -> UInt64[np.ndarray, " documents"]:
    """A hash of each document's bytes: what chooses between documents of like length."""
    digests = b"".join(hashlib.blake2b(document, digest_size=8).digest() for document in documents)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def split_documents(ends: Ends, keys: UInt64[np.ndarray, " documents"], config: DataConfig) -> Parts:
    """The parts of documents that end at `ends` in one flat array of tokens, with `content_keys` `keys`.

    `config` gives the rule, the shares and the row. There must be a row of tokens for each part that is asked for.
    """
    drawn = None
    if len(ends) >= _FEW_DOCUMENTS:
        drawn = _filled(ends, config) if config.split == "fill" else _sampled(ends, keys, config)
    cuts, part = _even_pieces(ends, config) if drawn is None or _too_little(*drawn, config) else drawn
    spans = np.stack([np.concatenate([[0], cuts[:-1]]), cuts], axis=1)
    return Parts(*(spans[part == number] for number in range(len(Parts._fields))))


def _sampled(ends: Ends, keys: UInt64[np.ndarray, " documents"], config: DataConfig) -> Stretches:
    """Documents of each length by the hash of their content, and the tails of very long ones."""
    lengths = np.diff(ends, prepend=0)
    long = lengths > config.held_out * ends[-1] / _FEW_PLACES
    unique, first, unit = np.unique(keys, return_index=True, return_inverse=True)
    by_length = np.lexsort((unique, lengths[first]))
    short = by_length[~long[first][by_length]]
    part = _drawn(unique, short, config)
    held, tuning = (np.where(long, np.floor(share * lengths), 0).astype(np.int64)
                    for share in (config.held_out, config.tuning))  # fmt: skip
    cuts = np.stack([ends - held - tuning, ends - held, ends], axis=1).ravel()
    of_long = np.broadcast_to([TUNING, HELD_OUT], (len(ends), 2))
    parts = np.concatenate([part[unit][:, None], of_long], axis=1).ravel()
    there = np.diff(cuts, prepend=0) > 0
    return cuts[there], parts[there]


def _drawn(
    keys: UInt64[np.ndarray, " unique"], by_length: Int64[np.ndarray, " short"], config: DataConfig, least: int = 0
) -> Int64[np.ndarray, " unique"]:
    """The part of each document, drawn of those `by_length`, at least `least` for each part that is asked for."""
    part, left = np.full(len(keys), TRAINING), by_length
    for number, share in ((HELD_OUT, config.held_out), (TUNING, config.tuning)):
        count = min(max(round(share * len(by_length)), least if share else 0), len(left))
        groups = np.split(left, np.arange(1, count) * len(left) // count) if count else []
        chosen = [group[np.argmin(keys[group])] for group in groups]
        part[chosen] = number
        left = left[~np.isin(left, chosen)]
    return part


def split_whole(
    lengths: Int64[np.ndarray, " documents"], keys: UInt64[np.ndarray, " documents"], config: DataConfig
) -> Int64[np.ndarray, " documents"]:
    """The part of each document, drawn by length like those of a text, but none is cut and one at least is held out.

    Documents of the same key are in the same part.
    """
    unique, first, unit = np.unique(keys, return_index=True, return_inverse=True)
    return _drawn(unique, np.lexsort((unique, lengths[first])), config, least=1)[unit]


def _filled(ends: Ends, config: DataConfig) -> Stretches:
    """The rule up to version 0.2.0: documents in the order of a hash of (index, length), each held out that still fits.

    It passes over long documents. It stays for the checkpoints that were trained by it: by another rule they would be
    evaluated on text that they were trained on.
    """
    lengths, left = np.diff(ends, prepend=0).tolist(), math.ceil(config.held_out * int(ends[-1]))
    part = np.full(len(ends), TRAINING)
    for index in sorted(range(len(ends)), key=lambda i: hashlib.sha256(f"{i} {lengths[i]}".encode()).digest()):
        if lengths[index] <= left:
            part[index] = HELD_OUT
            left -= lengths[index]
    return ends, part


def _too_little(cuts: Int64[np.ndarray, " n"], part: Int64[np.ndarray, " n"], config: DataConfig) -> bool:
    """Whether a part that is asked for has less than a row, or the held-out one too few places to be a sample."""
    sizes = np.bincount(part, weights=np.diff(cuts, prepend=0), minlength=len(Parts._fields))
    asked = sizes if config.tuning else sizes[:TUNING]
    scattered = config.split == "fill" or np.count_nonzero(part == HELD_OUT) >= _FEW_PLACES
    return not scattered or bool((asked < config.sequence_length).any())


def _even_pieces(ends: Ends, config: DataConfig) -> Stretches:
    """Even pieces of the text: several held-out places where it is long enough, so that they are a sample of it."""
    total, parts = int(ends[-1]), 3 if config.tuning else 2
    held_out = int(config.held_out * total)
    wanted = _FEW_PLACES if config.split == "fill" else held_out // (_ROWS_OF_A_PLACE * config.sequence_length)
    places = min(max(wanted, _FEW_PLACES), _PLACES)
    size = max(config.sequence_length, min(_LARGEST_EVEN_PIECE, held_out // places))
    count = max(parts, total // size)
    piece_ends = (np.arange(1, count + 1) * total) // count
    part = np.full(count, TRAINING)
    part[_evenly(count, config.held_out, parts - 1)] = HELD_OUT
    if config.tuning:
        left = np.flatnonzero(part == TRAINING)
        part[left[_evenly(len(left), config.tuning / (1 - config.held_out), 1)]] = TUNING
    cuts = np.union1d(ends, piece_ends)
    return cuts, part[np.searchsorted(piece_ends, cuts)]


def _evenly(count: int, share: float, leave: int) -> Bool[np.ndarray, " count"]:
    """Every (1 / share)-th of `count` places: at least one of them, and at least `leave` others."""
    chosen = np.diff(np.floor(np.arange(count + 1) * share + 1e-9)) > 0
    chosen[-1] |= not chosen.any()
    chosen[np.flatnonzero(chosen)[: max(0, leave - int((~chosen).sum()))]] = False
    return chosen
