"""The backward kernel: chunks in reverse order, the gradient of the states in scratch between them.

dS' is the gradient of the state after a chunk. Saved: S before the chunk, and A^T; the rest is computed again.

    W = V - gamma (K S)        U = A (beta W)            dU = (Gam scale (Q K^T))^T dO + lam (K dS')
    Y = A^T dU                 dV = beta Y               D = scale gamma dO,   E = gamma dV
    dP = scale Gam (dO U^T)    dL = -Gam tril(Y U^T, -1)        (gradients of Q K^T, and of beta (K K^T))
    dQ = D S^T + dP K          dK = dP^T Q + (beta dL)^T K + beta dL K + (lam U) dS'^T - E S^T
    dS = last dS' + Q^T D - K^T E

beta acts in L and on W:    dbeta_i = <Y_i, W_i> + sum_j (dL (K K^T))_ij        (no division: beta may be 0)

A sum G_i of log decays acts on what token i reads, and, the other way, on what it wrote that others read:

    read_i = <D_i, (Q S)_i> - <E_i, (K S)_i> + sum_j (N_ij - N_ji),    N = tril(dP (Q K^T), -1) + beta dL (K K^T)
    left_i = <lam U_i, (K dS')_i>
    dg_m = sum_{i >= m} read_i + sum_{i < m} left_i + last <S, dS'>        (i and m of one segment)
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.gated_delta_rule.tpu.chunk import Gates, Pack, read_gates, scores
from pallas_kernels.gated_delta_rule.tpu.forward import copy_states
from pallas_kernels.gated_delta_rule.tpu.packs import Plan, masks, multiply_each, multiply_finely, transpose
from pallas_kernels.matrix_unit import LANES, NN, NT, Ref, lane_index, multiply

TOGETHER = 8  # packs that are scheduled together: fewer leave the matrix unit waiting, more spill


def backward_kernel(plan: Plan, *refs: Ref) -> None:
    """Blocks in: q, k, v, gate columns, gate rows, (runs,) states, A, do, gradients of the final states.

    Out: dq, dk, dv, the gradients of the gates [.., C, 2 heads], those of the initial states; which stay in VMEM from
    the last chunk to the first: they are the gradients of the states in between.
    """
    q, k, v, columns, rows, *rest = refs
    runs, rest = (rest[:2], rest[2:]) if plan.segmented else ((), rest)
    states, inverses, d_o, d_final, d_q, d_k, d_v, d_gates, d_state = rest
    packs = [Pack(plan, i) for i in range(plan.packs)]

    @pl.when(pl.program_id(2) == 0)
    def _start() -> None:
        copy_states(d_final, d_state)

    gates = read_gates(plan, columns, rows, tuple(runs))
    of_keys, of_gates = _KeyGradients(plan, d_q, d_k), _GateGradients(plan)
    for start in range(0, len(packs), TOGETHER):
        some = packs[start : start + TOGETHER]
        parts = [_recompute(pack, gates, (q, k, v, d_o), states[0, 0, pack.index], pack.read_state(d_state))
                 for pack in some]  # fmt: skip
        solved = _solve(some, parts, [inverses[0, 0, pack.index] for pack in some])
        for pack, part, solution in zip(some, parts, solved, strict=True):
            d_v[0, :, pack.value_lanes()] = solution.d_v.astype(d_v.dtype)
            inner = _inner_gradients(pack, gates, part, solution)
            of_gates.add(pack, gates, part, solution, inner)
            of_keys.add(pack, *_key_gradients(pack, part, solution, inner, (q, k)))
            pack.write_state(d_state, _state_gradient(pack, gates, part, solution, (q, k), of_gates))
        of_keys.store()
    of_gates.store(d_gates, tuple(runs))


class _Part(NamedTuple):
    """What the forward pass had of a pack, and what comes in from the right."""

    kk: Float[Array, "c pc"]
    qk: Float[Array, "c pc"]
    kq: Float[Array, "c pc"]  # (Q K^T)^T, of every head
    pair: Float[Array, "c pc"]
    pair_transposed: Float[Array, "c pc"]
    gamma: Float[Array, "c pv"]
    lam: Float[Array, "c pv"]
    beta: Float[Array, "c pv"]
    held: Float[Array, "c pv"]  # K S
    read: Float[Array, "c pv"]  # Q S
    error: Float[Array, "c pv"]
    state: Float[Array, "k pv"]
    d_o: Float[Array, "c pv"]
    d_state: Float[Array, "k pv"]
    d_held: Float[Array, "c pv"]  # K dS'


def _recompute(pack: Pack, gates: Gates, blocks: tuple[Ref, ...], state: Array, d_state: Array) -> _Part:
    q, k, v, d_o = blocks
    plan = pack.plan
    keys, queries = pack.key_lanes(k), pack.key_lanes(q)
    kk, qk = scores(pack, q, k)
    kq = multiply(keys, pack.key_rows(q), NT, plan.exact)
    asked = pack.with_state(jnp.concatenate([keys, queries]), state)
    held, read = asked[: plan.chunk], asked[plan.chunk :]
    gamma, lam, beta = (gates.of(name, pack, plan.value_width) for name in ("gamma", "lam", "beta"))
    lanes = pack.value_lanes()
    return _Part(
        kk=kk, qk=qk, kq=kq, pair=gates.pair(pack), pair_transposed=gates.pair_transposed(pack), gamma=gamma, lam=lam,
        beta=beta, held=held, read=read, error=v[0, :, lanes].astype(jnp.float32) - gamma * held, state=state,
        d_o=d_o[0, :, lanes], d_state=d_state, d_held=pack.with_state(keys, d_state),
    )  # fmt: skip


class _Solution(NamedTuple):
    """What the triangular systems give: U from the left, Y = A^T dU from the right."""

    u: Float[Array, "c pv"]
    y: Float[Array, "c pv"]
    d_v: Float[Array, "c pv"]


def _solve(packs: list[Pack], parts: list[_Part], turned: list[Array]) -> list[_Solution]:
    plan = packs[0].plan
    exact, pack = plan.exact, plan.pack
    inverses = [transpose(a, pack) for a in turned]
    written = [multiply_finely(a, x.beta * x.error, NN, exact, pack) for x, a in zip(parts, inverses, strict=True)]
    d_written = [
        multiply_finely(plan.scale * x.pair_transposed * x.kq, x.d_o, NN, exact, pack) + x.lam * x.d_held for x in parts
    ]
    solved = [multiply_finely(a, d_u, NN, exact, pack) for a, d_u in zip(turned, d_written, strict=True)]
    return [_Solution(u, y, x.beta * y) for x, u, y in zip(parts, written, solved, strict=True)]


class _Inner(NamedTuple):
    """Gradients of Q K^T and of K K^T."""

    d_qk: Float[Array, "c pc"]
    d_qk_transposed: Float[Array, "c pc"]
    d_kk: Float[Array, "c pc"]  # dL
    asked: Float[Array, "c pc"]  # beta dL
    asked_transposed: Float[Array, "c pc"]


def _inner_gradients(pack: Pack, gates: Gates, x: _Part, solution: _Solution) -> _Inner:
    """Both ways round: to multiply again is cheaper than to transpose."""
    plan, masked = pack.plan, gates.masks
    u, y, d_v = solution

    def outer(left: Array, right: Array) -> Array:
        return multiply_finely(left, right, NT, plan.exact, plan.pack)

    read, solved = multiply_each([x.d_o, y], u, NT, plan.exact, plan.pack)
    d_kk = jnp.where(masked.before, -solved, 0.0) * x.pair
    return _Inner(
        d_qk=plan.scale * x.pair * read,
        d_qk_transposed=plan.scale * x.pair_transposed * outer(u, x.d_o),
        d_kk=d_kk,
        asked=gates.of("beta", pack, plan.chunk) * d_kk,
        asked_transposed=jnp.where(masked.after, -outer(u, d_v), 0.0) * x.pair_transposed,
    )


def _key_gradients(
    pack: Pack, x: _Part, solution: _Solution, inner: _Inner, blocks: tuple[Ref, Ref]
) -> tuple[Array, Array]:
    """dQ and dK of the pack's keys: of each value head, or of the key that all share."""
    exact = pack.plan.exact
    queries, keys = (pack.key_rows(ref) for ref in blocks)
    entered = pack.plan.scale * x.gamma * x.d_o.astype(jnp.float32)
    of_state = pack.with_state(jnp.concatenate([entered, x.gamma * solution.d_v]), x.state, NT)
    of_keys = multiply_each([inner.d_qk, inner.asked + inner.asked_transposed], keys, NN, exact)
    d_q = of_state[: pack.plan.chunk] + of_keys[0]
    d_k = pack.with_state(x.lam * solution.u, x.d_state, NT) - of_state[pack.plan.chunk :]
    return d_q, d_k + multiply_finely(inner.d_qk_transposed, queries, NN, exact) + of_keys[1]


