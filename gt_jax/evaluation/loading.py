"""What the evaluating commands share: flags that name a text, which part of it is held out, held-out batches.

The text, its split, the length of rows and the tokenizer are those of the newest training in the checkpoint's
lineage: what a grown, calibrated or converted model holds out is what its source held out.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gt_jax.configs.lineage import fits, trainings
from gt_jax.errors import Refused, refuse_all
from gt_jax.files import local_name
from gt_jax.options import whole
from gt_jax.text.flags import NOTHING, add_source_flags, source_fields

# what decides what is held out, beside the tokenizer, which is the checkpoint's own wherever it lies
SAME_TEXT = ("text", "tfds", "tfds_dir", "sequence_length", "held_out", "tuning", "split")
_SHAPE = ("tokenizer", "sequence_length")  # what a command may name beside the data
_SPLIT = ("held_out", "sequence_length", "tuning", "split")  # those of them that a position names, beside the content
HELD_OUT_BATCHES = 8  # of the run's own shape, where a command is not told how many


class Loaded(NamedTuple):
    """A model ready to apply, with held-out batches."""

    config: Any
    variables: Any
    metadata: dict[str, Any]
    rules: Any
    batches: list[Any]
    text: str
    notes: list[str]


def add_text_arguments(p: argparse.ArgumentParser, part: str = "their held-out part is used",
                       batches: str = "held-out batches to run") -> None:
    """The flags that name the text; `part` and `batches` say what of it is read."""
    add_source_flags(p, f"text files, folders of tokens, or JSON lines in *.jsonl; {part} (default: the data trained "
                     "on)")  # fmt: skip
    p.add_argument("--tokenizer", type=local_name,
                   help="bytes, a file or a folder (default: what the checkpoint was trained with)")
    p.add_argument("--sequence-length", type=whole, metavar="TOKENS",
                   help="tokens of a row (default: those of the training; of a model without one 256)")
    p.add_argument("--batches", type=whole, default=HELD_OUT_BATCHES, help=f"{batches} ({HELD_OUT_BATCHES})")


def text_config(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The DataConfig fields that name the data, its tokenizer and the length of rows, None when no flag does."""
    named = {**NOTHING, **source_fields(arguments), "tokenizer": arguments.tokenizer}
    del named["curriculum_rows"]  # of a training alone
    rows = arguments.sequence_length
    return {**named, "sequence_length": rows} if any(named.values()) or rows is not None else None


def names_text(named: Mapping[str, Any] | None) -> bool:
    """Whether these fields name data, and not the tokenizer and the length of rows alone."""
    return bool(_sources(named))


def _sources(named: Mapping[str, Any] | None) -> dict[str, Any]:
    """Those of the fields that name data."""
    return {name: value for name, value in (named or {}).items() if value and name not in _SHAPE}


