"""Runs growths that are killed: `python killed_growth.py JOB.json`, one fork a scenario, JSON about each on stdout.

Imports happen once, before the forks; nothing starts a thread of JAX before them. A scenario is killed (SIGKILL) at its
n-th change of the file system, or after some seconds; or from the n-th change on no file may grow, which stands in for
a full disk. A scenario without any of these counts the changes of an undisturbed growth.
"""

import json
import os
import resource
import signal
import sys
import time
from typing import Any

import jax

from gt_jax.errors import run_command
from gt_jax.growth import stream
from gt_jax.growth.plan import Plan

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree")


def changes_something(event: str, arguments: tuple[Any, ...]) -> bool:
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    return event in CHANGES or bool(writes)


def grow(job: dict[str, Any], scenario: dict[str, Any]) -> None:
    """In the child: one growth, killed where the scenario says."""
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if changes_something(event, arguments) and job["folder"] in str(arguments[0]):
            count += 1
            if count == scenario.get("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if count == scenario.get("full"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    sys.addaudithook(watch)
    stream.grow_checkpoint(job["source"], scenario["target"], plan=Plan.from_json(job["plan"]), **job["options"])
    if "count" in scenario:
        done = count
        with open(scenario["count"], "w") as file:
            file.write(str(done))


def run(job: dict[str, Any], scenario: dict[str, Any]) -> dict[str, Any]:
    """In the parent: fork, perhaps kill, report how it ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 2)
        run_command(lambda argv: grow(job, scenario) or 0)
    os.close(writing)
    if "seconds" in scenario:
        time.sleep(scenario["seconds"])
        os.kill(child, signal.SIGKILL)
    with open(reading) as stderr:
        said = stderr.read()
    _, status = os.waitpid(child, 0)
    return {"status": os.waitstatus_to_exitcode(status), "stderr": said}


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        job = json.load(file)
    tensors = {path: jax.ShapeDtypeStruct(shape, dtype) for path, (shape, dtype) in job["child"].items()}
    stream.child_abstract = lambda *arguments: tensors  # what the model code says, asked once by the test
    print(json.dumps([run(job, scenario) for scenario in job["scenarios"]]))
