"""The explicit list of a map plan: `1-8,1-4,1-8` or a CSV file, source layers counted from 1.

- On the command line and in a CSV without a head: layers and ranges, separated by commas and lines, in target order.
- In a CSV with a head: one row a target layer (or range) in the column `source`; other columns are not read.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path

from gt_jax.errors import Refused, refuse_all

_RANGE = re.compile(r"([0-9]{1,9})(?:\s*-\s*([0-9]{1,9}))?")
EXAMPLE = "1-8,1-4,1-8"


def read_map(text: str, layers: int) -> tuple[int, ...]:
    """Source layers by target position, counted from 0, of a list or of the CSV file that `text` names.

    Raises `Refused` with every item that is no layer or range of a source of `layers` layers.
    """
    path = Path(text)
    if path.suffix.lower() == ".csv" or (len(text) < 255 and path.is_file()):
        return _expanded(_cells(path), layers, f"map file {path}")
    return _expanded(((f"item {number}", item) for number, item in enumerate(text.split(","), 1)), layers,
                     f"--map {text!r}")


def spelled(layers: Iterable[int]) -> str:
    """Source layers counted from 0 in the notation of the list, runs as ranges: 0,1,2,6 is 1-3,7."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{first + 1}" if first == last else f"{first + 1}-{last + 1}" for first, last in runs)


def _cells(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [(f"line {number}", [cell.strip() for cell in row])
                    for number, row in enumerate(csv.reader(file), 1) if any(cell.strip() for cell in row)]
    except FileNotFoundError:
        raise Refused(f"map file {path} does not exist; write a list such as {EXAMPLE} or name a CSV file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Refused(f"map file {path} cannot be read: {error}") from None
    head = [cell.lower() for cell in rows[0][1]] if rows else []
    if "source" not in head:
        return [(line, cell) for line, row in rows for cell in row if cell]
    column = head.index("source")
    return [(line, row[column] if column < len(row) else "") for line, row in rows[1:]]


def _expanded(items: Iterable[tuple[str, str]], layers: int, origin: str) -> tuple[int, ...]:
    found: list[int] = []
    wrong = []
    for where, item in items:
        match = _RANGE.fullmatch(item.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if 1 <= first <= last <= layers:
            found.extend(range(first - 1, last))
        else:
            wrong.append(f"{where} is {item.strip()!r}; a layer from 1 to {layers} or a rising range such as "
                         f"1-{layers} is needed")
    if not found and not wrong:
        wrong.append(f"it names no layer; write for example 1-{layers},1-{layers}")
    refuse_all(wrong, f"{origin} is not a list of source layers:")
    return tuple(found)
