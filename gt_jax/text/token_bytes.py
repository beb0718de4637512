"""The bytes of every token, as the Kronecker embedding reads them: two small tables, one row a token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, UInt8


def token_table(
    texts: Sequence[bytes], width: int = 32
) -> tuple[UInt8[np.ndarray, "vocab width"], Int32[np.ndarray, " vocab"]]:
    """(bytes, lengths) of the tokens' texts: row i holds the first lengths[i] bytes of texts[i], then zeros.

    A text longer than `width` bytes is cut there, but not within a UTF-8 character; one that is not valid UTF-8 is cut
    at exactly `width`.
    """
    kept = [text if len(text) <= width else _cut(text, width) for text in texts]
    table = np.array(kept, f"S{width}").view(np.uint8)
    return table.reshape(len(kept), width), np.fromiter(map(len, kept), np.int32, len(kept))


def default_texts(vocab: int) -> list[bytes]:
    """Texts for a vocabulary without a tokenizer, all different: token i is byte i below 256, then b"<256>" and on."""
    return [bytes([i]) for i in range(min(vocab, 256))] + [b"<%d>" % i for i in range(256, vocab)]


def filled(texts: Sequence[bytes], vocab: int) -> list[bytes]:
    """A text for each id of a vocabulary that may be larger than the tokenizer: behind its texts the default ones."""
    return [*texts, *default_texts(vocab)[len(texts) :]]


def _cut(text: bytes, width: int) -> bytes:
    try:
        text.decode()
    except UnicodeDecodeError:
        return text[:width]
    return text[:width].decode(errors="ignore").encode()  # only the last character can be incomplete
