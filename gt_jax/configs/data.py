"""The data of a run: which text, which tokenizer, the shape of a batch, the held-out part."""

from __future__ import annotations

import dataclasses

from gt_jax.configs.json_config import Config, below

BYTES = "bytes"  # the tokenizer that needs no file


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Which text, in what shape: `text` files, or TFDS dataset `tfds` in `tfds_dir`, or the standard library's sources.

    `tokenizer` is "bytes", or a file or folder that `text.tokenizers.open_tokenizer` opens. A batch is [batch_size,
    sequence_length] tokens; `held_out` is the part of the text that is never trained on.
    """

    text: tuple[str, ...] = ()
    tfds: str | None = None
    tfds_dir: str | None = None
    tokenizer: str = BYTES
    sequence_length: int = 256
    batch_size: int = 8
    seed: int = 0
    held_out: float = 0.05

    def problems(self) -> list[str]:
        wrong = below(self, 1, "batch_size") + below(self, 0, "seed")
        if self.sequence_length < 2:
            wrong.append(f"sequence_length is {self.sequence_length}; it must be at least 2, a token and its next")
        if self.seed >= 2**32:
            wrong.append(f"seed is {self.seed}; it must be below 2**32")
        if not 0 < self.held_out < 1:
            wrong.append(f"held_out is {self.held_out}; it must lie between 0 and 1, for example 0.05")
        if self.text and self.tfds is not None:
            wrong.append(f"text {', '.join(self.text)} and tfds {self.tfds} are both given; one of them is the text")
        if self.tfds_dir is not None and self.tfds is None:
            wrong.append(f"tfds_dir is {self.tfds_dir!r} but tfds names no dataset")
        return wrong
