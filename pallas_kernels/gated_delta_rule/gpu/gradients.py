"""The gradients that need no walk, all chunks and value heads at once: dQ, dK, dV, and the sums behind dg and dbeta.

S is the state before the chunk, dS' the gradient of that after it, Y = A^T dU; the rest is computed again:

    W = V - gamma (K S)            U = A (beta W)                 dV = beta Y
    dP = scale pair tril(dO U^T)   dL = -pair tril(Y U^T, -1)     (gradients of Q K^T, and of beta (K K^T))
    dQ = scale gamma (dO S^T) + dP K
    dK = asked + written + left + diag(dP) Q
    asked = beta (dL K) - gamma beta (Y S^T)     written = tril(dP, -1)^T Q + (beta dL)^T K     left = lam (U dS'^T)

beta acts in L and on W:   dbeta = rowdot(Y, W) + rowdot(dL K, K)      (no division: beta may be 0)
A decay acts on what its token reads, and on what tokens before it leave to the next chunk (`layout.take_gates`):

    reading = rowdot(Q, scale gamma (dO S^T) + tril(dP, -1) K) + rowdot(K, asked - written)
    leaving = rowdot(K, left)

A block for each (slab of key columns, chunk, value head, row of the batch), of three warpgroups that walk over the
tiles of 64 value columns: one has dO and makes dQ and `left`, which it hands over, one has Y and makes dK, one loads.
Three sums fill the registers of a warpgroup.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels.gated_delta_rule.gpu import warpgroup as wg
from pallas_kernels.gated_delta_rule.gpu.plan import C, Plan
from pallas_kernels.gated_delta_rule.gpu.warpgroup import Ref, plgpu

READING, OF_KEYS, LEAVING, D_BETA, KEPT = range(5)  # rows of the sums


class _Given(NamedTuple):
    """In global memory; the last one stands for the segments."""

    q: Ref
    k: Ref
    v: Ref
    d_output: Ref
    y: Ref
    states: Ref
    ends: Ref
    inverse: Ref
    gates: Ref
    decays: Ref
    run: Ref


class _Made(NamedTuple):
    d_q: Ref
    d_k: Ref
    d_v: Ref
    sums: Ref


class _Shared(NamedTuple):
    q: Ref
    k: Ref
    inverse: Ref
    gates: Ref
    decays: Ref
    run: Ref
    v: Ref
    d_output: Ref
    y: Ref
    state: Ref
    end: Ref
    w: Ref  # beta W, later beta dL
    u: Ref
    d_scores: Ref
    out_q: Ref
    out_k: Ref
    sums: Ref
    itself: Ref


class _Barriers(NamedTuple):
    once: Ref
    tile: Ref
    tile_free: Ref
    u: Ref
    u_free: Ref
    walked: Ref  # the states are no longer needed
    d_scores: Ref


def gradients(
    plan: Plan,
    tokens: tuple[Array, Array, Array, Array, Array],
    states: Float[Array, "r b hv n v k"],
    ends: Float[Array, "r b hv n v k"],
    inverse: Float[Array, "r b hv n c c"],
    gates: Float[Array, "b hv 3 t"],
    decays: Float[Array, "b hv s t"],
    run: Int[Array, "b t"] | None,
) -> tuple[Float[Array, "b t hv k"], Float[Array, "b t hv k"], Float[Array, "b t hv v"], Float[Array, "l b hv 5 t"]]:
    """dQ and dK of every value head, dV, and five sums a token and slab of key columns; `tokens` are q, k, v, dO, Y."""
    _, batch, length, heads, width = tokens[2].shape
    dtype, slabs = jnp.dtype(jnp.float32 if plan.exact else jnp.bfloat16), len(plan.slabs)
    made = (
        jax.ShapeDtypeStruct((batch, length, heads, plan.key_width), dtype),
        jax.ShapeDtypeStruct((batch, length, heads, plan.key_width), dtype),
        jax.ShapeDtypeStruct((batch, length, heads, width), dtype),
        jax.ShapeDtypeStruct((slabs, batch, heads, 5, length), jnp.float32),
    )
    run = jnp.zeros((batch, C), jnp.int32) if run is None else run
    d_q, d_k, d_v, sums = plgpu.kernel(
        functools.partial(_gradients, plan, decays.shape[2]),
        out_type=made,
        grid=(slabs * (length // C), heads, batch),
        grid_names=("chunk", "head", "batch"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=wg.COMPILER,
        scratch_types=[*_scratch(plan, dtype), *_barriers(plan, decays.shape[2])],
        interpret=wg.interpreter(plan),
        kernel_name="gated_delta_rule_gradients",
    )(*tokens, states, ends, inverse, gates, decays, run)
    return d_q, d_k, d_v, sums


def _scratch(plan: Plan, dtype: jnp.dtype) -> _Shared:
    stages, parts, slab = plan.gradient_stages, plan.parts, plan.slabs[0]
    value, square = wg.tile(stages, plan.token_parts, C, C), wg.tile(parts, C, C)
    return _Shared(
        q=wg.tile(plan.token_parts, C, slab), k=wg.tile(plan.token_parts, C, plan.key_width), inverse=square,
        gates=plgpu.SMEM((3, C), jnp.float32), decays=plgpu.SMEM((2, C), jnp.float32),
        run=plgpu.SMEM((C,), jnp.int32), v=value, d_output=value, y=wg.tile(stages, parts, C, C),
        state=wg.tile(stages, parts, C, plan.key_width), end=wg.tile(stages, parts, C, slab),
        w=square, u=square, d_scores=square, out_q=wg.tile(C, C, dtype=dtype),
        out_k=wg.tile(C, C, dtype=dtype), sums=plgpu.SMEM((5, C), jnp.float32), itself=plgpu.SMEM((C,), jnp.float32),
    )  # fmt: skip


def _barriers(plan: Plan, summands: int) -> _Barriers:
    once = plan.token_parts * (1 + len(plan.slabs)) + plan.parts + 3 + summands + plan.segmented
    tile = 2 * plan.token_parts + plan.parts * (2 + len(plan.slabs))
    stages = plan.gradient_stages
    return _Barriers(
        once=plgpu.Barrier(num_arrivals=once),
        tile=plgpu.Barrier(num_arrivals=tile, num_barriers=stages),
        tile_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        u=plgpu.Barrier(),
        u_free=plgpu.Barrier(),
        walked=plgpu.Barrier(),
        d_scores=plgpu.Barrier(),
    )


class _Place(NamedTuple):
    slab: Array
    chunk: Array
    head: Array
    row: Array

    @property
    def tokens(self) -> Any:
        return pl.ds(self.chunk * C, C)


def _gradients(plan: Plan, summands: int, *refs: Ref) -> None:
    given, made, shared, barriers = wg.groups(refs, _Given, _Made, _Shared, _Barriers)
    step, head, row = (lax.axis_index(name) for name in ("chunk", "head", "batch"))
    count = jnp.int32(len(plan.slabs))
    place = _Place(lax.rem(step, count), lax.div(step, count), head, row)
    arguments = plan, summands, place, given, made, shared, barriers
    wg.take_turns([
        (224, functools.partial(_query_side, *arguments)),
        (240, functools.partial(_key_side, *arguments)),
        (40, functools.partial(_load, *arguments)),
    ])  # fmt: skip


def _columns(plan: Plan, at: _Place) -> Any:
    return pl.ds(at.slab * plan.slabs[0], plan.slabs[0])


def _load(
    plan: Plan, summands: int, at: _Place, x: _Given, made: _Made, to: _Shared, barriers: _Barriers
) -> None:
    key_head = lax.div(at.head, jnp.int32(plan.group))
    own, everywhere, chunk = _columns(plan, at), wg.slabs(plan), (at.row, at.head, at.chunk)
    copy = plgpu.copy_gmem_to_smem
    for part in range(plan.token_parts):
        copy(x.q.at[part, at.row, at.tokens, key_head, own], to.q.at[part], barriers.once)
        for slab in everywhere:
            copy(x.k.at[part, at.row, at.tokens, key_head, slab], to.k.at[part, :, slab], barriers.once)
    for part in range(plan.parts):
        copy(x.inverse.at[(part, *chunk)], to.inverse.at[part], barriers.once)
    for gate in range(3):
        copy(x.gates.at[at.row, at.head, gate, at.tokens], to.gates.at[gate], barriers.once)
    for part in range(summands):
        copy(x.decays.at[at.row, at.head, part, at.tokens], to.decays.at[part], barriers.once)
    if plan.segmented:
        copy(x.run.at[at.row, at.tokens], to.run, barriers.once)

    @pl.loop(0, plan.value_tiles)
    def _tile(n: Array) -> None:
        slot, columns = lax.rem(n, jnp.int32(plan.gradient_stages)), pl.ds(n * C, C)
        full = barriers.tile.at[slot]

        @pl.when(n >= plan.gradient_stages)
        def _wait() -> None:
            plgpu.barrier_wait(barriers.tile_free.at[slot])

        for part in range(plan.token_parts):
            copy(x.v.at[part, at.row, at.tokens, at.head, columns], to.v.at[slot, part], full)
            copy(x.d_output.at[part, at.row, at.tokens, at.head, columns], to.d_output.at[slot, part], full)
        for part in range(plan.parts):
            copy(x.y.at[part, at.row, at.tokens, at.head, columns], to.y.at[slot, part], full)
            copy(x.ends.at[(part, *chunk, columns, own)], to.end.at[slot, part], full)
            for slab in everywhere:
                copy(x.states.at[(part, *chunk, columns, slab)], to.state.at[slot, part, :, slab], full)


def _pieces(width: int) -> range:
    """The first columns of what is taken out of shared memory at once: what registers hold beside the sums."""
    return range(0, width, C)


def _value(refs: list[Ref], first: int = 0) -> Array:
    """The float32 value of 64 columns of parts in shared memory."""
    return wg.join([plgpu.load(ref.at[:, pl.ds(first, C)], layout=wg.LAYOUT) for ref in refs])


def _row_dot(refs: list[Ref], x: Array) -> Array:
    """Row sums of what is in shared memory, element by element, times x."""
    found = [jnp.sum(_value(refs, first) * x[:, first : first + C], axis=1) for first in _pieces(x.shape[1])]
    return sum(found[1:], found[0])


def _write(x: Array, shared: Ref, target: Ref, at: _Place, first: Array) -> None:
    """Columns of a result, 64 at a time through shared memory; `first` is the first of them."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    shared[...] = x.astype(shared.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared, target.at[at.row, at.tokens, at.head, pl.ds(first, C)])


