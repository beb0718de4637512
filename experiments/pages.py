"""What the pages of results share: writing them, their tables, rows of earlier runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.contract import KEPT
from gt_jax.errors import Failed
from gt_jax.files import write_atomically

Stored = Mapping[str, Any]


def page_writer(
    name: str, markdown: Callable[[Stored], str], draw: Callable[[Stored, Path], None] | None = None
) -> Callable[[Path, Stored], str]:
    """What writes OUTPUT/NAME.md of a stored file, and NAME.png where there is something to `draw`, and gives the text.
    """

    def write(output: Path, stored: Stored) -> str:
        text = markdown(stored)
        write_atomically(output / f"{name}.md", text)
        if draw is not None:
            draw(stored, output / f"{name}.png")
        return text

    return write


def markdown_table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> list[str]:
    """Lines of a Markdown table; raises `Failed` where a row has another number of cells."""
    if any(len(row) != len(head) for row in rows):
        raise Failed(f"a row of the table {', '.join(head)} has another number of cells")
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def earlier_runs(rows: Sequence[Mapping[str, Any]], task: str | None = None) -> list[str]:
    """Which rows, of a task or of all, are an earlier run's, and what that was."""
    runs: dict[str, tuple[Mapping[str, Any], dict[str, None]]] = {}
    for row in rows:
        if KEPT in row and task in (None, row["task"]):
            runs.setdefault(json.dumps(row[KEPT]), (row[KEPT], {}))[1][row["model"]] = None
    return [line for run, models in runs.values() for line in (
        f"Rows of an earlier run, with the times of its machine: {'; '.join(models)}. `{run['command']}`, "
        f"{run['seconds'] / 60:.0f} minutes on {run['machine']['cores']} cores ({run['machine']['processor']}).", "")]
