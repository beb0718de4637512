"""What the pages of results share."""

from __future__ import annotations

from collections.abc import Sequence

from gt_jax.errors import Failed


def markdown_table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> list[str]:
    """Lines of a Markdown table; raises `Failed` where a row has another number of cells."""
    if any(len(row) != len(head) for row in rows):
        raise Failed(f"a row of the table {', '.join(head)} has another number of cells")
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
