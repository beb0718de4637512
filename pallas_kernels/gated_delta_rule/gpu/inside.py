"""What a chunk is without the state, for every chunk and value head at once: its inverse and its scores.

    L = tril(beta pair (K K^T), -1)        A = (I + L)^-1        P = scale pair (Q K^T)

A block of one warpgroup for each (chunk, value head, row of the batch). The inverse goes by the ladder of
`common.triangular_inverse`: X L has the masked blocks of X L_s where X is block diagonal, so that L itself, written to
shared memory once, is the right operand of the first product of every rung; the left one is X, in registers, where the
last product left it. One step of refinement, with three passes, takes the rungs' rounding away:

    X <- X + X (I - X - X L)

With two parts the rungs have three passes as well: for beta up to 2 what they round may be as large as the answer.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels.gated_delta_rule.gpu import warpgroup as wg
from pallas_kernels.gated_delta_rule.gpu.plan import C, Plan
from pallas_kernels.gated_delta_rule.gpu.warpgroup import Ref, plgpu


def inside(
    plan: Plan,
    q: Float[Array, "p b t h k"],
    k: Float[Array, "p b t h k"],
    sums: Float[Array, "b hv s t"],
    beta: Float[Array, "b hv t"],
    run: Int[Array, "b t"] | None,
) -> tuple[Float[Array, "r b hv n c c"], Float[Array, "r b hv n c c"]]:
    """A and P of every chunk, in parts; `sums` are the log decays summed inside the chunk, coarse and fine."""
    _, batch, length, _, width = q.shape
    heads = beta.shape[1]
    made = jax.ShapeDtypeStruct((plan.parts, batch, heads, length // C, C, C), jnp.bfloat16)
    vector, counts = plgpu.SMEM((C,), jnp.float32), plgpu.SMEM((C,), jnp.int32)
    tokens = wg.tile(plan.token_parts, C, width)
    arrivals = plan.token_parts + sums.shape[2] + 1 + plan.segmented
    scratch = [
        tokens, tokens, plgpu.SMEM((2, C), jnp.float32), vector, counts, wg.tile(2, C, C), wg.tile(plan.parts, C, C),
        plgpu.Barrier(num_arrivals=arrivals), plgpu.Barrier(num_arrivals=plan.token_parts),
    ]  # fmt: skip
    run = jnp.zeros((batch, C), jnp.int32) if run is None else run
    inverse, scores = plgpu.kernel(
        functools.partial(_inside, plan, sums.shape[2]),
        out_type=(made, made),
        grid=(length // C, heads, batch),
        grid_names=("chunk", "head", "batch"),
        compiler_params=wg.COMPILER,
        scratch_types=scratch,
        interpret=wg.interpreter(plan),
        kernel_name="gated_delta_rule_inside",
    )(q, k, sums, beta, run)
    return inverse, scores


def _inside(
    plan: Plan, summands: int, q: Ref, k: Ref, sums: Ref, beta: Ref, run: Ref, inverse: Ref, scores: Ref,
    q_s: Ref, k_s: Ref, sums_s: Ref, beta_s: Ref, run_s: Ref, lower_s: Ref, x_s: Ref, ready: Ref, q_ready: Ref,
) -> None:  # fmt: skip
    chunk, head, b = (lax.axis_index(name) for name in ("chunk", "head", "batch"))
    tokens, key_head = pl.ds(chunk * C, C), lax.div(head, jnp.int32(plan.group))
    for part in range(plan.token_parts):
        plgpu.copy_gmem_to_smem(k.at[part, b, tokens, key_head], k_s.at[part], ready)
    for part in range(summands):
        plgpu.copy_gmem_to_smem(sums.at[b, head, part, tokens], sums_s.at[part], ready)
    plgpu.copy_gmem_to_smem(beta.at[b, head, tokens], beta_s, ready)
    if plan.segmented:
        plgpu.copy_gmem_to_smem(run.at[b, tokens], run_s, ready)
    for part in range(plan.token_parts):
        plgpu.copy_gmem_to_smem(q.at[part, b, tokens, key_head], q_s.at[part], q_ready)
    plgpu.barrier_wait(ready)
    keys, queries, lower, x = (wg.parts_of(ref) for ref in (k_s, q_s, lower_s, x_s))
    multiply = functools.partial(wg.multiply, plan.interpreted)

    pair = wg.pair_decay(plan, summands, sums_s, run_s)
    kk = multiply([(wg.SQUARE, [(keys, wg.turned(keys))])])[0]
    plgpu.barrier_wait(q_ready)
    qk = multiply([(wg.SQUARE, [(queries, wg.turned(keys))])])[0]
    i, j = wg.index(wg.ROW), wg.index(wg.COLUMN)
    system = jnp.where(wg.rows(i) > wg.columns(j), wg.rows(wg.load_row(beta_s)) * pair * kk, 0.0)
    wg.put(lower, wg.split(system, 2))
    wg.put(x, wg.split(plan.scale * pair * qk, plan.parts))
    plgpu.commit_smem()
    _leave(x, scores, (b, head, chunk))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    wg.put(x, wg.split(_invert(plan, system, lower, x), plan.parts))
    plgpu.commit_smem()
    _leave(x, inverse, (b, head, chunk))
    plgpu.wait_smem_to_gmem(0)


def _leave(parts: list[Ref], target: Ref, place: tuple[Array, ...]) -> None:
    for part, ref in enumerate(parts):
        plgpu.copy_smem_to_gmem(ref, target.at[(part, *place)])


def _invert(plan: Plan, system: Array, lower: list[Ref], x_s: list[Ref]) -> Array:
    """(I + L)^-1 of the strictly lower triangular `system`, whose parts are in `lower`; `x_s` is free for X."""
    i, j = wg.index(wg.ROW), wg.index(wg.COLUMN)
    multiply = functools.partial(wg.multiply, plan.interpreted)

    def identity() -> Array:
        return jnp.where(wg.rows(i) == wg.columns(j), 1.0, 0.0)

    def lower_left(rung: int) -> Array:
        """Rows of the lower half against columns of the upper half of each block of 2^(rung + 1)."""
        block = lax.shift_right_logical(j, rung)
        partner = jnp.where((block & 1) == 0, block + 1, -1)
        return wg.rows(lax.shift_right_logical(i, rung)) == wg.columns(partner)

    def keep(parts: list[Array]) -> None:
        wg.put(x_s, parts)
        plgpu.commit_smem()

    x = identity() - jnp.where(lower_left(0), system, 0.0)
    for rung in range(1, C.bit_length() - 1):
        own = wg.split(x, plan.parts)
        first = multiply([(wg.SQUARE, [(own, lower[: plan.parts])])], meanwhile=functools.partial(keep, own))[0]
        minus = wg.split(jnp.where(lower_left(rung), -first, 0.0), plan.parts)
        x = multiply([(wg.SQUARE, [(minus, x_s)])], start=[x])[0]
    own = wg.split(x, 2)
    held = own[: plan.parts]
    product = multiply([(wg.SQUARE, [(own, lower)])], meanwhile=functools.partial(keep, held))[0]
    rest = wg.split(identity() - x - product, plan.parts)
    return multiply([(wg.SQUARE, [(rest, x_s)])], start=[x])[0]
