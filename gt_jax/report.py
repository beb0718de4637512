"""`python -m gt_jax.report RUN… -o report.html`: what runs did, side by side, on one page that needs no other file.

    python -m gt_jax.report runs/a runs/b -o report.html --png curves.png
    python -m gt_jax.report runs/a -o report.html --overwrite

- The page holds a table of the runs, the curves as a picture inside it, the alerts in words
  and the config fields in which the runs differ; it loads nothing from anywhere.
- It reads config.json and metrics.jsonl, and of a step where in its data the run began; so a run may be going on: a
  half-written last line is left out, a run without metrics says so.
- The same runs give the same bytes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from gt_jax.checkpoints.folders import batches_before
from gt_jax.errors import Failed, Refused, first_line, refuse_all, run_command, say
from gt_jax.files import behind_link, local_path, write_atomically, wrong_place
from gt_jax.monitoring.alerts import texts
from gt_jax.monitoring.run_page import Run, page, picture, read_run


def write_report(sources: Sequence[Path], output: Path, png: Path | None = None, overwrite: bool = False) -> list[Run]:
    """Write the page, and the picture by itself to `png`; returns the runs.

    Raises `Refused` that lists all that keeps it from being written, before anything is, and `Failed` where the curves
    could not be drawn; the page is written then.
    """
    wrong = [f"{source} is named twice" for n, source in enumerate(sources) if source in sources[:n]]
    wrong += _unwritable("-o", output, overwrite) + ([] if png is None else _unwritable("--png", png, overwrite))
    if output.suffix.lower() == ".png":
        wrong.append(f"-o {output}: the page is HTML; name it {output.with_suffix('.html').name}, a picture is --png")
    if png is not None and png.suffix.lower() != ".png":
        wrong.append(f"--png {png}: pictures are PNG; name it {png.with_suffix('.png').name}")
    refuse_all(wrong, "the report cannot be written:")
    runs = [read_run(source, batches_before(source)) for source in sources]
    image, problem = _curves(runs)
    if png is not None and image is None and problem is None:
        raise Refused(f"--png {png}: no run has metrics to draw yet; leave it out, or come back later")
    write_atomically(output, page(runs, image, problem), overwrite)
    if problem is not None:
        raise Failed(f"{output} is written, without curves: they could not be drawn ({problem})")
    if png is not None and image is not None:
        write_atomically(png, image, overwrite)
    return runs


def _curves(runs: Sequence[Run]) -> tuple[bytes | None, str | None]:
    """The picture, and why there is none if it could not be drawn: the table and the alerts are not lost for that."""
    try:
        return picture(runs), None
    except Exception as error:  # noqa: BLE001 - of a library that draws, any; it is said on the page and raised later
        return None, first_line(error)


def _unwritable(flag: str, path: Path, overwrite: bool) -> list[str]:
    if path.is_dir():
        return [f"{flag} {path} is a folder; name a file in it"]
    if os.path.lexists(path) and not overwrite:
        return [f"{flag} {path} exists; name a new file, or replace it with --overwrite"]
    if path.exists() and not path.is_file():
        return [f"{flag} {path} is a pipe or a device, which nothing can replace; name a file"]
    problem = wrong_place(behind_link(path))
    return [f"{flag} {path}: {problem}"] if problem else []


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m gt_jax.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", type=local_path, nargs="+", help="run directories, of gt_jax.train")
    p.add_argument("-o", "--output", type=local_path, required=True, metavar="FILE.html", help="the page to write")
    p.add_argument("--png", type=local_path, metavar="FILE.png", help="write the picture by itself too")
    p.add_argument("--overwrite", action="store_true", help="replace files that are there")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; the alerts are said on stderr too."""
    arguments = parser().parse_args(argv)
    runs = write_report(arguments.run, arguments.output, arguments.png, arguments.overwrite)
    for run in runs:
        for text in texts(run.found):
            say(f"{run.name}: {text}")
    count = sum(len(run.found) for run in runs)
    print(f"{len(runs)} run{'s' * (len(runs) != 1)}, {count} alert{'s' * (count != 1)}: {arguments.output}")
    return 0


if __name__ == "__main__":
    run_command(main)
