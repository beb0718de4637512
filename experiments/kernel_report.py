"""What would the TPU kernels cost on a chip that is not here? Compiles them for it and reads the compiler's schedule.

    python experiments/kernel_report.py [--chip v5e|v5p|v6e|tpu7x] [--case NAME ...] [--kernels-only] [--json]

* Needs `jax[tpu]` (its compiler), no TPU. Every case is compiled forward and backward; one that fails prints its error.
* Cycles are static: the length of the compiler's schedule of one grid step, over the chunks and value heads in it. The
  same on every run of one compiler; waiting for memory is not in them.
* Slots are what the step issues to each unit, as a share of what the unit could take in its cycles. Spilled bytes are
  the registers that the schedule stores for want of registers, 4 KiB each, a grid step.
* VMEM is what the blocks and the scratch of a step take; HBM bytes are those of the blocks of all grid steps, over the
  least there is to move: arguments and results once, and what is kept for the backward pass. Estimated time is the
  larger of cycles and bytes at the chip's clock and bandwidth.
* The XLA path's bytes and temporaries for the same arguments, forward and backward, stand beside it.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHIPS = {  # topology, matrix unit, clock in GHz, HBM in GB/s (published)
    "v5e": ("v5e:2x2", 128, 1.50, 819),
    "v5p": ("v5p:2x2x1", 128, 1.75, 2765),
    "v6e": ("v6e:2x2", 256, 1.75, 1640),
    "tpu7x": ("tpu7x:2x2x1", 256, 2.20, 3690),  # one of the two cores
}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
CHUNKS = 32
REGISTER = 4096  # bytes


@dataclass(frozen=True)
class Case:
    """Arguments to compile for."""

    key_heads: int = 32
    value_heads: int = 32
    width: int = 128
    chunk: int = 64
    dtype: str = "bfloat16"
    segments: bool = False


CASES = {
    "plain": Case(),
    "grouped": Case(key_heads=16),
    "segments": Case(segments=True),
    "chunk 128": Case(chunk=128),
    "width 64": Case(width=64),
    "width 256": Case(key_heads=8, value_heads=8, width=256),
    "float32": Case(key_heads=8, value_heads=8, dtype="float32"),
    "one head": Case(key_heads=1, value_heads=1),
}


def prepare() -> Path:
    """Set up the compiler, which reads its environment when JAX is imported; returns where it will write schedules."""
    folder = Path(tempfile.mkdtemp(prefix="kernel-report-"))
    os.environ |= ENVIRONMENT | {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder}"}
    return folder


def compile_case(case: Case, chip: str, implementation: str) -> Any:
    """Forward and backward of the rule, compiled for one chip of that kind."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels.gated_delta_rule import pallas_tpu, xla

    topology, matrix_unit, *_ = CHIPS[chip]
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    rules = {
        "pallas_tpu": functools.partial(pallas_tpu.gated_delta_rule, matrix_unit=matrix_unit),
        "xla": xla.gated_delta_rule,
    }

    def both(q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, ids: Any, d_output: Any, d_final: Any) -> Any:
        def rule(*x: Any) -> Any:
            return rules[implementation](*x, ids if case.segments else None, case.width**-0.5, case.chunk)

        outputs, pull = jax.vjp(rule, q, k, v, g, beta, state)
        return outputs, pull((d_output, d_final))

    tokens, h, hv, w = CHUNKS * case.chunk, case.key_heads, case.value_heads, case.width
    shapes = [(1, tokens, n, w) for n in (h, h, hv)] + [(1, tokens, hv)] * 2 + [(1, hv, w, w), (1, tokens)]
    dtypes = [case.dtype] * 3 + ["float32"] * 3 + ["int32"]
    arguments = [*zip(shapes, dtypes, strict=True), ((1, tokens, hv, w), case.dtype), ((1, hv, w, w), "float32")]
    sharding = SingleDeviceSharding(device)
    structs = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding) for shape, dtype in arguments]
    return jax.jit(both).lower(*structs).compile()


def read_schedule(folder: Path, kernel: str) -> dict[str, Any]:
    """Cycles of a grid step, the share of each unit's slots in use, spilled bytes; from the last schedule written."""
    analyses = sorted(folder.glob(f"*{kernel}*schedule-analysis_packed-bundles-post-ra.txt"))
    tables = sorted(folder.glob(f"*{kernel}*final_hlo-static-per-bundle-utilization.txt"))
    found = re.search(r"total scheduled bundles:\s+(\d+)", analyses[-1].read_text()) if analyses else None
    if not found or not tables:
        raise RuntimeError(f"the compiler wrote no schedule of {kernel} into {folder}")
    cycles = int(found.group(1))
    lines = tables[-1].read_text().splitlines()
    units, room = lines[1].replace(" ", "").split(","), [int(x) for x in lines[2].split()]
    start = next(i for i, line in enumerate(lines) if "UTILIZATION" in line) + 1
    rows = [[int(x) for x in line.split()] for line in lines[start:] if len(line.split()) == len(units)]
    rows = [row for row in rows if len(row) == len(units)]
    used = dict(zip(units, map(sum, zip(*rows, strict=True)), strict=True))
    slots = {unit: round(used[unit] / (n * cycles), 3) for unit, n in zip(units, room, strict=True)}
    return {"cycles": cycles, "slots": slots, "spilled_bytes": used["VSTORE:SPILL"] * REGISTER}


