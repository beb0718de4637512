"""The options that name data, shared by the commands: text files, JSON lines, a TFDS dataset, tasks, and their mix."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from gt_jax.configs.data import Weight
from gt_jax.errors import Refused, refuse_all
from gt_jax.files import local_name

JSON_LINES = re.compile(r".*\.(jsonl|ndjson)(\.gz)?", re.IGNORECASE | re.DOTALL)
NOTHING: dict[str, Any] = {
    "text": (), "json_lines": (), "tfds": None, "tfds_dir": None, "tasks": (), "mix": (), "curriculum_rows": 0,
}  # fmt: skip
"""The fields of DataConfig that name data, as they are where none is named."""


def add_source_flags(p: Any, text: str) -> None:
    """The options on a parser or a group of it; `text` says what --text is for."""
    p.add_argument("--text", nargs="+", type=local_name, metavar="FILE", help=text)
    p.add_argument("--tfds", help="prepared TFDS dataset, for example tiny_shakespeare")
    p.add_argument("--tfds-dir", type=local_name, help="where TFDS datasets lie")
    p.add_argument("--task", action="append", metavar="NAME[:OPTION=VALUE,…]", help="a generated task, for example "
                   "pointer_jumps or variable_chains:hardest=8,chains=4; may be given several times")  # fmt: skip
    p.add_argument("--mix", metavar="PART=WEIGHT,…", help="shares of text, tasks and JSON-lines files in the rows, for "
                   "example text=0.5,variable_chains=0.5 (default: equal shares of what is named)")  # fmt: skip


def source_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of DataConfig that the options name: all of `NOTHING` where a source is named, else what is given.

    Raises `Refused` that lists all that cannot be read.
    """
    found: dict[str, Any] = {}
    if arguments.text or arguments.tfds or arguments.task:
        found = {**NOTHING, **file_fields(arguments.text or ()), "tasks": read_tasks(arguments.task or ())}
    named = {"tfds": arguments.tfds, "tfds_dir": arguments.tfds_dir}
    mix = {} if arguments.mix is None else {"mix": read_mix(arguments.mix)}
    return found | {name: value for name, value in named.items() if value is not None} | mix


def file_fields(files: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Files by what they are: `json_lines` by their ending .jsonl or .ndjson, packed as .gz too, the others `text`."""
    return {"text": tuple(file for file in files if not JSON_LINES.fullmatch(file)),
            "json_lines": tuple(file for file in files if JSON_LINES.fullmatch(file))}


def read_mix(words: str) -> tuple[Weight, ...]:
    """The weights of `PART=WEIGHT,…`; raises `Refused` that lists what is none."""
    found, wrong = [], []
    for one in words.split(","):
        part, _, weight = one.rpartition("=")
        try:
            found.append(Weight(part, float(weight)))
        except Refused as error:
            wrong.append(f"{one!r}: " + str(error).splitlines()[-1].removeprefix("  - "))
        except ValueError:
            wrong.append(f"{one!r} is no PART=WEIGHT, for example text=0.5")
    refuse_all(wrong, f"--mix {words} cannot be read:")
    return tuple(found)


def read_tasks(given: Sequence[str]) -> tuple[str, ...]:
    """Each task with all of its options."""
    from gt_jax.tasks.registry import notation, read_task  # here, so that --help needs no numpy

    found, wrong = [], []
    for words in given:
        try:
            found.append(notation(read_task(words)))
        except Refused as error:
            heading, *problems = str(error).splitlines()
            wrong.append(" ".join([heading, "; ".join(line.removeprefix("  - ") for line in problems)]).strip())
    refuse_all(wrong, "--task cannot be read:")
    return tuple(found)