def _state_gradient(
    pack: Pack, gates: Gates, x: _Part, solution: _Solution, blocks: tuple[Ref, Ref], of_gates: _GateGradients
) -> Float[Array, "k pv"]:
    queries, keys = (pack.heads_of(ref) for ref in blocks)
    last = gates.last(pack, pack.plan.value_width)
    of_gates.add_kept(pack, last * (x.state.astype(jnp.float32) * x.d_state).sum(0, keepdims=True))
    entered = pack.plan.scale * x.gamma * x.d_o.astype(jnp.float32)
    return last * x.d_state + pack.outer([queries, keys], [entered, -(x.gamma * solution.d_v)])


class _KeyGradients:
    """Sums over the value heads of a key head, written once no more come."""

    def __init__(self, plan: Plan, *refs: Ref) -> None:
        self.plan, self.refs = plan, refs
        self.sums: dict[int, list[Array]] = {}
        self.counts: dict[int, int] = {}

    def add(self, pack: Pack, *gradients: Array) -> None:
        members = self.plan.keys(pack.index)
        if pack.shared or self.plan.pack == 1:
            parts = [(members[0], len(members), list(gradients))]
        else:
            cuts = zip(*(pack.cut(x) for x in gradients), strict=True)
            parts = [(key, 1, list(cut)) for key, cut in zip(members, cuts, strict=True)]
        for key, count, new in parts:
            old = self.sums.get(key)
            self.sums[key] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]
            self.counts[key] = self.counts.get(key, 0) + count

    def store(self) -> None:
        """Write the sums of those keys whose value heads have all come."""
        width = self.plan.key_width
        for key in [key for key, count in self.counts.items() if count == self.plan.group]:
            for ref, x in zip(self.refs, self.sums.pop(key), strict=True):
                ref[0, :, key * width : (key + 1) * width] = x.astype(ref.dtype)
            del self.counts[key]


