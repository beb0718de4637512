"""A corpus into a folder of tokens (gt_jax/text/token_folder.py), a file after the other, in bounded memory, killable.

After each file it is noted how far the tokens are; the same call after a kill goes on behind the last file that was
whole. `gt_jax.prepare` gives the folder its name when all of it is on the disk.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gt_jax.configs.json_config import Config, below, read_object
from gt_jax.configs.tokenizer_file import NAMES, read_tokenizer_file
from gt_jax.errors import Refused, refuse_all
from gt_jax.files import refuse_once, unfinished_name, write_atomically
from gt_jax.text.corpus_files import documents_of
from gt_jax.text.round_trip import Loss, loss_of
from gt_jax.text.split import content_keys
from gt_jax.text.token_folder import (
    ENDS,
    KEYS,
    MANIFEST,
    TOKENS,
    CorpusFile,
    Manifest,
    Sums,
    TokenizerNamed,
    counted,
    named_tokenizer,
    read_manifest,
    sample_of,
    sha256_of,
)
from gt_jax.text.tokenizers import Tokenizer, encode_all, laid_out, open_tokenizer, portions, token_dtype

PROGRESS = "progress.json"
_LOOKED = 4  # documents of a portion that are decoded again
_WRITTEN_WHOLE = (MANIFEST, PROGRESS, *NAMES)


@dataclasses.dataclass(frozen=True)
class _Begun(Config):
    """How far a folder is: the files that are whole in it, the tokens, and the tokenizer that they are of."""

    files: tuple[CorpusFile, ...]
    tokens: int
    tokenizer: TokenizerNamed

    def problems(self) -> list[str]:
        return below(self, 0, "tokens")


def write_tokens(
    folder: Path, paths: Sequence[str], tokenizer: str, say: Callable[[str], None] = lambda line: None
) -> Manifest:  # fmt: skip
    """Make `folder` of the files of a corpus (gt_jax/text/corpus_files.py), in their order; it may be what a kill left.

    `say` hears a line after each file. Raises `Refused` where the folder is of other files or another tokenizer, or
    not ours, and for files that cannot be read.
    """
    opened = open_tokenizer(tokenizer)
    begun = _begin(folder, paths, tokenizer)
    if begun.files:
        say(f"{folder} holds {len(begun.files)} of {len(paths)} files; going on behind them")
    try:
        begun = _write(folder, paths, opened, tokenizer, begun, say)
    except Refused:
        if not (folder / PROGRESS).exists():  # no file was whole: nothing is lost
            shutil.rmtree(folder)
        raise
    return _finish(folder, opened, begun)


def is_whole(folder: Path, paths: Sequence[str], tokenizer: str) -> bool:
    """Whether a kill has left `folder` under its own name, as `write_tokens` makes it of these files."""
    if not (folder / PROGRESS).exists():
        return False
    made = read_manifest(str(folder))
    return made.tokenizer == named_tokenizer(tokenizer) and [file.sha256 for file in made.files] == [
        sha256_of(Path(path)) for path in paths]  # fmt: skip


def refuse_unreadable(paths: Sequence[str]) -> None:
    """Raise `Refused` that lists the files that cannot be read, as far as their names and places tell."""
    refuse_all([problem for path in paths if (problem := _unreadable(path))], "the text cannot be used:")


def _unreadable(path: str) -> str | None:
    try:
        refuse_once(path)
        if os.path.isdir(path):
            raise IsADirectoryError(None, "it is a folder")
        with open(path, "rb"):
            return None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path, or a pipe
        return f"text file {path!r} cannot be read: {getattr(error, 'strerror', None) or error}"


def _begin(folder: Path, paths: Sequence[str], tokenizer: str) -> _Begun:
    """The folder as a kill left it behind its last whole file, or a new one."""
    own = named_tokenizer(tokenizer)
    if os.path.lexists(folder):
        ours = {TOKENS, ENDS, KEYS, *_WRITTEN_WHOLE, *(unfinished_name(folder / name).name for name in _WRITTEN_WHOLE)}
        if folder.is_symlink() or not folder.is_dir() or not set(os.listdir(folder)) <= ours:
            raise Refused(f"{folder} holds what no preparation has written, which needs that name; move it away")
        begun = _left(folder)
        if begun is not None:
            _refuse_other(folder, begun, paths, own)
            return begun
        if (folder / MANIFEST).exists():
            raise Refused(f"{folder} holds tokens that are whole; give it another name, or move it away")
        arrays = {TOKENS, ENDS, KEYS}  # they are made first, and empty
        begun_arrays = all(file.name in arrays and not file.stat().st_size for file in folder.iterdir())
        if not arrays <= set(os.listdir(folder)) and not begun_arrays:
            raise Refused(f"{folder} is not what a preparation leaves, which needs that name; move it away")
        shutil.rmtree(folder)  # killed before its first file was whole
    folder.mkdir()
    for name in (TOKENS, ENDS, KEYS):
        (folder / name).touch()
    if own.sha256 is not None:
        write_atomically(folder / own.name, read_tokenizer_file(tokenizer).content)
    return _Begun((), 0, own)


def _left(folder: Path) -> _Begun | None:
    if not (folder / PROGRESS).exists():
        return None
    try:
        return _Begun.from_json(read_object(folder / PROGRESS, "what was begun,"))
    except Refused as error:
        raise Refused(f"{folder} cannot be gone on with, move it away: {error}") from error


def _refuse_other(folder: Path, begun: _Begun, paths: Sequence[str], own: TokenizerNamed) -> None:
    """Raise `Refused` where what was begun is not the beginning of what is asked for."""
    wrong = []
    if begun.tokenizer != own:
        wrong.append(f"its tokenizer is {begun.tokenizer.name}, SHA-256 {begun.tokenizer.sha256}; this one is "
                     f"{own.name}, {own.sha256}")
    for number, file in enumerate(begun.files):
        if number >= len(paths):
            wrong.append(f"file {number + 1} was {file.path}; {len(paths)} are named now")
        elif (found := sha256_of(Path(paths[number]))) != file.sha256:
            wrong.append(f"file {number + 1} was {file.path} (SHA-256 {file.sha256[:12]}); now it is "
                         f"{paths[number]} ({found[:12]})")
    refuse_all(wrong, f"{folder} was begun with other words; give the same ones, or move it away:")


def _write(
    folder: Path, paths: Sequence[str], opened: Tokenizer, tokenizer: str, begun: _Begun, say: Callable[[str], None]
) -> _Begun:  # fmt: skip
    """Append the files that are not whole yet, each noted when it is on the disk."""
    documents = sum(file.documents for file in begun.files)
    lengths = {TOKENS: begun.tokens * np.dtype(token_dtype(opened)).itemsize, ENDS: 8 * documents, KEYS: 8 * documents}
    short = [f"{folder / name} has {size} bytes, {PROGRESS} says {length}" for name, length in lengths.items()
             if (size := os.stat(folder / name).st_size) < length]  # fmt: skip
    refuse_all(short, f"{folder} is not what was written; move it away:")
    for name, length in lengths.items():
        os.truncate(folder / name, length)
    with (open(folder / TOKENS, "ab") as tokens, open(folder / ENDS, "ab") as ends,
          open(folder / KEYS, "ab") as keys):  # fmt: skip
        for path in paths[len(begun.files):]:
            file, count = _append(path, opened, tokenizer, (tokens, ends, keys), begun.tokens)
            for stream in (tokens, ends, keys):
                stream.flush()
                os.fsync(stream.fileno())
            begun = begun.replace(files=(*begun.files, file), tokens=begun.tokens + count)
            _note(folder, begun)
            say(f"{len(begun.files)} of {len(paths)} files: {path}, {counted(file.documents)}, {count:,} tokens")
    return begun


def _note(folder: Path, begun: _Begun) -> None:
    """A kill leaves the note before, or this one."""
    write_atomically(folder / PROGRESS, json.dumps(begun.to_json()))


def _append(
    path: str, opened: Tokenizer, tokenizer: str, streams: tuple[BinaryIO, BinaryIO, BinaryIO], start: int
) -> tuple[CorpusFile, int]:  # fmt: skip
    """Append the documents of one file; (what is noted of it, its tokens)."""
    documents, told = documents_of(path)
    tokens, ends, keys = streams
    position, loss, count, size = start, Loss(), 0, 0
    for portion in portions(documents):
        try:
            encoded = encode_all(opened, tokenizer, portion, count)
        except Refused as error:
            raise Refused(f"text file {path}: {error}") from error
        loss = loss.plus(loss_of(opened, portion, encoded, _LOOKED))
        flat, where = laid_out(encoded, opened)
        where = position + where
        tokens.write(flat.astype(flat.dtype.newbyteorder("<"), copy=False).tobytes())
        ends.write(where.astype("<i8").tobytes())
        keys.write(content_keys(portion).astype("<u8").tobytes())
        position, count, size = int(where[-1]), count + len(portion), size + sum(map(len, portion))
    file = CorpusFile(path, sha256_of(Path(path)), count, size, tuple(told), tuple(loss))
    return file, position - start


def _finish(folder: Path, opened: Tokenizer, begun: _Begun) -> Manifest:
    """Write the manifest, once all is on the disk."""
    loss = functools.reduce(Loss.plus, (Loss(*file.loss) for file in begun.files), Loss())
    told = "".join(f"; {line}" for file in begun.files for line in file.told)
    tokens, ends, keys = (sha256_of(folder / name) for name in (TOKENS, ENDS, KEYS))
    manifest = Manifest(
        dtype=token_dtype(opened), tokens=begun.tokens,
        documents=sum(file.documents for file in begun.files), bytes=sum(file.bytes for file in begun.files),
        vocab_size=opened.vocab_size, end_of_document=opened.end_of_document, tokenizer=begun.tokenizer,
        files=begun.files, told=told + loss.words(begun.tokens),
        sha256=Sums(tokens, ends, keys, sample_of(folder / TOKENS)),
    )  # fmt: skip
    write_atomically(folder / MANIFEST, json.dumps(manifest.to_json(), indent=1) + "\n")
    return manifest
