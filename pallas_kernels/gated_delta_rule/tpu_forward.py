"""The forward kernel: one chunk of some heads a grid step, chunks in order, the states in scratch between them.

Per chunk and head, K, Q [C, k], V [C, v], S [k, v], decays as in `chunks.py`:

    L = tril(beta Gam (K K^T), -1)          A = (I + L)^-1
    U = A (beta (V - gamma (K S)))          P = Gam (Q K^T)
    O = scale (gamma (Q S) + P U)           S' = last S + K^T (lam U)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.gated_delta_rule.tpu_chunk import Gates, Pack, read_gates, scores
from pallas_kernels.gated_delta_rule.tpu_parts import NN, Plan, Ref, invert_unit_lower, multiply_finely

TOGETHER = 8  # packs whose second halves are scheduled together; more of them only spill more


def forward_kernel(plan: Plan, saving: bool, *refs: Ref) -> None:
    """Blocks in: q, k, v, gate columns, gate rows, (runs,) initial states; out: o, final states, (states, A).

    The final states stay in VMEM from the first chunk to the last: they are the states in between.
    """
    q, k, v, columns, rows, *rest = refs
    runs, rest = (rest[:2], rest[2:]) if plan.segmented else ((), rest)
    initial, o, state, *saved = rest
    packs = [Pack(plan, i) for i in range(plan.packs)]

    @pl.when(pl.program_id(2) == 0)
    def _start() -> None:
        copy_states(initial, state)

    gates = read_gates(plan, columns, rows, tuple(runs))
    inverses, reads = _inside(packs, gates, q, k)
    if saving:
        for pack, a in zip(packs, inverses, strict=True):
            saved[0][0, 0, pack.index] = pack.read_state(state).astype(saved[0].dtype)
            saved[1][0, 0, pack.index] = a.astype(saved[1].dtype)
    for start in range(0, len(packs), TOGETHER):
        some = slice(start, start + TOGETHER)
        _with_states(packs[some], gates, inverses[some], reads[some], (q, k, v), o, state)


def copy_states(source: Ref, target: Ref) -> None:
    """[1, heads, k, v], once a sequence."""

    def head(index: Array, carry: None) -> None:
        target[0, index] = source[0, index]

    jax.lax.fori_loop(0, target.shape[1], head, None)


def _inside(
    packs: list[Pack], gates: Gates, q: Ref, k: Ref
) -> tuple[list[Float[Array, "c pc"]], list[Float[Array, "c pc"]]]:
    """A and P of every pack: what does not need the state."""
    systems, reads = [], []
    for pack in packs:
        kk, qk = scores(pack, q, k)
        pair = gates.pair(pack)
        beta = gates.of("beta", pack, pack.plan.chunk)
        systems.append(jnp.where(gates.masks.before, beta * pair * kk, 0.0))
        reads.append(pair * qk)
    return invert_unit_lower(systems, packs[0].plan), reads


def _with_states(
    packs: list[Pack],
    gates: Gates,
    inverses: list[Array],
    reads: list[Array],
    arguments: tuple[Ref, Ref, Ref],
    o: Ref,
    states: Ref,
) -> None:
    """U, O and S' of some packs."""
    q, k, v = arguments
    plan = packs[0].plan
    gammas = [gates.of("gamma", pack, plan.value_width) for pack in packs]
    before = [pack.read_state(states) for pack in packs]
    asked = [
        pack.with_state(jnp.concatenate([pack.key_lanes(k), pack.key_lanes(q)]), state)
        for pack, state in zip(packs, before, strict=True)
    ]
    errors = [
        gates.of("beta", pack, plan.value_width)
        * (v[0, :, pack.value_lanes()].astype(jnp.float32) - gamma * both[: plan.chunk])
        for pack, gamma, both in zip(packs, gammas, asked, strict=True)
    ]
    written = [multiply_finely(a, error, NN, plan.exact, plan.pack) for a, error in zip(inverses, errors, strict=True)]
    for pack, state, gamma, both, p, u in zip(packs, before, gammas, asked, reads, written, strict=True):
        read = gamma * both[plan.chunk :] + multiply_finely(p, u, NN, plan.exact, plan.pack)
        o[0, :, pack.value_lanes()] = (plan.scale * read).astype(o.dtype)
        leaving = gates.of("lam", pack, plan.value_width) * u
        pack.write_state(states, gates.last(pack) * state + pack.outer([pack.heads_of(k)], [leaving]))
