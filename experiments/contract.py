"""The stored file of a study: {"command", "config", "machine", "seconds", "rows": [...], "summary": {...}, "content"}.

Rows are sorted, so that the same units give the same bytes but for the seconds, whatever order they were made in.
`content` is a hash of what the study read; another study's file is refused by it and by the config.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.units import check_same
from gt_jax.configs.json_config import Config, read_object
from gt_jax.errors import Refused, refuse_all
from gt_jax.files import write_atomically

KEYS = ("command", "config", "machine", "seconds", "rows", "summary", "content")
ORDER = ("task", "model", "seed")
ANSWERS: dict[str, Any] = {"accuracy": {}, "passes": {}, "spearman": None, "accuracy_forced": {}}
"""What every row of the studies of depth, of growth and of early exit says of answers; so where it was not asked."""

Rows = Sequence[Mapping[str, Any]]
PLACES = ("--work", "--output")
RUN = ("command", "machine", "seconds")
KEPT = "kept_from"
"""Of a row that an earlier run made: what that run says of itself, `RUN`."""


def command_line(module: str, words: Sequence[str], files: Iterable[str] = ()) -> str:
    """What was typed, without `PLACES`, which no figure depends on, and `files` by their names alone: a stored file
    says nothing of the machine's folders."""
    names = {file: Path(file).name for file in files}
    kept = [word for before, word in zip(["", *words], words, strict=False)
            if word.partition("=")[0] not in PLACES and before not in PLACES]  # fmt: skip
    return shlex.join(["python", "-m", module, *(names.get(word, word) for word in kept)])


def in_order(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows by task, model, seed, then all else: as they are stored, and as every page has them."""

    def order(row: Mapping[str, Any]) -> tuple[str, ...]:
        # numbers by their size: of equal length, as text
        keys = (row.get(key, "") for key in ORDER)
        return (*(f"{key:012d}" if isinstance(key, int) else str(key) for key in keys), json.dumps(row, sort_keys=True))

    return sorted(rows, key=order)


def stored(
    *, command: str, config: Config, machine: Mapping[str, Any], seconds: float, rows: Iterable[Mapping[str, Any]],
    summary: Mapping[str, Any], content: str,
) -> dict[str, Any]:  # fmt: skip
    """The file's object, as it will be read: rows `in_order`."""
    found = {"command": command, "config": config.to_json(), "machine": dict(machine), "seconds": round(seconds, 1),
             "rows": in_order(rows), "summary": dict(summary), "content": content}  # fmt: skip
    return dict(json.loads(_text(found)))


def prepare(output: Path) -> None:
    """Make the folder of the results before hours of work; raises `Refused` where it cannot be written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--output {output} cannot be made: {error.strerror}") from error
    if not os.access(output, os.W_OK | os.X_OK):
        raise Refused(f"--output {output} cannot be written")


def write(file: Path, found: Mapping[str, Any]) -> None:
    """Write what `stored` gave, whole; the folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, _text(found))


def read(file: Path) -> dict[str, Any]:
    """A stored file; raises `Refused` where it cannot be read or is no such file."""
    found = read_object(file, "--output")
    if missing := [key for key in KEYS if key not in found]:
        raise Refused(f"{file} is no stored result of a study: it has no {', '.join(missing)}")
    rows = found["rows"]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "task" in row for row in rows):
        raise Refused(f"{file} is no stored result of a study: rows must be a list of objects, each with a task")
    if twice := len(rows) - len({json.dumps(row, sort_keys=True) for row in rows}):
        raise Refused(f"{file} has {twice} rows twice; a mean would count them twice")
    return found


def lent(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a stored file, each with what made it under `KEPT`: this file's run, or the one before it."""
    own = {key: found[key] for key in RUN}
    return [{KEPT: own, **row} for row in found["rows"]]


def check_kept(file: Path, found: Mapping[str, Any], kept: Rows, names: Collection[str], key: str = "task") -> None:
    """Refuse to write over `file` where rows of it would be lost: whose `key` is no name of the study, or all."""
    wrong = [f"it has rows of {name}, which this study leaves out; they would be lost"
             for name in sorted({str(row[key]) for row in found["rows"]} - set(names))]  # fmt: skip
    if not kept:
        wrong.append("none of its rows would be the same in this study; it is of another scale, or all has changed")
    refuse_all(wrong, f"--keep does not go with {file}; name another --output, where an old file is not needed:")


def check_output(output: Path, name: str, study: Config, content: str) -> None:
    """Refuse an --output that holds another study's `name`.json, or somebody's page, before any work is done."""
    if output.exists() and not output.is_dir():
        raise Refused(f"--output {output} is a file; name a folder")
    if (file := output / f"{name}.json").exists():
        check_same(file, study, content)
        return
    others = [other for suffix in (".md", ".png") if os.path.lexists(other := output / f"{name}{suffix}")]
    refuse_all([f"{other} is there without {file.name}, so it is not this study's" for other in others],
               f"--output {output} cannot be written to; name another:")  # fmt: skip


def standing(output: Path, name: str) -> bytes | None:
    """The stored file as it is, None where there is none: whether another study has written meanwhile."""
    file = output / f"{name}.json"
    return file.read_bytes() if file.exists() else None


def rendered(file: Path, summary: Callable[[Rows], dict[str, Any]], write: Callable[[dict[str, Any]], str]) -> str:
    """What `write` makes of a stored file, its summary made anew; raises `Refused` for rows of no whole study."""
    stored = read(file)
    try:
        return write({**stored, "summary": summary(stored["rows"])})
    except (LookupError, ValueError, TypeError, AttributeError, StopIteration) as error:
        raise Refused(f"{file} cannot be rendered: its config or rows are not those of a whole study "
                      f"({type(error).__name__}: {error}); was it edited?") from error


def _text(found: Mapping[str, Any]) -> str:
    """A line a row, so that two files are compared line by line; a number that is not finite is an error."""
    rows = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in found["rows"])
    rest = {key: found[key] for key in KEYS if key != "rows"}
    head = json.dumps(rest, indent=1, allow_nan=False)
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'
