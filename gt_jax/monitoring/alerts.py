"""Alerts: what is wrong with a run, in words, from its metrics alone.

- `Watch` hears of the records one by one, as training makes them; `alerts` reads a whole file of them. They say the
  same, since the second is the first in a loop.
- A sickness of one place (a layer, an expert) is told once, and may be told again after `CALM` records without it.
- Steps with forced passes say nothing of the halting heads: what depth and gates are judged by leaves them out.
- Healthy runs of the presets `tiny` and `tiny_3b` stay a factor of about two or more away from the thresholds.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gt_jax.configs.run import RunConfig

READ = ("loss", "gradient_norm", "price", "expected_k", "delta_ratio", "null_rate", "experts", "gate_mean", "gate_std",
        "gate_floored", "layers_used")  # fmt: skip
Record = Mapping[str, Any]
Found = dict[tuple[str, str], str]
"""(sickness, place) -> what to say."""

PATIENCE = 20  # records that must agree: one batch says little, and an audit comes every 20th step
WINDOW = 50  # records that a spike is measured against: enough for a median, short enough to follow a falling loss
CALM = 20  # records without it before a sickness counts as over: a value at the edge is not told at every step

ONE_PASS = 1.02  # passes a layer: at most 2 % of the tokens take a whole second pass, the share that `measure` ignores
PRICE_AT_TOP = 0.99  # of the highest price; there one pass is what the price asks for
ALL_PASSES = 0.98  # of the passes that the cap on p allows
GATE_SHARE = 0.99  # of the alive tokens at the floor: it clips p, and a clipped p has no gradient to leave it by
GATE_EDGE = 0.005  # how near its cap the mean of p is, and how narrow its spread: sigmoid' < 0.5 % of its argument
STARVED = 0.1  # of the fair share: the balance loss holds healthy experts within a factor of three
NULL_EDGE = 0.005  # of 0 or of 1; healthy runs begin with null rates of 0.01 to 0.04
ROUTERS_FROM = 0.1  # of the run: fresh routers begin with few null picks, the more experts the fewer
GRADIENT_SPIKE = 30.0  # times the median, before clipping; healthy runs reach 5, one batch of 512 tokens reached 17
LOSS_SPIKE = 8.0  # robust standard deviations above the median; batches of 512 tokens reach 3
LOSS_NOISE = 0.03  # of the median: the least standard deviation assumed, for runs whose batches are large and alike
DIVERGED = 0.25  # of the lowest median: the end of the forced passes moves the loss by up to 10 %
RATIO_HIGH = 5.0  # half of where |dh|/|h| is clipped; the first layer, which makes the stream, is always there
RATIO_LOW = 1e-3  # in bfloat16 a smaller update (2^-9 is half a unit) is mostly rounded away


class Alert(NamedTuple):
    """One sickness at one place (empty: the whole run), seen from step `first` to step `last`; None: it is not over."""

    sickness: str
    place: str
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
    """Hears of records in order; calling it with one returns what there is to say about it, often nothing."""

    def __init__(self, config: RunConfig) -> None:
        self._course = Course(config)
        self._seen: collections.deque[Record] = collections.deque(maxlen=WINDOW)
        self._free: collections.deque[Record] = collections.deque(maxlen=PATIENCE)
        self._best: tuple[float, float] | None = None  # the lowest median of the loss, and the noise it was in
        self._open: dict[tuple[str, str], tuple[Alert, int]] = {}  # and for how many records it has not been seen
        self._closed: list[Alert] = []

    def __call__(self, record: Record) -> list[str]:
        """The alerts that begin or end with this record; a record without a training loss says nothing."""
        if "loss" not in record:
            return []
        config, step = self._course.config, record["step"]
        record = {name: np.asarray(record[name], np.float64) for name in READ if name in record} | {"step": step}
        if config.train.thaw is not None and step == config.train.thaw.steps + 1:
            self._seen.clear()  # from here on the norm is of all tensors
        if self._best is None and config.start is None and math.isfinite(record["loss"]):
            self._best = float(record["loss"]), LOSS_NOISE * float(record["loss"])  # random weights: log(vocab)
        found = {**_gradient(record, self._seen), **_loss(record, self._seen)}
        self._seen.append(record)
        recent = list(self._seen)[-PATIENCE:]
        found |= self._divergence(recent)
        if len(recent) == PATIENCE:
            found |= _updates(recent)
            if step > ROUTERS_FROM * config.train.steps:
                found |= _routers(recent, config)
        if config.model.adaptive is not None and not self._course.forced(step):
            self._free.append(record)
        if len(self._free) == PATIENCE:
            found |= {**_depth(self._free, self._course), **_gates(self._free, self._course)}
        if config.model.exit is not None and len(recent) == PATIENCE:
            found |= _exits(recent)
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
                said.append(f"over, step {step}: {alert.sickness}{alert.place and f' in {alert.place}'}")
                self._closed.append(alert._replace(last=step - CALM))
                del self._open[key]
        return said


def alerts(records: Iterable[Record], config: RunConfig) -> list[Alert]:
    """Every alert of a run's records, in the order in which they began."""
    watch = Watch(config)
    for record in records:
        watch(record)
    return watch.alerts


