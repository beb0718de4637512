"""Types of numeric options: what argparse refuses by the option's name, with what would be right."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Literal

MatmulPrecision = Literal["default", "high", "highest"]  # JAX's names

_MOST = 2**31 - 1  # sizes and counts lie in int32


def whole(text: str) -> int:
    """A whole number that 64 bits hold: what commands check further, all of it at once."""
    beyond = argparse.ArgumentTypeError(f"{text[:24]!r} is beyond 64 bits")
    if len(text) > 40 and text.strip("+-").isdigit():  # Python makes no number of thousands of digits
        raise beyond
    value = int(text)  # argparse says it of what is none
    if not -(2**63) <= value < 2**63:
        raise beyond
    return value


def at_least(least: int, most: int = _MOST) -> Callable[[str], int]:
    """A whole number from `least` to `most`."""

    def read(text: str) -> int:
        value = int(text) if text.isascii() and text.isdigit() and len(text) < 12 else -1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number in {least} … {most}")
        return value

    return read


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def positives(text: str) -> list[float]:
    """Numbers as `positive`, between commas."""
    return [positive(one) for one in text.split(",")]
