"""Sizes of memory as a command line writes them."""

from __future__ import annotations

import re

from gt_jax.errors import Refused

_UNITS = {"b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}


def memory_size(text: str) -> int:
    """Bytes of a size such as 2GiB, 512MiB, 1.5 GB or 100000; raises `Refused`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    count = int(float(match[1]) * _UNITS.get(match[2].lower() or "b", 0)) if match else 0
    if count < 1:
        raise Refused(f"--memory {text!r} is not a size; write for example 2GiB or 512MiB")
    return count
