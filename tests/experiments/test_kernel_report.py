"""What the report of the kernels' cost says, without the TPU compiler: reading, counting, and the stored figures."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from experiments import kernel_report
from experiments.kernels_measured import gated_delta_rule as rule
from experiments.kernels_measured import hyper_connections as hyper
from experiments.kernels_measured import report, schedule, tables
from experiments.kernels_measured.chips import CHIPS
from experiments.kernels_measured.compiler import CompileError
from experiments.kernels_measured.registry import all_cases
from pallas_kernels.hyper_connections.pallas_tpu import KERNELS

STORED = Path(__file__).parents[2] / "experiments" / "results"
RECURRENCE = {"plain", "grouped", "segments", "chunk 128"}
PADDED = {"width 64", "one head"}  # heads of half a register, the gates of one head: whole registers in HBM

ANALYSIS = "Schedule analysis:\n\ttotal scheduled bundles:    {}\n\tempty scheduled bundles:    3\n"
UNITS = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    2     2     4     2     1     3     3     2     2     2
== UTILIZATION:
1 0 4 0 0 3 1 0 0 0
2 0 2 0 0 0 0 2 2 1
0 1 0 0 0 0 0 1 1 0
"""
PROGRAM = """
  #allocation0 [shape = 'u32[]', space=smem, size = 0x4, offset = 0x4, fixed_abs, tag = 'constant']
  #allocation1 [shape = 'u32[144,128]{1,0:T(1,128)}', space=vmem, size = 0x12000, scoped, tag = 'internal scratch']
  #allocation2 [shape = 'f32[16,128,256]{2,1,0:T(8,128)}', space=vmem, size = 0x200000, scoped, tag = 'scratch operand']
    #allocation3_spill [shape = 'u32[8,128]{1,0}', space=vmem, size = 0x1000, scoped, tag = 'spilled vreg/vmreg']
    #allocation4_spill [shape = 'u32[1]{0}', space=smem, size = 0x4, scoped, tag = 'spilled sreg/preg']
    %v7 = vld [vmem:[#allocation3_spill] sm:$0xff]
"""


def test_a_schedule_is_read_from_the_files_of_its_kernel_alone(tmp_path):
    def write(kernel, cycles, program=PROGRAM):
        (tmp_path / f"17-{kernel}-00-post-ra.txt").write_text(program)
        (tmp_path / f"17-{kernel}-01-schedule-analysis_packed-bundles-post-ra.txt").write_text(ANALYSIS.format(cycles))
        (tmp_path / f"17-{kernel}-02-packed-bundles-post-ra.txt").write_text("not this one")
        (tmp_path / f"17-{kernel}-04-pre-delay_hlo-static-per-bundle-utilization.txt").write_text(UNITS)

    write("rule.1", 10)
    write("rule_backward.1", 99, PROGRAM + PROGRAM.replace("allocation", "allocation9"))
    found = schedule.read_schedule(tmp_path, "rule")
    assert found.cycles == 10
    assert found.slots["MXU"] == 3 / 20 and found.slots["VALU"] == 6 / 40 and found.slots["EUP"] == 0
    assert found.spilled_bytes == 3 * 4096
    assert (found.vmem_bytes, found.spill_space_bytes) == (0x12000 + 0x200000 + 0x1000, 0x1000)
    assert schedule.read_schedule(tmp_path, "rule_backward").cycles == 99
    with pytest.raises(RuntimeError, match=r"wrote no schedule-analysis.* of other"):
        schedule.read_schedule(tmp_path, "other")
    with pytest.raises(ValueError, match="no total"):
        schedule.read_cycles("Schedule analysis:\n")
    with pytest.raises(ValueError, match="no table"):
        schedule.read_units("")


