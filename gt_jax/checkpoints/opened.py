"""The one way to open a checkpoint: where it lies, its config, what it says of itself, and its tensors' shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.folders import StrPath
from gt_jax.configs.model import ModelConfig


class Opened(NamedTuple):
    """A checkpoint before its values are read; `folder` is the step of a run that `path` names, or `path` itself."""

    path: Path
    folder: Path
    config: ModelConfig
    metadata: dict[str, Any]
    tensors: dict[str, jax.ShapeDtypeStruct]

    @property
    def model(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The tensors of the model alone, without what a training run keeps beside it."""
        return {name: leaf for name, leaf in self.tensors.items() if name.startswith(checkpoint.MODEL)}


def open_checkpoint(path: StrPath) -> Opened:
    """The checkpoint, or a run's newest, at `path`; raises `Refused` where there is none, or it contradicts itself."""
    folder = checkpoint.resolve(path)
    leaves, metadata = checkpoint.describe(folder)
    return Opened(Path(path), folder, checkpoint.model_config(folder, leaves, metadata), metadata, leaves)
