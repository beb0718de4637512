"""A checkpoint of the origin as files: one, several shards, or a folder of them with or without an index.

- A file named `…-00002-of-00005.…` stands for its whole set; half of a set is refused, and so is an index of which a
  file, or a tensor in a file, is not there.
- Every tensor is known by its canonical name; the other names it came under are kept, for their values must agree.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gt_jax.errors import Refused, refuse_all
from gt_jax.files import other_kind, read_json
from gt_jax.interop.safetensors import SafetensorsFile
from gt_jax.interop.tensor_files import Info, TensorFile, Unreadable, same_bytes
from gt_jax.interop.tensor_names import canonical, unwrapped
from gt_jax.interop.torch_files import TorchFile

_INDEX = ".index.json"
_TORCH = (".pt", ".pth", ".bin", ".ckpt")
SAFETENSORS = (".safetensors",)
_ARCHIVE = b"PK\x03\x04"  # of torch.save; two bytes of it also begin a header of safetensors of 19,280 bytes
KINDS = (SAFETENSORS, _TORCH)
_MOST_SHARDS = 100_000  # of a set: no model has more, and the names of as many as a file may claim fill the memory
_SHARD = re.compile(r"(?P<stem>.*?)(?P<number>\d+)-of-(?P<count>\d+)(?P<rest>\.\w+)")


class TensorLocation(NamedTuple):
    """One name of a tensor in one file."""

    file: TensorFile
    name: str

    @property
    def info(self) -> Info:
        return self.file.tensors[self.name]

    def read(self) -> np.ndarray:
        return self.file.read(self.name)

    def __str__(self) -> str:
        return f"{self.name} ({self.file.path.name})"


class Source:
    """Every tensor of a checkpoint by its canonical name, from all of its files; `ignored` names were left out."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.files, problems = open_files(paths)
        self.ignored: list[str] = []
        self.places: dict[str, list[TensorLocation]] = {}
        for file in self.files:
            for name in file.tensors:
                known = canonical(name)
                if known is None:
                    self.ignored.append(name)
                else:
                    places = self.places.setdefault(known, [])
                    places.insert(0 if name == known else len(places), TensorLocation(file, name))
        refuse_all(problems, f"{', '.join(map(str, paths))} is not whole:")
        self.notes = [note for file in self.files for note in (*file.notes, *_wrappers(file))]
        self.step = next((file.step for file in self.files if file.step is not None), None)
        self.config = next((file.config for file in self.files if file.config is not None), None)
        self.lineage = next((file.lineage for file in self.files if file.lineage is not None), None)

    @property
    def tensors(self) -> dict[str, Info]:
        """Shape and dtype by canonical name."""
        return {name: places[0].info for name, places in self.places.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor by its canonical name."""
        return self.places[name][0].read()

    def aliases(self) -> int:
        """How many names stand beside the first one of their tensor."""
        return sum(len(places) - 1 for places in self.places.values())

    def differing_aliases(self) -> list[str]:
        """One line for every name whose tensor differs from the one it should be."""
        return [f"{first} and {other} name one tensor, but {problem}"
                for first, *others in self.places.values() for other in others
                if (problem := _difference(first, other))]


def _wrappers(file: TensorFile) -> list[str]:
    """A line of the prefixes that stood before a file's names, and are taken off."""
    pairs = [(name, plain) for name in file.tensors if name != (plain := unwrapped(name))]
    found = Counter(repr(name.removesuffix(plain)) if name.endswith(plain) else "parts within" for name, plain in pairs)
    words = ", ".join(f"{prefix} of {count} names" for prefix, count in sorted(found.items()))
    return [f"{file.path.name}: the prefix of a wrapped model is taken off, {words}"] if words else []


def _difference(a: TensorLocation, b: TensorLocation) -> str | None:
    if a.info != b.info:
        return f"one is {a.info}, the other {b.info}"
    return None if same_bytes(a.read(), b.read()) else "their values differ"


def open_files(paths: Sequence[Path], kinds: Sequence[Sequence[str]] = KINDS) -> tuple[list[TensorFile], list[str]]:
    """The readers of all files, and where an index and its files do not agree; raises `Refused` for missing files.

    `kinds` are the endings to look for in a folder.
    """
    files: dict[Path, str] = {}
    maps: dict[Path, dict[str, Path]] = {}
    for path in paths:
        found, index = _files(Path(os.path.abspath(path)), kinds)
        files |= dict.fromkeys(found, "")
        if index is not None:
            maps[index] = _weight_map(index)
            files |= dict.fromkeys(maps[index].values(), f", but {index.name} names it")
    for file in list(files):
        for sibling in _shards(file):
            files.setdefault(sibling, f", but {file.name} belongs to the same set")
    refuse_all([f"{file} is not there{why}" for file, why in files.items() if not file.is_file()],
               "not every file of the checkpoint is there:")
    readers = _readers(files)
    return list(readers.values()), [line for index, names in maps.items() for line in _disagree(index, names, readers)]


def _readers(files: Iterable[Path]) -> dict[Path, TensorFile]:
    """A reader a file; raises `Refused` that says of every file that cannot be read why."""
    readers, problems = {}, []
    for file in files:
        try:
            readers[file] = _reader(file)
        except Refused as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    refuse_all([str(error) for error in problems], "several files cannot be read:")
    return readers


def _disagree(index: Path, names: Mapping[str, Path], readers: Mapping[Path, TensorFile]) -> list[str]:
    """One line for every tensor that only the index has, or only the file."""
    lines = [f"{name} is not in {file.name}, where {index.name} has it" for name, file in names.items()
             if name not in readers[file].tensors]
    return lines + [f"{name} in {file.name} is not in {index.name}" for file in sorted(set(names.values()))
                    for name in readers[file].tensors if names.get(name) != file]


def _files(path: Path, kinds: Sequence[Sequence[str]]) -> tuple[list[Path], Path | None]:
    """(files, index) that a path of the user stands for."""
    if not path.exists():
        raise Refused(f"{path} does not exist")
    if path.is_file():
        return ([], path) if path.name.endswith(_INDEX) else ([path], None)
    if (path / "_CHECKPOINT_METADATA").exists():
        raise Refused(f"{path} is a checkpoint of gt_jax already; --to safetensors writes it in the origin's names")
    others = tuple(end + _INDEX for kind in KINDS if kind not in kinds for end in kind)
    indices = sorted(file for file in path.glob(f"*{_INDEX}") if not file.name.endswith(others))
    if len(indices) > 1:
        raise Refused(f"{path} has {len(indices)} indices, {', '.join(index.name for index in indices)}; name one")
    if indices:
        return [], indices[0]
    found = [sorted(file for file in path.iterdir() if file.suffix in kind) for kind in kinds]
    if not any(found):
        ends = ", ".join(end for kind in kinds for end in kind)
        raise Refused(f"{path} holds no tensor file ({ends}) and no *{_INDEX}")
    if len(found) > 1 and all(found):
        raise Refused(f"{path} holds both {found[0][0].name} and {found[1][0].name}; name the files to read")
    return next(filter(None, found)), None


def _weight_map(index: Path) -> dict[str, Path]:
    """The file of every tensor that an index lists."""
    try:
        names = read_json(index, once=True)["weight_map"]
        if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
            raise TypeError("weight_map must be an object from tensor to file")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{index} is no index of shards: {error}") from error
    outside = sorted({file for file in names.values() if Path(file).name != file})
    refuse_all([f"{file!r} is not the name of a file beside it" for file in outside], f"{index} names files elsewhere:")
    return {name: index.parent / file for name, file in names.items()}


def _shards(file: Path) -> list[Path]:
    """The whole set that a file named …-NUMBER-of-COUNT… belongs to, numbered from 1, or from 0 if there is a 0."""
    match = _SHARD.fullmatch(file.name)
    if match is None:
        return []
    width, count = len(match["number"]), int(match["count"])
    if count > _MOST_SHARDS:
        raise Refused(f"{file.name} says that it is one of {count} files; at most {_MOST_SHARDS} are read")

    def name(number: int) -> Path:
        return file.with_name(f"{match['stem']}{number:0{width}d}-of-{match['count']}{match['rest']}")

    first = 0 if name(0).exists() else 1
    if not first <= int(match["number"]) < first + count:
        raise Refused(f"{file.name} has a number outside of its set of {count}")
    return [name(number) for number in range(first, first + count)]


def _reader(path: Path) -> TensorFile:
    """The reader of a file: by its first bytes, an archive's or not, and by the endings of older torch files."""
    if (kind := other_kind(path)) is not None:
        raise Unreadable(f"{path} holds no tensors; it is {kind}")
    with open(path, "rb") as stream:
        start = stream.read(4)
    if start == _ARCHIVE or path.suffix in _TORCH:
        return TorchFile(path)
    return SafetensorsFile(path)


def summary(source: Source) -> dict[str, Any]:
    """Where a checkpoint came from, as the metadata keeps it."""
    files = {file.path.name: file.path.stat().st_size for file in source.files}
    return {"source": str(source.files[0].path.parent), "files": files, "tensors": len(source.places)}
