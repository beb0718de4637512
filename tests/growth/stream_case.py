"""A small source, its plan, and what the tests of growing from checkpoint to checkpoint do with them."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gt_jax.configs import presets
from gt_jax.configs.model import DeltaNetConfig, GSAConfig
from gt_jax.growth import stream
from gt_jax.growth.plan import block_plan
from gt_jax.growth.repetition import from_json

CONFIG = presets.tiny().replace(
    layout="DG*2", width=8, vocab=16, mlp_width=8,
    deltanet=DeltaNetConfig(heads=2, value_heads=2, key_width=4, value_width=4),
    gsa=GSAConfig(heads=2, head_width=4, indexer_heads=2, indexer_width=4, k_base=8, k_min=4, k_max=16))
COUNTS = (1, 3, 2, 4)
PLAN = block_plan(from_json({f"layer{layer}": {"k_exec": k, "p_mu": 0.5} for layer, k in enumerate(COUNTS)}),
                  CONFIG.depth)
OPTIONS: dict[str, Any] = {"carry": "gain", "noise_std": 1e-4, "seed": 7}
QUIET = {**OPTIONS, "noise_std": 0.0}  # compiles little: for the growths that are killed
SMALL = 8_192  # bytes: slices of a kilobyte


class Case(NamedTuple):
    source: Path
    tree: dict[str, Any]
    grown: dict[str, np.ndarray]
    hash: str
    quiet_hash: str


def grow(source: Path, target: Path, **changes: Any) -> dict[str, Any]:
    return stream.grow_checkpoint(source, target, **{"plan": PLAN, **OPTIONS, **changes})


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def where_stored(folder: Path, value: np.ndarray) -> tuple[Path, int]:
    """The file of a checkpoint that holds an array, and where in it."""
    data = np.ascontiguousarray(value).tobytes()
    file = next(file for file in sorted((folder / "state").rglob("*")) if file.is_file() and data in file.read_bytes())
    return file, file.read_bytes().index(data)


class Stopped(Exception):
    """Raised by a progress callback: a growth that stops between two source tensors."""


def stop_after(lines: int) -> Any:
    remaining = iter(range(lines))

    def progress(line: str) -> None:
        if next(remaining, None) is None:
            raise Stopped

    return progress
