"""How fast is `gt_jax.grow` beside the disk it reads from and writes to, and how much memory does it hold?

    python -m experiments.bench_grow [--preset-source 3b] [--scales 1] [--repeats 3] [--workdir DIR]

* The growth is `python -m gt_jax.grow --no-check`. The floor, and how both are measured: experiments/disk_floor.py.
* `--scales 0.5,1,2`: the same for half and double the parameters; peak memory should not change.
* WORKDIR needs room for one source and one target (25 GB for 3b); what is made there is deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import disk_floor
from gt_jax.configs import presets
from gt_jax.errors import run_command
from gt_jax.files import local_path
from gt_jax.options import at_least, positives


def measure(source: Path, workdir: Path, repeats: int, extra: Sequence[str]) -> dict[str, Any]:
    """Floor and growth, in turns."""
    target = workdir / "target"
    command = [sys.executable, "-m", "gt_jax.grow", str(source), str(target), "--no-check", *extra]
    found = disk_floor.measure("grow", command, source, target, repeats)
    shutil.rmtree(target)
    return found


def one_scale(preset: str, scale: float, workdir: Path, repeats: int, extra: Sequence[str]) -> dict[str, Any]:
    """`measure` for a random source of one size, which is deleted afterwards."""
    source = workdir / "source"
    disk_floor.timed([sys.executable, "-m", "experiments.write_random_checkpoint", str(source), "--preset", preset,
                      "--scale", str(scale)])
    try:
        return {"preset": preset, "scale": scale, **measure(source, workdir, repeats, extra)}
    finally:
        shutil.rmtree(source)


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
        print(f"cold caches by {disk_floor.forget(workdir)}, {os.cpu_count()} cores, "
              f"{shutil.disk_usage(workdir).free / 1e9:.0f} GB free", flush=True)
        results, repeats = [], arguments.repeats
        for scale in (None,) if arguments.source else arguments.scales:
            results.append(one_scale(arguments.preset_source, scale, workdir, repeats, arguments.extra)
                           if scale else measure(arguments.source.resolve(), workdir, repeats, arguments.extra))
            words = f"{results[-1].get('preset', 'source')} x {results[-1].get('scale', 1):g}"
            print(disk_floor.line(words, results[-1]), flush=True)
    finally:
        if own:
            shutil.rmtree(workdir)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
