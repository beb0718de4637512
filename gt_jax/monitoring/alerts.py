"""Alerts: what is wrong with a run, in words, from its metrics alone.

- `Watch` hears of the records one by one, as training makes them; `alerts` reads a whole file of them. They say the
  same, since the second is the first in a loop.
- What can be sick in one layer is looked at layer by layer (`layer_alerts`): a mean over layers hides a dead one.
- A sickness of one place (a layer, an expert) is told once, and may be told again after `CALM` records without it.
- Where a curriculum makes its questions harder the loss rises, as it should: what it was before is forgotten there.
- Steps with forced passes say nothing of the halting heads: what depth and gates are judged by leaves them out.
- Healthy runs of the presets `tiny` and `tiny_3b` stay a factor of about two or more away from the thresholds.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gt_jax.configs.run import RunConfig
from gt_jax.errors import Refused
from gt_jax.monitoring import layer_alerts
from gt_jax.monitoring.layer_alerts import PATIENCE, Found, Record
from gt_jax.monitoring.metrics import measured
from gt_jax.tasks.rows import rises

READ = ("loss", "gradient_norm", "price", *layer_alerts.READ)
WINDOW = 50  # records that a spike is measured against: enough for a median, short enough to follow a falling loss
CALM = 20  # records without it before a sickness counts as over: a value at the edge is not told at every step

ROUTERS_FROM = 0.1  # of the run: fresh routers begin with few null picks, the more experts the fewer
GRADIENT_SPIKE = 30.0  # times the median, before clipping; healthy runs reach 5, one batch of 512 tokens reached 17
LOSS_SPIKE = 8.0  # robust standard deviations above the median; batches of 512 tokens reach 3
LOSS_NOISE = 0.03  # of the median: the least standard deviation assumed, for runs whose batches are large and alike
LEAST_NOISE = 0.01  # nats: likewise, where a task is solved and the loss is next to nothing
DIVERGED = 0.25  # of the lowest median: the end of the forced passes moves the loss by up to 10 %


class Alert(NamedTuple):
    """One sickness at one place (empty: the whole run), seen from step `first` to step `last`; None: it is not over."""

    sickness: str
    where: str
    first: int
    last: int | None
    words: str


class Course(NamedTuple):
    """What a record's step was trained with, as `training.price.phase` has it."""

    config: RunConfig

    def forced(self, step: int) -> bool:
        """Whether the passes were forced: warming up, or an audit. The record of step k is of the k-th update."""
        return self._before(step, self.config.train.price.forced_until) or self.audit(step)

    def audit(self, step: int) -> bool:
        """Whether the passes were forced in between, which makes a curve of passes jump for one record."""
        price = self.config.train.price
        return not self._before(step, price.forced_until) and (step - 1) % price.audit_every == price.audit_every - 1

    def cap(self, step: int) -> float:
        """The highest p that the schedule allows."""
        price = self.config.train.price
        return price.p_max if self._before(step, price.clipped_until) else 1.0

    def _before(self, step: int, fraction: float) -> bool:
        """Whether the step began before this fraction of the run, in the float32 of the training step."""
        return bool(np.float32(step - 1) / np.float32(self.config.train.steps) < np.float32(fraction))


