"""`python process_group_job.py JOB.json --coordinator …`: several runs in one group of processes, for one start.

JOB.json lists the words of each; each is what `python -m gt_jax.train` does after it has joined the group.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from gt_jax import train
from gt_jax.devices.processes import ProcessGroup, process_group
from gt_jax.errors import run_command
from gt_jax.training import loop


@contextlib.contextmanager
def noted() -> Iterator[list[str]]:
    """A digest of every batch that a run is given, the held-out ones first."""
    seen: list[str] = []
    global_batch = loop.global_batch

    def note(batch: dict[str, np.ndarray], *rest: object) -> dict[str, object]:
        seen.append(hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest())
        return global_batch(batch, *rest)  # type: ignore[arg-type]

    loop.global_batch = note  # type: ignore[assignment]
    try:
        yield seen
    finally:
        loop.global_batch = global_batch


def trained(group: ProcessGroup, words: Sequence[str]) -> list[str]:
    """Train as `words` say; the digests of the batches."""
    with noted() as seen:
        train._train(train.parser().parse_args(words), group)
    return seen


def main(argv: Sequence[str] | None = None) -> int:
    """All of the job; process I notes its batches in batches.I.json."""
    job, *flags = argv or sys.argv[1:]
    with open(job) as file:
        work = json.load(file)
    loop.make_trainer = functools.cache(loop.make_trainer)  # runs of one config compile once
    with process_group(train.parser().parse_args(["run", *flags])) as group:
        batches = [trained(group, words) for words in work]
        with open(f"batches.{group.index}.json", "w") as file:
            json.dump(batches, file)
    return 0


if __name__ == "__main__":
    run_command(main)