LOOPS = """
2: 0x1   LB: > { %s1 = sphi %s0, %s2 }
3: 0x2   LB: >> { %v1 = vld [vmem:[%s3]] }
4: 0x3   LB: >>> { %p1 = scmp.ge.s32.totalorder %s4, 5 /* loop exit test */ }
5: 0x4     : >>> { %9 = sbr.rel (!%p1) target bundleno = 3 (0x3), region = 9 }
6: 0x5     : >> { %p2 = scmp.ge.s32.totalorder (%p1), %s5, 8 /* loop exit test */ }
7: 0x6     : >> { %8 = sbr.rel (!%p2) target bundleno = 2 (0x2), region = 8 }
8: 0x7     : > { %p3 = scmp.ge.s32.totalorder %s1, 18 /* loop exit test */ }
9: 0x8     : > { %10 = sbr.rel (!%p3) target bundleno = 1 (0x1), region = 10 }
"""


def test_rounds_of_loops_with_a_constant_count_are_counted():
    """The loop of the grid, the longest, apart; one inside another multiplies."""
    assert schedule.read_rounds(LOOPS, 10) == [1, 1, 8, 40, 40, 8, 8, 1, 1, 1]
    table = UNITS.split("== UTILIZATION:")[0] + "== UTILIZATION:\n" + "1 0 0 0 0 0 0 0 0 0\n" * 10
    assert schedule.read_units(table, schedule.read_rounds(LOOPS, 10))[0]["MXU"] == 2 * 40 + 3 * 8 + 5
    with pytest.raises(ValueError, match="from bundle 3 to 4 has no constant count"):
        schedule.read_rounds(LOOPS.replace("%s4, 5", "%s4, %s9"), 10)


def test_least_bytes_are_those_of_the_arrays():
    """Of arguments, results and what is kept: the arrays themselves, added up."""
    for shape in rule.SHAPES.values():
        case = next(x for x in rule.cases() if rule.SHAPES[x.name] == shape)
        q, k, v, g, beta, state, ids, d_output, d_final = (
            math.prod(dimensions) * jnp.dtype(dtype).itemsize for dimensions, dtype in case.arguments
        )
        ids = ids if shape.segments else 0
        per_chunk = shape.value_heads * (shape.width**2 + shape.chunk**2) * jnp.dtype(shape.dtype).itemsize
        kept = rule.BATCH * rule.CHUNKS * per_chunk
        results = d_output + d_final
        assert rule.least(shape, backward=False) == q + k + v + g + beta + state + ids + results + kept
        gradients = q + k + v + g + beta + state
        assert rule.least(shape, backward=True) == q + k + v + g + beta + ids + kept + results + gradients


def test_least_bytes_of_hyper_connections():
    """Two sublayers pass over the streams 6 times forward and 8.5 times backward, at four streams of one width."""
    shape = hyper.Shape()
    tokens = hyper.BATCH * hyper.TOKENS
    numbers = 4 * tokens * 2 * shape.numbers + 2 * 4 * shape.streams * shape.width * shape.numbers
    states = [hyper.least(shape, kernel) / (2 * tokens * shape.streams * shape.width) for kernel in KERNELS]
    share = numbers / (2 * tokens * shape.streams * shape.width)
    for got, wanted in zip(states, (1.25, 2.25, 2.5, 3.25, 1.5, 3.75), strict=True):
        assert wanted < got < wanted + 2.5 * share
    assert share < 0.02


def test_useful_flops():
    """A forward chunk of a head is 10.5 MFLOP at 128 x 128 by 64; a shared key saves two products a head and pass."""
    plain, grouped = rule.SHAPES["plain"], rule.SHAPES["grouped"]
    assert rule.flops(plain, backward=False) / plain.value_heads == pytest.approx(10.5e6, rel=0.01)
    scores = 2 * 2 * 64 * 64 * 128
    for backward in (False, True):
        assert rule.flops(plain, backward) - rule.flops(grouped, backward) == 16 * scores
        longer = dataclasses.replace(plain, key_heads=64, value_heads=64)
        assert rule.flops(longer, backward) == 2 * rule.flops(plain, backward)


@pytest.mark.parametrize("name", CHIPS)
def test_chips_are_those_of_jax(name):
    chip, version = CHIPS[name], pltpu.ChipVersion(name.removeprefix("tpu"))
    known = pltpu.get_tpu_info_for_chip(version, 1)
    assert (chip.matrix_unit, chip.vmem) == (known.mxu_column_size, known.vmem_capacity_bytes)
    assert chip.cores == version.num_physical_tensor_cores_per_chip
    assert chip.peak == pytest.approx(known.bf16_ops_per_second, rel=0.01)
    assert chip.hbm == pytest.approx(known.hbm_capacity_bytes, rel=0.08)  # GB or GiB
    assert chip.bandwidth == pytest.approx(known.mem_bw_bytes_per_second, rel=0.13 if name == "v5p" else 0.01)
    assert 1.4e9 < chip.clock < 2.3e9


def test_what_does_not_compile_has_its_error_in_the_report(tmp_path, monkeypatch, capsys):
    def fails(*arguments, **options):
        raise CompileError("Mosaic: no such layout")

    monkeypatch.setattr(report, "compile_for", fails)
    rows = report.rows_of(all_cases()["plain"], "v6e", tmp_path, with_xla=False)
    found = [(row["case"], row["compiles"], row["error"]) for row in rows]
    assert found == [("plain", False, "Mosaic: no such layout")]
    assert "does not compile: Mosaic: no such layout" in tables.terminal(rows)
    assert "the kernels do not compile" in capsys.readouterr().err


def test_figures_of_another_compiler_are_not_dropped_unasked(tmp_path, monkeypatch, capsys):
    stored = {"chip": "v6e", "libtpu": "1", "jax": "2", "rows": [{"case": "plain"}, {"case": "other"}]}
    (tmp_path / "kernels_v6e.json").write_text(json.dumps(stored))
    now = {"chip": "v6e", "libtpu": "9", "jax": "2"}
    assert kernel_report._lost(tmp_path, now, {"plain"}) == ["other"]
    assert not kernel_report._lost(tmp_path, now, {"plain", "other"})
    assert not kernel_report._lost(tmp_path, {**now, "libtpu": "1"}, {"plain"})
    monkeypatch.setattr(kernel_report, "_about", lambda chip: now)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert kernel_report.main(tmp_path, ["--case", "plain", "--output", str(tmp_path)]) == 2
    assert "which would go: other; make them anew too" in capsys.readouterr().err


def test_the_command_without_the_compiler_and_with_wrong_words(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    assert kernel_report.main(tmp_path, ["--case", "plain", "--kernels-only"]) == 2
    assert "pip install 'jax[tpu]'" in capsys.readouterr().err
    for words in (["--chip", "v1"], ["--case", "unheard of"]):
        with pytest.raises(SystemExit) as end:
            kernel_report.main(tmp_path, words)
        assert end.value.code == 2


@pytest.mark.parametrize("chip", CHIPS)
def test_stored_figures_keep_the_promises(chip):
    """Every case is stored and compiles, in 0.8 of the VMEM; the recurrence moves at most 1.15 times the least there is
    and an eighth of what XLA's operations do. (Sparse attention reads keys again for each tile of queries.)
    """
    stored = json.loads((STORED / f"kernels_{chip}.json").read_text())
    assert {row["case"] for row in stored["rows"]} == set(all_cases())
    assert all(row["compiles"] and row["vmem_share"] <= 0.8 for row in stored["rows"])
    recurrence = [row for row in stored["rows"] if row["operation"] != "sparse attention"]
    assert all(row["hbm_over_least"] <= 1.15 for row in recurrence if row["case"] not in PADDED)
    beside = [row["xla_over_kernels"] for row in recurrence if "xla_over_kernels" in row and row["case"] in RECURRENCE]
    assert beside and min(beside) >= 8


def test_the_stored_table_is_that_of_the_stored_figures():
    reports = {chip: json.loads((STORED / f"kernels_{chip}.json").read_text()) for chip in CHIPS}
    assert (STORED / "kernels.md").read_text() == tables.markdown(reports)


def test_the_device_of_a_trace_is_that_of_its_mesh():
    from pallas_kernels.platform import matrix_unit_width, target_device

    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    assert target_device()[0] == jax.devices()[0].platform
    with jax.sharding.use_abstract_mesh(mesh):
        assert target_device() == ("tpu", "TPU v5 lite")
    widths = {"TPU v5 lite": 128, "TPU v5": 128, "TPU v6 lite": 256, "TPU7x": 256}
    assert {kind: matrix_unit_width(kind) for kind in widths} == widths
