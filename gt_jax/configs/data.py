"""The data of a run: which text, which tokenizer, the shape of a batch, the held-out part."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from gt_jax.configs.json_config import Config, below

BYTES = "bytes"  # the tokenizer that needs no file
WITHOUT_SPLIT = {"split": "fill", "tuning": 0.0}  # what JSON means that was stored before it named the split


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Which text, in what shape: `text` files, or TFDS dataset `tfds` in `tfds_dir`, or the standard library's sources.

    `tokenizer` is "bytes", or a file or folder that `text.tokenizers.open_tokenizer` opens. A batch is [batch_size,
    sequence_length] tokens; `held_out` is the part of the text that is never trained on, `tuning` another such part,
    for choices that the held-out part is to judge. `split` is the rule that chooses both (gt_jax/text/split.py):
    "sample", or "fill", the rule up to version 0.2.0, which keeps the text and the batches of runs of its time.
    """

    text: tuple[str, ...] = ()
    tfds: str | None = None
    tfds_dir: str | None = None
    tokenizer: str = BYTES
    sequence_length: int = 256
    batch_size: int = 8
    seed: int = 0
    held_out: float = 0.05
    tuning: float = 0.0
    split: Literal["fill", "sample"] = "sample"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DataConfig:
        """As every config; an object that names no split was stored when the rule was "fill"."""
        return super().from_json({**WITHOUT_SPLIT, **data})

    def problems(self) -> list[str]:
        wrong = below(self, 1, "batch_size") + below(self, 0, "seed")
        if self.sequence_length < 2:
            wrong.append(f"sequence_length is {self.sequence_length}; it must be at least 2, a token and its next")
        if self.seed >= 2**32:
            wrong.append(f"seed is {self.seed}; it must be below 2**32")
        if not 0 < self.held_out < 1:
            wrong.append(f"held_out is {self.held_out}; it must lie between 0 and 1, for example 0.05")
        if not 0 <= self.tuning < 1 or self.held_out + self.tuning >= 1:
            wrong.append(f"tuning is {self.tuning} beside held_out {self.held_out}; both together must leave text to "
                         "train on, for example tuning 0.02")
        if self.tuning and self.split == "fill":
            wrong.append(f"tuning is {self.tuning}; split 'fill' has no tuning part, take 'sample'")
        if self.text and self.tfds is not None:
            wrong.append(f"text {', '.join(self.text)} and tfds {self.tfds} are both given; one of them is the text")
        if self.tfds_dir is not None and self.tfds is None:
            wrong.append(f"tfds_dir is {self.tfds_dir!r} but tfds names no dataset")
        return wrong
