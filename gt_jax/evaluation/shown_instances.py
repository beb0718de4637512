"""Held-out instances of a task, or documents of a JSON-lines file, with a model's answers beside the right ones.

    pointer_jumps, held-out instance 1: 1 of 2 answers right
      tokens  BCABCA2B1A
      right          A B
      model          A C
      wrong            ^

An answer is the most likely token where one is asked, with the right ones before it where an answer has several tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules, global_batch
from gt_jax.errors import Refused
from gt_jax.evaluation.generation import NOT_FINITE
from gt_jax.models.language_model import LanguageModel, free_passes
from gt_jax.models.memory_chunks import forward_rows
from gt_jax.text.data import Answers
from gt_jax.text.tokenizers import Tokenizer
from gt_jax.training.step import Batch, shard_batch
from gt_jax.typing import Tree

_WIDTH = 100  # of a line
_UNPRINTABLE, _END = "·", "¶"


class Instance(NamedTuple):
    """int32 [n] each: the tokens, the targets (-1 where nothing is asked), the model's most likely tokens."""

    tokens: Int32[np.ndarray, " n"]
    targets: Int32[np.ndarray, " n"]
    said: Int32[np.ndarray, " n"]


def held_out_instances(
    config: ModelConfig, variables: Tree, part: Answers, count: int, tokens: int
) -> list[Instance]:
    """The first `count` held-out instances of a part; answers are the likeliest of the first `tokens` ids.

    Raises `Refused` where logits are not finite: the likeliest of NaN is nothing that the model said.
    """
    rules = Rules()
    network = LanguageModel(config, rules)

    @jax.jit
    def most_likely(variables: Tree, batch: Batch) -> tuple[Int[Array, "b t"], Array]:
        placed = shard_batch(batch, rules)
        logits, _ = forward_rows(network, variables, placed["tokens"], placed["segment_ids"], free_passes())
        said = jnp.argmax(logits[..., :tokens], axis=-1).astype(jnp.int32)
        return said, jnp.isfinite(logits).all()

    found: list[Instance] = []
    for batch in part.held_out(-(-count // part.config.batch_size)):
        said, finite = map(np.asarray, most_likely(variables, global_batch(batch, rules)))
        if not finite:
            raise Refused(NOT_FINITE)
        for row, segments in enumerate(batch["segment_ids"]):
            for segment in range(1, int(segments.max()) + 1):
                here = segments == segment
                found.append(Instance(*(a[row][here] for a in (batch["tokens"], batch["targets"], said))))
    return found[:count]


def lines_of(name: str, number: int, instance: Instance, tokenizer: Tokenizer) -> list[str]:
    """An instance for a reader: each answer stands below the token that asks for it, the wrong ones are marked."""
    texts = _texts(tokenizer)
    asked = instance.targets >= 0
    wrong = asked & (instance.said != instance.targets)
    columns = [(texts[token], texts[target] if here else "", texts[said] if here else "", "^" if bad else "")
               for token, target, said, here, bad in zip(*(a.tolist() for a in (*instance, asked, wrong)), strict=True)]
    counted = asked & (instance.targets != tokenizer.end_of_document)  # the end behind an answer is no answer
    found = [f"{name}, held-out instance {number}: {int((counted & ~wrong).sum())} of {int(counted.sum())} answers "
             "right"]  # fmt: skip
    for piece in _pieces(columns):
        found += [f"  {title:<8}{line}".rstrip() for title, line in zip(("tokens", "right", "model", "wrong"), piece,
                                                                        strict=True) if line.strip()]  # fmt: skip
    return found


def _pieces(columns: Sequence[tuple[str, ...]]) -> list[list[str]]:
    """The columns as blocks of lines that are not too long; a blank parts columns where one is wider than a letter."""
    widths = [max(map(len, column)) for column in columns]
    gap = 1 if max(widths, default=0) > 1 else 0
    pieces: list[list[str]] = []
    room = 0
    for column, width in zip(columns, widths, strict=True):
        if width + gap > room or not pieces:
            pieces.append([""] * len(column))
            room = _WIDTH
        pieces[-1] = [line + word.ljust(width + gap) for line, word in zip(pieces[-1], column, strict=True)]
        room -= width + gap
    return pieces


def _texts(tokenizer: Tokenizer) -> list[str]:
    """The tokens for a reader, without what would break a line."""
    def shown(text: bytes) -> str:
        words: Any = text.decode("utf-8", "replace")
        return "".join(sign if sign.isprintable() and sign != "�" else _UNPRINTABLE for sign in words) or _UNPRINTABLE

    found = [shown(text) for text in tokenizer.texts()]
    found[tokenizer.end_of_document] = _END
    return found
