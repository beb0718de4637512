"""Rows of the result, and the table of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.gpu_measured.cases import Case
from experiments.pages import markdown_table

OURS, THEIRS = ("pallas_gpu", "xla"), "fla"
COLUMNS = ("part", "shape", "pass", *OURS, THEIRS, "ours over theirs")


def row_of(
    case: Case, name: str, milliseconds: Mapping[str, Sequence[float]], off: Mapping[str, float]
) -> dict[str, Any]:
    """JSON of one pass of a case: every round of every side, and how far their outputs are off the XLA path's."""
    return {"part": "rule", "shape": case._asdict(), "name": case.name, "pass": name,
            "milliseconds": {who: list(times) for who, times in milliseconds.items()}, "off": dict(off)}  # fmt: skip


def ratio(row: Mapping[str, Any]) -> float | None:
    """Our best side's fastest round over theirs; None without theirs, or where the two are not of one model."""
    times = row["milliseconds"]
    mine = [min(times[name]) for name in OURS if name in times]
    return min(mine) / min(times[THEIRS]) if THEIRS in times and mine else None


def table(result: Mapping[str, Any]) -> list[str]:
    """The machine on a line, then a row each: milliseconds of the fastest round (and of the slowest)."""
    about = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    return [about, "", *markdown_table([_cells(row) for row in result["rows"]], COLUMNS)]


def _cells(row: Mapping[str, Any]) -> list[str]:
    times, found = row["milliseconds"], ratio(row)
    cells = [f"{min(times[who]):.3f} ({max(times[who]):.3f})" if who in times else "-" for who in (*OURS, THEIRS)]
    return [row["part"], row["name"], row["pass"], *cells, "-" if found is None else f"{found:.2f}"]
