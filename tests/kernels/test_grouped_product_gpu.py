"""Grouped products of a Hopper GPU: through the interpreter against numpy, and as compiled for a card that is not here.

The interpreter of JAX 0.10 knows no transposed tiles: there the products that need them are left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from gt_jax.models.layers import grouped_product, moe
from pallas_kernels.grouped_product import pallas_gpu

ROOT = Path(__file__).parents[2]
TRANSPOSES = not jax.__version__.startswith("0.10.")


def hopper():
    """As if an H100 were compiled for."""
    kind = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=kind)
    return jax.sharding.use_abstract_mesh(mesh)


INTERPRETED = """
import jax, jax.numpy as jnp, numpy as np, sys
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from pallas_kernels.grouped_product import pallas_gpu

transposes, sizes = int(sys.argv[1]), [64, 0, 128]
random = np.random.default_rng(0)
x, w, c = (random.standard_normal(s).astype(np.float32) for s in ((256, 128), (3, 128, 128), (256, 128)))
x, w, c = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, w, c))
y, dx, dw = np.zeros(c.shape), np.zeros(x.shape), np.zeros(w.shape)
for i, end in enumerate(np.cumsum(sizes)):
    run = slice(end - sizes[i], end)
    y[run], dx[run], dw[i] = x[run] @ w[i], c[run] @ w[i].T, x[run].T @ c[run]
low = [jnp.asarray(a, jnp.bfloat16) for a in (x, w, c)]
given = dict(block=64, interpret=InterpretGPUParams())
sizes = jnp.asarray(sizes, jnp.int32)
pairs = [(pallas_gpu.product(low[0], low[1], sizes, **given), y)]
if transposes:
    pairs.append((pallas_gpu.product(low[2], low[1], sizes, transposed=True, **given), dx))
    pairs.append((pallas_gpu.matrix_gradient(low[0], low[2], sizes, **given), dw))
for got, wanted in pairs:  # one rounding, to bfloat16, of each sum
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=2.0**-8, atol=1e-3)
"""


def test_the_kernels_multiply_each_run_by_its_matrix_and_nothing_else():
    """An empty group, and a block after the last run. With too few threads the interpreter waits forever."""
    environment = {**os.environ, "NPROC": "16", "PJRT_NPROC": "16", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", INTERPRETED, str(int(TRANSPOSES))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def traced(tokens, dtype, experts=20, width=4096, hidden=1024):
    shapes = ((1, tokens, width), (experts, width, hidden), (experts, width, hidden), (experts, hidden, width))
    x, *matrices = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    picked = [jax.ShapeDtypeStruct((1, tokens, 2), kind) for kind in (jnp.int32, jnp.float32)]

    def loss(x, weights, matrices, experts):
        y = moe.mix_experts(x, moe.Routing(experts, weights), matrices[:2], matrices[2])
        return jnp.sum(y.astype(jnp.float32))

    return jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, picked[1], matrices, picked[0])


def test_a_hopper_gpu_multiplies_by_kernels_and_little_more_than_the_rows_that_are_picked():
    with hopper():
        for tokens, rows in ((4096, 9728), (8192, 18944)):
            program = str(traced(tokens, jnp.bfloat16))
            assert program.count("mpmd_map[") == 9 and "ragged_dot" not in program
            assert f"bf16[{rows},4096]" in program and rows <= 1.3 * 2 * tokens
        assert "mpmd_map[" not in str(traced(64, jnp.float32, 4, 128, 128))  # float32 stays float32
    assert "mpmd_map[" not in str(traced(64, jnp.bfloat16, 4, 128, 128))


def test_what_the_kernels_do_not_do_is_said():
    x, w = jnp.zeros((64, 100)), jnp.zeros((2, 100, 128), jnp.bfloat16)
    said = " ".join(pallas_gpu.unsupported(x, w, 32))
    assert "float32 and bfloat16" in said and "(64, 128), got 32" in said and "got 100 and 128" in said
    assert grouped_product.block_for(16384, jnp.zeros((1, 128)), jnp.zeros((20, 128, 128))) == 128  # as ever on a CPU
