"""Independent units of a study, made at once by processes of one core each.

    with Workers(units, make, jobs=2, say=print) as workers:
        tuned = workers.all({"dense at 0.003": 0.003, "dense at 0.006": 0.006})     # name -> argument of `make`
        final = workers.all({f"seed{seed}/dense": (seed, best) for seed in range(3)})

- `make(argument)` gives the unit. With more than one job it is a function of a module, or a `functools.partial` of one
  and of values that pickle: every worker imports it anew. What it keeps, such as compiled programs, its worker keeps;
  `alike` of a name says which units share it, and a worker goes on with those, so that two compile nothing twice.
- A worker holds itself to one core before it asks JAX for devices. XLA then starts one thread of its own pool: two
  workers on two cores run as fast as one beside nothing. XLA's flags leave the pool as wide as the machine.
- A unit whose worker was killed is made again, `TRIES` times in all. An exception in a worker ends the study: `Failed`
  with its message, after the traceback on standard error. What is finished is kept.
- One job is this process, on all its cores and whatever accelerator it has.
- Every compiled program holds memory maps, of which Linux gives a process 65,530: after an hour of many models the next
  one would fail with "Cannot allocate memory". So programs are dropped where they hold half of them.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from experiments.units import Unit, Units
from gt_jax.errors import Failed

TRIES = 3
Make = Callable[[Any], Unit]
Alike = Callable[[str], Any]


class _Worker(NamedTuple):
    process: Any
    pipe: Connection


class Workers:
    """`jobs` processes that make units of `units`; they end with the `with` block."""

    def __init__(self, units: Units, make: Make, jobs: int = 1, say: Callable[[str], None] = lambda line: None) -> None:
        self._units, self._make, self._jobs, self._say = units, make, jobs, say
        self._idle: list[tuple[int, _Worker]] = []
        self._busy: dict[str, tuple[int, _Worker]] = {}
        self._free = list(range(jobs))
        self._made: dict[int, list[Any]] = {}  # by core: the kinds of units its worker made, the last one last

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        for _, worker in (*self._idle, *self._busy.values()):
            worker.process.terminate()
            worker.process.join()
            worker.pipe.close()
        self._idle, self._busy, self._made, self._free = [], {}, {}, list(range(self._jobs))

    def all(self, wanted: Mapping[str, Any], alike: Alike = lambda name: None) -> dict[str, dict[str, Any]]:
        """Every unit by name, in the order asked for; made where it is not found. `wanted`: the argument of each."""
        began, done = time.monotonic(), {}
        for name in wanted:
            there = self._units.found(name)
            if there is not None:
                done[name] = there
        found = len(done)

        def finished(name: str, made: Unit) -> None:
            done[name] = self._units.keep(name, made)
            spent = (time.monotonic() - began) / (len(done) - found) * (len(wanted) - len(done)) / 60
            self._say(f"{name}: {made.get('line', 'done')} ({len(done)} of {len(wanted)}; about {spent:.0f} min left)")

        if found:
            self._say(f"{found} of {len(wanted)} units found done")
        missing = {name: argument for name, argument in wanted.items() if name not in done}
        if self._jobs == 1:
            for name, argument in missing.items():
                finished(name, self._make(argument))
                drop_programs()
        else:
            self._share_out(missing, finished, alike)
        return {name: done[name] for name in wanted}

    def _share_out(self, missing: Mapping[str, Any], finished: Callable[[str, Unit], None], alike: Alike) -> None:
        queue, tries = list(missing), dict.fromkeys(missing, 0)
        while queue or self._busy:
            while queue and (self._idle or self._free):
                core, worker = self._idle.pop() if self._idle else self._new(self._free.pop(0))
                name = self._next(queue, core, alike)
                queue.remove(name)
                tries[name] += 1
                self._busy[name] = core, worker
                kinds = self._made.setdefault(core, [])
                self._made[core] = [*(kind for kind in kinds if kind != alike(name)), alike(name)]
                with contextlib.suppress(BrokenPipeError):  # it was killed while idle: its end of the pipe says so
                    worker.pipe.send(missing[name])
            ready = wait([worker.pipe for _, worker in self._busy.values()])
            for name in [name for name, (_, worker) in self._busy.items() if worker.pipe in ready]:
                made = self._answer(name, tries[name])
                if made is None:
                    queue.insert(0, name)
                else:
                    finished(name, made)

    def _answer(self, name: str, tries: int) -> Unit | None:
        """What the worker of a unit made; None where it was killed. Raises `Failed` with an error in it."""
        core, worker = self._busy.pop(name)
        try:
            made, message = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            worker.pipe.close()
            del self._made[core]
            self._free.append(core)
            self._say(f"{name}: its worker ended with {worker.process.exitcode}; the unit is made again")
            if tries == TRIES:
                raise Failed(f"{name}: {tries} workers died of it, the last with {worker.process.exitcode}") from None
            return None
        self._idle.append((core, worker))
        if message is not None:
            raise Failed(f"{name}: {message}")
        unit: Unit = made
        return unit

    def _next(self, queue: list[str], core: int, alike: Alike) -> str:
        """Like what this worker made, the last first; else like nothing that another one made; else the first."""
        mine = self._made.get(core, [])
        others = {kind for other, kinds in self._made.items() if other != core for kind in kinds}
        again = (name for kind in reversed(mine) for name in queue if alike(name) == kind)
        new = (name for name in queue if alike(name) not in others)
        return next(itertools.chain(again, new, queue))

    def _new(self, core: int) -> tuple[int, _Worker]:
        spawn = multiprocessing.get_context("spawn")  # a fork of a process that runs JAX may hang
        here, there = spawn.Pipe()
        process = spawn.Process(target=_work, args=(self._make, there, core), daemon=True)
        process.start()
        there.close()  # so that this end hears when the worker's is gone
        return core, _Worker(process, here)


def hold_to_one_core(index: int) -> None:
    """Run this process on the `index`-th of its cores; where the system cannot, threads share them as they do."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[index % len(cores)]})


def drop_programs(process: Path = Path("/proc/self/maps"), limit: Path = Path("/proc/sys/vm/max_map_count")) -> bool:
    """Drop this process' compiled programs where it has more than half the memory maps that it may; says whether.

    They are compiled again where they are needed. Systems without these files have no such limit.
    """
    if not process.exists() or not limit.exists():
        return False
    with process.open("rb") as maps:
        crowded = 2 * sum(1 for _ in maps) > int(limit.read_text())
    if crowded:
        import jax  # loaded by whoever made the programs

        jax.clear_caches()
        gc.collect()
    return crowded


def _end_with_parent() -> None:
    """End this process where its parent is killed: a unit that nobody waits for would go on for minutes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(make: Make, pipe: Connection, core: int) -> None:
    """A worker: arguments in, (unit, None) or (None, message) out, until the pipe is closed or its parent ends."""
    hold_to_one_core(core)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            argument = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        answer: tuple[dict[str, Any] | None, str | None]
        try:
            answer = dict(make(argument)), None
        except KeyboardInterrupt:  # the terminal sends it to all; the study's own process ends the study
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, the process that waits must hear of it
            traceback.print_exc()
            answer = None, f"{type(error).__name__}: {error}"
        drop_programs()
        with contextlib.suppress(BrokenPipeError):  # the study was killed; the next `recv` says so
            pipe.send(answer)
