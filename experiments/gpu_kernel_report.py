"""What do the Hopper kernels take of a card that is not here? Compiles them for an H100, reads the assembler's report.

    python -m experiments.gpu_kernel_report [--case NAME ...] [--json] [--output FILE.json]

* Needs Python 3.12, JAX 0.12 with jax-cuda13-plugin, and a ptxas (`make test-gpu-compile` installs them); no GPU.
* registers, spills and shared memory are what ptxas and Mosaic say of each kernel, the same at every run of the same
  versions. `launched` counts what the whole compiled function executes, XLA's own kernels among them, a loop's as
  often as it runs.
* Nothing here is a time. What did not compile prints its error, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gt_jax.errors import Failed, run_command
from gt_jax.files import local_path

COLUMNS = ("case", "kernel", "registers", "spilled_bytes", "shared_bytes")


class Case(NamedTuple):
    """One compilation: widths, dtype, the most that beta may be, with segments, with gradients."""

    key_width: int
    value_width: int
    dtype: str
    most_beta: float = 1.0
    segmented: bool = False
    gradients: bool = True


CASES = {
    "forward 128": Case(128, 128, "bfloat16", gradients=False),
    "64": Case(64, 64, "bfloat16"),
    "128": Case(128, 128, "bfloat16"),
    "128, segments": Case(128, 128, "bfloat16", segmented=True),
    "128, beta to 2": Case(128, 128, "bfloat16", most_beta=2.0),
    "256": Case(256, 256, "bfloat16"),
    "64, float32": Case(64, 64, "float32"),
}


def main(dump: Path, arguments: Sequence[str] | None = None) -> int:
    """Print the report; 0 if every case compiled, 1 if one did not, 2 without the compiler or for wrong words."""
    options = _parser().parse_args(arguments)
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        print("gpu_kernel_report: no compiler for GPUs here: pip install jax-cuda13-plugin", file=sys.stderr)
        return 2
    os.environ |= {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": str(dump)}  # read when JAX is imported
    if len(options.case) == 1:
        report = _report(dump, options.case[0])
    else:
        report = _joined([_in_a_process_of_its_own(name) for name in options.case])
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1) if options.json else _table(report))
    return 0 if not report["failed"] else 1


def _in_a_process_of_its_own(case: str) -> dict[str, Any]:
    """A kernel that the process has compiled before is not always dumped again."""
    command = [sys.executable, "-m", "experiments.gpu_kernel_report", "--json", "--case", case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or not done.stdout:
        raise Failed(f"the compilation of {case!r} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def _joined(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    joined = reports[0]
    for report in reports[1:]:
        joined["rows"] += report["rows"]
        joined["launched"] |= report["launched"]
        joined["failed"] |= report["failed"]
    return joined


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Resources of the Hopper kernels, compiled for an H100.")
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES), help="default: all")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--output", type=local_path, help="file to keep the report in")
    return parser


def _report(dump: Path, name: str) -> dict[str, Any]:
    import jax

    from gt_jax.devices.pods import hlo
    from gt_jax.devices.pods.gpus import Cluster
    from gt_jax.devices.pods.launches import count_launches

    (device,) = Cluster("h100", 1).stand_ins()
    report: dict[str, Any] = {"card": device.device_kind, "jax": jax.__version__}
    report |= {"ptxas": _ptxas_version(), "rows": [], "launched": {}, "failed": {}}
    try:
        text = _compiled(CASES[name], device)
    except jax.errors.JaxRuntimeError as error:
        return report | {"failed": {name: str(error)}}
    kernels = count_launches(hlo.read(text))["kernels"]
    return report | {"launched": {name: kernels}, "rows": [{"case": name, **row} for row in _kernels(dump)]}


def _compiled(case: Case, device: Any) -> str:
    """HLO of one call: one row of 8,192 tokens, 16 key heads, 32 value heads, chosen as on the card itself."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from pallas_kernels.gated_delta_rule.api import gated_delta_rule

    batch, length, heads, value_heads = 1, 8192, 16, 32
    tokens = [(batch, length, n, w) for n, w in ((heads, case.key_width),) * 2 + ((value_heads, case.value_width),)]
    state = (batch, value_heads, case.key_width, case.value_width)
    gates = (batch, length, value_heads)
    mesh = Mesh(np.array([device]), ("data",))

    def struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    inputs = [struct(shape, case.dtype) for shape in tokens] + [struct(gates, jnp.float32)] * 2
    inputs.append(struct(state, jnp.float32))
    segments = struct((batch, length), jnp.int32) if case.segmented else None

    def rule(*x: jax.Array, segment_ids: jax.Array | None) -> Any:
        return gated_delta_rule(
            *x[:5], initial_state=x[5], segment_ids=segment_ids, return_state=True, most_beta=case.most_beta,
            implementation="pallas_gpu",
        )  # fmt: skip

    def both_ways(inputs: Any, cotangents: Any, segment_ids: jax.Array | None) -> Any:
        outputs, pull = jax.vjp(lambda *x: rule(*x, segment_ids=segment_ids), *inputs)
        return outputs, pull(cotangents)

    with jax.set_mesh(mesh):
        if case.gradients:
            lowered = jax.jit(both_ways).lower(inputs, (inputs[2], inputs[5]), segments)
        else:
            lowered = jax.jit(rule).lower(*inputs, segment_ids=segments)
    return lowered.compile().as_text() or ""


def _kernels(dump: Path) -> list[dict[str, Any]]:
    """What the compiler said of each kernel."""
    rows = []
    for path in sorted(dump.glob("*.ptxas")):
        text, resources = path.read_text(), path.with_suffix(".resources.txt").read_text()
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
        rows.append({
            "kernel": path.stem.removeprefix("gated_delta_rule_").rsplit("_", 1)[0],
            "registers": int(_first(r"Used (\d+) registers", text)),
            "spilled_bytes": sum(map(int, spills)),
            "shared_bytes": int(_first(r"smem_scratch_bytes=(\d+)", resources)),
        })  # fmt: skip
    return rows


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the assembler's report has no {pattern!r}: {text[:200]}")
    return found[1]


def _ptxas_version() -> str:
    from pallas_kernels.ptxas import find_ptxas

    path = find_ptxas()
    if path is None:
        return "none"
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return _first(r"(V[\d.]+)", said)


def _table(report: dict[str, Any]) -> str:
    lines = [f"{report['card']}, JAX {report['jax']}, ptxas {report['ptxas']}", "", " | ".join(COLUMNS)]
    lines += [" | ".join(str(row[name]) for name in COLUMNS) for row in report["rows"]]
    lines += ["", *(f"{name}: {count} launched" for name, count in report["launched"].items())]
    return "\n".join([*lines, *(f"{name}: {error}" for name, error in report["failed"].items())])


def command(arguments: Sequence[str] | None = None) -> int:
    """`main` with a folder for the compiler's dumps."""
    with tempfile.TemporaryDirectory(prefix="gpu-kernel-report-") as folder:
        return main(Path(folder), arguments)


if __name__ == "__main__":
    run_command(command)
