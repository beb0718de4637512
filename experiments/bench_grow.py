"""How fast is `gt_jax.grow` beside the disk it reads from and writes to, and how much memory does it hold?

    python -m experiments.bench_grow [--preset-source 3b] [--scales 1] [--repeats 3] [--workdir DIR]

* The floor: `cat SOURCE/* > /dev/null`, then `dd if=/dev/zero conv=fsync` of the target's bytes, on the same disk.
* The growth: `python -m gt_jax.grow --no-check` as a process of its own, wall time with a final `sync`; its peak
  resident memory as the system counts it (VmHWM). Floor and growth take turns, each from a cold cache.
* Cold: /proc/sys/vm/drop_caches where that may be written, else posix_fadvise(DONTNEED) on every file; it says which.
* `--scales 0.5,1,2`: the same for half and double the parameters; peak memory should not change.
* WORKDIR needs room for one source and one target (25 GB for 3b); what is made there is deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gt_jax.configs import presets
from gt_jax.errors import Failed, run_command
from gt_jax.files import local_path
from gt_jax.options import at_least, positives

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


def timed(command: Sequence[str]) -> tuple[float, float]:
    """(seconds, peak resident GiB) of one command; raises `Failed` with what it said when it fails."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said), 0
        while process.poll() is None:
            peak = max(peak, high_water(process.pid))
            time.sleep(0.02)
        seconds = time.monotonic() - started
        if process.returncode:
            said.seek(0)
            raise Failed(f"{' '.join(command[:4])} ended with {process.returncode}: {said.read()[-1000:]}")
    return seconds, peak / 2**20


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
    reading, _ = timed(["bash", "-c", 'cat "$@" > /dev/null', "cat", *names])
    zeros = workdir / "zeros"
    writing, _ = timed(["dd", "if=/dev/zero", f"of={zeros}", f"bs={BLOCK}", f"count={-(-target_bytes // BLOCK)}",
                     "conv=fsync", "status=none"])
    zeros.unlink()
    return reading, writing


def grow(source: Path, target: Path, extra: Sequence[str]) -> tuple[float, float]:
    """Seconds of one growth with its final sync, and its peak resident GiB."""
    forget(source)
    started = time.monotonic()
    _, peak = timed([sys.executable, "-m", "gt_jax.grow", str(source), str(target), "--no-check", *extra])
    os.sync()
    return time.monotonic() - started, peak


def touch_memory() -> None:
    """Have the machine hand out memory before anything is timed; a virtual one is slow to, the first time."""
    timed([sys.executable, "-c", "b = bytearray(2**31); b[::4096] = bytes([1]) * 2**19"])


def measure(source: Path, workdir: Path, repeats: int, extra: Sequence[str]) -> dict[str, Any]:
    """Floor and growth, in turns; the target's bytes are those of a first growth, which is not counted."""
    target, rounds = workdir / "target", []
    touch_memory()
    grow(source, target, extra)
    target_bytes = size(target)
    shutil.rmtree(target)
    for repeat in range(repeats):
        reading, writing = floor(source, workdir, target_bytes)
        seconds, peak = grow(source, target, extra)
        shutil.rmtree(target)
        rounds.append({"read": reading, "write": writing, "grow": seconds, "ratio": seconds / (reading + writing),
                       "peak_gib": peak})
        print(f"  {repeat + 1}: floor {reading:.1f} + {writing:.1f} s, grow {seconds:.1f} s, ratio "
              f"{rounds[-1]['ratio']:.2f}, peak {peak:.2f} GiB", flush=True)
    ratios = [one["ratio"] for one in rounds]
    return {"source_bytes": size(source), "target_bytes": target_bytes, "rounds": rounds,
            "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
            "peak_gib": max(one["peak_gib"] for one in rounds)}


def one_scale(preset: str, scale: float, workdir: Path, repeats: int, extra: Sequence[str]) -> dict[str, Any]:
    """`measure` for a random source of one size, which is deleted afterwards."""
    source = workdir / "source"
    timed([sys.executable, "-m", "experiments.write_random_checkpoint", str(source), "--preset", preset,
           "--scale", str(scale)])
    try:
        return {"preset": preset, "scale": scale, **measure(source, workdir, repeats, extra)}
    finally:
        shutil.rmtree(source)


def line(found: dict[str, Any]) -> str:
    """One result in words."""
    ratio = found["ratio"]
    return (f"{found.get('preset', 'source')} x {found.get('scale', 1):g}: {found['source_bytes'] / 1e9:.2f} -> "
            f"{found['target_bytes'] / 1e9:.2f} GB, {ratio['median']:.2f} times the disk's floor "
            f"({ratio['least']:.2f} to {ratio['most']:.2f}), peak {found['peak_gib']:.2f} GiB")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset-source", default="3b", choices=sorted(presets.PRESETS))
    parser.add_argument("--scales", type=positives, default=[1.0], help="sizes of the source, for example 0.5,1,2 (1)")
    parser.add_argument("--source", type=local_path, help="a checkpoint that is there, instead of presets")
    parser.add_argument("--repeats", type=at_least(1), default=3)
    parser.add_argument("--workdir", type=local_path, help="where to make sources and targets (a temporary folder)")
    parser.add_argument("--json", type=local_path)
    parser.add_argument("extra", nargs="*", help="after --: arguments for gt_jax.grow")
    arguments = parser.parse_args(argv)
    own = arguments.workdir is None
    workdir = Path(tempfile.mkdtemp(prefix="bench_grow")) if own else arguments.workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        print(f"cold caches by {forget(workdir)}, {os.cpu_count()} cores, "
              f"{shutil.disk_usage(workdir).free / 1e9:.0f} GB free", flush=True)
        results, repeats = [], arguments.repeats
        for scale in (None,) if arguments.source else arguments.scales:
            results.append(one_scale(arguments.preset_source, scale, workdir, repeats, arguments.extra)
                           if scale else measure(arguments.source.resolve(), workdir, repeats, arguments.extra))
            print(line(results[-1]), flush=True)
    finally:
        if own:
            shutil.rmtree(workdir)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