def _write_sum(x: Array, which: int, shared: _Shared, made: _Made, at: _Place) -> None:
    shared.sums.at[which][...] = x
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared.sums.at[which], made.sums.at[at.slab, at.row, at.head, which, at.tokens])


def _query_side(
    plan: Plan, summands: int, at: _Place, x: _Given, made: _Made, shared: _Shared, barriers: _Barriers
) -> None:
    multiply, own = functools.partial(wg.multiply, plan.interpreted), _columns(plan, at)
    slab, u = (C, plan.slabs[0]), wg.parts_of(shared.u)

    def tile(n: Array, sums: list[Array]) -> list[Array]:
        of_state, of_scores, of_end = sums
        slot = lax.rem(n, jnp.int32(plan.gradient_stages))
        plgpu.barrier_wait(barriers.tile.at[slot])
        d_output, end = wg.parts_of(shared.d_output, slot), wg.parts_of(shared.end, slot)
        state = [ref.at[:, own] for ref in wg.parts_of(shared.state, slot)]
        of_state = multiply([(slab, [(d_output, state)])], start=[of_state])[0]
        plgpu.barrier_wait(barriers.u)
        found = multiply(
            [(wg.SQUARE, [(d_output, wg.turned(u))]), (slab, [(u, end)])], start=[of_scores, of_end]
        )
        wg.arrive_if(n + 1 < plan.value_tiles, barriers.u_free)
        wg.arrive_if(n + plan.gradient_stages < plan.value_tiles, barriers.tile_free.at[slot])
        return [of_state, *found]

    zero = [wg.zeros(slab), wg.zeros(wg.SQUARE), wg.zeros(slab)]
    of_state, of_scores, of_end = lax.fori_loop(0, plan.value_tiles, tile, zero)
    plgpu.barrier_wait(barriers.once)
    keys, queries = [ref.at[:, own] for ref in wg.parts_of(shared.k)], wg.parts_of(shared.q)
    gamma, lam = (wg.load_row(shared.gates.at[gate]) for gate in range(2))
    plgpu.barrier_wait(barriers.walked)
    leaving = _give_left(plan, wg.rows(lam, slab[1]) * of_end, keys, shared)
    pair = plan.scale * wg.pair_decay(plan, summands, shared.decays, shared.run)
    i, j = wg.rows(wg.index(wg.ROW)), wg.columns(wg.index(wg.COLUMN))
    itself = plan.scale * jnp.sum(jnp.where(i == j, of_scores, 0.0), axis=1)
    d_scores = wg.split(jnp.where(i > j, pair * of_scores, 0.0), plan.parts)
    wg.put(wg.parts_of(shared.d_scores), d_scores)
    shared.itself[...] = itself
    plgpu.commit_smem()
    plgpu.barrier_arrive(barriers.d_scores)
    start = [wg.rows(plan.scale * gamma, slab[1]) * of_state]
    d_q = multiply([(slab, [(d_scores, keys)])], start=start)[0]
    _write_sum(leaving, LEAVING, shared, made, at)
    _write_sum(_row_dot(queries, d_q), READING, shared, made, at)
    for first in _pieces(slab[1]):
        whole = d_q[:, first : first + C] + wg.rows(itself) * _value(keys, first)
        _write(whole, shared.out_q, made.d_q, at, at.slab * slab[1] + first)
    plgpu.wait_smem_to_gmem(0)


