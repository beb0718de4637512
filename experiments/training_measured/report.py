"""What the two benchmarks of training share: spreads, tables and files."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def seconds(name: str, values: Mapping[str, float]) -> list[str]:
    """A row of a table."""
    return [name, *(f"{values[key]:.2f}" for key in ("median", "least", "most"))]


def note(words: str) -> None:
    """Say how far it is, beside the result."""
    print(words, file=sys.stderr, flush=True)


def markdown_table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def keep(name: Path, report: Mapping[str, Any], markdown: Sequence[str]) -> None:
    """Write NAME.json and NAME.md."""
    name.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    name.with_suffix(".md").write_text("\n".join(markdown) + "\n")