def _finite(records: Iterable[Record], name: str) -> list[float]:
    return [float(record[name]) for record in records if name in record and math.isfinite(record[name])]


def _median_and_noise(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the standard deviation that the median distance from it stands for in a normal distribution."""
    median = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(np.asarray(values) - median)))
    return median, max(spread, LOSS_NOISE * abs(median))


def _mean(records: Iterable[Record], name: str) -> np.ndarray | None:
    """Over the records; None where not all of them have it, or where it is not a finite number everywhere."""
    values = [record.get(name) for record in records]
    there = [value for value in values if value is not None]
    if not there or len(there) < len(values):
        return None
    mean = np.asarray(np.mean(there, axis=0))
    return mean if mean.size and np.isfinite(mean).all() else None


def _gradient(record: Record, before: Sequence[Record]) -> Found:
    if "gradient_norm" not in record:
        return {}
    norm, earlier = float(record["gradient_norm"]), _finite(before, "gradient_norm")
    key = ("the gradient norm spikes", "")
    if not math.isfinite(norm):
        return {key: f"the gradient norm is {norm}; lower --learning-rate, or look at the batch"}
    usual = float(np.median(earlier)) if len(earlier) >= PATIENCE else math.inf
    if norm <= GRADIENT_SPIKE * usual:
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


def _updates(recent: Sequence[Record]) -> Found:
    """|dh|/|h| of the first pass of each layer."""
    ratios, found = _mean(recent, "delta_ratio"), {}
    for layer, ratio in enumerate(() if ratios is None else ratios):
        place = f"layer {layer}"
        if layer and ratio > RATIO_HIGH:
            found["an update explodes", place] = (
                f"{place} replaces the stream: |dh|/|h| is {ratio:.3g} over {PATIENCE} records, from {RATIO_HIGH:g} on "
                "it is no residual update; lower --learning-rate")  # fmt: skip
        elif ratio < RATIO_LOW:
            found["an update vanishes", place] = (
                f"{place} does nothing: |dh|/|h| is {ratio:.2g} over {PATIENCE} records; below {RATIO_LOW:g} the "
                "compute dtype rounds it away")  # fmt: skip
    return found


def _routers(recent: Sequence[Record], config: RunConfig) -> Found:
    moe = config.model.moe
    if moe is None:
        return {}
    found: Found = {}
    rates, shares = _mean(recent, "null_rate"), _mean(recent, "experts")
    for layer, rate in enumerate(() if rates is None or not moe.null_experts else rates):
        if min(rate, 1 - rate) < NULL_EDGE:
            what = "no pick is null: every token pays for all its experts" if rate < 0.5 else \
                "every pick is null: no token reaches an expert"
            found["a null rate is at its end", f"layer {layer}"] = (
                f"layer {layer}: {what} (null rate {rate:.3f}, wanted {1 - moe.real_share:.2f}); raise moe.null_loss")
    if shares is None:
        return found
    for layer, expert in np.argwhere(shares < STARVED / moe.experts).tolist():
        if shares[layer].sum() < 0.5:
            continue  # nobody is routed here, which is another sickness
        found["an expert starves", f"layer {layer}, expert {expert}"] = (
            f"layer {layer}, expert {expert} starves: it gets {100 * shares[layer, expert]:.2g} % of the picks over "
            f"{PATIENCE} records, its fair share is {100 / moe.experts:.2g} %; raise moe.balance_loss")
    return found


def _depth(free: Sequence[Record], course: Course) -> Found:
    """Of the records without forced passes: all of the layers at one pass, or all of them at the most there are."""
    values = [record.get("expected_k") for record in free]
    if any(value is None for value in values):
        return {}
    adaptive, price = course.config.model.adaptive, course.config.train.price
    assert adaptive is not None
    passes, caps = np.asarray(values), np.asarray([course.cap(record["step"]) for record in free])
    most = np.sum(caps[:, None] ** np.arange(adaptive.max_passes), axis=1)
    asked = [float(record.get("price", 0.0)) for record in free]
    if passes.max() < ONE_PASS < price.target and max(asked) < PRICE_AT_TOP * price.highest:
        return {("all tokens halt at once", ""):
                f"all tokens halt at once: no layer runs more than {passes.max():.3f} passes over {PATIENCE} records, "
                f"and the price {asked[-1]:.2g} does not ask for it (its top is {price.highest:g}); train with forced "
                "passes for longer (train.price.forced_until)"}  # fmt: skip
    if adaptive.max_passes > 1 and (passes.min(axis=1) >= 1 + ALL_PASSES * (most - 1)).all():
        return {("no token halts", ""):
                f"no token halts: every layer runs at least {passes.min():.3f} of {adaptive.max_passes} passes over "
                f"{PATIENCE} records, p may be up to {caps[-1]:g}; the price is {asked[-1]:.2g}, raise its top "
                "(train.price.highest) or its rate"}  # fmt: skip
    return {}


def _gates(free: Sequence[Record], course: Course) -> Found:
    """The continue gate of each layer at the floor for all tokens, or at its cap."""
    floored, mean, spread = (_mean(free, f"gate_{name}") for name in ("floored", "mean", "std"))
    if floored is None or mean is None or spread is None:
        return {}
    found: Found = {}
    cap = course.cap(free[-1]["step"])
    for layer in range(len(mean)):
        key, place = ("a gate saturates", f"layer {layer}"), f"the continue gate of layer {layer}"
        if floored[layer] > GATE_SHARE:
            found[key] = (f"{place} saturates: p is at its floor for {100 * floored[layer]:.0f} % of the tokens over "
                          f"{PATIENCE} records; a clipped gate has no gradient and stays where it is")  # fmt: skip
        elif mean[layer] > cap - GATE_EDGE and spread[layer] < GATE_EDGE:
            found[key] = (f"{place} saturates: p is {mean[layer]:.3f} for every token over {PATIENCE} records, its top "
                          f"is {cap:g}; it no longer depends on the token")  # fmt: skip
    return found


def _exits(recent: Sequence[Record]) -> Found:
    """A model whose tokens may leave the stack: all of them do after one layer. (That none does is where it starts.)"""
    used = _mean(recent, "layers_used")
    if used is None or float(used) >= ONE_PASS:
        return {}
    return {("all tokens leave at once", ""): f"all tokens leave the stack at once: {float(used):.3f} layers are used "
                                              f"over {PATIENCE} records; lower exit.ponder"}  # fmt: skip


def texts(found: Iterable[Alert]) -> Iterator[str]:
    """One line an alert: when, what."""
    for alert in found:
        when = f"from step {alert.first}" + (" on" if alert.last is None else f" to {alert.last}")
        yield f"{when}: {alert.words}"