def _give_left(plan: Plan, left: Array, keys: list[Ref], shared: _Shared) -> Array:
    """Put `left` where the states were, for the other warpgroup, which has read them; its row sums with the keys."""
    for part, value in enumerate(wg.split(left, plan.parts)):
        shared.state.at[0, part, :, pl.ds(0, plan.slabs[0])][...] = value
    return _row_dot(keys, left)


def _key_side(
    plan: Plan, summands: int, at: _Place, x: _Given, made: _Made, shared: _Shared, barriers: _Barriers
) -> None:
    multiply, own = functools.partial(wg.multiply, plan.interpreted), _columns(plan, at)
    slab, u, w = (C, plan.slabs[0]), wg.parts_of(shared.u), wg.parts_of(shared.w)
    plgpu.barrier_wait(barriers.once)
    all_keys, inverse = wg.parts_of(shared.k), wg.parts_of(shared.inverse)
    keys, queries = [ref.at[:, own] for ref in all_keys], wg.parts_of(shared.q)
    gamma, beta = (wg.load_row(shared.gates.at[gate]) for gate in (0, 2))

    def tile(n: Array, sums: list[Array]) -> list[Array]:
        of_lower, of_state, d_beta, kept = sums
        slot = lax.rem(n, jnp.int32(plan.gradient_stages))
        plgpu.barrier_wait(barriers.tile.at[slot])
        y, whole = wg.parts_of(shared.y, slot), wg.parts_of(shared.state, slot)
        state = [ref.at[:, own] for ref in whole]

        @pl.when(at.slab == 0)
        def _give_d_v() -> None:
            _write(wg.rows(beta) * _value(y), shared.out_k, made.d_v, at, n * C)

        held = multiply([(wg.SQUARE, [(all_keys, wg.turned(whole))])])[0]
        error = _value(wg.parts_of(shared.v, slot)) - wg.rows(gamma) * held
        d_beta = d_beta + jnp.sum(_value(y) * error, axis=1)
        wg.put(w, wg.split(wg.rows(beta) * error, plan.parts))
        plgpu.commit_smem()
        written = multiply([(wg.SQUARE, [(inverse, w)])])[0]

        @pl.when(n > 0)
        def _wait() -> None:
            plgpu.barrier_wait(barriers.u_free)

        wg.put(u, wg.split(written, plan.parts))
        plgpu.commit_smem()
        plgpu.barrier_arrive(barriers.u)
        found = multiply([(wg.SQUARE, [(y, wg.turned(u))]), (slab, [(y, state)])], start=[of_lower, of_state])
        for first in _pieces(slab[1]):
            kept = kept + jnp.sum(_value(state, first) * _value(wg.parts_of(shared.end, slot), first), axis=1)
        wg.arrive_if(n + plan.gradient_stages < plan.value_tiles, barriers.tile_free.at[slot])
        return [*found, d_beta, kept]

    zero = [wg.zeros(wg.SQUARE), wg.zeros(slab), wg.zeros((C,), wg.ROW), wg.zeros((C,), wg.ROW)]
    of_lower, of_state, d_beta, kept = lax.fori_loop(0, plan.value_tiles, tile, zero)
    plgpu.barrier_arrive(barriers.walked)
    _write_sum(kept, KEPT, shared, made, at)
    pair = wg.pair_decay(plan, summands, shared.decays, shared.run)
    i, j = wg.rows(wg.index(wg.ROW)), wg.columns(wg.index(wg.COLUMN))
    d_lower = jnp.where(i > j, -pair * of_lower, 0.0)
    d_k = multiply([(slab, [(wg.split(d_lower, plan.parts), keys)])])[0]
    d_beta = jnp.where(at.slab == 0, d_beta, 0.0) + _row_dot(keys, d_k)
    _write_sum(d_beta, D_BETA, shared, made, at)
    wg.put(w, wg.split(wg.rows(beta) * d_lower, plan.parts))
    plgpu.commit_smem()
    d_k = wg.rows(beta, slab[1]) * (d_k - wg.rows(gamma, slab[1]) * of_state)
    asked = _row_dot(keys, d_k)
    plgpu.barrier_wait(barriers.d_scores)
    written = [(wg.turned(wg.parts_of(shared.d_scores)), queries), (wg.turned(w), keys)]
    d_k = multiply([(slab, written)], start=[d_k])[0]
    _write_sum(2 * asked - _row_dot(keys, d_k), OF_KEYS, shared, made, at)
    itself, left = wg.load_row(shared.itself), wg.parts_of(shared.state, jnp.int32(0))
    for first in _pieces(slab[1]):
        whole = d_k[:, first : first + C] + _value(left, first) + wg.rows(itself) * _value(queries, first)
        _write(whole, shared.out_k, made.d_k, at, at.slab * slab[1] + first)
    plgpu.wait_smem_to_gmem(0)
