"""A model on disk and in memory: its config, its variables, and the metadata beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gt_jax.checkpoints import checkpoint, opened
from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules
from gt_jax.models.language_model import abstract
from gt_jax.typing import Tree


class TrainedModel(NamedTuple):
    """`variables` are {"params", "statistics"}; `metadata` say its step, what it was trained on or grown from."""

    config: ModelConfig
    variables: Tree
    metadata: dict[str, Any]


class Checkpoint(opened.Opened):
    """A model on disk before its values are read."""

    def load(self, rules: Rules | None = None) -> Tree:
        """The variables, laid out by `rules` on the current mesh if there is one."""
        return checkpoint.load(self.folder, abstract(self.config, rules))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint, or a run's newest, at `path`; raises `Refused` where there is none."""
    return Checkpoint(*opened.open_checkpoint(path))


def load(path: str | Path, rules: Rules | None = None) -> TrainedModel:
    """The model of a checkpoint, or of a run's newest step, laid out by `rules` on the current mesh if there is one.

    Raises `Refused` for a path that holds no model, or one whose tensors do not fit its config.

    >>> import gt_jax, os, tempfile
    >>> config = gt_jax.preset("tiny").replace(layout="DG")
    >>> path = os.path.join(tempfile.mkdtemp(), "model")
    >>> gt_jax.save(path, config, gt_jax.initialise(config, seed=0))
    >>> gt_jax.load(path).config == config
    True
    """
    found = open_checkpoint(path)
    return TrainedModel(found.config, found.load(rules), found.metadata)


def save(path: str | Path, config: ModelConfig, variables: Tree, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a model, whole or not at all; `metadata` is a JSON object that is kept beside it.

    Raises `Refused` where the path exists. On several processes every process calls it.

    >>> import gt_jax, os, tempfile
    >>> config = gt_jax.preset("tiny").replace(layout="DG")
    >>> path = os.path.join(tempfile.mkdtemp(), "model")
    >>> gt_jax.save(path, config, gt_jax.initialise(config, seed=0), {"note": "random"})
    >>> gt_jax.load(path).metadata["note"]
    'random'
    """
    checkpoint.save(path, variables, {"kind": "model", "step": 0, **(metadata or {}), "config": config.to_json()})
