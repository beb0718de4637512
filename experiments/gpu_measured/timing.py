"""Sides that take turns: a round is some calls in a row, launched without waiting in between, then the wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np


class Clock(Protocol):
    """Started when it is made."""

    def milliseconds(self) -> float:
        """Since the start."""
        ...


class WallClock:
    """The clock of this machine, for calls that are waited for."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def milliseconds(self) -> float:
        """Since the start."""
        return 1e3 * (time.perf_counter() - self._start)


class Side(NamedTuple):
    """Calls by the name of the pass, how to wait for a result, its output as numpy, and the clock that times them."""

    calls: Mapping[str, Callable[[], Any]]
    wait: Callable[[Any], Any]
    output: Callable[[Any], np.ndarray]
    clock: Callable[[], Clock] = WallClock


def rounds(sides: Mapping[str, Side], name: str, count: int, calls: int) -> dict[str, list[float]]:
    """Milliseconds a call of the pass `name`, of each side one number a round; a round's first call is not timed."""
    times: dict[str, list[float]] = {who: [] for who in sides}
    for _ in range(count):
        for who, side in sides.items():
            call = side.calls[name]
            side.wait(call())
            clock, result = side.clock(), None
            for _ in range(calls):
                result = call()
            side.wait(result)
            times[who].append(clock.milliseconds() / calls)
    return times


def differences(sides: Mapping[str, Side], name: str, against: str) -> dict[str, float]:
    """RMS of what each side's first output is off `against`'s, over the RMS of that."""
    outputs = {who: side.output(side.calls[name]()) for who, side in sides.items()}
    wanted = outputs[against]
    size = float(np.sqrt(np.mean(wanted**2)))
    return {who: float(np.sqrt(np.mean((found - wanted) ** 2))) / size for who, found in outputs.items()}
