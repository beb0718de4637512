"""`python -m gt_jax.prepare NAME FILE…`: text files into tokens on the disk, or into a TFDS dataset.

With `--tokenizer` NAME becomes a folder of tokens for `--text NAME`, which runs map into memory instead of tokenizing
their text at each start (gt_jax/text/token_writer.py); files may be JSON lines and Parquet too. It goes on after a
kill, and `--check` reads it all.

Without, DIR/NAME/1.0.0 becomes a dataset of array_record files for `--tfds NAME`. TensorFlow is not needed.

A document is a file, or what stands between lines `<|endoftext|>` (as TinyStories has it). Nothing is downloaded. What
is made appears whole, or not at all; what exists is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gt_jax.errors import Refused, refuse_all, run_command, say
from gt_jax.files import explain_full_disk, local_name, local_path

VERSION = "1.0.0"
SHARD = 100_000  # documents of an array_record file
T = TypeVar("T")


def prepare(name: str, files: Sequence[str], folder: Path) -> dict[str, Any]:
    """Write the dataset: {"dataset", "documents", "bytes", "folder"}; raises `Refused`, with nothing written."""
    from gt_jax.text.flags import file_fields
    from gt_jax.text.sources import text_files

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise Refused(f"dataset name {name!r} must be lower-case letters, digits and _, a letter first")
    lines = file_fields(files)["json_lines"]
    refuse_all([f"{file} is JSON lines, of which a TFDS dataset of texts would have the raw JSON" for file in lines],
               "only texts can be prepared with --tfds-dir; prepare TARGET FILES --tokenizer reads JSON lines:")
    place = folder / name / VERSION
    _refuse_existing(place, "choose another name or --tfds-dir")
    documents = text_files(files)[1]

    def write(unfinished: Path) -> None:
        _clear(unfinished, name)
        unfinished.mkdir()
        _write(name, documents, unfinished)

    _publish(place, write)
    return {"dataset": name, "documents": len(documents), "bytes": sum(map(len, documents)), "folder": str(place)}


def tokens(target: Path, files: Sequence[str], tokenizer: str) -> dict[str, Any]:
    """Write a folder of tokens: {"folder", "tokens", "documents", "bytes", "dtype", "told"}; raises `Refused`."""
    from gt_jax.text.token_folder import read_manifest
    from gt_jax.text.token_writer import PROGRESS, is_whole, refuse_unreadable, write_tokens

    refuse_unreadable(files)
    if is_whole(target, files, tokenizer):  # killed when all was done
        made = read_manifest(str(target))
    else:
        _refuse_existing(target, "choose another name")
        made = _publish(target, lambda unfinished: write_tokens(unfinished, files, tokenizer, say))
    (target / PROGRESS).unlink()  # not before: all of it would be written again after a kill
    told = made.told.removeprefix("; ")
    if told:
        say(f"note: {told}")
    return {"folder": str(target), "tokens": made.tokens, "documents": made.documents, "bytes": made.bytes,
            "dtype": made.dtype, "told": told}  # fmt: skip


def _refuse_existing(place: Path, instead: str) -> None:
    if os.path.lexists(place):
        raise Refused(f"{place} exists; what was prepared is never overwritten, {instead}")


def _publish(place: Path, write: Callable[[Path], T]) -> T:
    """What `write` returns of PLACE.unfinished, which has its own name when all of it is on the disk."""
    from gt_jax.checkpoints.folders import parent_made, rename, sync_all
    from gt_jax.checkpoints.lock import only_writer

    unfinished = place.with_name(place.name + ".unfinished")
    with parent_made(place), only_writer(place):
        if place.exists():
            raise Refused(f"{place} exists; another process has finished it meanwhile")
        with explain_full_disk(place, "do it again"):
            made = write(unfinished)
            sync_all(unfinished)
            rename(unfinished, place)
    return made


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
    p = argparse.ArgumentParser(prog="python -m gt_jax.prepare",
                                description="Text files into tokens on the disk, or into a TFDS dataset.")
    p.add_argument("name", type=local_name, help="with --tokenizer the folder to make, for --text; else the dataset, "
                   "as --tfds will name it")  # fmt: skip
    p.add_argument("files", type=local_name, nargs="*", help="text files; with --tokenizer also JSON lines and "
                   "Parquet with a \"text\" (*.jsonl, *.jsonl.gz, *.jsonl.zst, *.parquet)")  # fmt: skip
    kind = p.add_mutually_exclusive_group()
    kind.add_argument("--tokenizer", type=local_name, help="bytes, a tokenizer.json, a SentencePiece .model or their "
                      "folder: makes a folder of its tokens")  # fmt: skip
    kind.add_argument("--tfds-dir", type=local_path, help="where TFDS datasets lie (TFDS' own default)")
    kind.add_argument("--check", action="store_true", help="read the folder of tokens NAME: is it as it was written?")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare and say what was written; exit code 1 for tokens that are not what was written."""
    arguments = parser().parse_args(argv)
    if arguments.check:
        return _check(arguments)
    if not arguments.files:
        raise Refused("no files are named; name the text files that are to be prepared")
    if arguments.tokenizer is not None:
        result = tokens(Path(arguments.name), arguments.files, arguments.tokenizer)
        from gt_jax.text.token_folder import counted

        words = (f"{result['tokens']:,} tokens in {counted(result['documents'])}, in {result['folder']}; train on "
                 f"them with --text {result['folder']}")  # fmt: skip
    else:
        folder = arguments.tfds_dir
        if folder is None:
            import tensorflow_datasets as tfds

            folder = Path(tfds.core.constants.DATA_DIR)
        result = prepare(arguments.name, arguments.files, folder.expanduser())
        words = f"{result['documents']} documents, {result['bytes']} bytes, in {result['folder']}"
    print(json.dumps(result) if arguments.json else words)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from gt_jax.text.token_folder import changed_content, counted, read_manifest

    if arguments.files:
        raise Refused(f"--check reads the folder {arguments.name} alone; leave out {', '.join(arguments.files[:3])}")
    manifest, wrong = read_manifest(arguments.name), changed_content(arguments.name)
    found = {"folder": arguments.name, "tokens": manifest.tokens, "documents": manifest.documents, "wrong": wrong}
    words = [*wrong, f"{arguments.name}: {manifest.tokens:,} tokens in {counted(manifest.documents)}, "
             f"{'NOT ' if wrong else ''}as they were written"]  # fmt: skip
    print(json.dumps(found) if arguments.json else "\n".join(words))
    return 1 if wrong else 0


if __name__ == "__main__":
    run_command(main)
