"""`python -m gt_jax.prepare NAME FILE…`: text files into a TFDS dataset of array_record files, for `--tfds NAME`.

A document is a file, or what stands between lines `<|endoftext|>` (as TinyStories has it). Nothing is downloaded, and
TensorFlow is not needed. The dataset appears whole under DIR/NAME/1.0.0, or not at all; one that exists is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gt_jax.errors import Refused, run_command
from gt_jax.files import explain_full_disk, local_name, local_path

VERSION = "1.0.0"
SHARD = 100_000  # documents of an array_record file


def prepare(name: str, files: Sequence[str], folder: Path) -> dict[str, Any]:
    """Write the dataset: {"dataset", "documents", "bytes", "folder"}; raises `Refused`, with nothing written."""
    from gt_jax.checkpoints.folders import prepare_parent, rename, sync_all
    from gt_jax.checkpoints.lock import only_writer
    from gt_jax.text.sources import text_files

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise Refused(f"dataset name {name!r} must be lower-case letters, digits and _, a letter first")
    place = folder / name / VERSION
    if os.path.lexists(place):
        raise Refused(f"{place} exists; a dataset is never overwritten, choose another name or --tfds-dir")
    documents = text_files(files)[1]
    unfinished = folder / name / f"{VERSION}.unfinished"
    prepare_parent(place)
    with only_writer(place):
        if place.exists():
            raise Refused(f"{place} exists; another process has finished it meanwhile")
        _clear(unfinished, name)
        with explain_full_disk(place, "do it again"):
            unfinished.mkdir()
            _write(name, documents, unfinished)
            sync_all(unfinished)
            rename(unfinished, place)
    return {"dataset": name, "documents": len(documents), "bytes": sum(map(len, documents)), "folder": str(place)}


def _clear(unfinished: Path, name: str) -> None:
    """Delete what a killed run left; raises `Refused` where anything else lies there."""
    if not os.path.lexists(unfinished):
        return
    made = re.compile(rf"{name}-train\.array_record.*|dataset_info\.json|features\.json")
    if unfinished.is_symlink() or not unfinished.is_dir() or not all(map(made.fullmatch, os.listdir(unfinished))):
        raise Refused(f"{unfinished} holds what no preparation of {name} has written, which needs that name; "
                      "move it away")
    shutil.rmtree(unfinished)


def _write(name: str, documents: Sequence[bytes], folder: Path) -> None:
    import tensorflow_datasets as tfds

    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version(VERSION), data_dir=str(folder), module_name=__name__
    )
    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=SHARD, file_format="array_record")
    writer.initialize_splits(["train"])
    writer.add_examples({"train": [{"text": document} for document in documents]})
    writer.close_all()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m gt_jax.prepare", description="Text files into a TFDS dataset.")
    p.add_argument("name", help="of the dataset, as --tfds will name it")
    p.add_argument("files", type=local_name, nargs="+", help="text files")
    p.add_argument("--tfds-dir", type=local_path, help="where TFDS datasets lie (TFDS' own default)")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare and say what was written."""
    arguments = parser().parse_args(argv)
    folder = arguments.tfds_dir
    if folder is None:
        import tensorflow_datasets as tfds

        folder = Path(tfds.core.constants.DATA_DIR)
    result = prepare(arguments.name, arguments.files, folder.expanduser())
    words = f"{result['documents']} documents, {result['bytes']} bytes, in {result['folder']}"
    print(json.dumps(result) if arguments.json else words)
    return 0


if __name__ == "__main__":
    run_command(main)
