"""What a growth has finished, in its unfinished folder: one file a process, a line for each source tensor.

- The first line is the growth's identity: all that the target's values depend on, but for the source's values.
- Every further line is a source tensor, with its digest, whose part of the target is on the disk, and the checksums of
  what was written for it (gt_jax.checkpoints.checksums). Lines are added one by one, each made durable; a kill can
  tear the last one only, and that one is ignored.
- A growth that goes on gathers what it finds into one new file first. No file times are looked at.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gt_jax.checkpoints.checksums import Pieces
from gt_jax.checkpoints.folders import JOURNALS, sync
from gt_jax.files import parse_json


class Finished(NamedTuple):
    """A source tensor whose part of the target is on the disk: its digest, and what was written by file."""

    digest: str
    pieces: Pieces


def read_journals(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Finished]]:
    """(identity, what is finished by source tensor) of all journals in `folder`; identity is None without any."""
    identity, finished = None, dict[str, Finished]()
    for file in sorted(folder.glob(JOURNALS)):
        lines = []
        for line in file.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # a torn line
                lines.append(parse_json(line))
        if lines and "identity" in lines[0]:
            identity = lines[0]["identity"]
            finished |= {line["tensor"]: Finished(line["digest"], line.get("pieces", {}))
                         for line in lines[1:] if "tensor" in line}
    return identity, finished


def gather_journals(folder: Path, identity: Mapping[str, Any], finished: Mapping[str, Finished]) -> None:
    """Leave one journal, of process 0, with this content."""
    name = JOURNALS.replace("*", "0")
    lines = [{"identity": identity}, *({"tensor": tensor, **one._asdict()} for tensor, one in finished.items())]
    temporary = folder / f"{name}.tmp"
    with open(temporary, "w") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / name)
    sync(folder)
    for other in folder.glob(JOURNALS):
        if other.name != name:
            other.unlink()


class Journal:
    """The journal that process number `process` adds to."""

    def __init__(self, folder: Path, process: int, identity: Mapping[str, Any]) -> None:
        path = folder / JOURNALS.replace("*", str(process))
        new = not path.exists()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if new:
            self._add({"identity": identity})
            sync(folder)

    def finished(self, name: str, digest: str, pieces: Pieces) -> None:
        """Note a source tensor; everything made of it must be on the disk."""
        self._add({"tensor": name, **Finished(digest, pieces)._asdict()})

    def close(self) -> None:
        """No more lines."""
        os.close(self._file)

    def _add(self, line: Mapping[str, Any]) -> None:
        data = (json.dumps(line) + "\n").encode()
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)
