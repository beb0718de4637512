"""What the two benchmarks of training share: spreads, tables and files."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.training_measured import sizes
from gt_jax.files import local_path
from gt_jax.options import at_least


def add_common(p: argparse.ArgumentParser) -> None:
    """The flags of both benchmarks."""
    p.add_argument("--size", choices=tuple(sizes.SIZES), default="small")
    p.add_argument("--batch", type=at_least(0), default=4, help="rows a step (4)")
    p.add_argument("--tokens", type=at_least(0), default=256, help="of a row (256)")
    p.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    p.add_argument("--output", type=local_path, help="folder to keep the results in")


def common_problems(options: argparse.Namespace, counts: Sequence[str], folders: Sequence[str]) -> list[str]:
    """What is wrong with numbers that must be at least 1, with --tokens, and with folders that must be there."""
    wrong = [f"--{name} {value}: at least 1 is needed" for name in counts if (value := getattr(options, name)) < 1]
    if options.tokens < 2:
        wrong.append(f"--tokens {options.tokens}: at least 2 are needed")
    return wrong + [f"--{name} {folder} is no folder" for name in folders
                    if (folder := getattr(options, name)) is not None and not folder.is_dir()]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def seconds(name: str, values: Mapping[str, float]) -> list[str]:
    """A row of a table."""
    return [name, *(f"{values[key]:.2f}" for key in ("median", "least", "most"))]


def note(words: str) -> None:
    """Say how far it is, beside the result."""
    print(words, file=sys.stderr, flush=True)


def keep(name: Path, report: Mapping[str, Any], markdown: Sequence[str]) -> None:
    """Write NAME.json and NAME.md."""
    name.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    name.with_suffix(".md").write_text("\n".join(markdown) + "\n")
