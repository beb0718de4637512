"""Contestants in processes of their own that take turns: neither's threads, memory or imports disturb the other's."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple

from experiments.training_measured import sizes
from gt_jax.configs.model import ModelConfig
from gt_jax.errors import Failed


class Job(NamedTuple):
    """What a contestant trains and how: `by` is "ours", or PyTorch: "eager", "compiled", "fla" on a card."""

    by: str
    config: ModelConfig
    rows: int
    tokens: int
    threads: int
    experts_by: str | None = None


class Turn(NamedTuple):
    """Seconds by the wall clock and of all its threads, and the loss before each step."""

    seconds: float
    processor_seconds: float
    losses: list[float]


class Contestant:
    """A model in training in another process; a context manager, at whose end the process is gone."""

    def __init__(self, job: Job) -> None:
        self.job = job
        spawn = multiprocessing.get_context("spawn")  # a fork would share what the parent has imported
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs, job), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._process.terminate()
        self._process.join()

    def turn(self, steps: int, limit: float | None = None) -> Turn:
        """So many steps; raises `Failed` where they do not end, or not within `limit` seconds."""
        self._pipe.send(steps)
        return Turn(*self._answer(limit))

    def about(self) -> dict[str, Any]:
        """What it trains and with what."""
        self._pipe.send(0)
        found: dict[str, Any] = self._answer(None)
        return found

    def _answer(self, limit: float | None) -> Any:
        if not self._pipe.poll(limit):
            raise Failed(f"{self.job.by}: no answer within {limit:.0f} s")
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise Failed(f"{self.job.by}: the process ended with {self._process.exitcode}") from None
        if kind == "failed":
            raise Failed(f"{self.job.by}: {value}")
        return value


def serve(pipe: Connection, job: Job) -> None:
    """In the process: answer each number of steps with its turn, and 0 with what is trained."""
    try:
        limit_processors(job.threads)
        model, done = make(job), 0
        while True:
            steps = pipe.recv()
            if steps:
                turn = measured(model, job, range(done, done + steps))
                done += steps
            pipe.send(("done", tuple(turn) if steps else model.about))
    except EOFError:  # the parent has gone
        return
    except Exception as error:  # noqa: BLE001 — told to the parent, which raises it
        pipe.send(("failed", f"{type(error).__name__}: {str(error)[:500]}"))


def limit_processors(threads: int) -> None:
    """Run on so many processors from here on; XLA makes as many threads as it may use processors."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def make(job: Job) -> Any:
    """The model of a job."""
    if job.by == "ours":
        from experiments.training_measured.ours import Ours

        return Ours(job.config)
    if job.by == "fla":
        from experiments.training_measured.theirs_on_a_card import OnACard

        return OnACard(job.config, job.tokens, job.threads)
    from experiments.training_measured.theirs import Theirs

    return Theirs(job.config, job.tokens, job.threads, job.by == "compiled", job.experts_by)


def measured(model: Any, job: Job, numbers: Sequence[int]) -> Turn:
    """The steps of these numbers, their batches drawn before the clock starts."""
    batches = [sizes.rows_of_tokens(job.config.vocab, job.rows, job.tokens, number) for number in numbers]
    start, used = time.perf_counter(), time.process_time()
    losses = [model.step(batch) for batch in batches]
    return Turn(time.perf_counter() - start, time.process_time() - used, losses)
