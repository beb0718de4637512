"""The forward kernels: read, write, and a write with the next sublayer's read, a tile of tokens a grid step.

read    r = 1 / rms(vec X);  z = r X phi;  a = z + bias;  H_pre = sigmoid(a_pre), H_post = 2 sigmoid(a_post),
        H_res = Sinkhorn(a_res);  u = sum_j H_pre[j] X_j
write   X'_i = sum_j H_res[i, j] X_j + H_post[i] y

Streams are mixed by multiply and add in float32. The projection is a matrix product with the tokens in the lanes of its
result; the norm, a number a token, follows after it. bfloat16 streams are exact factors; phi then comes in two halves.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.hyper_connections.tpu import sinkhorn
from pallas_kernels.hyper_connections.tpu.plan import Plan, each_rows, each_slab, gathered, over_lanes, spread, total
from pallas_kernels.matrix_unit import LANES, NT, Ref, multiply


def enter_kernel(plan: Plan, *refs: Ref) -> None:
    """Blocks in: X, phi, bias; out: u, record; scratch of `read`."""
    x, phi, bias, u, record, *scratch = refs
    read(plan, x, phi, bias, u, record, tuple(scratch))


def leave_kernel(plan: Plan, *refs: Ref) -> None:
    """Blocks in: X, y, record; out: X'; scratch: columns."""
    x, y, record, after, columns = refs
    write(plan, x, y, record, after, columns)


def between_kernel(plan: Plan, *refs: Ref) -> None:
    """Blocks in: X, y, record of the sublayer that ends, phi, bias of the one that begins; out: X', u, record."""
    x, y, record, phi, bias, after, u, new_record, *scratch = refs
    write(plan, x, y, record, after, scratch[-1])
    read(plan, after, phi, bias, u, new_record, tuple(scratch))


def write(plan: Plan, x: Ref, y: Ref, record: Ref, after: Ref, columns: Ref) -> None:
    """X' from X, y and the coefficients."""
    n, span = plan.streams, range(plan.streams)
    for k in range(n, plan.numbers):
        columns[k] = spread(record[0], k)

    def rows(at: Any) -> None:
        post = [columns[n + i, at] for i in span]
        mix = [[columns[plan.mixes(i, j), at] for j in span] for i in span]

        def lanes(at_lanes: Any, carry: None) -> None:
            branch = y[0, at, at_lanes].astype(jnp.float32)
            streams = [x[0, j, at, at_lanes].astype(jnp.float32) for j in span]
            for i in span:
                kept = total(mix[i][j] * streams[j] for j in span)
                after[0, i, at, at_lanes] = (kept + post[i] * branch).astype(after.dtype)

        over_lanes(plan.width, lanes, None)

    each_rows(plan, rows)


def read(plan: Plan, x: Ref, phi: Ref, bias: Ref, u: Ref, record: Ref, scratch: tuple[Ref, ...]) -> None:
    """u and the record of a tile."""
    squares, projection, logits, columns = scratch
    span = range(plan.streams)
    _project(plan, x, phi, squares, projection)
    rms = jax.lax.rsqrt(gathered(squares[...]) / (plan.streams * plan.width) + plan.epsilon)
    z = rms * projection[: plan.rows]
    logits[...] = z + bias[: plan.rows, :1]
    _coefficients(plan, logits, record)
    record[0, plan.rows : 2 * plan.rows] = z
    record[0, 2 * plan.rows :] = jnp.broadcast_to(rms, (record.shape[1] - 2 * plan.rows, plan.tile))
    for k in span:
        columns[k] = spread(record[0], k)

    def rows(at: Any) -> None:
        pre = [columns[j, at] for j in span]

        def lanes(at_lanes: Any, carry: None) -> None:
            mixed = total(pre[j] * x[0, j, at, at_lanes].astype(jnp.float32) for j in span)
            u[0, at, at_lanes] = mixed.astype(u.dtype)

        over_lanes(plan.width, lanes, None)

    each_rows(plan, rows)


def _project(plan: Plan, x: Ref, phi: Ref, squares: Ref, projection: Ref) -> None:
    """(X phi)^T without the norm, and the sum of squares, yet to be summed over the lanes; in one go over X."""
    used = plan.packed if plan.exact else 2 * plan.packed
    squares[...] = jnp.zeros(squares.shape, jnp.float32)
    projection[...] = jnp.zeros(projection.shape, jnp.float32)

    def slab(start: Any) -> None:
        there = pl.ds(start, plan.wide_slab)
        product = total(
            multiply(phi[j, :used, there], x[0, j, :, there], NT, plan.exact) for j in range(plan.streams))
        projection[...] += product if plan.exact else product[: plan.packed] + product[plan.packed :]

        def rows(at: Any) -> None:
            squared = [jnp.square(x[0, j, at, pl.ds(start + lane, LANES)].astype(jnp.float32))
                       for j in range(plan.streams) for lane in range(0, plan.wide_slab, LANES)]  # fmt: skip
            squares[at] += total(squared)

        each_rows(plan, rows, unrolled=True)

    each_slab(plan, plan.wide_slab, slab)


def _coefficients(plan: Plan, logits: Ref, record: Ref) -> None:
    """H_pre, H_post and H_res as rows of the record; rows that are no number are 0."""
    n = plan.streams
    record[0, : plan.rows] = jnp.zeros((plan.rows, plan.tile), jnp.float32)
    record[0, :n] = sigmoid(logits[:n])
    record[0, n : 2 * n] = 2 * sigmoid(logits[n : 2 * n])
    for i, row in enumerate(sinkhorn.balanced(plan, sinkhorn.matrix(logits, plan))):
        for j, mixed in enumerate(row):
            at = plan.mixes(i, j)
            record[0, at : at + 1] = mixed


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x)."""
    return 1 / (1 + jnp.exp(-x))
