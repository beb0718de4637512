"""How long a disk takes to give and to take so many bytes, and what a command beside that takes in time and memory.

* The floor: `cat SOURCE/* > /dev/null`, then `dd if=/dev/zero conv=fsync` of the target's bytes, on the same disk.
* The command: a process of its own, wall time with a final `sync`; its peak resident memory as the system counts it
  (VmHWM), and its processor time. Floor and command take turns, each from a cold cache.
* Where other programs want the processors, the command waits for them and the floor hardly does: the load is said.
* Cold: /proc/sys/vm/drop_caches where that may be written, else posix_fadvise(DONTNEED) on every file; it says which.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gt_jax.errors import Failed

BLOCK = 16 * 2**20


def files(folder: Path) -> list[Path]:
    """All files of a checkpoint."""
    return sorted(file for file in folder.rglob("*") if file.is_file())


def size(folder: Path) -> int:
    """Bytes of a checkpoint."""
    return sum(file.stat().st_size for file in files(folder))


def forget(folder: Path) -> str:
    """Make the next read of `folder` come from the disk; returns how."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return "drop_caches"
    except OSError:
        for file in files(folder):
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
        return "fadvise"


class Timed(NamedTuple):
    """Wall and processor seconds of a command, and the GiB that it held."""

    seconds: float
    peak: float
    processor: float


def timed(command: Sequence[str]) -> Timed:
    """Run one command; raises `Failed` with what it said when it fails."""
    started, before = time.monotonic(), processor_seconds()
    with tempfile.TemporaryFile("w+") as said:
        process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said), 0
        while process.poll() is None:
            peak = max(peak, high_water(process.pid))
            time.sleep(0.02)
        seconds = time.monotonic() - started
        if process.returncode:
            said.seek(0)
            raise Failed(f"{' '.join(command[:4])} ended with {process.returncode}: {said.read()[-1000:]}")
    return Timed(seconds, peak / 2**20, processor_seconds() - before)


def processor_seconds() -> float:
    """Of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def high_water(process: int) -> int:
    """The most KiB that a running process has held (VmHWM); 0 where it has ended.

    Not ru_maxrss, which also counts what the parent held when it started the process.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def floor(source: Path, workdir: Path, target_bytes: int) -> tuple[float, float]:
    """Seconds to read the source, and to write as many zeros as the target has bytes."""
    forget(source)
    names = [str(file) for file in files(source)]
    reading = timed(["bash", "-c", 'cat "$@" > /dev/null', "cat", *names]).seconds
    zeros = workdir / "zeros"
    writing = timed(["dd", "if=/dev/zero", f"of={zeros}", f"bs={BLOCK}", f"count={-(-target_bytes // BLOCK)}",
                     "conv=fsync", "status=none"]).seconds  # fmt: skip
    zeros.unlink()
    return reading, writing


def run(command: Sequence[str], source: Path) -> Timed:
    """A command that reads `source`, from a cold cache and with its final sync."""
    forget(source)
    started = time.monotonic()
    found = timed(command)
    os.sync()
    return found._replace(seconds=time.monotonic() - started)


def touch_memory() -> None:
    """Have the machine hand out memory before anything is timed; a virtual one is slow to, the first time."""
    timed([sys.executable, "-c", "b = bytearray(2**31); b[::4096] = bytes([1]) * 2**19"])


def measure(name: str, command: Sequence[str], source: Path, target: Path, repeats: int) -> dict[str, Any]:
    """Floor and command `name`, which makes `target` of `source`, in turns; the last target stays.

    The target's bytes are those of a first run, which is not counted.
    """
    rounds = []
    touch_memory()
    run(command, source)
    target_bytes = size(target)
    for repeat in range(repeats):
        shutil.rmtree(target)
        reading, writing = floor(source, target.parent, target_bytes)
        done = run(command, source)
        ratio, load = done.seconds / (reading + writing), os.getloadavg()[0]
        rounds.append({"read": reading, "write": writing, name: done.seconds, "ratio": ratio, "peak_gib": done.peak,
                       "processor": done.processor, "load": load})
        print(f"  {repeat + 1}: floor {reading:.1f} + {writing:.1f} s, {name} {done.seconds:.1f} s, ratio {ratio:.2f}, "
              f"{done.processor:.1f} s of processor, load {load:.1f}, peak {done.peak:.2f} GiB", flush=True)
    ratios = [one["ratio"] for one in rounds]
    return {"source_bytes": size(source), "target_bytes": target_bytes, "rounds": rounds,
            "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
            "peak_gib": max(one["peak_gib"] for one in rounds)}


def line(name: str, found: dict[str, Any]) -> str:
    """One result in words."""
    ratio = found["ratio"]
    return (f"{name}: {found['source_bytes'] / 1e9:.2f} -> {found['target_bytes'] / 1e9:.2f} GB, "
            f"{ratio['median']:.2f} times the disk's floor ({ratio['least']:.2f} to {ratio['most']:.2f}), "
            f"peak {found['peak_gib']:.2f} GiB")
