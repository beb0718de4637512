"""A model on disk and in memory: its config, its variables, and the metadata beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gt_jax.checkpoints import checkpoint, opened
from gt_jax.configs.lineage import KINDS
from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules
from gt_jax.errors import refuse_all
from gt_jax.models.given import stored_as, wrong_dtypes, wrong_variables
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

    `metadata` may name the `step`, and the `kind` where it is what `load` gave. Values of fewer bits than the config
    stores are stored as it says, unchanged. Raises `Refused` where the path exists, and for variables or metadata that
    no command could read again. On several processes every process calls it.

    >>> import gt_jax, os, tempfile
    >>> config = gt_jax.preset("tiny").replace(layout="DG")
    >>> path = os.path.join(tempfile.mkdtemp(), "model")
    >>> gt_jax.save(path, config, gt_jax.initialise(config, seed=0), {"note": "random"})
    >>> gt_jax.load(path).metadata["note"]
    'random'
    """
    said = {"kind": "model", "step": 0, **(metadata or {}), "config": config.to_json()}
    refuse_all(wrong_variables(config, variables) or wrong_dtypes(config, variables) + _wrong_metadata(said),
               f"{path} would be no model that can be read again:")  # fmt: skip
    checkpoint.save(path, stored_as(config, variables), said)


def _wrong_metadata(metadata: Mapping[str, Any]) -> list[str]:
    """Why these are no metadata of a checkpoint, in words."""
    wrong = []
    if metadata["kind"] not in KINDS:
        wrong.append(f"metadata: kind is {metadata['kind']!r}; it is one of {', '.join(KINDS)}, \"model\" if left out")
    if type(metadata["step"]) is not int or not 0 <= metadata["step"] < 2**63:
        wrong.append(f"metadata: step is {metadata['step']!r}; it must be a whole number, 0 or more")
    for key, value in metadata.items():
        try:
            json.dumps({key: value}, allow_nan=False)
        except (TypeError, ValueError) as error:
            wrong.append(f"metadata: {key} is no JSON: {error}")
    return wrong
