"""What a benchmark ran on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [text.split(":", 1)[1].strip() for text in file if text.startswith("model name")]
        model = names[0] if names else model
    device = jax.devices()[0].device_kind
    return {"processor": model, "cores": os.cpu_count(), "device": device, "jax": jax.__version__}


def keep(path: str | None, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of a benchmark with what they were measured on, where `--json` names a file."""
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"machine": about, "rows": rows}, file, indent=1)
