"""The data of a run: which text, tasks and files of answers, in which mix, the shape of a batch, the held-out part."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from gt_jax.configs.json_config import Config, below
from gt_jax.files import addresses

ENDLESS = 2**53  # rows of what has no end: whoever counts their batches divides in floating point
BYTES = "bytes"  # the tokenizer that needs no file
WITHOUT_SPLIT = {"split": "fill", "tuning": 0.0}  # what JSON means that was stored before it named the split
TEXT = "text"  # the part of the data that is plain text
SUM_WITHIN = 1e-3  # of the weights of a mix, around 1: 0.333 three times is meant as thirds


@dataclasses.dataclass(frozen=True)
class Weight(Config):
    """The share of the rows that are of a part: "text", a task by its name, or a JSON-lines file by its stem."""

    part: str
    weight: float

    def problems(self) -> list[str]:
        if 0 < self.weight <= 1 and math.isfinite(self.weight):
            return []
        return [f"the weight of {self.part} is {self.weight}; it must be above 0 and at most 1"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Which text, tasks and answers, in what shape.

    Text is `text` files, or TFDS dataset `tfds` in `tfds_dir`, or, where nothing else is named, the standard library's
    sources. `tasks` are generated ones, NAME:OPTION=VALUE,… (gt_jax/tasks/registry.py); over the first
    `curriculum_rows` training rows of all the data their hardest difficulty rises linearly. `json_lines` are files of
    prompts with answers (gt_jax/text/json_lines.py). `mix` weighs these parts, which else share the rows evenly.

    `tokenizer` is "bytes", or a file or folder that `text.tokenizers.open_tokenizer` opens. A batch is [batch_size,
    sequence_length] tokens; `held_out` is the part of the text that is never trained on, `tuning` another such part,
    for choices that the held-out part is to judge. `split` is the rule that chooses both (gt_jax/text/split.py):
    "sample", or "fill", the rule up to version 0.2.0, which keeps the text and the batches of runs of its time.
    """

    text: tuple[str, ...] = ()
    tfds: str | None = None
    tfds_dir: str | None = None
    tasks: tuple[str, ...] = ()
    json_lines: tuple[str, ...] = ()
    mix: tuple[Weight, ...] = ()
    curriculum_rows: int = 0
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

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts: "text" where there is text, the tasks, the stems of the JSON-lines files."""
        others = (*(words.partition(":")[0] for words in self.tasks), *(Path(file).stem for file in self.json_lines))
        weighed = any(one.part == TEXT for one in self.mix)
        return (TEXT, *others) if self.text or self.tfds is not None or weighed or not others else others

    @property
    def shares(self) -> dict[str, float]:
        """The share of each part in the rows."""
        if not self.mix:
            return {name: 1 / len(self.parts) for name in self.parts}
        weights = {one.part: one.weight for one in self.mix}
        return {name: weights[name] / sum(weights.values()) for name in self.parts}

    def problems(self) -> list[str]:
        wrong = below(self, 1, "batch_size") + below(self, 0, "seed", "curriculum_rows") + self._wrong_parts()
        wrong += addresses(text=self.text, json_lines=self.json_lines, tokenizer=self.tokenizer)
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

    def _wrong_parts(self) -> list[str]:
        """What is wrong with the parts, their names and their weights."""
        parts, weighed = self.parts, [one.part for one in self.mix]
        wrong = [f"two parts are named {name}; each needs a name of its own"
                 for name, count in Counter(parts).items() if count > 1]
        wrong += [f"json_lines {file} would be the part {TEXT}, which is plain text; give the file another name"
                  for file in self.json_lines if Path(file).stem == TEXT]
        wrong += [f"mix weighs {name} twice" for name, count in Counter(weighed).items() if count > 1]
        wrong += [f"mix names {name}, which is not given; the parts are {', '.join(parts)}"
                  for name in weighed if name not in parts]
        if self.mix:
            total = math.fsum(one.weight for one in self.mix)
            wrong += [f"mix has no weight for {name}; weigh it, or leave it out"
                      for name in parts if name not in weighed]
            if abs(total - 1) > SUM_WITHIN * (1 + 1e-9):
                wrong.append(f"the weights of mix sum to {total:.6g}; they must sum to 1")
        if self.curriculum_rows and not self.tasks:
            wrong.append(f"curriculum_rows is {self.curriculum_rows}; it is for tasks, and there is none")
        return wrong
