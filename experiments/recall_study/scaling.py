"""Loss over size: loss = A N^-alpha + B, what five sizes say of alpha, and what any three of them would claim.

- Every size has its own learning rate, the best of those tried at the first seed by the tuning part.
- Intervals are percentiles over resampled seeds, drawn within each size. They say how the fit moves with the seeds;
  not whether the law is right, nor where it ends.
- N counts what is not the token table, which is most of so small a model and does little for its depth.
- For each alpha of a grid A and B >= 0 follow by least squares; the alpha with the least squared error is taken.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.recall_study.material import material, training_rows
from experiments.recall_study.study import TEXT, Arm, RecallStudy, parameters
from experiments.seeds_and_rates import wrong_rates, wrong_seeds
from experiments.several_seeds import fit, held_out_nats, stacked
from gt_jax.configs.data import BYTES
from gt_jax.configs.json_config import Config, below
from gt_jax.configs.model import ModelConfig
from gt_jax.errors import Refused

ALPHAS = np.linspace(0.01, 2.0, 400)
DRAWS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingStudy(Config):
    """Widths of one layout, trained on the same text for the same steps, each at its own rate."""

    layout: str = "D*3"
    widths: tuple[int, ...] = (16, 24, 32, 48, 64)
    rates: tuple[float, ...] = (8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
    text: tuple[str, ...] = ()
    tokenizer: str = BYTES
    seeds: tuple[int, ...] = (0, 1, 2)
    length: int = 128
    rows: int = 8
    steps: int = 400
    held_out_batches: int = 24

    def problems(self) -> list[str]:
        wrong = below(self, 1, "length", "rows", "held_out_batches") + below(self, 2, "steps")
        if len(set(self.widths)) < 5:
            wrong.append(f"widths is {list(self.widths)}; three numbers are fitted, at least five sizes are needed")
        wrong += wrong_rates(self.rates)
        wrong += wrong_seeds(self.seeds)
        return wrong

    def model(self, width: int, vocab: int) -> ModelConfig:
        """The model of a width, two heads."""
        sizes = RecallStudy(width=width, heads=2, length=max(64, self.length), facts=1, stages=(0,))
        return sizes.model(Arm(self.layout, 0.0, TEXT), vocab)


class Size(NamedTuple):
    """One unit: a width, at `rates[i]` with `seeds[i]`."""

    study: ScalingStudy
    width: int
    seeds: tuple[int, ...]
    rates: tuple[float, ...]

    @property
    def name(self) -> str:
        """Where the unit is kept."""
        pairs = " ".join(f"{seed}@{rate:g}" for seed, rate in zip(self.seeds, self.rates, strict=True))
        return f"width {self.width}/{pairs}"


SCALES = {
    "minutes": ScalingStudy(widths=(8, 12, 16, 20, 24), steps=6, rows=2, length=64, held_out_batches=2),
    "small": ScalingStudy(),
    "accelerator": ScalingStudy(widths=(64, 96, 128, 192, 256, 384), rates=(1e-3, 2e-3, 4e-3), steps=8000, rows=32,
                                length=256, held_out_batches=64),
}  # fmt: skip


def scaled(scale: str, seeds: tuple[int, ...], text: tuple[str, ...], tokenizer: str) -> ScalingStudy:
    """The study of a scale; raises `Refused` for one that is not known."""
    if scale not in SCALES:
        raise Refused(f"--scale {scale} is not known; the scales are {', '.join(SCALES)}")
    return SCALES[scale].replace(seeds=seeds, text=text, tokenizer=tokenizer)


def make(wanted: Size) -> dict[str, Any]:
    """The unit: a row for each seed and rate, with its losses on the tuning and the held-out part."""
    study, began = wanted.study, time.monotonic()
    source = material(study.text, study.tokenizer, study.length, study.rows)
    config = study.model(wanted.width, source.words.size)
    rows = [training_rows(study.text, study.tokenizer, study.length, study.rows, seed) for seed in wanted.seeds]

    def batches(step: int) -> dict[str, np.ndarray]:
        taken = range(step * study.rows, (step + 1) * study.rows)
        found = [[one[index] for index in taken] for one in rows]
        return stacked([{name: np.stack([row[name] for row in each]) for name in each[0]} for each in found])

    trained = fit(config, seeds=wanted.seeds, rates=wanted.rates, steps=study.steps, batches=batches)
    losses = {part: held_out_nats(config, trained.variables, source.batches(part, study.held_out_batches))
              for part in ("tuning", "held-out")}  # fmt: skip
    bits = source.bits(config, trained.variables, source.batches("held-out", study.held_out_batches))
    made = [{"task": TEXT, "model": f"width {wanted.width}", "seed": seed, "rate": rate, "width": wanted.width,
             "parameters": parameters(config), "tuning_nats": losses["tuning"][index],
             "nats": losses["held-out"][index], "bits_per_byte": bits[index]}
            for index, (seed, rate) in enumerate(zip(wanted.seeds, wanted.rates, strict=True))]  # fmt: skip
    said = ", ".join(f"{row['nats']:.3f} at {row['rate']:g}" for row in made)
    return {"rows": made, "line": f"{said}, in {time.monotonic() - began:.0f} s"}


class Fit(NamedTuple):
    """loss = A N^-alpha + B."""

    amplitude: float
    alpha: float
    floor: float
    error: float


def fitted(sizes: Sequence[float], losses: Sequence[float]) -> Fit:
    """The fit with the least squared error; N in units of the smallest size, A and B not below 0."""
    x = (np.asarray(sizes, np.float64) / min(sizes))[None] ** -ALPHAS[:, None]  # a row each alpha
    y = np.asarray(losses, np.float64)
    far = x - x.mean(axis=1, keepdims=True)
    slope = far @ (y - y.mean()) / np.sum(far * far, axis=1)
    floor = y.mean() - slope * x.mean(axis=1)
    through_zero = x @ y / np.sum(x * x, axis=1)
    slope, floor = np.where(floor < 0, through_zero, slope), np.maximum(floor, 0.0)
    slope, floor = np.maximum(slope, 0.0), np.where(slope < 0, y.mean(), floor)
    error = np.sum((slope[:, None] * x + floor[:, None] - y[None]) ** 2, axis=1)
    best = int(np.argmin(error))
    return Fit(float(slope[best]), float(ALPHAS[best]), float(floor[best]), float(error[best]))


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fit of all sizes with percentiles over resampled seeds, and the fits of any three sizes."""
    by = {width: sorted((row for row in rows if row["width"] == width), key=lambda row: row["seed"])
          for width in sorted({row["width"] for row in rows})}  # fmt: skip
    sizes = [each[0]["parameters"] for each in by.values()]
    losses = [[row["nats"] for row in each] for each in by.values()]
    means = [float(np.mean(each)) for each in losses]
    random = np.random.Generator(np.random.Philox(0))
    drawn = [fitted(sizes, [float(np.mean(random.choice(each, len(each)))) for each in losses])
             for _ in range(DRAWS)] if len(losses[0]) > 1 else []  # fmt: skip
    whole = fitted(sizes, means)
    threes = [{"widths": [list(by)[index] for index in chosen],
               **_as_json(fitted([sizes[index] for index in chosen], [means[index] for index in chosen]))}
              for chosen in itertools.combinations(range(len(sizes)), 3)]  # fmt: skip
    return {
        "sizes": [{"width": width, "parameters": each[0]["parameters"], "rate": each[0]["rate"],
                   "nats": [row["nats"] for row in each]} for width, each in by.items()],
        "fit": _as_json(whole), "intervals": {name: _percentiles([getattr(one, name) for one in drawn])
                                              for name in ("amplitude", "alpha", "floor")},
        "three_sizes": threes,
    }  # fmt: skip


def _as_json(found: Fit) -> dict[str, float]:
    return {**found._asdict()}


def _percentiles(values: Sequence[float]) -> list[float] | None:
    return [float(value) for value in np.percentile(values, [2.5, 97.5])] if values else None


