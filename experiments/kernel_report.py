"""What would the TPU kernels cost on a chip that is not here? Compiles them for it and reads the compiler's schedule.

    python -m experiments.kernel_report [--chip v5e|v5p|v6e|tpu7x] [--case NAME ...] [--kernels-only] [--json]
                                        [--output experiments/results]

* Needs `jax[tpu]` (its compiler), no TPU. One that does not compile prints its error, and the exit code is 1.
* What the columns are, and how they are read: `kernels_measured/{schedule,tables}.py` and
  `gt_jax/devices/pods/hbm_traffic.py`; the chips' rates and where they come from: `chips.py`; how an operation joins:
  `cases.py`, `registry.py`.
* The XLA path of the same arguments is compiled beside the kernels; --kernels-only leaves it out, and says so.
* --output keeps the rows as kernels_CHIP.json, in place of those of the same cases, and writes kernels.md from the
  JSON of all chips there. Where another compiler made those of other cases it refuses; all of them take their place.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from experiments.kernels_measured.chips import CHIPS
from experiments.kernels_measured.compiler import set_up
from gt_jax.errors import run_command
from gt_jax.files import local_path


def main(dump: Path, arguments: Sequence[str] | None = None) -> int:
    """Print the report; 0 if every case compiled, 1 if one did not, 2 without the compiler or for wrong words."""
    from experiments.kernels_measured import tables
    from experiments.kernels_measured.registry import all_cases
    from experiments.kernels_measured.report import rows_of

    cases = all_cases()
    options = _parser(cases).parse_args(arguments)
    if importlib.util.find_spec("libtpu") is None:
        print("kernel_report: the TPU compiler is not installed: pip install 'jax[tpu]'", file=sys.stderr)
        return 2
    chosen = [case for name, case in cases.items() if {name, case.operation} & set(options.case)]
    if options.output and not options.output.is_dir():
        print(f"kernel_report: --output {options.output} is no folder", file=sys.stderr)
        return 2
    report = _about(options.chip) | {"rows": []}
    if options.output and (lost := _lost(options.output, report, {case.name for case in chosen} & set(cases))):
        print(f"kernel_report: --output has rows of another compiler or JAX, which would go: {', '.join(lost)}; make "
              "them anew too, or name another folder", file=sys.stderr)  # fmt: skip
        return 2
    for case in chosen:
        report["rows"] += rows_of(case, options.chip, dump, with_xla=not options.kernels_only)
        if options.output:  # what is measured is kept, whatever comes after
            _keep(options.output, report, list(cases))
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print(f"{options.chip}, libtpu {report['libtpu']}\n\n{tables.terminal(report['rows'])}")
    return 0 if all(row["compiles"] for row in report["rows"]) else 1


def _parser(cases: dict[str, Any]) -> argparse.ArgumentParser:
    operations = list(dict.fromkeys(case.operation for case in cases.values()))
    parser = argparse.ArgumentParser(description="Static cost of the TPU kernels, compiled for a chip.")
    parser.add_argument("--chip", choices=CHIPS, default="v6e")
    parser.add_argument("--case", choices=[*cases, *operations], nargs="+", default=operations, help="default: all")
    parser.add_argument("--kernels-only", action="store_true", help="leave out the XLA path, which compiles slowly")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--output", type=local_path, help="folder to keep the rows in, as JSON and Markdown")
    return parser


def _about(chip: str) -> dict[str, Any]:
    import jax
    import libtpu

    return {"chip": chip, "libtpu": getattr(libtpu, "__version__", "unknown"), "jax": jax.__version__}


def _stored(folder: Path, chip: str) -> dict[str, Any]:
    path = folder / f"kernels_{chip}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _lost(folder: Path, report: dict[str, Any], chosen: Collection[str]) -> list[str]:
    """The cases whose rows another compiler or JAX made and that are not chosen: figures of two are not set side by
    side."""
    before = _stored(folder, report["chip"])
    same = all(before.get(key) == report[key] for key in ("libtpu", "jax"))
    return [] if same else [row["case"] for row in before.get("rows", []) if row["case"] not in chosen]


def _keep(folder: Path, report: dict[str, Any], names: Sequence[str]) -> None:
    """The rows in place of those of the same cases; of another compiler's, or of cases that are no more, none stay."""
    from experiments.kernels_measured.tables import markdown

    before = _stored(folder, report["chip"])
    same = all(before.get(key) == report[key] for key in ("libtpu", "jax"))
    measured = {row["case"] for row in report["rows"]}
    rows = [row for row in before.get("rows", []) if same and row["case"] not in measured and row["case"] in names]
    rows = sorted([*rows, *report["rows"]], key=lambda row: names.index(row["case"]))
    (folder / f"kernels_{report['chip']}.json").write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
    reports = {chip: found for chip in CHIPS if (found := _stored(folder, chip))}
    (folder / "kernels.md").write_text(markdown(reports))


def command(arguments: Sequence[str] | None = None) -> int:
    """`main` with a folder for the compiler's dumps."""
    with tempfile.TemporaryDirectory(prefix="kernel-report-") as folder:
        set_up(Path(folder))
        return main(Path(folder), arguments)


if __name__ == "__main__":
    run_command(command)