def measure(case: Case, chip: str, folder: Path) -> list[dict[str, Any]]:
    """A row for the forward and one for the backward kernel."""
    for path in folder.iterdir():
        path.unlink()
    plan = make_plan(case, chip)
    compiled = compile_case(case, chip, "pallas_tpu")
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    rows = []
    for name in ("forward", "backward"):
        row: dict[str, Any] = {"kernel": name, **read_schedule(folder, f"gated_delta_rule_{name}")}
        row |= {"heads_per_step": plan.heads, "cycles_per_chunk_and_head": round(row["cycles"] / plan.heads)}
        row |= _bytes(case, plan, name == "backward") | {"temporaries": temporaries}
        _, _, clock, bandwidth = CHIPS[chip]
        steps = CHUNKS * case.value_heads // plan.heads
        times = {"compute": row["cycles"] * steps / clock / 1e3, "memory": row["hbm_bytes"] / bandwidth / 1e3}
        bound = max(times, key=lambda key: times[key])
        row |= {"microseconds": round(times[bound], 1), "roofline_microseconds": round(times["memory"], 1)}
        rows.append(row | {"bound_by": bound})
    return rows


def make_plan(case: Case, chip: str) -> Any:
    """How the kernels cut these arguments up."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.gated_delta_rule import tpu_layout

    q, v = (
        jax.ShapeDtypeStruct((1, CHUNKS * case.chunk, heads, case.width), jnp.dtype(case.dtype))
        for heads in (case.key_heads, case.value_heads)
    )
    scale = case.width**-0.5
    return tpu_layout.make_plan((q, q, v), case.chunk, scale, case.segments, CHIPS[chip][1])


def _bytes(case: Case, plan: Any, backward: bool) -> dict[str, Any]:
    from pallas_kernels.gated_delta_rule import tpu_layout

    item = 4 if plan.exact else 2
    key, value = (heads * case.chunk * case.width * item for heads in (case.key_heads, case.value_heads))
    saved = case.value_heads * (case.width**2 + case.chunk**2) * item
    gates = 2 * case.value_heads * case.chunk * 4
    least = CHUNKS * ((4 * key + 3 * value + 2 * gates if backward else 2 * key + 2 * value + gates) + saved)
    least += 2 * case.value_heads * case.width**2 * 4
    moved = tpu_layout.moved_bytes(plan, backward)
    total = (CHUNKS * moved["chunk"] + moved["sequence"]) * (case.value_heads // plan.heads)
    vmem = tpu_layout.step_bytes(plan, backward)
    return {"vmem_bytes": vmem, "hbm_bytes": total, "hbm_over_least": round(total / least, 2)}


def report(chip: str, names: Sequence[str], folder: Path, with_xla: bool) -> list[dict[str, Any]]:
    """Rows of all cases; a case that does not compile has its error instead."""
    rows: list[dict[str, Any]] = []
    for name in names:
        try:
            own = measure(CASES[name], chip, folder)
            beside = beside_xla(CASES[name], chip) if with_xla else {}
            rows += [{"chip": chip, "case": name, "compiles": True, **row, **beside} for row in own]
        except (RuntimeError, ValueError) as error:  # the compiler's errors are RuntimeErrors
            rows.append({"chip": chip, "case": name, "compiles": False, "error": str(error)[:2000]})
    return rows


def beside_xla(case: Case, chip: str) -> dict[str, int]:
    """What the XLA path moves and keeps for the same arguments, forward and backward; slow to compile on some chips."""
    compiled = compile_case(case, chip, "xla")
    moved, kept = compiled.cost_analysis().get("bytes accessed", 0), compiled.memory_analysis().temp_size_in_bytes
    return {"xla_bytes": int(moved), "xla_temporaries": kept}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a terminal."""
    lines = [
        f"{'case':10} {'kernel':8} {'cycles':>6} {'MXU':>5} {'VALU':>5} {'XLU':>5} {'VLD':>5} {'VST':>5} "
        f"{'spilled':>8} {'VMEM':>8} {'HBM':>8} {'/least':>6} {'time':>9}  {'XLA moves':>9} {'and keeps':>9}"
    ]
    for row in rows:
        if not row["compiles"]:
            lines.append(f"{row['case']:10} does not compile: {row['error'].splitlines()[0][:90]}")
            continue
        slots = " ".join(f"{row['slots'][unit]:5.0%}" for unit in ("MXU", "VALU", "XLU", "VLOAD", "VSTORE"))
        sizes = " ".join(f"{row[key] / 2**20:5.1f}MiB" for key in ("spilled_bytes", "vmem_bytes", "hbm_bytes"))
        beside = " ".join(f"{row[key] / 2**20:6.0f}MiB" for key in ("xla_bytes", "xla_temporaries") if key in row)
        lines.append(
            f"{row['case']:10} {row['kernel']:8} {row['cycles_per_chunk_and_head']:6} {slots} {sizes} "
            f"{row['hbm_over_least']:6.2f} {row['microseconds']:7.1f}us  {beside}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 0 if every case compiled, 1 if one did not, 2 without the compiler."""
    parser = argparse.ArgumentParser(description="Static cost of the TPU kernels, compiled for a chip.")
    parser.add_argument("--chip", choices=CHIPS, default="v6e")
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--kernels-only", action="store_true", help="leave out the XLA path, which compiles slowly")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("libtpu") is None:
        print("kernel_report: the TPU compiler is not installed: pip install 'jax[tpu]'", file=sys.stderr)
        return 2
    folder = prepare()
    import libtpu

    rows = report(options.chip, options.case, folder, with_xla=not options.kernels_only)
    compiler = getattr(libtpu, "__version__", "unknown")
    if options.json:
        print(json.dumps({"chip": options.chip, "libtpu": compiler, "chunks": CHUNKS, "rows": rows}, indent=1))
    else:
        print(f"{options.chip}, libtpu {compiler}: static cycles per chunk and value head\n{table(rows)}")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return 0 if all(row["compiles"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
