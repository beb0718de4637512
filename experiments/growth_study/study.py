"""What the study is: one frozen config, the models and the text that follow from it, and the checks of the text.

The held-out part is cut in two: passes are measured on the first, losses on the second, so that no coefficient was
fitted to what it is judged by. The batches that calibration sees are training text that no model trains on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from typing import Any, NamedTuple

import numpy as np

from gt_jax.configs.data import DataConfig
from gt_jax.configs.json_config import Config, below
from gt_jax.configs.model import DeltaNetConfig, GSAConfig, ModelConfig
from gt_jax.configs.presets import tiny
from gt_jax.configs.price import PriceConfig
from gt_jax.errors import Failed, Refused
from gt_jax.text.batches import Text, open_text

Batch = dict[str, np.ndarray]
WINDOW, WINDOWS = 64, 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig(Config):
    """All that determines the figures. Steps are of `rows` x `sequence_length` bytes; rates are peaks.

    `price_target` is the mean weight that the compute price steers the sources to.
    `scratch_rates` are tried at the first seed, for the number of steps that costs what source and growth cost;
    `longer_rates` there too, for the grown model that is given half of the tokens of the one from scratch.
    """

    text: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    layout: str = "DDDG*2"
    target_layers: int = 20
    width: int = 96
    sequence_length: int = 128
    rows: int = 4
    source_steps: int = 480
    further_steps: int = 60
    price_target: float = 1.3
    measuring_batches: int = 12
    evaluation_batches: int = 24
    calibration_batches: int = 8
    calibration_iterations: int = 4
    source_rate: float = 3e-3
    further_rate: float = 1e-3
    scratch_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    longer_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    noise_std: float = 1e-4

    def problems(self) -> list[str]:
        wrong = below(self, 1, "rows", "measuring_batches", "evaluation_batches", "calibration_batches",
                      "calibration_iterations")  # fmt: skip
        wrong += below(self, 2, "source_steps", "further_steps")
        if not self.text:
            wrong.append("text is empty; name at least one text file")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            wrong.append(f"seeds are {list(self.seeds)}; one or more different whole numbers from 0 are needed")
        if self.width < 8 or self.width % 8:
            wrong.append(f"width is {self.width}; it must be a multiple of 8, four heads of an even width")
        tried = self.scratch_rates, self.longer_rates
        if not all(tried) or min((*tried[0], *tried[1], self.source_rate, self.further_rate)) <= 0:
            wrong.append("every learning rate must be positive, and scratch_rates and longer_rates need at least one")
        return wrong

    @property
    def source(self) -> ModelConfig:
        """The preset `tiny` at this width."""
        base, head = tiny(), self.width // 4
        assert base.deltanet is not None and base.gsa is not None
        return base.replace(
            layout=self.layout, width=self.width, mlp_width=2 * self.width,
            deltanet=DeltaNetConfig(heads=4, value_heads=4, key_width=head, value_width=head, chunk_size=32),
            gsa=GSAConfig(heads=4, head_width=head, indexer_heads=2, indexer_width=16, k_base=64, k_min=16, k_max=128),
        )  # fmt: skip

    @property
    def price(self) -> PriceConfig:
        """The compute price under which the source is trained: the default one with this target of the mean weight."""
        return PriceConfig(target=self.price_target)

    @property
    def settled_price(self) -> PriceConfig:
        """The same for a source that is trained on: charged from its first step, no forced passes but the audits."""
        return self.price.replace(forced_until=0.0, price_from=0.0, clipped_until=0.0)

    @property
    def tokens_per_step(self) -> int:
        """Bytes a training step reads."""
        return self.rows * self.sequence_length

    def data(self, seed: int) -> DataConfig:
        """The text in this study's shape; the held-out part does not depend on the seed."""
        return DataConfig(text=self.text, sequence_length=self.sequence_length, batch_size=self.rows, seed=seed)

    @property
    def points(self) -> tuple[int, ...]:
        """The steps after growth at which the held-out loss is taken: 0, a quarter, half, all."""
        steps = self.further_steps
        return tuple(sorted({0, *(max(1, round(steps / part)) for part in (4, 2)), steps}))


class Material(NamedTuple):
    """One seed's text: `measuring` and `evaluation` batches are held out, and disjoint."""

    text: Text
    measuring: list[Batch]
    evaluation: list[Batch]


def open_material(study: StudyConfig, seed: int) -> Material:
    """Open the text; raises `Refused` for one too short for all held-out batches."""
    text = open_text(study.data(seed))
    wanted = study.measuring_batches + study.evaluation_batches
    held_out = text.held_out(wanted)
    if len(held_out) < wanted:
        raise Refused(f"{text.summary()}: {len(held_out)} held-out batches of {study.tokens_per_step} bytes, the study "
                      f"needs {wanted}; give more text with --text")
    return Material(text, held_out[: study.measuring_batches], held_out[study.measuring_batches :])


def separation(text: Text) -> dict[str, Any]:
    """Proof that training never reads the held-out part: spans that share no token, and how much text recurs.

    `windows_seen` is the share of held-out windows of 64 bytes that also stand, letter for letter, in the training
    part: what the text itself repeats. Raises `Failed` where the spans overlap.
    """
    marked = np.zeros(len(text.tokens), np.int8)
    for start, stop in (*text.training_spans.tolist(), *text.held_out_spans.tolist()):
        marked[start:stop] += 1
    if marked.max() > 1:
        raise Failed(f"{text.source}: {int((marked > 1).sum())} tokens are both in the training and the held-out part")
    ends = b"\xff"  # never a byte of UTF-8 text: the end of a document
    flat = np.where(text.tokens > 255, ends[0], text.tokens).astype(np.uint8)
    training = ends.join(flat[start:stop].tobytes() for start, stop in text.training_spans.tolist())
    held = ends.join(flat[start:stop].tobytes() for start, stop in text.held_out_spans.tolist())
    step = max(WINDOW, (len(held) - WINDOW) // WINDOWS)
    windows = [held[at : at + WINDOW] for at in range(0, max(1, len(held) - WINDOW), step)]
    seen = sum(window in training for window in windows)
    return {"shared_tokens": 0, "windows": len(windows), "windows_seen": seen / len(windows), "window_bytes": WINDOW}


class Watched:
    """Batches, and a running hash of what was handed out: contenders of one seed must have seen the same."""

    def __init__(self, batches: Any) -> None:
        self._batches, self._digest = batches, hashlib.sha256()
        self.asked: list[float] = []  # when each batch was asked for, seconds of the monotonic clock

    def __iter__(self) -> Watched:
        return self

    def __next__(self) -> Batch:
        self.asked.append(time.monotonic())
        batch = next(self._batches)
        for name in ("tokens", "targets", "segment_ids"):
            self._digest.update(np.ascontiguousarray(batch[name]).tobytes())
        return batch

    @property
    def digest(self) -> str:
        """SHA-256 of all batches so far."""
        return self._digest.hexdigest()
