"""The rows of the report for a terminal, and those of all chips as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.kernels_measured.chips import CHIPS

Row = dict[str, Any]
UNITS = ("MXU", "VALU", "XLU", "VLOAD", "VSTORE")
_HEAD = (
    "case", "kernel", "cycles a unit", *UNITS, "spilled a step, kept in", "VMEM", "HBM", "FLOPs", "time", "roofline",
    "XLA moves", "in HBM", "and keeps",
)  # fmt: skip
_MIB = 2**20
EXPLAINED = """\
Static cycles of a grid step over the units of work in it; slots used of the matrix, vector, cross-lane, load and store
units; bytes that a step stores for want of registers, and the space they have; VMEM with everything that the compiler
allocates, as a share of the chip's; HBM bytes of all grid steps, over the least there is to move; useful FLOPs, as a
share of the peak in these cycles; time at the chip's clock, the larger of cycles and HBM; the roofline of those FLOPs
and the least bytes. Beside it plain XLA with the same arguments: what its operations read and write, its loops counted
out, over what the kernels of the case move together; the part of it that goes to HBM, the rest staying in VMEM where
that is large enough; its temporaries in HBM. All of one core, with its share of the HBM."""


def cells(row: Row) -> list[str]:
    """A row of the report, one text a column; fewer for what does not compile."""
    if not row["compiles"]:
        return [row["case"], f"does not compile: {row['error'].splitlines()[0][:120]}"]
    percent = [f"{row['slots'][unit]:.0%}" for unit in UNITS]
    spills, space, vmem, moved = (
        f"{row[key] / _MIB:.1f}" for key in ("spilled_bytes", "spill_space_bytes", "vmem_bytes", "hbm_bytes")
    )
    return [
        row["case"], row["kernel"], f"{row['cycles_per_unit']:.0f}", *percent, f"{spills}, {space} MiB",
        f"{vmem} MiB ({row['vmem_share']:.0%})", f"{moved} MiB ({row['hbm_over_least']:.2f} x)",
        f"{row['flops'] / 1e9:.1f} G ({row['peak_share']:.1%})", f"{row['microseconds']:.0f} us ({row['bound_by']})",
        f"{row['roofline_microseconds']:.0f} us", *_beside(row),
    ]  # fmt: skip


def _beside(row: Row) -> list[str]:
    if "xla_bytes" not in row:
        return [row["xla"].splitlines()[0][:120], "", ""]
    pairs = (("xla_bytes", "xla_over_kernels"), ("xla_hbm_bytes", "xla_hbm_over_kernels"))
    sizes = [f"{row[size] / _MIB:.0f} MiB ({row[times]:.1f} x)" for size, times in pairs]
    return [*sizes, f"{row['xla_temporaries'] / _MIB:.0f} MiB"]


def terminal(rows: Sequence[Row]) -> str:
    """Aligned columns, one part an operation."""
    parts = []
    for operation, unit, own in _by_operation(rows):
        lines = [list(_HEAD), *[cells(row) for row in own]]
        whole = [line for line in lines if len(line) == len(_HEAD)]
        widths = [max(len(line[at]) for line in whole) for at in range(len(_HEAD))]
        texts = [f"{operation}, a unit is a {unit}"]
        for line in lines:
            pairs = zip(line, widths, strict=False)
            texts.append("  ".join(cell.rjust(width) for cell, width in pairs) if line in whole else "  ".join(line))
        parts.append("\n".join(texts))
    return "\n\n".join(parts)


def markdown(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """All chips' reports, by chip; a part an operation, a table a chip."""
    lines = ["# What the TPU kernels cost", "", *EXPLAINED.splitlines(), ""]
    lines += ["Written by `python -m experiments.kernel_report --output experiments/results`, from its JSON.", ""]
    for name, report in reports.items():
        chip = CHIPS[name]
        rates = f"{chip.peak / 1e12:.0f} TFLOP/s bfloat16, {chip.bandwidth / 1e9:.0f} GB/s, {chip.clock / 1e9:.2f} GHz"
        sizes = f"VMEM {chip.vmem >> 20} MiB, HBM {chip.hbm / 1e9:.0f} GB"
        share = f"one of {chip.cores} cores: " if chip.cores > 1 else ""
        lines += [f"## {name}", "", f"{share}{rates}, {sizes}; libtpu {report['libtpu']}, jax {report['jax']}.", ""]
        for operation, unit, own in _by_operation(report["rows"]):
            lines += [f"{operation[0].upper()}{operation[1:]}; a unit is a {unit}.", "", *_table(own), ""]
    return "\n".join(lines)


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [_HEAD, ["---"] * 2 + ["---:"] * (len(_HEAD) - 2), *[cells(row) for row in rows]]
    full = [[cell.replace("|", "\\|") for cell in [*line, *[""] * (len(_HEAD) - len(line))]] for line in lines]
    return ["| " + " | ".join(line) + " |" for line in full]


def _by_operation(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    found = []
    for operation in dict.fromkeys(row["operation"] for row in rows):
        own = [row for row in rows if row["operation"] == operation]
        unit = next((row["unit"] for row in own if row["compiles"]), "unit of work")
        found.append((operation, unit, own))
    return found
