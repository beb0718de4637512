"""What the study reads: text for the models' language, with needle questions in the same tokens; bits per byte.

Without text and tokenizer it is the standard library's sources, a token a byte, and the words of the needles as tokens
of their own after those: then text and questions share no token, but everything runs from a fresh clone.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from experiments.recall_study.needles import Vocabulary, beside_bytes, vocabulary
from experiments.several_seeds import held_out_nats
from experiments.text_files import refuse_short
from gt_jax.configs.data import BYTES, DataConfig
from gt_jax.configs.model import ModelConfig
from gt_jax.evaluation.scoring import byte_lengths
from gt_jax.text.batches import PackedRows, Text, open_text
from gt_jax.text.tokenizers import open_tokenizer
from gt_jax.typing import Tree

TUNING = 0.03


class Material(NamedTuple):
    """A text in rows of one length, the words of the needles, and how many bytes each token stands for."""

    text: Text
    words: Vocabulary
    bytes: Int64[np.ndarray, " vocab"]

    def batches(self, part: str, count: int) -> list[dict[str, Any]]:
        """Batches of the "held-out" or the "tuning" part."""
        return self.text.held_out(count) if part == "held-out" else self.text.tuning(count)

    def bits(self, config: ModelConfig, variables: Tree, batches: Sequence[dict[str, Any]]) -> list[float]:
        """Bits per byte of the batches' targets, by seed."""
        nats = held_out_nats(config, variables, batches)
        targets = np.concatenate([batch["targets"][batch["targets"] >= 0] for batch in batches])
        return [value * len(targets) / math.log(2) / float(self.bytes[targets].sum()) for value in nats]


def words_of(tokenizer: str) -> Vocabulary:
    """The words of the needles in this tokenizer, or beside the bytes; raises `Refused` where one has no token."""
    opened = open_tokenizer(tokenizer)
    return beside_bytes(opened.vocab_size) if tokenizer == BYTES else vocabulary(opened, tokenizer)


@functools.lru_cache(maxsize=4)
def material(text: tuple[str, ...], tokenizer: str, length: int, rows: int) -> Material:
    """Open it; raises `Refused` for a text that is too short, or a tokenizer without the words of the needles."""
    words = words_of(tokenizer)
    opened = open_text(DataConfig(text=text, tokenizer=tokenizer, sequence_length=length, batch_size=rows,
                                  tuning=TUNING))  # fmt: skip
    lengths = np.zeros(words.size, np.int64)
    lengths[: opened.tokenizer.vocab_size] = byte_lengths(opened.tokenizer)
    return Material(opened, words, lengths)


@functools.lru_cache(maxsize=16)
def training_rows(text: tuple[str, ...], tokenizer: str, length: int, rows: int, seed: int) -> PackedRows:
    """The training rows of a seed, endless."""
    opened = material(text, tokenizer, length, rows).text
    return PackedRows(opened.tokens, opened.training_spans, length, seed, True)


def content(text: tuple[str, ...], tokenizer: str, length: int, rows: int, wanted: Mapping[str, int]) -> str:
    """A hash of the text in these tokens, and of the words' tokens; raises `Refused` where a part has fewer batches
    than `wanted`."""
    found = material(text, tokenizer, length, rows)
    refuse_short(found.text, wanted)
    return hashlib.sha256(found.text.content_hash().encode() + found.words.ids.tobytes()).hexdigest()
