"""Does a tokenizer give its text back? Said once, with a share, where it does not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from gt_jax.text.tokenizers import ByteTokenizer, Tokenizer

_DOCUMENTS, _TOKENS = 64, 1 << 14  # that are looked at, evenly over the text, and of each


def lost(tokenizer: Tokenizer, documents: Sequence[bytes], encoded: Sequence[Int32[np.ndarray, " _"]]) -> str:
    """What of these documents does not come back from their ids, as words after a summary; "" where all does.

    A sample is decoded. The unknown token is counted in all of them.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return ""
    chosen = np.unique(np.linspace(0, len(documents) - 1, min(_DOCUMENTS, len(documents))).astype(int)).tolist()
    changed = sum(not _comes_back(tokenizer, documents[index], encoded[index]) for index in chosen)
    words = []
    if changed:
        words.append(f"{changed} of {len(chosen)} documents looked at ({100 * changed / len(chosen):.3g} %) do not "
                     "come back from their tokens as they were")  # fmt: skip
    tokens = sum(map(len, encoded))
    unknown = sum(int(np.count_nonzero(ids == tokenizer.unknown)) for ids in encoded)
    if tokenizer.unknown is not None and unknown:
        words.append(f"{100 * unknown / tokens:.3g} % of the tokens are the unknown one, which counts no bytes")
    return "".join(f"; {line}" for line in words)


def _comes_back(tokenizer: Tokenizer, document: bytes, ids: Int32[np.ndarray, " _"]) -> bool:
    """Whether the first tokens are the document, or what it begins with where there are more; a last character may be
    cut in two.
    """
    found = tokenizer.decode(ids[:_TOKENS])
    if len(ids) <= _TOKENS:
        return found == document
    return document.startswith(found.rstrip("\ufffd".encode()))
