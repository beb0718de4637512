"""The forward kernel: one chunk of some heads a grid step, chunks in order, the states in the result's block.

Tokens lie in the lanes, states and values transposed: what a token's gate scales are lanes then, and a row of gates is
spread over sublanes at no cost, where a column takes a permutation for every register. Per chunk and head, K, Q [C, k],
V [C, v], S [k, v], decays as in `chunks.py`, `x M` scaling the columns of M:

    L^T = triu(beta x Gam^T (K K^T), 1)                A^T = (I + L^T)^-1
    U^T = (beta x (V^T - gamma x (S^T K^T))) A^T       P^T = Gam^T (K Q^T)
    O^T = scale (gamma x (S^T Q^T) + U^T P^T)          S'^T = last S^T + (lam x U^T) K
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.gated_delta_rule.tpu.chunk import Gates, Pack, read_gates
from pallas_kernels.gated_delta_rule.tpu.packs import Plan, expand, invert_unit_upper, multiply_finely
from pallas_kernels.matrix_unit import NN, NT, Ref, multiply

TOGETHER = 8  # packs whose second halves are scheduled together; more of them only spill more


def forward_kernel(plan: Plan, saving: bool, *refs: Ref) -> None:
    """Blocks in: q, k, v, gate columns, gate rows, (runs,) initial states; out: o, final states, (S, A^T).

    The final states stay in VMEM from the first chunk to the last: they are the states in between.
    """
    q, k, v, columns, rows, *rest = refs
    runs, rest = (rest[:2], rest[2:]) if plan.segmented else ((), rest)
    initial, o, states, *saved = rest
    packs = [Pack(plan, i) for i in range(plan.packs)]

    @pl.when(pl.program_id(2) == 0)
    def _start() -> None:
        copy_states(initial, states)

    gates = read_gates(plan, columns, rows, tuple(runs))
    asked = [_ask(pack, q, k, states) for pack in packs]
    inverses, reads = _inside(packs, gates, asked)
    if saving:
        for pack, a in zip(packs, inverses, strict=True):
            turned = [x.T for x in pack.cut(pack.read_state(states).astype(saved[0].dtype))]
            saved[0][0, 0, pack.index] = jnp.concatenate(turned, axis=1)
            saved[1][0, 0, pack.index] = a.astype(saved[1].dtype)
    for start in range(0, len(packs), TOGETHER):
        some = slice(start, start + TOGETHER)
        _with_states(packs[some], gates, asked[some], inverses[some], reads[some], (k, v), o, states)


def copy_states(source: Ref, target: Ref) -> None:
    """[1, heads, ..]; a loop, as it is done once a sequence."""

    def head(index: Array, carry: None) -> None:
        target[0, index] = source[0, index]

    jax.lax.fori_loop(0, target.shape[1], head, None)


class _Asked(NamedTuple):
    """What keys and queries are to the keys, and what they find in the state."""

    kk: Float[Array, "c pc"]
    kq: Float[Array, "c pc"]  # K Q^T
    held: Float[Array, "v pc"]  # S^T K^T
    read: Float[Array, "v pc"]  # S^T Q^T


def _ask(pack: Pack, q: Ref, k: Ref, states: Ref) -> _Asked:
    """One product: K and S^T side by side in the lanes of a pack, times K^T and Q^T of each head."""
    plan = pack.plan
    keys = jnp.concatenate(pack.heads_of(k), axis=1)
    state = pack.read_state(states).astype(keys.dtype)
    right = jnp.concatenate([_spread(pack, k), _spread(pack, q)])
    product = multiply(jnp.concatenate([keys, state]), right, NT, plan.exact)
    lanes = plan.pack * plan.chunk
    scores, found = product[: plan.chunk], product[plan.chunk :]
    return _Asked(scores[:, :lanes], scores[:, lanes:], found[:, :lanes], found[:, lanes:])


def _spread(pack: Pack, ref: Ref) -> Float[Array, "pc pk"]:
    """The keys of each head on the diagonal."""
    return expand(jnp.concatenate(pack.heads_of(ref), axis=1), pack.plan.pack)


def _inside(
    packs: list[Pack], gates: Gates, asked: list[_Asked]
) -> tuple[list[Float[Array, "c pc"]], list[Float[Array, "c pc"]]]:
    """A^T and P^T of every pack: what does not need the state."""
    systems, reads = [], []
    for pack, x in zip(packs, asked, strict=True):
        pair = gates.pair_transposed(pack)
        systems.append(jnp.where(gates.masks.after, gates.row("beta", pack) * pair * x.kk, 0.0))
        reads.append(pair * x.kq)
    return invert_unit_upper(systems, packs[0].plan), reads


def _with_states(
    packs: list[Pack],
    gates: Gates,
    asked: list[_Asked],
    inverses: list[Array],
    reads: list[Array],
    arguments: tuple[Ref, Ref],
    o: Ref,
    states: Ref,
) -> None:
    """U, O and S' of some packs."""
    k, v = arguments
    plan = packs[0].plan
    gammas = [gates.row("gamma", pack) for pack in packs]
    errors = [
        gates.row("beta", pack) * (_values(pack, v) - gamma * x.held)
        for pack, gamma, x in zip(packs, gammas, asked, strict=True)
    ]
    written = [multiply_finely(error, a, NN, plan.exact, plan.pack) for error, a in zip(errors, inverses, strict=True)]
    for pack, gamma, x, p, u in zip(packs, gammas, asked, reads, written, strict=True):
        read = gamma * x.read + multiply_finely(u, p, NN, plan.exact, plan.pack)
        _store_values(pack, o, (plan.scale * read).astype(o.dtype))
        added = multiply(gates.row("lam", pack) * u, _spread(pack, k), NN, plan.exact)
        pack.write_state(states, gates.last(pack, plan.key_width) * pack.read_state(states) + added)


def _values(pack: Pack, ref: Ref) -> Float[Array, "v pc"]:
    """The values of each head, tokens in the lanes."""
    return jnp.concatenate(pack.cut(ref[0, :, pack.value_lanes()])).T.astype(jnp.float32)


def _store_values(pack: Pack, ref: Ref, x: Float[Array, "v pc"]) -> None:
    turned, size = x.T, pack.plan.chunk
    heads = [turned[i * size : (i + 1) * size] for i in range(pack.plan.pack)]
    ref[0, :, pack.value_lanes()] = jnp.concatenate(heads, axis=1)
