"""The Hopper kernels compile for an H100, without one, and take no more of it than last time.

Where the compiler for GPUs is not installed, nothing is tested: `make test-gpu-compile` installs it.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.gated_delta_rule import pallas_gpu

ROOT = Path(__file__).parents[2]
STORED = ROOT / "experiments" / "results" / "gpu_kernels_h100.json"
INSTALLED = importlib.util.find_spec("jax_cuda13_plugin") is not None and not pallas_gpu.missing()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED, reason="the compiler for GPUs is not installed (make test-gpu-compile)"),
]


def outside(*command):
    """In a process of its own: the compiler reads its environment when JAX is imported."""
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.timeout(1600)
def test_takes_no_more_of_the_card_than_last_time():
    """Within 5 % of the stored figures of the same versions; nothing spills up to heads of 128."""
    found = json.loads(outside("-m", "experiments.gpu_kernel_report", "--json"))
    assert {row["kernel"] for row in found["rows"]} == {"inside", "across", "back", "gradients"}
    assert not [row for row in found["rows"] if row["spilled_bytes"] and row["case"] != "256"]
    stored = json.loads(STORED.read_text())
    if any(stored[key] != found[key] for key in ("jax", "ptxas")):
        pytest.skip(f"compiles; the stored figures are of JAX {stored['jax']} and ptxas {stored['ptxas']}")
    now = {(row["case"], row["kernel"]): row for row in found["rows"]}
    for old in stored["rows"]:
        row = now[old["case"], old["kernel"]]
        for figure in ("registers", "spilled_bytes", "shared_bytes"):
            assert row[figure] <= 1.05 * old[figure], (row, old)
    for case, count in stored["launched"].items():
        assert found["launched"][case] <= 1.05 * count, case


CHOSEN = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from gt_jax.devices.pods.gpus import CARDS, target_config
from pallas_kernels.gated_delta_rule.api import gated_delta_rule

text = target_config(CARDS["h100"])
if sys.argv[1] != "H100":
    text = text.replace("H100 80GB HBM3", sys.argv[1])
    text = text.replace("major: 9 feature_extension: ACCELERATED_FEATURES", "major: 8")
device = topologies.get_topology_desc(
    platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=text
).devices[0]
mesh = Mesh(np.array([device]), ("data",))
shapes = [(2, 128, 4, 64)] * 3 + [(2, 128, 4)] * 2
arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P())) for shape in shapes]
loss = lambda *x: gated_delta_rule(*x, most_beta=1.0).astype(jnp.float32).sum()
with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))).lower(*arguments).as_text()
print(text.count("custom_call @mosaic_gpu"))
"""


@pytest.mark.parametrize("card, kernels", [("H100", 4), ("A100-SXM4-80GB", 0)])
def test_chosen_for_a_card_that_is_not_here_by_its_name(card, kernels):
    assert int(outside("-c", CHOSEN, card).split()[-1]) == kernels
