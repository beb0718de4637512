"""The text of a study: the option that names it, and enough of it for what the study asks."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gt_jax.errors import refuse_all
from gt_jax.files import local_name
from gt_jax.text.flags import JSON_LINES

if TYPE_CHECKING:
    from gt_jax.text.batches import Text
    from gt_jax.text.data import Data


def add_text_flag(p: Any) -> None:
    """--text on a parser or a group of it."""
    p.add_argument("--text", nargs="+", type=text_file, default=(), metavar="FILE",
                   help="text files instead of the Python library's sources")


def text_file(name: str) -> str:
    """The name of a text file; raises what argparse makes a refusal of for an address, and for JSON lines, of which a
    study would learn the JSON."""
    if JSON_LINES.fullmatch(local_name(name)):
        raise argparse.ArgumentTypeError(f"{name} has JSON lines, and studies read plain text: write the documents' "
                                         "text to a file, and give that")
    return name


def refuse_short(opened: Text | Data, wanted: Mapping[str, int]) -> None:
    """Refuse a text of which a part ("held-out", "tuning") has fewer whole batches than `wanted`: the page says by how
    much models were judged."""
    asked = {"held-out": opened.held_out, "tuning": opened.tuning}
    wrong = []
    for part, count in wanted.items():
        batches = asked[part](count)
        rows = sum(int((batch["targets"] >= 0).any(-1).sum()) for batch in batches)
        size = len(batches[0]["targets"]) if batches else 1
        if rows < count * size:
            wrong.append(f"{rows} {part} rows, the study needs {count * size}; give more text with --text")
    refuse_all(wrong, f"{opened.summary()}:")
