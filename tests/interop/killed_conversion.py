"""Runs conversions that are killed: `python killed_conversion.py JOB.json`, one fork each, what happened on stdout.

One is killed (SIGKILL) at its n-th change of the file system, or no file may grow from then on, which stands in for a
full disk. Imports happen once, before the forks.
"""

import json
import os
import resource
import signal
import sys

from gt_jax.errors import run_command
from gt_jax.interop import expected_tensors, tensor_files, to_orbax, to_safetensors
from tests.growth.killed_growth import changes_something
from tests.interop import origin

expected_tensors.model_leaves = origin.contract
LIMIT = 200_000  # bytes: several groups


def small_groups(items, size):
    return tensor_files.groups(items, size, LIMIT)


to_orbax.groups = to_safetensors.groups = small_groups


def convert(job, to, target, kill=0, full=0, count=None):
    """In the child: one conversion, killed at its change `kill`, without room from its change `full` on."""
    done = 0

    def watch(event, arguments):
        nonlocal done
        if changes_something(event, arguments) and job["folder"] in str(arguments[0]):
            done += 1
            if done == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            if done == full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    sys.addaudithook(watch)
    if to == "orbax":
        to_orbax.to_orbax([job["source"]], target, overrides=origin.OVERRIDES)
    else:
        to_safetensors.to_safetensors(job["ours"], target)
    if count is not None:
        os.write(count, str(done).encode())


def run(job, to, target, **options):
    """In the parent: fork, and report how it ended, what it said, and what is there then."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 2)
        run_command(lambda argv: convert(job, to, target, **options) or 0)
    os.close(writing)
    with open(reading) as stderr:
        said = stderr.read()
    _, status = os.waitpid(child, 0)
    return {"status": os.waitstatus_to_exitcode(status), "stderr": said, "there": os.path.exists(target),
            "left": sorted(os.listdir(job["folder"]))}


def scenarios(job, to, points):
    """Kills at `points` moments spread over a conversion, each on what the one before left; then an undisturbed one."""
    reading, writing = os.pipe()
    counted = run(job, to, f"{job['folder']}/counted-{to}", count=writing)
    changes = int(os.read(reading, 100))
    target = f"{job['folder']}/{to}"
    full = run(job, to, target, full=changes // 2)
    kills = [run(job, to, target, kill=1 + point * (changes - 2) // points) for point in range(points)]
    return {"counted": counted, "full": full, "kills": kills, "last": run(job, to, target)}


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        job = json.load(file)
    print(json.dumps({to: scenarios(job, to, points) for to, points in (("orbax", 4), ("safetensors", 2))}))
