"""The TPU kernels of sparse attention compile for every chip, without one, if the TPU compiler is installed."""

import importlib.util

import pytest

from tests.kernels.test_tpu_compile import CHIPS, outside

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed"),
]

EACH = """
import sys
from gt_jax.devices.pods.topologies import use_compiler
use_compiler()
import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from experiments.kernels_measured.chips import CHIPS
from pallas_kernels.sparse_attention.tpu.standalone import kernels

device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[sys.argv[1]].topology).devices[0]
sizes = dict(heads=8, width=128, indexer_heads=2, indexer_width=32, sharding=SingleDeviceSharding(device))
for kernel in kernels(1, int(sys.argv[2]), **sizes):
    jax.jit(kernel.run).lower(*kernel.arguments).compile()
    assert kernel.vmem_bytes <= 0.8 * 64 * 2**20 and kernel.least_bytes <= kernel.moved_bytes
    print(kernel.name)
"""


@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_compiles_for(chip):
    """At 32,768 tokens, where the strip of `select` is largest; blocks within 0.8 of the smallest VMEM."""
    assert len(outside("-c", EACH, chip, "32768").split()) == 4


PICKED = """
import re
from gt_jax.devices.pods.topologies import use_compiler
use_compiler()
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from pallas_kernels.sparse_attention.api import Indexer, Positions, Statistics, sparse_attention

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "tensor"))
tokens, gates, row, head = P("data", None, "tensor", None), P("data", None, "tensor"), P("data", None), P("tensor")

def local(q, k, v, *rest):
    return sparse_attention(q, k, v, Indexer(*rest[:6]), Positions(*rest[6:]), k_base=64, k_min=8, k_max=128,
                            head_axes=("tensor",))

specs = (tokens,) * 5 + (gates, head, head, P()) + (row,) * 4
split = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(tokens, Statistics(row, row, row, row)),
                      check_vma=False)
t = 512
shapes = [(2, t, 4, 64)] * 3 + [(2, t, 2, 32)] * 2 + [(2, t, 2), (2,), (4,), ()] + [(2, t)] * 4
dtypes = [jnp.bfloat16] * 5 + [jnp.float32] * 4 + [jnp.int32] * 4
arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
             for shape, dtype, spec in zip(shapes, dtypes, specs, strict=True)]

def loss(*x):
    o, seen = split(*x)
    return o.astype(jnp.float32).sum() + seen.kl.sum()

text = jax.jit(jax.grad(loss, argnums=range(8))).lower(*arguments).compile().as_text()
print(*sorted(set(re.findall(r"sparse_attention_([a-z]+)", text))))
"""


def test_chosen_inside_shard_map_for_a_topology_that_is_not_here():
    """On a host without a TPU, by the mesh alone; heads are split, rows too."""
    assert outside("-c", PICKED).split() == ["attend", "backward", "diverge", "select"]
