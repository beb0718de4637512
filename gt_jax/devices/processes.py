"""One job in several processes (`jax.distributed`): how they meet, who does what, that all hear of one's failure.

Every process runs the same lines. Where the next step needs what others did, all of them meet in `ProcessGroup.agree`:
an error of one becomes an error of all, so that nobody waits for a process that has given up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from gt_jax.devices.flags import is_distributed
from gt_jax.devices.meeting import Watch, meet
from gt_jax.errors import Failed, Refused, say_error

_NOTICE = 2.0  # seconds until the watch has seen that a process died

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


_watch: list[Watch] = []  # that of this process, while it is one of several


@contextlib.contextmanager
def process_group(args: argparse.Namespace) -> Iterator[ProcessGroup]:
    """Be one process of `jax.distributed`, as the flags say, while the context lasts; alone if they say nothing.

    Of processes that met by hand, what ends one ends all within `--process-timeout`, and an exception ends this process
    here: JAX's own farewell would wait for the others. With --distributed they are JAX's alone, by the same timeout.
    """
    if not is_distributed(args):
        yield ProcessGroup()
        return
    with _results_alone():
        if args.distributed:
            _connect(args.process_timeout, {})
            try:
                yield _greeted()
            finally:
                jax.distributed.shutdown()
            return
        peers = meet(args.coordinator, args.processes, args.process, args.process_timeout)
        _watch.append(Watch(peers, args.process, args.process_timeout))
        try:
            _connect(args.process_timeout, {"coordinator_address": args.coordinator, "num_processes": args.processes,
                                            "process_id": args.process})  # fmt: skip
            yield _greeted()
            jax.distributed.shutdown()
        except BaseException as error:  # noqa: BLE001 - said here, where this process ends
            if not isinstance(error, (Refused, Failed, OSError, KeyboardInterrupt)):
                time.sleep(_NOTICE)  # a collective fails where a process has died: the watch knows which, and says it
            end_together(error)
        _watch.pop().leave()


def end_together(error: BaseException) -> None:
    """Where this process is one of several that met by hand: say why, end the others, and this one; else nothing."""
    if not _watch:
        return
    code = say_error(error)
    _watch[0].fail(str(error) or type(error).__name__, code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _greeted() -> ProcessGroup:
    group = ProcessGroup()
    group.gather(None)
    return group


def _connect(timeout: float, by_hand: dict[str, Any]) -> None:
    """`jax.distributed.initialize`; raises `Refused` where JAX knows of no cluster, `Failed` where it does not connect.

    Processes that met by hand watch each other, so that JAX, which would say it in C++, need not.
    """
    seconds = max(1, math.ceil(timeout))
    try:
        jax.distributed.initialize(
            **by_hand, initialization_timeout=seconds, shutdown_timeout_seconds=seconds,
            heartbeat_timeout_seconds=max(100, 3 * seconds) if by_hand else seconds,
        )
    except ValueError as error:
        raise Refused(f"--distributed: JAX finds no cluster here ({error}); name the processes with --coordinator, "
                      "--processes and --process") from error
    except RuntimeError as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise Failed(f"the processes did not connect within {seconds} s: {line}") from error


@contextlib.contextmanager
def _results_alone() -> Iterator[None]:
    """Standard output for what Python prints there.

    The library that connects the processes says so, at every new group of devices, where it finds file descriptor 1:
    that is standard error meanwhile.
    """
    if sys.stdout is None:  # closed before the start
        yield
        return
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
