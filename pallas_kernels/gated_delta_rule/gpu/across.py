"""The walk over the chunks: the state goes from one to the next in registers, and is read out.

    U = A (beta (V - gamma (K S)))        O = scale gamma (Q S) + P U        S' = last S + K^T (lam U)

A block for each (64 value columns, value head, row of the batch), of three warpgroups:

* one follows the state. It is transposed, S^T [v, k]: the matrix unit takes its left operand from registers in the
  layout in which it leaves results, so that S^T K^T, then (beta (V - gamma K S))^T A^T, then (lam U)^T K chain without
  leaving them. V^T comes out of shared memory as V^T I, exactly, while the first product runs.
* one reads out, in natural orientation, from copies of S^T and U^T in shared memory.
* one loads, by TMA, into rings.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
    v: Ref
    inverse: Ref
    scores: Ref
    gates: Ref  # [b, hv, 3, t]: gamma, lam, beta
    initial: Ref


class _Made(NamedTuple):
    output: Ref
    final: Ref
    states: Ref


class _Shared(NamedTuple):
    """Rings and what stands beside them in shared memory."""

    k: Ref
    v: Ref
    inverse: Ref
    gates: Ref
    q: Ref
    scores: Ref
    gamma: Ref
    state: Ref
    written: Ref
    identity: Ref
    output: Ref


class _Barriers(NamedTuple):
    """Full and free, of each ring and each copy."""

    chunk: Ref
    chunk_free: Ref
    read: Ref
    read_free: Ref
    state: Ref
    state_free: Ref
    written: Ref
    written_free: Ref


def across(
    plan: Plan,
    q: Float[Array, "p b t h k"],
    k: Float[Array, "p b t h k"],
    v: Float[Array, "p b t hv v"],
    inverse: Float[Array, "r b hv n c c"],
    scores: Float[Array, "r b hv n c c"],
    gates: Float[Array, "b hv 3 t"],
    initial: Float[Array, "b hv v k"],
    dtype: jnp.dtype,
    saving: bool,
) -> tuple[Float[Array, "b t hv v"], Float[Array, "b hv v k"], Array]:
    """o, the transposed last state, and, if `saving`, S^T before each chunk in parts, [r, b, hv, n, v, k]."""
    _, batch, length, heads, width = v.shape
    chunks = length // C
    states = (plan.parts, batch, heads, chunks, width, plan.key_width) if saving else (1,)
    made = (
        jax.ShapeDtypeStruct((batch, length, heads, width), dtype),
        jax.ShapeDtypeStruct(initial.shape, jnp.float32),
        jax.ShapeDtypeStruct(states, jnp.bfloat16),
    )
    output, final, states = plgpu.kernel(
        functools.partial(_across, plan, saving),
        out_type=made,
        grid=(plan.value_tiles, heads, batch),
        grid_names=("tile", "head", "batch"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=wg.COMPILER,
        scratch_types=[*_scratch(plan, dtype), *_barriers(plan)],
        interpret=wg.interpreter(plan),
        kernel_name="gated_delta_rule_across",
    )(q, k, v, inverse, scores, gates, initial)
    return output, final, states


def _scratch(plan: Plan, dtype: jnp.dtype) -> _Shared:
    stages, reads, parts = plan.stages, plan.read_stages, plan.token_parts
    return _Shared(
        k=wg.tile(stages, parts, C, plan.key_width),
        v=wg.tile(stages, parts, C, C),
        inverse=wg.tile(stages, plan.parts, C, C),
        gates=plgpu.SMEM((stages, 3, C), jnp.float32),
        q=wg.tile(reads, parts, C, plan.key_width),
        scores=wg.tile(reads, plan.parts, C, C),
        gamma=plgpu.SMEM((reads, C), jnp.float32),
        state=wg.tile(plan.parts, C, plan.key_width),
        written=wg.tile(plan.written_stages, plan.parts, C, C),
        identity=wg.tile(C, C),
        output=wg.tile(C, C, dtype=dtype),
    )


def _barriers(plan: Plan) -> _Barriers:
    stages, reads, written = plan.stages, plan.read_stages, plan.written_stages
    return _Barriers(
        chunk=plgpu.Barrier(num_arrivals=2 * plan.token_parts + plan.parts + 3, num_barriers=stages),
        chunk_free=plgpu.Barrier(num_barriers=stages),
        read=plgpu.Barrier(num_arrivals=plan.token_parts + plan.parts + 1, num_barriers=reads),
        read_free=plgpu.Barrier(num_barriers=reads),
        state=plgpu.Barrier(),
        state_free=plgpu.Barrier(),
        written=plgpu.Barrier(num_barriers=written),
        written_free=plgpu.Barrier(num_barriers=written),
    )


def _across(plan: Plan, saving: bool, *refs: Ref) -> None:
    given, made, shared, barriers = wg.groups(refs, _Given, _Made, _Shared, _Barriers)
    place = Place(*(lax.axis_index(name) for name in ("tile", "head", "batch")))
    arguments = plan, place, given, made, shared, barriers
    wg.take_turns([
        (240, functools.partial(_follow, saving, *arguments)),
        (160, functools.partial(_read, *arguments)),
        (40, functools.partial(_load, *arguments)),
    ])  # fmt: skip


def _load(plan: Plan, at: Place, x: _Given, made: _Made, to: _Shared, barriers: _Barriers) -> None:
    key_head, chunks = lax.div(at.head, jnp.int32(plan.group)), x.q.shape[2] // C

    @pl.loop(0, chunks)
    def _chunk(n: Array) -> None:
        slot, read = lax.rem(n, jnp.int32(plan.stages)), lax.rem(n, jnp.int32(plan.read_stages))
        tokens = pl.ds(n * C, C)

        @pl.when(n >= plan.stages)
        def _wait() -> None:
            plgpu.barrier_wait(barriers.chunk_free.at[slot])

        full = barriers.chunk.at[slot]
        for part in range(plan.token_parts):
            plgpu.copy_gmem_to_smem(x.k.at[part, at.row, tokens, key_head], to.k.at[slot, part], full)
            plgpu.copy_gmem_to_smem(x.v.at[part, at.row, tokens, at.head, at.columns], to.v.at[slot, part], full)
        for part in range(plan.parts):
            plgpu.copy_gmem_to_smem(x.inverse.at[part, at.row, at.head, n], to.inverse.at[slot, part], full)
        for gate in range(3):
            plgpu.copy_gmem_to_smem(x.gates.at[at.row, at.head, gate, tokens], to.gates.at[slot, gate], full)

        @pl.when(n >= plan.read_stages)
        def _wait_for_reader() -> None:
            plgpu.barrier_wait(barriers.read_free.at[read])

        full = barriers.read.at[read]
        for part in range(plan.token_parts):
            plgpu.copy_gmem_to_smem(x.q.at[part, at.row, tokens, key_head], to.q.at[read, part], full)
        for part in range(plan.parts):
            plgpu.copy_gmem_to_smem(x.scores.at[part, at.row, at.head, n], to.scores.at[read, part], full)
        plgpu.copy_gmem_to_smem(x.gates.at[at.row, at.head, 0, tokens], to.gamma.at[read], full)


def _follow(
    saving: bool, plan: Plan, at: Place, x: _Given, made: _Made, shared: _Shared, barriers: _Barriers
) -> None:
    chunks, slabs = x.q.shape[2] // C, wg.slabs(plan)
    multiply = functools.partial(wg.multiply, plan.interpreted)
    wg.put_identity(shared.identity)

    def give_state(n: Array, parts: Sequence[list[Array]]) -> None:
        @pl.when(n > 0)
        def _wait() -> None:
            plgpu.barrier_wait(barriers.state_free)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for slab, own in zip(wg.in_slabs(plan, shared.state), parts, strict=True):
            wg.put(slab, own)
        plgpu.commit_smem()
        plgpu.barrier_arrive(barriers.state)
        if saving:
            for part in range(plan.parts):
                target = made.states.at[part, at.row, at.head, n, at.columns]
                plgpu.copy_smem_to_gmem(shared.state.at[part], target)

    def give_written(n: Array, parts: list[Array]) -> None:
        slot = lax.rem(n, jnp.int32(plan.written_stages))

        @pl.when(n >= plan.written_stages)
        def _wait() -> None:
            plgpu.barrier_wait(barriers.written_free.at[slot])

        wg.put(wg.parts_of(shared.written, slot), parts)
        plgpu.commit_smem()
        plgpu.barrier_arrive(barriers.written.at[slot])

    def step(n: Array, state: list[Array]) -> list[Array]:
        slot = lax.rem(n, jnp.int32(plan.stages))
        keys, values = wg.in_slabs(plan, shared.k.at[slot]), wg.parts_of(shared.v, slot)
        inverse = wg.parts_of(shared.inverse, slot)
        held = [wg.split(one, plan.parts) for one in state]
        plgpu.barrier_wait(barriers.chunk.at[slot])
        asked = [(own, wg.turned(key)) for own, key in zip(held, keys, strict=True)]
        predicted, value = multiply(
            [(wg.SQUARE, asked), (wg.SQUARE, [(wg.turned(values), [shared.identity])])],
            meanwhile=functools.partial(give_state, n, held),
        )
        gamma, lam, beta = (wg.columns(wg.load_column(shared.gates.at[slot, gate])) for gate in range(3))
        error = wg.split(beta * (value - gamma * predicted), plan.parts)
        solved = multiply([(wg.SQUARE, [(error, wg.turned(inverse))])])[0]
        left = wg.split(lam * solved, plan.parts)
        last = shared.gates[slot, 0, C - 1]
        state = multiply(
            [((C, plan.slabs[0]), [(left, key)]) for key in keys],
            start=[last * one for one in state],
            meanwhile=functools.partial(give_written, n, wg.split(solved, plan.parts)),
        )
        wg.arrive_if(n + plan.stages < chunks, barriers.chunk_free.at[slot])
        return state

    initial = [
        plgpu.load(x.initial.at[at.row, at.head, at.columns, slab], layout=wg.LAYOUT, optimized=False)
        for slab in slabs
    ]
    for slab, one in zip(slabs, lax.fori_loop(0, chunks, step, initial), strict=True):
        plgpu.store(made.final.at[at.row, at.head, at.columns, slab], one, optimized=False)
    plgpu.wait_smem_to_gmem(0)


def _read(plan: Plan, at: Place, x: _Given, made: _Made, shared: _Shared, barriers: _Barriers) -> None:
    chunks = x.q.shape[2] // C
    multiply = functools.partial(wg.multiply, plan.interpreted)
    state = wg.parts_of(shared.state)

    @pl.loop(0, chunks)
    def _chunk(n: Array) -> None:
        slot, own = lax.rem(n, jnp.int32(plan.read_stages)), lax.rem(n, jnp.int32(plan.written_stages))
        queries, scores = wg.parts_of(shared.q, slot), wg.parts_of(shared.scores, slot)
        written = wg.parts_of(shared.written, own)
        plgpu.barrier_wait(barriers.read.at[slot])
        gamma = wg.rows(wg.load_row(shared.gamma.at[slot]))
        plgpu.barrier_wait(barriers.state)
        read = plan.scale * gamma * multiply([(wg.SQUARE, [(queries, wg.turned(state))])])[0]
        wg.arrive_if(n + 1 < chunks, barriers.state_free)
        plgpu.barrier_wait(barriers.written.at[own])
        read = multiply([(wg.SQUARE, [(scores, wg.turned(written))])], start=[read])[0]
        wg.arrive_if(n + plan.written_stages < chunks, barriers.written_free.at[own])
        wg.arrive_if(n + plan.read_stages < chunks, barriers.read_free.at[slot])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        shared.output[...] = read.astype(shared.output.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared.output, made.output.at[at.row, pl.ds(n * C, C), at.head, at.columns])

    plgpu.wait_smem_to_gmem(0)
