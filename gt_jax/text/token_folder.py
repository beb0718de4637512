"""A text that was tokenized before: a folder of tokens, which any number of runs map into memory instead of reading it.

    tokens.bin      the ids of all documents, one behind another, each with its end; little-endian uint16, or uint32
                    where the vocabulary is larger than 65,536
    ends.bin        where each document ends in it, int64
    keys.bin        a hash of each document's bytes, uint64: what splits it (gt_jax/text/split.py)
    tokens.json     how many there are of each, of what tokenizer, from which files, and SHA-256 of all of it
    tokenizer.*     the tokenizer's file, unless it is bytes: so the folder is a name for `--tokenizer` too

`gt_jax.text.token_writer` makes it. What is opened has the sizes that were written, the same ends and keys and the same
sample of the tokens; `changed_content` reads it all. A run holds some 100 bytes a document beside them.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt, UInt64

from gt_jax.configs.data import BYTES
from gt_jax.configs.json_config import Config, below, read_object
from gt_jax.configs.tokenizer_file import read_tokenizer_file
from gt_jax.errors import Refused, refuse_all

MANIFEST, TOKENS, ENDS, KEYS = "tokens.json", "tokens.bin", "ends.bin", "keys.bin"
FORMAT = 1
_TYPES = {"uint16": "<u2", "uint32": "<u4"}
_SAMPLE = f"{TOKENS} (sample)"
_PIECES, _PIECE = 256, 4096  # of a sample: how many, and bytes of each


class JoinedTokens:
    """Arrays of tokens one behind another, sliced within one of them: no document reaches from one to the next."""

    def __init__(self, arrays: Sequence[UInt[np.ndarray, " _"]]) -> None:
        self._arrays = list(arrays)
        self._starts = list(itertools.accumulate((len(one) for one in arrays), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, place: slice) -> UInt[np.ndarray, " n"]:
        number = bisect.bisect_right(self._starts, place.start, hi=len(self._arrays)) - 1
        first = self._starts[number]
        if place.stop > self._starts[number + 1]:
            raise IndexError(f"tokens {place.start} to {place.stop} lie in two arrays")
        return self._arrays[number][place.start - first:place.stop - first]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> UInt[np.ndarray, " n"]:
        return np.concatenate(self._arrays).astype(dtype or self._arrays[0].dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class TokenizerNamed(Config):
    """The tokenizer of a folder: its file's name there and its SHA-256; of bytes there is none."""

    name: str
    sha256: str | None


def named_tokenizer(name: str) -> TokenizerNamed:
    """What a folder says of the tokenizer `name`; raises `Refused` where there is none."""
    if name == BYTES:
        return TokenizerNamed(BYTES, None)
    file = read_tokenizer_file(name)
    return TokenizerNamed(file.name, file.sha256)


@dataclasses.dataclass(frozen=True)
class CorpusFile(Config):
    """A file that the tokens are of, as it was read: how many documents, bytes of text and, of what `round_trip.Loss`
    counts, how many; `told` how it was read."""

    path: str
    sha256: str
    documents: int
    bytes: int
    told: tuple[str, ...] = ()
    loss: tuple[int, ...] = ()

    def problems(self) -> list[str]:
        return below(self, 0, "documents", "bytes")


@dataclasses.dataclass(frozen=True)
class Sums(Config):
    """SHA-256 of each array, and of a `sample` of the tokens, in hexadecimal digits."""

    tokens: str
    ends: str
    keys: str
    sample: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest(Config):
    """What tokens.json says; `told` is how the text was read, to stand after a summary."""

    format: int = FORMAT
    dtype: Literal["uint16", "uint32"]
    tokens: int
    documents: int
    bytes: int
    vocab_size: int
    end_of_document: int
    tokenizer: TokenizerNamed
    files: tuple[CorpusFile, ...]
    told: str
    sha256: Sums

    def problems(self) -> list[str]:
        wrong = below(self, 1, "tokens", "documents", "vocab_size") + below(self, 0, "bytes", "end_of_document")
        if self.format != FORMAT:
            wrong.append(f"format is {self.format}; this program reads {FORMAT}")
        if self.end_of_document >= self.vocab_size or self.vocab_size > 2**32:
            wrong.append(f"end_of_document is {self.end_of_document}, vocab_size {self.vocab_size}; that is an id "
                         "below it")  # fmt: skip
        return wrong

    def sizes(self) -> dict[str, int]:
        """The bytes of each file."""
        return {TOKENS: self.tokens * np.dtype(self.dtype).itemsize, ENDS: 8 * self.documents, KEYS: 8 * self.documents}


class TokenFolder(NamedTuple):
    """An open folder; the arrays are mapped, not read."""

    path: str
    manifest: Manifest
    tokens: UInt[np.ndarray, " n"]
    ends: Int64[np.ndarray, " documents"]
    keys: UInt64[np.ndarray, " documents"]


def is_token_folder(path: str) -> bool:
    """Whether a name of a text is that of a folder of tokens."""
    return os.path.isfile(os.path.join(path, MANIFEST))


def own_tokenizer(paths: Sequence[str]) -> str | None:
    """The tokenizer that a text brings with it: that of its first folder; None for files, which bring none."""
    if not paths or not is_token_folder(paths[0]):
        return None
    return BYTES if read_manifest(paths[0]).tokenizer.sha256 is None else paths[0]


