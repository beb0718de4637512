"""From cases to rows: what each kernel costs, beside what the same costs by plain XLA."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.kernels_measured.cases import Case, Kernel
from experiments.kernels_measured.chips import CHIPS, Chip
from experiments.kernels_measured.compiler import CompileError, compile_for
from experiments.kernels_measured.schedule import read_schedule
from gt_jax.devices.pods import hlo
from gt_jax.devices.pods.hbm_traffic import called_bytes, hbm_traffic

Row = dict[str, Any]


def rows_of(case: Case, chip: str, dump: Path, with_xla: bool) -> list[Row]:
    """A row a kernel; one row, with its error, for a case that does not compile. Says on stderr how far it is."""
    said, began = f"{chip}, {case.operation}, {case.name}: ", time.monotonic()
    about = {"chip": chip, "operation": case.operation, "case": case.name}
    _say(f"{said}compiling the kernels")
    try:
        rows, program = _kernel_rows(case, CHIPS[chip], dump)
    except CompileError as error:
        _say(f"{said}the kernels do not compile")
        return [about | {"compiles": False, "error": str(error)[:2000]}]
    beside: Row = {"xla": "left out" if case.beside else "no part of it alone"}
    if with_xla and case.beside:
        _say(f"{said}kernels compiled in {time.monotonic() - began:.0f} s; compiling the XLA path")
        beside = _beside(case, case.beside, CHIPS[chip], program["kernels_bytes"])
    _say(f"{said}done in {time.monotonic() - began:.0f} s{'' if with_xla else ', the XLA path left out'}")
    return [about | {"compiles": True} | row | program | beside for row in rows]


def _say(words: str) -> None:
    print(f"kernel_report: {words}", file=sys.stderr, flush=True)


def _kernel_rows(case: Case, chip: Chip, dump: Path) -> tuple[list[Row], Row]:
    for path in dump.iterdir():
        path.unlink()
    kernels = case.kernels(chip)
    compiled = compile_for(chip, case.run(chip), case.arguments, alone=True)
    program = hlo.read(compiled.as_text())
    passed = {kernel.in_dump: called_bytes(program, kernel.in_dump) for kernel in kernels}
    rows = [kernel_row(case, chip, kernel, dump, passed[kernel.in_dump]) for kernel in kernels]
    of_kernels = sum(row["hbm_bytes"] for row in rows)
    around = hbm_traffic(program, leave_out=list(passed)).bytes
    return rows, {
        "program_bytes": around + of_kernels,
        "program_temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "kernels_bytes": of_kernels,
    }


def kernel_row(case: Case, chip: Chip, kernel: Kernel, dump: Path, passed_bytes: int) -> Row:
    """What the schedule says of a kernel, and what follows for one core with its share of the HBM."""
    schedule = read_schedule(dump, kernel.in_dump, kernel.counted_loops)
    moved = passed_bytes if kernel.moved_bytes is None else round(kernel.moved_bytes)
    cycles = schedule.cycles * kernel.steps
    times = {"compute": cycles / chip.clock, "memory": moved / chip.bandwidth}
    bound = max(times, key=lambda key: times[key])
    roofline = max(kernel.flops / chip.peak, kernel.least_bytes / chip.bandwidth)
    return {
        "kernel": kernel.name,
        "unit": case.unit,
        "steps": kernel.steps,
        "units_per_step": kernel.units_per_step,
        "cycles": schedule.cycles,
        "cycles_per_unit": round(schedule.cycles / kernel.units_per_step, 1),
        "slots": schedule.slots,
        "spilled_bytes": schedule.spilled_bytes,
        "spill_space_bytes": schedule.spill_space_bytes,
        "vmem_bytes": schedule.vmem_bytes,
        "vmem_share": round(schedule.vmem_bytes / chip.vmem, 3),
        "hbm_bytes": moved,
        "hbm_over_least": round(moved / kernel.least_bytes, 3),
        "flops": round(kernel.flops),
        "peak_share": round(kernel.flops / (cycles * chip.flops_per_cycle), 4),
        "microseconds": round(times[bound] * 1e6, 1),
        "bound_by": bound,
        "roofline_microseconds": round(roofline * 1e6, 1),
    }


def _beside(case: Case, function: Callable[..., Any], chip: Chip, kernels_bytes: int) -> Row:
    """What plain XLA moves and keeps for the same arguments, and how often that is what the kernels move.

    Bytes are those that its operations read and write; those in HBM are fewer where XLA finds room in VMEM for what
    goes from one operation to the next, as for a small batch on a chip with 128 MiB.
    """
    try:
        compiled = compile_for(chip, function, case.arguments, alone=False)
    except CompileError as error:
        return {"xla": f"does not compile: {str(error)[:2000]}"}
    moved = hbm_traffic(hlo.read(compiled.as_text()), loop_length=case.loop_length)
    loops = f", {moved.unknown_loops} loops taken as {case.loop_length:g} long" if moved.unknown_loops else ""
    return {
        "xla": f"compiled{loops}",
        "xla_bytes": moved.touched,
        "xla_over_kernels": round(moved.touched / kernels_bytes, 1),
        "xla_hbm_bytes": moved.bytes,
        "xla_hbm_over_kernels": round(moved.bytes / kernels_bytes, 1),
        "xla_temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }
