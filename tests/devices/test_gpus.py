"""GPUs that are not there: names, the compiler, links in a box and between boxes, kernels that a program executes."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gt_jax.devices.pods import gpus, hlo, topologies
from gt_jax.devices.pods.hbm_traffic import hbm_traffic
from gt_jax.devices.pods.launches import count_launches
from gt_jax.devices.pods.program_flops import count_flops
from gt_jax.devices.sharding import make_mesh
from gt_jax.errors import Refused
from gt_jax.models.flops import peak_flops
from gt_jax.plan_pod import _mesh_lines

ROOT = Path(__file__).parents[2]
PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") or importlib.util.find_spec("jax_cuda12_plugin")


def test_cards_by_name_and_number():
    cluster = topologies.parse("h100:64")
    assert (cluster.name, cluster.devices, cluster.device_memory >> 30) == ("h100:64", 64, 79)
    assert topologies.parse("h200:1").bandwidth == 4.8e12 and topologies.parse("v5p:2x2x1").bandwidth == 2765e9
    for text in ("h100:3", "h100:12", "h200:0", "h100:", "h100", "h100:8x8", "h100:-8"):
        with pytest.raises(Refused, match="comes in boxes of 8: 1, 2, 4, 8 or a multiple of 8, for example h100:1"):
            topologies.parse(text)
    with pytest.raises(Refused, match=r"'b200:8' does not exist; there are v5e:SHAPE.*; h100:N and h200:N with N 1"):
        topologies.parse("b200:8")
    assert all(peak_flops(card.name) == 989e12 for card in gpus.CARDS.values())


def test_what_the_compiler_is_told_of_a_card_is_well_formed():
    """Every field once, of the card: the compiler's own parser reads it where the plugin is installed."""
    text = gpus.target_config(gpus.CARDS["h200"])
    fields = re.findall(r"^ {0,2}(\w+)[: ]", text, re.M)
    assert len(fields) == len(set(fields)) and text.count("{") == text.count("}")
    assert 'name: "NVIDIA H200"' in text and "memory_bandwidth: 4800000000000\n" in text
    assert "shared_memory_per_block_optin: 232448" in text and "shared_memory_per_core: 233472" in text


def test_what_to_install_is_said(monkeypatch):
    for missing, there, said in (
        (lambda name: False, True, r"not installed: pip install 'gt-jax\[cuda\]'; no GPU is needed"),
        (lambda name: name == "jax_cuda13_plugin", False, "pip install nvidia-cuda-nvcc$"),
        (lambda name: name == "jax_cuda12_plugin", False, "pip install nvidia-cuda-nvcc-cu12$"),
    ):
        monkeypatch.setattr(gpus, "_found", missing)
        monkeypatch.setattr(gpus, "find_ptxas", lambda there=there: there)
        with pytest.raises(Refused, match=said):
            topologies.parse("h100:8").use_compiler()


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a GPU as a mesh asks for."""

    id: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"
    process_index: int = 0


def test_a_byte_takes_nvlink_in_a_box_and_the_network_between_boxes():
    box = lambda *counts: [number for number, count in enumerate(counts) for _ in range(count)]  # noqa: E731
    assert gpus.seconds_a_byte(box(1)) == 0
    assert gpus.seconds_a_byte(box(8)) == gpus.seconds_a_byte(box(2)) == 1 / 4.5e11
    assert gpus.seconds_a_byte(box(1, 1)) == 1 / 5e10  # all that comes, through one network card
    assert np.isclose(gpus.seconds_a_byte(box(2, 2)), 4 / 3 / 2 / 1e11)  # half of what a box gathers, through two
    assert gpus.seconds_a_byte(box(8, 8)) == 1 / 4.5e11  # eight network cards bring half of it faster than NVLink all
    devices = [Device(i) for i in range(16)]
    cluster = topologies.parse("h100:16")
    rates = cluster.axis_rates(make_mesh(data=2, fsdp=4, tensor=2, devices=devices))
    assert rates == {"data": (5e10, 1), "fsdp": (4.5e11, 1), "expert": (np.inf, 0), "tensor": (4.5e11, 1)}
    seconds = cluster.link_seconds(devices)
    assert seconds([0, 1, 2]) == 1 / 4.5e11 and seconds([7, 8]) == 1 / 5e10


STEP = """HloModule jit_step, is_scheduled=true, num_partitions=8

%slice (a: f32[3,64], b: f32[64], i: s32[]) -> f32[3,64] {
  %a = f32[3,64]{1,0} parameter(0)
  %b = f32[64]{0} parameter(1)
  %i = s32[] parameter(2)
  %row = f32[1,64]{1,0} bitcast(%b)
  %zero = s32[] constant(0)
  ROOT %put = f32[3,64]{1,0} dynamic-update-slice(%a, %row, %i, %zero)
}

%double (c: f32[64]) -> f32[64] {
  %c = f32[64]{0} parameter(0)
  ROOT %twice = f32[64]{0} add(%c, %c)
}

%yes (p: (f32[64])) -> f32[64] {
  %p = (f32[64]{0}) parameter(0)
  %x.1 = f32[64]{0} get-tuple-element(%p), index=0
  %x.2 = f32[64]{0} fusion(%x.1), kind=kLoop, calls=%double
  ROOT %x.3 = f32[64]{0} fusion(%x.2), kind=kLoop, calls=%double
}

%no (q: (f32[64])) -> f32[64] {
  %q = (f32[64]{0}) parameter(0)
  %y.1 = f32[64]{0} get-tuple-element(%q), index=0
  ROOT %y.2 = f32[64]{0} copy(%y.1)
}

%body (carry: (s32[], f32[64], f32[3,64])) -> (s32[], f32[64], f32[3,64]) {
  %carry = (s32[], f32[64]{0}, f32[3,64]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%carry), index=0
  %v = f32[64]{0} get-tuple-element(%carry), index=1
  %all = f32[3,64]{1,0} get-tuple-element(%carry), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  %which = pred[] custom-call(%v), custom_call_target="flag"
  %given = (f32[64]{0}) tuple(%v)
  %new = f32[64]{0} conditional(%which, %given, %given), true_computation=%yes, false_computation=%no
  %begun = ((f32[3,64]{1,0}, f32[64]{0}, s32[]), f32[3,64]{1,0}, u32[]) fusion-start(%all, %new, %n), kind=kLoop, \
calls=%slice
  %kept = f32[3,64]{1,0} fusion-done(%begun)
  ROOT %out = (s32[], f32[64]{0}, f32[3,64]{1,0}) tuple(%next, %new, %kept)
}

%condition (carry.1: (s32[], f32[64], f32[3,64])) -> pred[] {
  %carry.1 = (s32[], f32[64]{0}, f32[3,64]{1,0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%carry.1), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%n.1, %three), direction=LT
}

ENTRY %main (s: s32[], v0: f32[64], all0: f32[3,64], m: bf16[32,64], w: bf16[64,16]) -> bf16[32,16] {
  %s = s32[] parameter(0)
  %v0 = f32[64]{0} parameter(1)
  %all0 = f32[3,64]{1,0} parameter(2)
  %m = bf16[32,64]{1,0} parameter(3)
  %w = bf16[64,16]{1,0} parameter(4)
  %v1 = f32[64]{0} copy(%v0)
  %start = (s32[], f32[64]{0}, f32[3,64]{1,0}) tuple(%s, %v1, %all0)
  %loop = (s32[], f32[64]{0}, f32[3,64]{1,0}) while(%start), condition=%condition, body=%body
  %product = (bf16[32,16]{1,0}, s8[4096]{0}) custom-call(%m, %w), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"]}}}
  ROOT %result = bf16[32,16]{1,0} get-tuple-element(%product), index=0
}
"""


def test_kernels_of_a_step_are_counted_with_loops_and_the_dearer_branch():
    """A copy, a product; three times the counter, the flag, two fusions of a branch, the fusion that is started."""
    program = hlo.read(STEP)
    assert count_launches(program) == {"kernels": 2 + 3 * 5, "copies": 1, "conditionals": 3, "loops": 1}
    assert program.unknown_loops == 0
    # what the started fusion writes in place is a row: 256 bytes read and 256 written, not the 768 of the whole
    without = hbm_traffic(hlo.read(STEP.replace("fusion-start(%all, %new, %n)", "after-all()"))).bytes
    assert hbm_traffic(program).bytes - without == 3 * 2 * 256


def test_products_of_the_library_count_and_a_kernel_without_an_estimate_is_told():
    assert count_flops(hlo.read(STEP)) == (2 * 32 * 16 * 64, 0, 0)
    kernel = STEP.replace('"flag"', '"mosaic_gpu_v2"')
    assert count_flops(hlo.read(kernel)).silent_kernels == 1 and count_launches(hlo.read(kernel))["kernels"] == 17


def test_the_report_of_a_gpu_tells_launches_and_the_memory_that_jax_takes():
    memory = {"arguments": 1, "temporaries": 1, "outputs": 0, "program": 0, "total": 70 << 30, "of": 79 << 30,
              "free_share": 0.11}  # fmt: skip
    row = {"mesh": {"data": 8}, "accumulate": 1, "fits": True, "seconds_compiling": 1.0, "seconds_lowering": 1.0,
           "replicated": [], "memory": memory, "flops": 1, "bytes": 1, "links": 1, "collectives": {},
           "whole_stacks": [], "largest": [], "kernels": 0, "flops_of_kernels": 0, "loops_counted_once": 0,
           "silent_kernels": 3, "assumed": gpus.ASSUMED,
           "least_seconds": {"flops": 1.0, "bytes": 2.0, "links": 0.5}, "bound": "bytes",
           "parts": [{"part": "MLP", "phase": "forward", "bytes": 1, "flops": 1, "links": 1, "kernels": 1234}],
           "launches": {"kernels": 1234, "copies": 5, "conditionals": 6, "loops": 7}}  # fmt: skip
    text = "\n".join(_mesh_lines(row))
    assert "executed in a step: 1,234 kernels, 5 of them copies; 6 conditionals, 7 loops" in text
    assert "3 of our own kernels give no estimate, and are not in the FLOP" in text
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in text and "of links: one collective at a time, NVLink" in text
    assert re.search(r"links GB +kernels\n +MLP .* 1234\n", text)


def planned(*words):
    """The best mesh of what plan_pod says, in a process of its own: the compiler has to be chosen before JAX."""
    kept = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run([sys.executable, "-m", "gt_jax.plan_pod", *words, "--json"], text=True, capture_output=True,
                          env=kept | {"PYTHONPATH": str(ROOT)}, timeout=1800)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)["tried"][0]


@pytest.mark.skipif(PLUGIN is None, reason="JAX's plugin for CUDA is not installed")
def test_a_tiny_model_for_eight_cards_that_are_not_there(tmp_path):
    (tmp_path / "plain.json").write_text(json.dumps({"layout": "D", "adaptive": None}))
    row = planned("--preset", "tiny", "--model", str(tmp_path / "plain.json"), "--topology", "h100:8", "--batch", "16",
                  "--sequence-length", "128", "--mesh", "data=2,fsdp=2,tensor=2")  # fmt: skip
    assert row["fits"] and row["collectives"] and row["link_seconds"] > 0
    assert sum(part["kernels"] for part in row["parts"]) == row["launches"]["kernels"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(PLUGIN is None, reason="JAX's plugin for CUDA is not installed")
def test_a_step_of_small_executes_no_more_kernels_than_are_stored():
    """Two minutes of compiling: kernels in all, and without the delta rule, which has kernels of its own on Hopper."""
    stored = json.loads((ROOT / "experiments" / "results" / "gpu_launches_small.json").read_text())
    row = planned(*stored["command"].split("plan_pod ")[1].split())
    assert row["loops_counted_once"] == 0  # no loop whose length the host would wait for
    assert row["launches"]["kernels"] <= 1.05 * stored["launches"]["kernels"]
    other = sum(part["kernels"] for part in row["parts"] if part["part"] != "D mixers")
    assert other <= 1.05 * (stored["launches"]["kernels"] - stored["parts"]["D mixers"])