def read_folder(path: str) -> TokenFolder:
    """The folder at `path`; raises `Refused` for one that is none, or not as it was written."""
    manifest = read_manifest(path)
    wrong = _wrong_sizes(path, manifest) or _changed(path, {
        ENDS: manifest.sha256.ends, KEYS: manifest.sha256.keys, _SAMPLE: manifest.sha256.sample})  # fmt: skip
    wrong += _wrong_tokenizer(path, manifest)
    refuse_all(wrong, f"the tokens in {path} are not what was written; write them again with `gt_jax prepare`:")

    def mapped(name: str, dtype: str) -> Any:
        return np.memmap(Path(path, name), dtype, mode="r")

    kind = _TYPES[manifest.dtype]
    return TokenFolder(path, manifest, mapped(TOKENS, kind), mapped(ENDS, "<i8"), mapped(KEYS, "<u8"))


def _wrong_sizes(path: str, manifest: Manifest) -> list[str]:
    wrong = []
    for name, size in manifest.sizes().items():
        try:
            there = os.stat(Path(path, name)).st_size
        except OSError as error:
            wrong.append(f"{Path(path, name)} cannot be read: {error.strerror or error}")
            continue
        if there != size:
            wrong.append(f"{Path(path, name)} has {there} bytes, {MANIFEST} says {size}")
    return wrong


def _wrong_tokenizer(path: str, manifest: Manifest) -> list[str]:
    """Whether the tokenizer in the folder is the one that its tokens are of."""
    named = manifest.tokenizer
    if named.sha256 is None:
        return []
    try:
        found = read_tokenizer_file(path).sha256
    except Refused as error:
        return [str(error)]
    return [] if found == named.sha256 else [
        f"{Path(path, named.name)} is not the tokenizer of these tokens: SHA-256 {found[:12]}, {MANIFEST} says "
        f"{named.sha256[:12]}; put that one back"]  # fmt: skip


def _changed(path: str, sums: Mapping[str, str]) -> list[str]:
    """Which files do not have these SHA-256; of the tokens also by their sample."""
    return [f"{Path(path, name)} does not hold what was written: SHA-256 {found[:12]}, {MANIFEST} says {said[:12]}"
            for name, said in sums.items()
            if (found := sample_of(Path(path, TOKENS)) if name == _SAMPLE else sha256_of(Path(path, name))) != said
            ]  # fmt: skip


def sample_of(path: Path) -> str:
    """SHA-256 of pieces that lie evenly over a file, of all of it where it is small."""
    size, digest = os.stat(path).st_size, hashlib.sha256()
    with open(path, "rb") as stream:
        for number in range(_PIECES):
            stream.seek(max(0, size - _PIECE) * number // (_PIECES - 1) if size > _PIECES * _PIECE else number * _PIECE)
            digest.update(stream.read(_PIECE))
    return digest.hexdigest()


def read_folders(paths: Sequence[str], tokenizer: str) -> list[TokenFolder]:
    """Those of a text, all of one tokenizer, which is `tokenizer`; raises `Refused` that lists what is not so."""
    files = [path for path in paths if not is_token_folder(path)]
    if files:
        raise Refused(f"the text names tokens ({next(path for path in paths if path not in files)}) and files "
                      f"({', '.join(files[:3])}); make tokens of all of it with `gt_jax prepare`, or of none")
    folders = [read_folder(path) for path in paths]
    mine = named_tokenizer(tokenizer).sha256
    refuse_all([f"{one.path} holds tokens of {one.manifest.tokenizer.name} (SHA-256 "
                f"{(one.manifest.tokenizer.sha256 or 'none')[:12]}), the tokenizer here is {tokenizer} "
                f"({(mine or 'none')[:12]}); name tokens of this one, or begin a run with --tokenizer "
                f"{own_tokenizer([one.path])}"
                for one in folders if one.manifest.tokenizer.sha256 != mine], "the text cannot be used:")
    return folders


def read_manifest(path: str) -> Manifest:
    """What its tokens.json says; raises `Refused`."""
    place = Path(path, MANIFEST)
    try:
        return Manifest.from_json(read_object(place, "text"))
    except Refused as error:
        raise Refused(f"{place} is not what `gt_jax prepare` writes{begun(path)}: {error}") from error


def begun(path: str) -> str:
    """What was begun under the name of a text that is not there, as words after a message."""
    left = f"{path}.unfinished"
    return f"; {left} was begun, the command that did completes it" if os.path.isdir(left) else ""


def counted(documents: int) -> str:
    """So many documents, in words."""
    return f"{documents:,} document{'s' * (documents != 1)}"


def content_of(folders: Sequence[TokenFolder]) -> str:
    """What `Text.content_hash` is: SHA-256 of a folder's tokens, as if they were read now; of several that of those."""
    each = [one.manifest.sha256.tokens for one in folders]
    return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()


def changed_content(path: str) -> list[str]:
    """What does not hold what was written, by size and SHA-256, one line each; reads all of it."""
    manifest = read_manifest(path)
    sums = manifest.sha256
    wrong = _wrong_sizes(path, manifest) or _changed(path, {TOKENS: sums.tokens, ENDS: sums.ends, KEYS: sums.keys})
    return wrong + _wrong_tokenizer(path, manifest)


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
