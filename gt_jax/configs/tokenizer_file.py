"""The file of a tokenizer: where a name leads, what the file holds, and which one a checkpoint carries.

- A name is "bytes", a tokenizer.json, a SentencePiece .model, or a folder that holds one of them.
- A checkpoint holds a copy of the file its tokens are of. Its metadata say {"name", "sha256"} of that as
  `tokenizer_file`; when they are read from a checkpoint, "path" says where the copy lies.
- A file of another format, which is one file, has the tokenizer in the last record of its lineage, as "zlib".
- What a process has opened is what its checkpoints carry, though the file be replaced while a run goes on.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gt_jax.configs.data import BYTES
from gt_jax.configs.lineage import LINEAGE, TOKENIZER_FILE, chain
from gt_jax.errors import Refused
from gt_jax.files import other_content, refuse_address

NAMES = ("tokenizer.json", "tokenizer.model")  # in a folder, and in a checkpoint


class TokenizerFile(NamedTuple):
    """A file as it was read."""

    path: str
    content: bytes

    @property
    def sha256(self) -> str:
        """Of the content, in hexadecimal digits."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def name(self) -> str:
        """What a checkpoint calls it."""
        return NAMES[self.path.endswith(".model")]


class Known(NamedTuple):
    """The tokenizer that metadata name: where it was, or lies in the checkpoint, its hash where that is noted, and the
    packed content where that is in the metadata themselves.
    """

    name: str
    sha256: str | None
    packed: str | None = None


_opened: dict[str, TokenizerFile] = {}


def read_tokenizer_file(name: str) -> TokenizerFile:
    """The file that `name` leads to; raises `Refused` where there is none that a tokenizer is read from."""
    refuse_address(name)
    path = Path(name)
    if not os.path.exists(name):  # unlike Path's, it takes words that are too long for a name
        raise Refused(f"tokenizer {name!r} is neither {BYTES!r} nor a file or folder; nothing is downloaded")
    if path.is_dir():
        inside = [path / file for file in NAMES if (path / file).is_file()]
        if not inside:
            raise Refused(f"tokenizer folder {name} has neither {' nor '.join(NAMES)}")
        path = inside[0]
    if path.suffix not in (".json", ".model"):
        raise Refused(f"tokenizer {name} must be a tokenizer.json or a SentencePiece .model file")
    try:
        file = TokenizerFile(str(path), path.read_bytes())
    except OSError as error:
        raise Refused(f"tokenizer {path} cannot be read: {error.strerror or error}") from error
    if (kind := other_content(file.content)) is not None:
        raise Refused(f"tokenizer {path} is {kind}")
    _opened[os.path.abspath(name)] = file
    return file


def known_tokenizer(metadata: Mapping[str, Any]) -> Known | None:
    """The tokenizer whose tokens the model of these metadata speaks; None where they do not say."""
    sha256: str | None = None
    for record in reversed(chain(metadata)):
        file, run = record.get(TOKENIZER_FILE), record.get("run")
        if isinstance(file, Mapping):
            sha256 = sha256 or file.get("sha256")
            if isinstance(place := file.get("path") or (file.get("zlib") and file.get("name")), str):
                return Known(place, sha256, file.get("zlib"))
        name = run.get("data", {}).get("tokenizer", BYTES) if isinstance(run, Mapping) else record.get("tokenizer")
        if name is not None:
            return Known(str(name), None if name == BYTES else sha256)
    return None


def carried_tokenizer(metadata: Mapping[str, Any]) -> TokenizerFile | None:
    """The file that a checkpoint with these metadata is to carry; None for bytes, and where it is not at hand.

    Raises `Refused` where the file that its name leads to is not the one whose hash is noted.
    """
    known = known_tokenizer(metadata)
    if known is None or known.name == BYTES:
        return None
    file = _opened.get(os.path.abspath(known.name)) if known.packed is None else unpacked(known)
    if file is None:
        try:
            file = read_tokenizer_file(known.name)
        except Refused:
            return None  # then the metadata note no hash, and commands say that nothing proves what they are given
    refuse_other_file(known, file, "the checkpoint to be written")
    return file


def refuse_other_file(known: Known, file: TokenizerFile, path: object) -> None:
    """Raise `Refused` where the hash of the file is not the one noted by the checkpoint at `path`."""
    if known.sha256 is not None and file.sha256 != known.sha256:
        raise Refused(f"tokenizer {file.path} is not the file that {path} was trained with: its SHA-256 is "
                      f"{file.sha256[:12]}, that of the model's own {known.sha256[:12]}; put that one back")


def packed(records: Sequence[Mapping[str, Any]], file: TokenizerFile | None) -> list[dict[str, Any]]:
    """A lineage that is all that another format keeps: the last record holds the tokenizer itself."""
    made = [_without_place(record) for record in records]
    if file is not None:
        content = base64.b64encode(zlib.compress(file.content, 9)).decode()
        made[-1][TOKENIZER_FILE] = {"name": file.name, "sha256": file.sha256, "zlib": content}
    return made


def unpacked(known: Known) -> TokenizerFile:
    """The tokenizer that is in the metadata themselves; raises `Refused` where it cannot be read."""
    try:
        return TokenizerFile(known.name, zlib.decompress(base64.b64decode(known.packed or "")))
    except (binascii.Error, ValueError, zlib.error) as error:
        raise Refused(f"the tokenizer in this file's lineage cannot be unpacked: {error}") from error


def to_store(metadata: Mapping[str, Any], file: TokenizerFile | None) -> dict[str, Any]:
    """The metadata as a checkpoint that carries `file` keeps them: hashes, and no places of other checkpoints."""
    made = {name: value for name, value in metadata.items() if name != TOKENIZER_FILE}
    if LINEAGE in made:
        made[LINEAGE] = [_without_place(record) for record in made[LINEAGE]]
    return made if file is None else {**made, TOKENIZER_FILE: {"name": file.name, "sha256": file.sha256}}


def as_stored(metadata: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The metadata of the checkpoint in `folder`, with the place of the tokenizer that it carries."""
    own = metadata.get(TOKENIZER_FILE)
    if not isinstance(own, Mapping) or own.get("name") not in NAMES:
        return dict(metadata)
    return {**metadata, TOKENIZER_FILE: {**own, "path": str(folder.absolute() / own["name"])}}


def _without_place(record: Mapping[str, Any]) -> dict[str, Any]:
    file = record.get(TOKENIZER_FILE)
    if not isinstance(file, Mapping):
        return dict(record)
    return {**record, TOKENIZER_FILE: {name: file[name] for name in ("name", "sha256") if name in file}}
