"""One job in several processes (`jax.distributed`): how they meet, who does what, that all hear of one's failure.

Every process runs the same lines. Where the next step needs what others did, all of them meet in `ProcessGroup.agree`:
an error of one becomes an error of all, so that nobody waits for a process that has given up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from gt_jax.devices.flags import is_distributed
from gt_jax.errors import Failed, Refused

T = TypeVar("T")


class ProcessGroup:
    """The processes of this run (`jax.distributed`); a single one most of the time."""

    def __init__(self) -> None:
        self.index, self.count = jax.process_index(), jax.process_count()

    @property
    def first(self) -> bool:
        """Whether this is process 0, which prepares and publishes."""
        return self.index == 0

    def agree(self, work: Callable[[], T]) -> T:
        """`work()`; its exception, or, where another process has one, `Refused` or `Failed` with that one's words."""
        if self.count == 1:
            return work()
        result, failure = None, None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - raised below, when all have heard of it
            failure = error
        status = None if failure is None else [isinstance(failure, Refused), f"{failure}"]
        statuses = self.gather(status)
        if failure is not None:
            raise failure
        for index, other in enumerate(statuses):
            if other is not None:
                refused, message = other
                raise (Refused if refused else Failed)(message if refused else f"process {index}: {message}")
        return result  # type: ignore[return-value]

    def on_first(self, work: Callable[[], object]) -> None:
        """Run `work` in the first process alone; the others wait for it, and hear of its error as in `agree`."""
        self.agree(lambda: work() if self.first else None)

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every process, in their order."""
        if self.count == 1:
            return [value]
        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = np.asarray(multihost_utils.process_allgather(np.asarray([data.size], np.int32))).reshape(-1)
        padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
        padded[: data.size] = data
        rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(self.count, -1)
        return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def share(self, costs: Mapping[str, int]) -> list[str]:
        """The names that are this process's work: largest first, each to the process with the least so far."""
        loads, own = [0] * self.count, []
        for name, cost in sorted(costs.items(), key=lambda item: (-item[1], item[0])):
            index = min(range(self.count), key=lambda process: loads[process])
            loads[index] += cost
            if index == self.index:
                own.append(name)
        return sorted(own)


@contextlib.contextmanager
def process_group(args: argparse.Namespace) -> Iterator[ProcessGroup]:
    """Be one process of `jax.distributed`, as the flags say, while the context lasts; alone if they say nothing."""
    if not is_distributed(args):
        yield ProcessGroup()
        return
    by_hand = {"coordinator_address": args.coordinator, "num_processes": args.processes, "process_id": args.process}
    with _results_alone():
        jax.distributed.initialize(**({} if args.distributed else by_hand))
        try:
            group = ProcessGroup()
            group.gather(None)
            yield group
        finally:
            jax.distributed.shutdown()


@contextlib.contextmanager
def _results_alone() -> Iterator[None]:
    """Standard output for what Python prints there.

    The library that connects the processes says so, at every new group of devices, where it finds file descriptor 1:
    that is standard error meanwhile.
    """
    printed, results = sys.stdout, os.dup(1)
    printed.flush()
    os.dup2(2, 1)
    try:
        with open(results, "w", encoding=printed.encoding, errors=printed.errors, closefd=False) as sys.stdout:
            yield
    finally:
        sys.stdout = printed
        os.dup2(results, 1)
        os.close(results)
