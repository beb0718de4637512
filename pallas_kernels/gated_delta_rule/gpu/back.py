"""The walk back over the chunks: the mirror of `across`, with the gradient of the state in registers.

    dU = P^T dO + lam (K dS')        Y = A^T dU        dS = last dS' + Q^T (scale gamma dO) - K^T (gamma beta Y)

A block for each (64 value columns, value head, row of the batch), of two warpgroups: one follows the gradient,
transposed, one loads. dO^T comes out of shared memory as dO^T I, exactly.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.gated_delta_rule.gpu import warpgroup as wg
from pallas_kernels.gated_delta_rule.gpu.plan import C, Plan
from pallas_kernels.gated_delta_rule.gpu.warpgroup import Place, Ref, plgpu


class _Given(NamedTuple):
    """In global memory."""

    q: Ref
    k: Ref
    d_output: Ref
    inverse: Ref
    scores: Ref
    gates: Ref
    d_final: Ref


class _Made(NamedTuple):
    y: Ref
    ends: Ref
    d_initial: Ref


class _Shared(NamedTuple):
    q: Ref
    k: Ref
    d_output: Ref
    inverse: Ref
    scores: Ref
    gates: Ref
    end: Ref
    y: Ref
    identity: Ref


class _Barriers(NamedTuple):
    chunk: Ref
    chunk_free: Ref


def back(
    plan: Plan,
    q: Float[Array, "p b t h k"],
    k: Float[Array, "p b t h k"],
    d_output: Float[Array, "p b t hv v"],
    inverse: Float[Array, "r b hv n c c"],
    scores: Float[Array, "r b hv n c c"],
    gates: Float[Array, "b hv 3 t"],
    d_final: Float[Array, "b hv v k"],
) -> tuple[Float[Array, "r b t hv v"], Float[Array, "r b hv n v k"], Float[Array, "b hv v k"]]:
    """Y, the transposed gradients of the states after each chunk, both in parts, and that of the first state."""
    _, batch, length, heads, width = d_output.shape
    parts, stages = plan.parts, plan.back_stages
    made = (
        jax.ShapeDtypeStruct((parts, batch, length, heads, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((parts, batch, heads, length // C, width, plan.key_width), jnp.bfloat16),
        jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
    )
    key = wg.tile(stages, plan.token_parts, C, plan.key_width)
    square = wg.tile(stages, parts, C, C)
    shared = _Shared(
        q=key, k=key, d_output=wg.tile(stages, plan.token_parts, C, C), inverse=square, scores=square,
        gates=plgpu.SMEM((stages, 3, C), jnp.float32), end=wg.tile(parts, C, plan.key_width),
        y=wg.tile(parts, C, C), identity=wg.tile(C, C),
    )  # fmt: skip
    arrivals = 3 * plan.token_parts + 2 * parts + 3
    barriers = _Barriers(plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages), plgpu.Barrier(num_barriers=stages))
    y, ends, d_initial = plgpu.kernel(
        functools.partial(_back, plan),
        out_type=made,
        grid=(plan.value_tiles, heads, batch),
        grid_names=("tile", "head", "batch"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=wg.COMPILER,
        scratch_types=[*shared, *barriers],
        interpret=wg.interpreter(plan),
        kernel_name="gated_delta_rule_back",
    )(q, k, d_output, inverse, scores, gates, d_final)
    return y, ends, d_initial


def _back(plan: Plan, *refs: Ref) -> None:
    given, made, shared, barriers = wg.groups(refs, _Given, _Made, _Shared, _Barriers)
    place = Place(*(lax.axis_index(name) for name in ("tile", "head", "batch")))
    arguments = plan, place, given, made, shared, barriers
    wg.take_turns([(240, functools.partial(_follow, *arguments)), (40, functools.partial(_load, *arguments))])


def _load(plan: Plan, at: Place, x: _Given, made: _Made, to: _Shared, barriers: _Barriers) -> None:
    key_head, chunks = lax.div(at.head, jnp.int32(plan.group)), x.q.shape[2] // C

    @pl.loop(0, chunks)
    def _chunk(step: Array) -> None:
        slot, n = lax.rem(step, jnp.int32(plan.back_stages)), chunks - 1 - step
        tokens, full = pl.ds(n * C, C), barriers.chunk.at[slot]

        @pl.when(step >= plan.back_stages)
        def _wait() -> None:
            plgpu.barrier_wait(barriers.chunk_free.at[slot])

        for part in range(plan.token_parts):
            plgpu.copy_gmem_to_smem(x.k.at[part, at.row, tokens, key_head], to.k.at[slot, part], full)
            plgpu.copy_gmem_to_smem(x.q.at[part, at.row, tokens, key_head], to.q.at[slot, part], full)
            d_output = x.d_output.at[part, at.row, tokens, at.head, at.columns]
            plgpu.copy_gmem_to_smem(d_output, to.d_output.at[slot, part], full)
        for part in range(plan.parts):
            plgpu.copy_gmem_to_smem(x.inverse.at[part, at.row, at.head, n], to.inverse.at[slot, part], full)
            plgpu.copy_gmem_to_smem(x.scores.at[part, at.row, at.head, n], to.scores.at[slot, part], full)
        for gate in range(3):
            plgpu.copy_gmem_to_smem(x.gates.at[at.row, at.head, gate, tokens], to.gates.at[slot, gate], full)


def _follow(plan: Plan, at: Place, x: _Given, made: _Made, shared: _Shared, barriers: _Barriers) -> None:
    chunks, slabs = x.q.shape[2] // C, wg.slabs(plan)
    multiply = functools.partial(wg.multiply, plan.interpreted)
    wg.put_identity(shared.identity)

    def give_end(n: Array, ends: list[list[Array]]) -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for slab, own in zip(wg.in_slabs(plan, shared.end), ends, strict=True):
            wg.put(slab, own)
        plgpu.commit_smem()
        for part in range(plan.parts):
            target = made.ends.at[part, at.row, at.head, n, at.columns]
            plgpu.copy_smem_to_gmem(shared.end.at[part], target)

    def give_y(n: Array, parts: list[Array]) -> None:
        for part, value in enumerate(parts):
            shared.y.at[part].T[...] = value
        plgpu.commit_smem()
        for part in range(plan.parts):
            target = made.y.at[part, at.row, pl.ds(n * C, C), at.head, at.columns]
            plgpu.copy_smem_to_gmem(shared.y.at[part], target)

    def one(step: Array, end: list[Array]) -> list[Array]:
        slot, n = lax.rem(step, jnp.int32(plan.back_stages)), chunks - 1 - step
        keys, queries = (wg.in_slabs(plan, ref.at[slot]) for ref in (shared.k, shared.q))
        d_output = wg.turned(wg.parts_of(shared.d_output, slot))
        inverse, scores = wg.parts_of(shared.inverse, slot), wg.parts_of(shared.scores, slot)
        held = [wg.split(own, plan.parts) for own in end]
        plgpu.barrier_wait(barriers.chunk.at[slot])
        asked = [(own, wg.turned(key)) for own, key in zip(held, keys, strict=True)]
        left, d_u, read = multiply(
            [(wg.SQUARE, asked), (wg.SQUARE, [(d_output, scores)]), (wg.SQUARE, [(d_output, [shared.identity])])],
            meanwhile=functools.partial(give_end, n, held),
        )
        gamma, lam, beta = (wg.columns(wg.load_column(shared.gates.at[slot, gate])) for gate in range(3))
        y = multiply([(wg.SQUARE, [(wg.split(d_u + lam * left, plan.parts), inverse)])])[0]
        entered, solved = wg.split(plan.scale * gamma * read, plan.parts), wg.split(-gamma * beta * y, plan.parts)
        last = shared.gates[slot, 0, C - 1]
        before = multiply(
            [((C, plan.slabs[0]), [(entered, query), (solved, key)]) for key, query in zip(keys, queries, strict=True)],
            start=[last * own for own in end],
            meanwhile=functools.partial(give_y, n, wg.split(y, plan.parts)),
        )
        wg.arrive_if(step + plan.back_stages < chunks, barriers.chunk_free.at[slot])
        return before

    final = [
        plgpu.load(x.d_final.at[at.row, at.head, at.columns, slab], layout=wg.LAYOUT, optimized=False)
        for slab in slabs
    ]
    for slab, own in zip(slabs, lax.fori_loop(0, chunks, one, final), strict=True):
        plgpu.store(made.d_initial.at[at.row, at.head, at.columns, slab], own, optimized=False)
    plgpu.wait_smem_to_gmem(0)
