"""`python killed_training.py JOB.json`: training runs that end badly, one fork a life, JSON about each on stdout.

Imports happen once, before the forks. A life {"change": n} is killed (SIGKILL) at its n-th change of the file system in
the run's folder; {"line": n, "seconds": s} so long after the n-th line of metrics; from the n-th save of {"full": n}
on no file may grow, which stands in for a full disk. One without any of these is left alone.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import grain  # noqa: F401 - what the runs import

from gt_jax import train
from gt_jax.errors import run_command
from gt_jax.monitoring.metrics import Recorder
from gt_jax.training import loop  # noqa: F401
from tests.growth.killed_growth import changes_something


def watch(life: dict[str, Any], run: str) -> None:
    """Arrange the end of this process."""
    changes = saves = lines = 0

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes, saves
        if not changes_something(event, arguments) or f"{run}/" not in f"{arguments[0]}/":
            return
        changes += 1
        saves += event == "os.mkdir" and f"{arguments[0]}".endswith(".unfinished.orbax-checkpoint-tmp")
        if changes == life.get("change"):
            os.kill(os.getpid(), signal.SIGKILL)
        if saves == life.get("full"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    sys.addaudithook(look)
    log = Recorder.log

    def logged(self: Recorder, step: int, **values: Any) -> None:
        nonlocal lines
        log(self, step, **values)
        lines += 1
        if lines == life.get("line"):
            timer = threading.Timer(life["seconds"], os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()

    Recorder.log = logged  # type: ignore[method-assign]


def live(job: dict[str, Any], life: dict[str, Any]) -> dict[str, Any]:
    """One life of the run, begun or resumed: how it ended, what it said and what it left."""
    run = Path(job["run"])
    words = ["--resume"] if (run / "config.json").exists() else job["words"]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 2)
        os.dup2(writing, 1)
        watch(life, job["run"])
        run_command(train.main, [job["run"], *words])
    os.close(writing)
    with open(reading) as stream:
        said = stream.read()
    _, status = os.waitpid(child, 0)
    left = sorted(path.name for path in run.iterdir()) if run.exists() else []
    return {"life": life, "status": os.waitstatus_to_exitcode(status), "said": said, "left": left}


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        job = json.load(file)
    for life in job["lives"]:
        print(json.dumps(live(job, life)), flush=True)
