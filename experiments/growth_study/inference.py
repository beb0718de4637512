"""What a few seeds allow to be said: intervals of means and of paired differences, and times that were not reached.

    mean +- t_{n-1}(0.975) s / sqrt(n)        of n seeds; of a difference, of the n differences seed by seed

- A difference is claimed where its interval leaves out 0. The same sign at every seed is no such claim: of three seeds
  with no difference at all it is true one time in four.
- Each interval is at 95 %: of twenty comparisons without a difference one is claimed by chance. A report says how many
  comparisons it makes.
- The interval is over seeds, all judged by the same held-out text. It says nothing of other text.
- A time that a run had not reached when it ended is longer than the run, "> 31", and is no part of a mean. Of several
  times the median is given: the time by which half of the seeds had reached it, as Kaplan and Meier estimate it. Few
  seeds give it no interval at 95 %: from the least to the largest of n times the true median lies with 1 - 2^(1-n).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gt_jax.evaluation.confidence_intervals import ratio_interval

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean over `seeds` seeds between its confidence limits, which are None for one seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    def text(self, pattern: str = "{:.4f}") -> str:
        """`mean (low to high)`."""
        if self.low is None or self.high is None:
            return pattern.format(self.mean)
        return f"{pattern.format(self.mean)} ({pattern.format(self.low)} to {pattern.format(self.high)})"

    @property
    def sign(self) -> int:
        """-1 or 1 where the whole interval lies on that side of 0; else, and for one seed, 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


def interval(values: Sequence[float]) -> Interval:
    """The mean of one value a seed, and its t-interval."""
    found = ratio_interval(np.asarray(values, np.float64), np.ones(len(values)), CONFIDENCE, fewest=2)
    return Interval(found.value, found.low, found.high, len(values))


def mean(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "low", "high", "seeds"}: `interval` as it is stored."""
    return interval(values)._asdict()


def read(found: Mapping[str, Any]) -> Interval:
    """The interval of a stored figure, whatever else stands beside it."""
    return Interval(*(found[name] for name in Interval._fields))


def text_of(found: Mapping[str, Any], pattern: str) -> str:
    """`mean (low to high)` of a stored figure."""
    return read(found).text(pattern)


class Times(NamedTuple):
    """By seed the time of an event, None where the run ended at `ends` before it."""

    times: tuple[float | None, ...]
    ends: tuple[float, ...]

    @property
    def reached(self) -> int:
        """At how many seeds the event came."""
        return sum(time is not None for time in self.times)

    @property
    def median(self) -> float | None:
        """The time by which half of the seeds had reached it; None where the runs ended before.

        The product over event times of (1 - events / seeds still running) at its first value of at most a half.
        """
        left = 1.0
        for now in sorted({time for time in self.times if time is not None}):
            running = sum((end if time is None else time) >= now
                          for time, end in zip(self.times, self.ends, strict=True))  # fmt: skip
            left *= 1 - sum(time == now for time in self.times) / running
            if left <= 0.5 + 1e-12:
                return now
        return None

    def text(self, pattern: str = "{:.0f}") -> str:
        """The times in the order of the seeds, those that were not reached as `> end`: `28, > 31, 23`."""
        return ", ".join(f"> {pattern.format(end)}" if time is None else pattern.format(time)
                         for time, end in zip(self.times, self.ends, strict=True))  # fmt: skip

    def median_text(self, pattern: str = "{:.0f}") -> str:
        """The median, or what it is longer than."""
        return f"> {pattern.format(min(self.ends))}" if self.median is None else pattern.format(self.median)


def verdict(mine: str, other: str, difference: Interval, pattern: str = "{:+.4f}") -> str:
    """mine against other by their paired difference (negative: mine is lower), with its interval and its seeds."""
    figure = f"({difference.text(pattern)}, {difference.seeds} seed{'s' * (difference.seeds != 1)})"
    if difference.sign == 0:
        return f"{mine} and {other} cannot be told apart {figure}"
    return f"{mine} ends {'below' if difference.sign < 0 else 'above'} {other} {figure}"


def within(figure: Interval, bound: float) -> str:
    """Whether |mean| <= bound: "yes" or "no" where the whole interval says so, else "cannot be said"."""
    if figure.low is None or figure.high is None:
        return "cannot be said"
    if -bound <= figure.low and figure.high <= bound:
        return "yes"
    return "no" if figure.low > bound or figure.high < -bound else "cannot be said"
