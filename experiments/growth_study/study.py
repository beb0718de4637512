"""What the study is: one frozen config, the models and the text that follow from it, and the checks of the text.

The text has three parts, disjoint by document: models train on the first. Whatever is chosen by a figure is chosen on
the second, the tuning part: passes are measured there, gains calibrated, learning rates tuned. Losses are judged by the
third, the held-out part, alone. So no length of the study can make it train on, or fit to, what it is judged by.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.seeds_and_rates import wrong_seeds
from experiments.text_files import refuse_short
from gt_jax.configs.data import DataConfig
from gt_jax.configs.json_config import Config, below
from gt_jax.configs.model import DeltaNetConfig, GSAConfig, ModelConfig
from gt_jax.configs.presets import tiny
from gt_jax.configs.price import PriceConfig
from gt_jax.errors import Failed, Refused
from gt_jax.text.batches import Text, open_text

Batch = dict[str, np.ndarray]
WINDOW, WINDOWS = 64, 300
SEEN_ALLOWED = 0.02  # of the windows of held-out text that stand elsewhere too; in two MiB of TinyStories it is none
TUNING = 0.05  # share of the text


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig(Config):
    """All that determines the figures. Steps are of `rows` x `sequence_length` bytes; rates are peaks.

    `price_target` is the mean weight, summed over a layer's passes, that the compute price steers the sources to.
    `scratch_rates` are tried at the first seed, for the number of steps that costs what source and growth cost;
    `longer_rates` there too, for the grown model that is given half of the tokens of the one from scratch. The best is
    the one with the lowest loss on `tuning_batches`; 0 stands in results of earlier runs, which took the evaluation's.
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
    tuning_batches: int = 24
    calibration_batches: int = 8
    calibration_iterations: int = 4
    source_rate: float = 3e-3
    further_rate: float = 1e-3
    scratch_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    longer_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    noise_std: float = 1e-4

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StudyConfig:
        """As every config; an object without `tuning_batches` is of an earlier run."""
        return super().from_json({"tuning_batches": 0, **data})

    def problems(self) -> list[str]:
        wrong = below(self, 1, "rows", "measuring_batches", "evaluation_batches", "calibration_batches",
                      "calibration_iterations")  # fmt: skip
        wrong += below(self, 2, "source_steps", "further_steps") + below(self, 0, "tuning_batches")
        if not self.text:
            wrong.append("text is empty; name at least one text file")
        wrong += wrong_seeds(self.seeds)
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
        """The compute price under which the source is trained: the default one with this target."""
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
        """The text in this study's shape; its parts do not depend on the seed."""
        return DataConfig(text=self.text, sequence_length=self.sequence_length, batch_size=self.rows, seed=seed,
                          tuning=TUNING)  # fmt: skip

    @property
    def points(self) -> tuple[int, ...]:
        """The steps after growth at which the held-out loss is taken: 0, a quarter, half, all."""
        steps = self.further_steps
        return tuple(sorted({0, *(max(1, round(steps / part)) for part in (4, 2)), steps}))


class Material(NamedTuple):
    """One seed's text: `evaluation` is of the held-out part, the other batches of the tuning part, and disjoint."""

    text: Text
    measuring: list[Batch]
    calibration: list[Batch]
    tuning: list[Batch]
    evaluation: list[Batch]
    separation: dict[str, Any]


def open_material(study: StudyConfig, seed: int) -> Material:
    """Open the text; raises `Refused` for one that is too short, or whose held-out part stands in the others too."""
    text = open_text(study.data(seed))
    first = study.measuring_batches
    second = first + study.calibration_batches
    if not study.tuning_batches:
        raise Refused("tuning_batches is 0; the rates would be tuned on the text that they are judged by")
    refuse_short(text, {"tuning": second + study.tuning_batches, "held-out": study.evaluation_batches})
    tuning, held_out = text.tuning(second + study.tuning_batches), text.held_out(study.evaluation_batches)
    return Material(text, tuning[:first], tuning[first:second], tuning[second:], held_out, separation(text))


def separation(text: Text) -> dict[str, Any]:
    """Proof that nothing reads the held-out part but the evaluation: spans that share no token, and text that recurs.

    `windows_seen` is the share of held-out windows of 64 bytes that also stand, letter for letter, anywhere in the
    training or the tuning part, whether a run of this length reads as far or not. Raises `Refused` where it is more
    than `SEEN_ALLOWED`, `Failed` where the spans overlap.
    """
    parts = text.training_spans.tolist(), text.tuning_spans.tolist(), text.held_out_spans.tolist()
    marked = np.zeros(len(text.tokens), np.int8)
    for start, stop in (span for spans in parts for span in spans):
        marked[start:stop] += 1
    if marked.max() > 1:
        raise Failed(f"{text.source}: {int((marked > 1).sum())} tokens are in two of the training, tuning and held-out "
                     "parts")  # fmt: skip
    ends = b"\xff"  # never a byte of UTF-8 text: the end of a document
    tokens = np.asarray(text.tokens)
    flat = np.where(tokens > 255, ends[0], tokens).astype(np.uint8)
    training, tuning, held = (ends.join(flat[start:stop].tobytes() for start, stop in spans) for spans in parts)
    step = max(WINDOW, (len(held) - WINDOW) // WINDOWS)
    windows = [held[at : at + WINDOW] for at in range(0, max(1, len(held) - WINDOW), step)]
    seen = sum(window in training or window in tuning for window in windows) / len(windows)
    if seen > SEEN_ALLOWED:
        raise Refused(f"{text.source} repeats itself: {100 * seen:.1f} % of {len(windows)} held-out windows of "
                      f"{WINDOW} bytes stand in the text that is trained or tuned on; at most {100 * SEEN_ALLOWED:g} % "
                      "may, or its losses are not of unseen text")  # fmt: skip
    return {"shared_tokens": 0, "windows": len(windows), "windows_seen": seen, "window_bytes": WINDOW}


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