def data_config(metadata: Mapping[str, Any], named: Mapping[str, Any] | None, path: object = "the checkpoint") -> Any:
    """The data of the newest training in the lineage, or the named data in the same shape; rows as long as is named.

    Text files that hold what an earlier training read, byte for byte, are read as that training read them: in its order
    and with its split. Tasks alone get rows a whole number of times as long where their instances need it. A model that
    was not trained reads the embedded default. Raises `Refused` where no tokenizer is known, and for some of the text
    files of a training: what was held out of them depends on the others.
    """
    from gt_jax.configs.data import DataConfig
    from gt_jax.text.tokenizers import chosen_tokenizer

    tokenizer = chosen_tokenizer(metadata, (named or {}).get("tokenizer"), path)
    runs = trainings(metadata)
    base = DataConfig.from_json(runs[0]["run"]["data"]) if runs else DataConfig()
    asked = (named or {}).get("sequence_length")
    rows = {} if asked is None else {"sequence_length": asked}
    base = base.replace(tokenizer=tokenizer, **rows)
    if not (sources := _sources(named)):
        return base
    if sources.keys() == {"mix"}:
        return base.replace(**sources)
    data = base.replace(**{**NOTHING, **sources})
    if data.text:
        read = _as_trained_on(runs, data.text, tokenizer, path)
        shape, text = (base, data.text) if read is None else (read, read.text)
        return shape.replace(**{**NOTHING, **sources, **rows, "text": text})
    if len(data.tasks) < len(data.parts):
        return data
    from gt_jax.tasks.registry import read_task

    longest = max(read_task(words).longest for words in data.tasks)
    return data.replace(sequence_length=data.sequence_length * -(-longest // data.sequence_length))


def _as_trained_on(runs: Sequence[Mapping[str, Any]], files: tuple[str, ...], tokenizer: str, path: object) -> Any:
    """The DataConfig of the newest training whose text was exactly these files, naming them; None where none did."""
    from gt_jax.configs.data import DataConfig
    from gt_jax.text.sources import file_hashes
    from gt_jax.text.token_folder import is_token_folder

    if not any(run.get("files") for run in runs):
        return None
    here = {file["path"]: _corpus(file) for file in file_hashes(files)}
    shared: list[str] = []
    for run in runs:
        text = run["run"]["data"].get("text", ())  # behind them come the files of answers, each with a split of its own
        there = [sha256 for file in (run.get("files") or ())[: len(text)] for sha256 in _corpus(file)]
        if sorted(there) == sorted(sha256 for file in files for sha256 in here[file]):
            ordered = sorted(files, key=lambda file: there.index(here[file][0]))
            data = DataConfig.from_json(run["run"]["data"])
            return data.replace(**{**NOTHING, "text": tuple(ordered)}, tokenizer=tokenizer)
        shared += [f"{file} is {'of ' * is_token_folder(file)}one of the {len(there)} files of a training of {path}"
                   for file in files if set(here[file]) & set(there)]  # fmt: skip
    refuse_all(shared, "what is held out of a text depends on all of it; name all of its files and no other, or leave "
                       "out --text:")  # fmt: skip
    return None


def _corpus(file: Mapping[str, Any]) -> list[str]:
    """The hashes of the files that a text is of: its own, of a folder of tokens those that they were made of."""
    return list(file.get("of") or [file["sha256"]])


def text_note(metadata: Mapping[str, Any], data: Any, path: object, other: bool) -> str | None:
    """What the lineage says against, or does not say for, that the held-out part of `data` is new to the model.

    `other`: the user named the data. None where a training of the model held out just this part, and no other trained
    on it. Of several parts each is judged by itself.
    """
    from gt_jax.text.task_part import TaskPart

    runs = trainings(metadata)
    if not runs:
        return f"nothing says what {path} was trained on; it may know this text"
    readings = [*runs, *fits(metadata)]  # a calibration reads the training part of its text too
    notes = [_task_note(runs, part, path) if isinstance(part, TaskPart) else _part_note(readings, part, path, other)
             for part in data.parts.values()]  # fmt: skip
    return "; ".join(dict.fromkeys(note for note in notes if note is not None)) or None


def _task_note(runs: Sequence[Mapping[str, Any]], part: Any, path: object) -> str | None:
    """Whether a training may have seen instances that are held out here: it has where it held out less of them."""
    from gt_jax.configs.data import DataConfig

    for run in runs:
        there = DataConfig.from_json(run["run"]["data"])
        if there.tasks and there.held_out + there.tuning < part.config.held_out:
            return (f"{path} was trained on tasks with another part held out ({there.held_out}): it may know instances "
                    f"of {part.task.name} that are held out here")  # fmt: skip
    return None


def _part_note(readings: Sequence[Mapping[str, Any]], text: Any, path: object, other: bool) -> str | None:
    """`text_note` of a text, or of a JSON-lines file."""
    from gt_jax.configs.data import WITHOUT_SPLIT, DataConfig
    from gt_jax.text.batches import Text

    places = [{**WITHOUT_SPLIT, **place} if isinstance(place := one.get("data"), Mapping) else {} for one in readings]
    hashes = [_contents(place) for place in places]
    names = _SPLIT if isinstance(text, Text) else ("held_out", "tuning")  # whole documents, whatever the rows
    split = [getattr(text.config, name) for name in names]
    uneven = [place for place, content in zip(places, hashes, strict=True) if text.content_hash() in content
              and [place.get(name) for name in names] != split]  # fmt: skip
    if uneven:
        there = ", ".join(f"{name} {uneven[0].get(name)}" for name in names)
        return (f"{path} was trained on this text with another part held out ({there}): it may know what is held out "
                "here")  # fmt: skip
    shared = _shared_file(readings, hashes, text)
    known = None if shared is None else (
        f"{path} was trained on {shared}, a part of this text, by itself or with other files: it may know what is held "
        "out here")  # fmt: skip
    if any(text.content_hash() in content for content in hashes):
        return known
    if not other:
        return None if not hashes[0] else (
            f"the text is not the one that {path} was trained on any more (its hash differs): it may know what is held "
            "out here")  # fmt: skip
    if known is not None:
        return known
    if not all(hashes):
        named = DataConfig.from_json(readings[0]["run"]["data"])
        if all(getattr(named, name) == getattr(text.config, name) for name in SAME_TEXT):
            return None
        return f"not the text that {path} names as its own, and it keeps no hash: it may know what is held out here"
    return f"another text than {path} was trained on: as far as its lineage says, nothing of it was trained on"


def _contents(place: Mapping[str, Any]) -> set[str]:
    """The hashes of what a position is a position in: of a text, or of all parts of a mix."""
    own, parts = place.get("content"), place.get("parts")
    return ({own} if isinstance(own, str) else set()) | set(parts.values() if isinstance(parts, Mapping) else ())


def _shared_file(readings: Sequence[Mapping[str, Any]], hashes: Sequence[set[str]], text: Any) -> str | None:
    """The first file of `text` that a training on another text read too, and held out another part of."""
    here = {sha256: file["path"] for file in text.files() for sha256 in _corpus(file)}
    return next((here[sha256] for one, content in zip(readings, hashes, strict=True)
                 if text.content_hash() not in content for file in one.get("files") or () for sha256 in _corpus(file)
                 if sha256 in here), None)  # fmt: skip


def load_for_text(source: Path, named: Mapping[str, Any] | None, batches: int) -> Loaded:
    """A checkpoint and `batches` held-out batches of the named text (None: the text it was trained on)."""
    from gt_jax.devices.sharding import Rules
    from gt_jax.evaluation.held_out_rows import refuse_nothing_asked
    from gt_jax.evaluation.model_files import load
    from gt_jax.text.data import open_data, short_parts

    if batches < 1:
        raise Refused(f"--batches is {batches}; at least one is needed")
    config, variables, metadata = load(source)
    text = open_data(data_config(metadata, named, source))
    note = text_note(metadata, text, source, names_text(named))
    by_part = text.held_out_by_part(batches)
    notes = [*([] if note is None else [note]), *short_parts(text, batches, by_part)]
    held_out = [batch for of_part in by_part.values() for batch in of_part]
    refuse_nothing_asked(held_out)
    return Loaded(config, variables, metadata, Rules(), held_out, text.summary(), notes)
