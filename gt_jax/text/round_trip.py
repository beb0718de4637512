"""Does a tokenizer give its text back? Said once, with a share, where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from gt_jax.text.tokenizers import ByteTokenizer, Tokenizer

_DOCUMENTS, _TOKENS = 64, 1 << 14  # that are looked at, evenly over the text, and of each


class Loss(NamedTuple):
    """Of `looked` documents `changed` do not come back from their tokens; `unknown` tokens of all have no text."""

    changed: int = 0
    looked: int = 0
    unknown: int = 0

    def plus(self, other: Loss) -> Loss:
        """Of two texts together."""
        return Loss(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def words(self, tokens: int) -> str:
        """What stands after the summary of a text of so many tokens; "" where all of it comes back."""
        words = []
        if self.changed:
            words.append(f"{self.changed} of {self.looked} documents looked at "
                         f"({100 * self.changed / self.looked:.3g} %) do not come back from their tokens as they were")
        if self.unknown:
            words.append(f"{100 * self.unknown / tokens:.3g} % of the tokens are the unknown one, which counts no "
                         "bytes")  # fmt: skip
        return "".join(f"; {line}" for line in words)


def lost(tokenizer: Tokenizer, documents: Sequence[bytes], encoded: Sequence[Int32[np.ndarray, " _"]]) -> str:
    """What of these documents does not come back from their ids, as words after a summary; "" where all does.

    A sample is decoded. The unknown token is counted in all of them.
    """
    return loss_of(tokenizer, documents, encoded).words(sum(map(len, encoded)))


def loss_of(
    tokenizer: Tokenizer, documents: Sequence[bytes], encoded: Sequence[Int32[np.ndarray, " _"]],
    looked: int = _DOCUMENTS,
) -> Loss:  # fmt: skip
    """The same as counts, of at most `looked` documents."""
    if isinstance(tokenizer, ByteTokenizer):
        return Loss()
    chosen = np.unique(np.linspace(0, len(documents) - 1, min(looked, len(documents))).astype(int)).tolist()
    changed = sum(not _comes_back(tokenizer, documents[index], encoded[index]) for index in chosen)
    unknown = 0 if tokenizer.unknown is None else sum(
        int(np.count_nonzero(ids == tokenizer.unknown)) for ids in encoded)
    return Loss(changed, len(chosen), unknown)


def _comes_back(tokenizer: Tokenizer, document: bytes, ids: Int32[np.ndarray, " _"]) -> bool:
    """Whether the first tokens are the document, or what it begins with where there are more; a last character may be
    cut in two.
    """
    found = tokenizer.decode(ids[:_TOKENS])
    if len(ids) <= _TOKENS:
        return found == document
    return document.startswith(found.rstrip("\ufffd".encode()))
