"""Sinkhorn's rounds on rows of tokens: E_ij is a row with a token a lane, so that sums over i and j are plain adds.

E = max(exp(logits - row max), floor);  u = 1 / (E v),  v = 1 / (E^T u) from v = 1;  H_ij = u_i E_ij v_j after the last
round. Backwards through the rounds themselves, as `xla.sinkhorn` has it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.hyper_connections.tpu.plan import Plan, total
from pallas_kernels.matrix_unit import Ref

Rows = list[Array]
Matrix = list[Rows]


def positive(logits: Matrix, floor: float) -> tuple[Matrix, Matrix]:
    """E, and exp(logits - row max) before the floor."""
    tops = [_largest(row) for row in logits]
    powers = [[jnp.exp(x - top) for x in row] for row, top in zip(logits, tops, strict=True)]
    return [[jnp.maximum(x, floor) for x in row] for row in powers], powers


def scalings(plan: Plan, e: Matrix, kept: Ref | None = None) -> tuple[Rows, Rows]:
    """The last u and v. Into `kept` [rounds, 2n, tile] go v before each round and its u."""
    n = plan.streams

    def one_round(i: Array, carry: tuple[Rows, Rows]) -> tuple[Rows, Rows]:
        _, v = carry
        u = [1 / total(a * b for a, b in zip(row, v, strict=True)) for row in e]
        if kept is not None:
            for j in range(n):
                kept[i, j : j + 1] = v[j]
                kept[i, n + j : n + j + 1] = u[j]
        return u, [1 / total(e[i][j] * u[i] for i in range(n)) for j in range(n)]

    ones = [jnp.ones_like(x) for x in e[0]]
    return jax.lax.fori_loop(0, plan.rounds, one_round, (ones, ones))


def balanced(plan: Plan, logits: Matrix) -> Matrix:
    """H."""
    e, _ = positive(logits, plan.floor)
    u, v = scalings(plan, e)
    return [[u[i] * x * v[j] for j, x in enumerate(row)] for i, row in enumerate(e)]


def backward(plan: Plan, logits: Matrix, d_mixed: Matrix, kept: Ref) -> Matrix:
    """The gradient of the logits from that of H; `kept` is scratch."""
    n = plan.streams
    e, powers = positive(logits, plan.floor)
    span = range(n)
    u, v = scalings(plan, e, kept)

    def rows_of(i: Array | int, start: int) -> Rows:
        return [kept[i, start + j : start + j + 1] for j in span]

    weighted = [[d_mixed[i][j] * e[i][j] for j in span] for i in span]
    ds = [-total(weighted[i][j] * u[i] for i in span) * v[j] * v[j] for j in span]
    dr = [-(total(weighted[i][j] * v[j] for j in span) + total(e[i][j] * ds[j] for j in span)) * u[i] * u[i]
          for i in span]  # fmt: skip
    de = [[d_mixed[i][j] * u[i] * v[j] for j in span] for i in span]

    def one_round(k: Array, carry: tuple[Matrix, Rows, Rows]) -> tuple[Matrix, Rows, Rows]:
        de, ds, dr = carry
        at = plan.rounds - 1 - k
        before, u = rows_of(at, 0), rows_of(at, n)
        earlier = rows_of(jnp.maximum(at - 1, 0), n)  # the first round has none: what it computes is not read
        de = [[de[i][j] + u[i] * ds[j] + dr[i] * before[j] for j in span] for i in span]
        ds = [-total(e[i][j] * dr[i] for i in span) * before[j] * before[j] for j in span]
        dr = [-total(e[i][j] * ds[j] for j in span) * earlier[i] * earlier[i] for i in span]
        return de, ds, dr

    de, _, _ = jax.lax.fori_loop(0, plan.rounds, one_round, (de, ds, dr))
    return _through_powers(plan, logits, powers, de)


def _through_powers(plan: Plan, logits: Matrix, powers: Matrix, de: Matrix) -> Matrix:
    """Where the floor is taken there is no gradient; that of the row maximum is shared by the entries that are it."""
    found = []
    for row, power, d_row in zip(logits, powers, de, strict=True):
        top = _largest(row)
        d = [jnp.where(p > plan.floor, x * p, 0.0) for x, p in zip(d_row, power, strict=True)]
        tops = [jnp.where(x == top, 1.0, 0.0) for x in row]
        share = total(d) / total(tops)
        found.append([x - share * is_top for x, is_top in zip(d, tops, strict=True)])
    return found


def _largest(row: Rows) -> Array:
    top = row[0]
    for x in row[1:]:
        top = jnp.maximum(top, x)
    return top


def matrix(ref: Ref, plan: Plan) -> Matrix:
    """The rows of an n x n matrix in a block [rows, tile], as `Plan.mixes` numbers them."""
    n = plan.streams
    return [[ref[pl.ds(plan.mixes(i, j), 1)] for j in range(n)] for i in range(n)]
