"""The forward kernel: one chunk of some heads a grid step, chunks in order, the states in scratch between them.

Per chunk and head, K, Q [C, k], V [C, v], S [k, v], decays as in `chunks.py`:

    L = tril(beta Gam (K K^T), -1)          A = (I + L)^-1
    U = A (beta (V - gamma (K S)))          P = Gam (Q K^T)
    O = scale (gamma (Q S) + P U)           S' = last S + K^T (lam U)
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.gated_delta_rule.tpu_chunk import Gates, Pack, read_gates, scores
from pallas_kernels.gated_delta_rule.tpu_parts import NN, Plan, Ref, invert_unit_lower, multiply_finely

TOGETHER = 8  # packs whose second halves are scheduled together; more of them only spill more


def forward_kernel(plan: Plan, saving: bool, *refs: Ref) -> None:
    """Blocks in: q, k, v, gate columns, gate rows, (runs,) initial states; out: o, final states, (states, A).

    The last one is scratch: the states [packs, k, p v] float32.
    """
    q, k, v, columns, rows, *rest, state = refs
    runs, rest = (rest[:2], rest[2:]) if plan.segmented else ((), rest)
    initial, o, final, *saved = rest
    packs = [Pack(plan, i) for i in range(plan.packs)]

    @pl.when(pl.program_id(2) == 0)
    def _start() -> None:
        load_states(packs, initial, state)

    gates = read_gates(plan, columns, rows, tuple(runs))
    inverses, reads = _inside(packs, gates, q, k)
    if saving:
        for pack, a in zip(packs, inverses, strict=True):
            saved[0][0, 0, pack.index] = state[pack.index].astype(saved[0].dtype)
            saved[1][0, 0, pack.index] = a.astype(saved[1].dtype)
    for start in range(0, len(packs), TOGETHER):
        some = slice(start, start + TOGETHER)
        _with_states(packs[some], gates, inverses[some], reads[some], (q, k, v), o, state)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _end() -> None:
        store_states(packs, state, final)


def load_states(packs: list[Pack], blocks: Ref, scratch: Ref) -> None:
    """[1, heads, k, v] to the packs' lanes."""
    for pack in packs:
        scratch[pack.index] = jnp.concatenate([blocks[0, head] for head in pack.plan.members(pack.index)], axis=1)


def store_states(packs: list[Pack], scratch: Ref, blocks: Ref) -> None:
    """The packs' lanes to [1, heads, k, v]."""
    for pack in packs:
        for head, state in zip(pack.plan.members(pack.index), pack.cut(scratch[pack.index]), strict=True):
            blocks[0, head] = state


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
    asked = [
        pack.with_state(jnp.concatenate([pack.key_lanes(k), pack.key_lanes(q)]), states[pack.index]) for pack in packs
    ]
    errors = [
        gates.of("beta", pack, plan.value_width)
        * (v[0, :, pack.value_lanes()].astype(jnp.float32) - gamma * both[: plan.chunk])
        for pack, gamma, both in zip(packs, gammas, asked, strict=True)
    ]
    written = [multiply_finely(a, error, NN, plan.exact, plan.pack) for a, error in zip(inverses, errors, strict=True)]
    for pack, gamma, both, p, u in zip(packs, gammas, asked, reads, written, strict=True):
        read = gamma * both[plan.chunk :] + multiply_finely(p, u, NN, plan.exact, plan.pack)
        o[0, :, pack.value_lanes()] = (plan.scale * read).astype(o.dtype)
        leaving = gates.of("lam", pack, plan.value_width) * u
        states[pack.index] = gates.last(pack) * states[pack.index] + pack.outer([pack.heads_of(k)], [leaving])