class _GateGradients:
    """Row sums of every head, a lane a head."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        zero = jnp.zeros((plan.chunk, plan.heads), jnp.float32)
        self.reading, self.leaving, self.d_beta = zero, zero, zero
        self.kept = jnp.zeros((1, plan.heads), jnp.float32)

    def add(self, pack: Pack, gates: Gates, x: _Part, solution: _Solution, inner: _Inner) -> None:
        before, after = gates.masks.before, gates.masks.after
        entered = self.plan.scale * x.gamma * x.d_o.astype(jnp.float32)
        weights = jnp.where(before, inner.d_qk * x.qk, 0.0) + inner.asked * x.kk
        weights = weights - jnp.where(after, inner.d_qk_transposed * x.kq, 0.0) - inner.asked_transposed * x.kk
        reading = entered * x.read - x.gamma * solution.d_v * x.held
        d_beta = solution.y * x.error
        self.reading = self._put(pack, self.reading, _row_sums(pack, reading, weights))
        self.leaving = self._put(pack, self.leaving, _row_sums(pack, x.lam * solution.u * x.d_held))
        self.d_beta = self._put(pack, self.d_beta, _row_sums(pack, d_beta, inner.d_kk * x.kk))

    def add_kept(self, pack: Pack, products: Float[Array, "1 pv"]) -> None:
        self.kept = self._put(pack, self.kept, [x.sum(1, keepdims=True) for x in pack.cut(products)])

    def _put(self, pack: Pack, total: Array, columns: list[Array]) -> Array:
        lane = lane_index(total.shape)
        for head, column in zip(self.plan.members(pack.index), columns, strict=True):
            total = jnp.where(lane == head, jnp.broadcast_to(column, total.shape), total)
        return total

    def store(self, ref: Ref, runs: tuple[Ref, ...]) -> None:
        """dg of the chunk as one product with the pairs of tokens that see each other, and dbeta."""
        size = self.plan.chunk
        run_column, run_row = (runs[0][0, 0], runs[1][0, 0][:, :size]) if runs else (None, None)
        pairs = masks(size, 1, run_column, run_row)
        later = jnp.where(pairs.seeing, 1.0, 0.0)
        earlier = jnp.where(pairs.seen & pairs.before, 1.0, 0.0)
        d_g = multiply(later, self.reading, NN, True) + multiply(earlier, self.leaving, NN, True) + self.kept
        ref[0, 0, 0] = jnp.concatenate([d_g, self.d_beta], axis=1)


def _row_sums(
    pack: Pack, wide: Float[Array, "c pv"], narrow: Float[Array, "c pc"] | None = None
) -> list[Float[Array, "c 1"]]:
    """Sums over the lanes of each head, of both arrays at once where their lanes can be added first."""
    parts = [sum((x[:, i : i + LANES] for i in range(LANES, x.shape[1], LANES)), x[:, :LANES]) for x in pack.cut(wide)]
    if narrow is None:
        return [x.sum(1, keepdims=True) for x in parts]
    size, aligned = pack.plan.chunk, pack.plan.chunk % LANES == 0
    if not aligned and pack.plan.pack == 1:
        return [parts[0].sum(1, keepdims=True) + narrow.sum(1, keepdims=True)]
    if aligned:
        own = pack.cut(narrow)
    else:
        head = lane_index(narrow.shape) >> (size.bit_length() - 1)
        own = [jnp.where(head == i, narrow, 0.0) for i in range(pack.plan.pack)]
    return [(x + y).sum(1, keepdims=True) for x, y in zip(parts, own, strict=True)]
