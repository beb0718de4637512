"""What the evaluating commands share: the flags that name a text, a checkpoint on the mesh, held-out batches."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from gt_jax.errors import Refused

HELD_OUT_BATCHES = 8  # of the run's own shape, where a command is not told how many


class Loaded(NamedTuple):
    """A model ready to apply, with held-out batches."""

    config: Any
    variables: Any
    metadata: dict[str, Any]
    rules: Any
    batches: list[Any]
    text: str


def add_text_arguments(p: argparse.ArgumentParser) -> None:
    """The flags that name the text."""
    p.add_argument("--text", nargs="+", help="text files; their held-out part is used (default: the training text)")
    p.add_argument("--tfds", help="prepared TFDS dataset")
    p.add_argument("--tfds-dir", help="where TFDS datasets lie")
    p.add_argument("--batches", type=int, default=HELD_OUT_BATCHES, help="held-out batches to run")


def text_config(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The DataConfig fields that name the text, None when no flag does."""
    named = {"text": tuple(arguments.text or ()), "tfds": arguments.tfds, "tfds_dir": arguments.tfds_dir}
    return named if any(named.values()) else None


def data_config(metadata: dict[str, Any], named: dict[str, Any] | None) -> Any:
    """The data of a run, or other text in the same shape; a checkpoint without a run reads the embedded default.

    One that was grown keeps the tokenizer of the run that it was grown from.
    """
    from gt_jax.configs.data import BYTES, DataConfig
    from gt_jax.text.tokenizers import tokenizer_of

    stored = metadata.get("run", {}).get("data")
    base = DataConfig(tokenizer=tokenizer_of(metadata) or BYTES) if stored is None else DataConfig.from_json(stored)
    return base if named is None else base.replace(**named)


def load_for_text(source: Path, named: dict[str, Any] | None, batches: int) -> Loaded:
    """A checkpoint and `batches` held-out batches of the named text (None: the text it was trained on)."""
    from gt_jax.devices.sharding import Rules
    from gt_jax.evaluation.model_files import load
    from gt_jax.text.batches import open_text

    if batches < 1:
        raise Refused(f"--batches is {batches}; at least one is needed")
    config, variables, metadata = load(source)
    text = open_text(data_config(metadata, named))
    return Loaded(config, variables, metadata, Rules(), text.held_out(batches), text.summary())
