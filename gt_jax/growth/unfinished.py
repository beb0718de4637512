"""What an interrupted growth leaves beside its target, and what can still be made of it.

TARGET.unfinished is all there is until TARGET exists: arrays of which some values are not written yet, and journals
that tell which are. At the end the metadata join them, the journals go, and the rename publishes. An unfinished folder
without journals is therefore either whole, with only its name missing, or has nothing that counts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from gt_jax.checkpoints.checksums import Pieces
from gt_jax.checkpoints.folders import JOURNALS, UNFINISHED, damage, sync
from gt_jax.checkpoints.leftovers import ARRAYS, EMPTY, GROWTH, clear
from gt_jax.configs.tokenizer_file import to_store
from gt_jax.errors import Refused, refuse_all
from gt_jax.files import parse_json
from gt_jax.growth.journal import gather_journals, read_journals

Kind = Literal["grown", "retrofitted"]
RECORDS: dict[Kind, str] = {"grown": "grown_from", "retrofitted": "retrofitted_from"}
"""Where the metadata say of each kind how it was made."""
_NOUNS: dict[Kind, str] = {"grown": "growth", "retrofitted": "retrofit"}
_OUTSIDE = ("source", "content_hash", "counts", "stood")  # of a record: where things lay, not what came of them


class UnfinishedGrowth:
    """The unfinished growth of one target, as it is on disk."""

    def __init__(self, target: Path, kind: Kind = "grown") -> None:
        self.target, self.noun = target, _NOUNS[kind]
        self.folder = target.with_name(target.name + UNFINISHED)

    def refuse_unless(self, resume: bool) -> None:
        """Raise `Refused` when something is there and `resume` is not set."""
        if self.folder.exists() and not resume:
            raise Refused(f"{self.folder.name} in {self.target.parent}: a {self.noun} of {self.target.name} was "
                          "interrupted (or is running); complete it with --resume, or delete this first")

    def whole(self) -> dict[str, Any] | None:
        """The metadata of a folder in which only the last name is missing, else None."""
        if not self.folder.is_dir() or any(self.folder.glob(JOURNALS)) or damage(self.folder) is not None:
            return None
        metadata = parse_json((self.folder / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
        return metadata if _record(metadata) is not None else None

    def refuse_another(self, identity: Mapping[str, Any]) -> None:
        """Raise `Refused`, naming the fields, when what is there belongs to a growth with another identity."""
        found = self._identity()
        if found is None:
            return
        lines = [f"{name}: {_short(found.get(name))} there, {_short(value)} now"
                 for name, value in identity.items() if found.get(name) != value]
        self._refuse(lines, "The fields that differ:")

    def refuse_another_source(self, lines: list[str]) -> None:
        """Raise `Refused` with `lines`, one for each thing in which the source's content differs."""
        self._refuse(lines, "The source's content differs:")

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Make the folder, with one journal of all that is finished; what cannot be kept is deleted.

        Raises `Refused` where the folder is not a growth's.
        """
        found, finished = read_journals(self.folder)
        if found is None:
            clear(self.folder, (GROWTH, ARRAYS, EMPTY), f"the {self.noun} of {self.target.name}")
            self.folder.mkdir()
            sync(self.folder.parent)
            finished = {}
        gather_journals(self.folder, identity, finished)

    def finished(self) -> dict[str, str]:
        """Digest by source tensor of all that is finished."""
        return {name: one.digest for name, one in read_journals(self.folder)[1].items()}

    def pieces(self) -> Pieces:
        """Checksums of all that was written, by file."""
        made: Pieces = {}
        for one in read_journals(self.folder)[1].values():
            for file, pieces in one.pieces.items():
                made.setdefault(file, []).extend(pieces)
        return made

    def forget_journals(self) -> None:
        """The folder is whole: nothing is left to go on with."""
        for file in self.folder.glob(f"{JOURNALS}*"):
            file.unlink()
        sync(self.folder)

    def discard(self) -> None:
        """Delete all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _identity(self) -> dict[str, Any] | None:
        metadata = self.whole()
        if metadata is None:
            return read_journals(self.folder)[0]
        return identity_of(metadata)

    def _refuse(self, lines: list[str], heading: str) -> None:
        refuse_all(lines, f"{self.folder.name} in {self.target.parent} belongs to another {self.noun}; repeat that one "
                   f"with --resume, or delete this first. {heading}")


def identity_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """All that the target's values depend on, but for the source's: where that lies may change, its content may not."""
    record = _record(metadata)
    assert record is not None
    made_from = {name: value for name, value in metadata[record].items() if name not in _OUTSIDE}
    own = {name: value for name, value in to_store(metadata, None).items() if name != record}
    return json.loads(json.dumps({**own, **made_from}))


def _record(metadata: Mapping[str, Any]) -> str | None:
    """The name of the record that says how it was made, if it was made so."""
    return next((name for name in RECORDS.values() if name in metadata), None)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