class Watch:
    """Hears of records in order; calling it with one returns what there is to say about it, often nothing.

    A run that starts from another goes on in its data, `begun` batches behind their beginning.
    """

    def __init__(self, config: RunConfig, begun: int = 0) -> None:
        self._course = Course(config)
        self._seen: collections.deque[Record] = collections.deque(maxlen=WINDOW)
        self._free: collections.deque[Record] = collections.deque(maxlen=PATIENCE)
        self._best: tuple[float, float] | None = None  # the lowest median of the loss, and the noise it was in
        self._open: dict[tuple[str, str], tuple[Alert, int]] = {}  # and for how many records it has not been seen
        self._closed: list[Alert] = []
        data = config.data
        self._rises = {step - begun for step in rises(data.tasks, data.curriculum_rows, data.batch_size)}

    def __call__(self, record: Record) -> list[str]:
        """The alerts that begin or end with this record; a record without a training loss says nothing."""
        if "loss" not in record:
            return []
        config, step = self._course.config, record["step"]
        try:
            record = {name: measured(record[name]) for name in READ if name in record} | {"step": step}
        except (TypeError, ValueError) as error:
            raise Refused(f"the metrics of step {step} hold what is no number: {error}") from error
        if config.train.thaw is not None and step == config.train.thaw.steps + 1:
            self._seen.clear()  # from here on the norm is of all tensors
        if harder := step in self._rises:
            self._seen.clear()
            self._best = None
        if self._best is None and (config.start is None or harder) and math.isfinite(record["loss"]):
            self._best = float(record["loss"]), LOSS_NOISE * float(record["loss"])  # random weights: log(vocab)
        found = {**_gradient(record, self._seen, config.train.optimizer.clip), **_loss(record, self._seen),
                 **layer_alerts.not_finite(record)}  # fmt: skip
        self._seen.append(record)
        recent = list(self._seen)[-PATIENCE:]
        found |= self._divergence(recent)
        if len(recent) == PATIENCE:
            found |= layer_alerts.updates(recent)
            if step > ROUTERS_FROM * config.train.steps:
                found |= layer_alerts.routers(recent, config)
        if config.model.adaptive is not None and not self._course.forced(step):
            self._free.append(record)
        if len(self._free) == PATIENCE:
            found |= layer_alerts.gates(self._free, config, [self._course.cap(one["step"]) for one in self._free])
        if config.model.exit is not None and len(recent) == PATIENCE:
            found |= layer_alerts.exits(recent)
        return self._change(step, found)

    @property
    def alerts(self) -> list[Alert]:
        """All so far, in the order in which they began."""
        return sorted([*self._closed, *(alert for alert, _ in self._open.values())], key=lambda alert: alert.first)

    def _divergence(self, recent: Sequence[Record]) -> Found:
        """The median of the last records against the lowest that it has been."""
        losses = _finite(recent, "loss")
        if len(losses) < PATIENCE:
            return {}
        median, noise = _median_and_noise(losses)
        if self._best is None or median < self._best[0]:
            self._best = median, noise
        lowest, noise = self._best
        if median - lowest <= max(DIVERGED * lowest, 2 * noise):
            return {}
        return {("the loss diverges", ""): f"the loss diverges: its median over {PATIENCE} records is {median:.4g}, it "
                                           f"has been {lowest:.4g}; go back to a checkpoint before, with a lower "
                                           "--learning-rate"}  # fmt: skip

    def _change(self, step: int, found: Found) -> list[str]:
        said = []
        for key, words in found.items():
            if key not in self._open:
                said.append(f"alert, step {step}: {words}")
                self._open[key] = (Alert(*key, step, None, words), 0)
            else:
                self._open[key] = (self._open[key][0], 0)
        for key in [key for key in self._open if key not in found]:
            alert, calm = self._open[key]
            self._open[key] = (alert, calm + 1)
            if calm + 1 == CALM:
                said.append(f"over, step {step}: {alert.sickness}{alert.where and f' in {alert.where}'}")
                self._closed.append(alert._replace(last=step - CALM))
                del self._open[key]
        return said


def alerts(records: Iterable[Record], config: RunConfig, begun: int = 0) -> list[Alert]:
    """Every alert of a run's records, in the order in which they began; `begun` as for `Watch`."""
    watch = Watch(config, begun)
    for record in records:
        watch(record)
    return watch.alerts


def _finite(records: Iterable[Record], name: str) -> list[float]:
    return [float(record[name]) for record in records if name in record and math.isfinite(record[name])]


def _median_and_noise(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the standard deviation that the median distance from it stands for in a normal distribution."""
    median = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(np.asarray(values) - median)))
    return median, max(spread, LOSS_NOISE * abs(median), LEAST_NOISE)


def _gradient(record: Record, before: Sequence[Record], clip: float) -> Found:
    if "gradient_norm" not in record:
        return {}
    norm, earlier = float(record["gradient_norm"]), _finite(before, "gradient_norm")
    key = ("the gradient norm spikes", "")
    if not math.isfinite(norm):
        return {key: f"the gradient norm is {norm}; lower --learning-rate, or look at the batch"}
    usual = float(np.median(earlier)) if len(earlier) >= PATIENCE else math.inf
    if norm <= max(GRADIENT_SPIKE * usual, clip):
        return {}
    times = norm / max(usual, 1e-30)
    return {key: f"the gradient norm is {norm:.3g}, {times:.0f} times the median of the {len(earlier)} records before; "
                 "clipping bounds the step, look at the batches if it goes on"}  # fmt: skip


def _loss(record: Record, before: Sequence[Record]) -> Found:
    loss, earlier, key = float(record["loss"]), _finite(before, "loss"), ("the loss spikes", "")
    if not math.isfinite(loss):
        return {key: f"the loss is {loss}; lower --learning-rate, or look at the batch"}
    if len(earlier) < PATIENCE:
        return {}
    median, noise = _median_and_noise(earlier)
    if loss - median <= LOSS_SPIKE * noise:
        return {}
    above = (loss - median) / noise
    return {key: f"the loss is {loss:.4g}, {above:.0f} standard deviations above {median:.4g}, the median of the "
                 f"{len(earlier)} records before; an unusual batch, or the beginning of a divergence"}  # fmt: skip


def texts(found: Iterable[Alert]) -> Iterator[str]:
    """One line an alert: when, what."""
    for alert in found:
        when = f"from step {alert.first}" + (" on" if alert.last is None else f" to {alert.last}")
        yield f"{when}: {alert.words}"
