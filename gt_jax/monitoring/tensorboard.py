"""A run's metrics for TensorBoard, where `tensorboardX` or `tensorboard` is installed; neither is needed otherwise.

- One scalar a number: a list goes to `name/0`, `name/1`, …, one a layer. Tables, text and what is not finite are in
  metrics.jsonl alone.
- Wall-clock values go to `time/…`.
- Resumed, tensorboardX has the viewer drop what came after the checkpoint; with `tensorboard` alone those steps show
  twice.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gt_jax.errors import Refused

INSTALL = "pip install tensorboardX"


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, value) of every finite number of a record but its step, and of those in its lists of numbers."""
    for name, value in record.items():
        if name == "step" or value is None or isinstance(value, str):
            continue
        tag = name.replace("time_", "time/", 1) if name.startswith("time_") else name
        array = np.asarray(value)
        if array.dtype.kind not in "biuf" or array.ndim > 1:
            continue
        tags = [f"{tag}/{place}" for place in range(len(array))] if array.ndim else [tag]
        found = zip(tags, array.ravel().tolist(), strict=True)
        yield from ((tag, float(number)) for tag, number in found if math.isfinite(number))


class TensorBoard:
    """Writes records under `folder`; a `metrics.Listener`. Nothing is written before the first record.

    `resume_step` is the last step that stays, None for a new run. Raises `Refused` where no package is installed.
    """

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        self._folder, self._resume_step = folder, resume_step
        self._module = writer_module()
        self._writer: Any = None

    def log(self, record: Mapping[str, Any]) -> None:
        """The numbers of one record at its step."""
        if self._writer is None:
            self._writer = self._open()
        for tag, value in scalars(record):
            self._writer.add_scalar(tag, value, record["step"])

    def close(self) -> None:
        """Flush and close what was opened."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> Any:
        if self._module.__name__ != "tensorboardX":
            return self._module.Writer(str(self._folder))
        if self._resume_step is None:
            return self._module.SummaryWriter(str(self._folder))
        # the suffix: two files of one second would have one name, and the second would replace the first
        return self._module.SummaryWriter(
            str(self._folder), purge_step=self._resume_step + 1, filename_suffix=f".from{self._resume_step}"
        )


def writer_module() -> Any:
    """`tensorboardX`, else `tensorboard.summary`; raises `Refused` with what to install where there is neither."""
    for name in ("tensorboardX", "tensorboard.summary"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise Refused(f"--tensorboard needs tensorboardX or tensorboard, and neither is installed: {INSTALL}")
