"""The backward kernels. Between the two of a sublayer the gradient of its result goes round its branch as it is.

With G the gradient of X', g_u that of u; `write_back` runs before the branch's backward pass, `read_back` after it:

write_back  dy = sum_i H_post[i] G_i;   dH_post[i] = <G_i, y>
read_back   dH_pre[j] = <g_u, X_j>;     dH_res[i, j] = <G_i, X_j>;   da through sigmoid and Sinkhorn;   dbias = sum da
            dp = r da;   dphi = sum X^T dp;   c = -r^2 <da, z> / (n d)
            dX_j = sum_i H_res[i, j] G_i + H_pre[j] g_u + phi_j dp + c X_j

So the sum over the grid of dphi and dbias stays in VMEM, and X and G are read once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.hyper_connections.tpu import sinkhorn
from pallas_kernels.hyper_connections.tpu.plan import (
    HALF,
    ROWS,
    Plan,
    each_rows,
    each_slab,
    gathered,
    over_lanes,
    real_tokens,
    spread,
    total,
    turned,
)
from pallas_kernels.matrix_unit import LANES, NN, Ref, multiply

_SUMS = 24  # registers of sums kept at a time


def enter_back_kernel(plan: Plan, *refs: Ref) -> None:
    """Blocks in: X, G, g_u, record, dH_post, phi, bias; out: dX, dphi, dbias; scratch."""
    x, g, g_u, record, d_post, phi, bias, dx, d_phi, d_bias, *scratch = refs
    read_back(plan, (x, g, g_u, record, d_post, phi, bias), (dx, d_phi, d_bias), scratch)


def leave_back_kernel(plan: Plan, *refs: Ref) -> None:
    """Blocks in: G, y, record; out: dy, dH_post; scratch: columns, sums."""
    g, y, record, dy, d_post, columns, sums = refs
    write_back(plan, g, y, record, dy, d_post, (columns, sums))


def between_back_kernel(plan: Plan, *refs: Ref) -> None:
    """`enter_back_kernel` of the later sublayer, whose dX is the G of `leave_back_kernel` of the one before."""
    x, g, g_u, record, d_post, phi, bias, y, before, dx, d_phi, d_bias, dy, d_post_before, *scratch = refs
    read_back(plan, (x, g, g_u, record, d_post, phi, bias), (dx, d_phi, d_bias), scratch)
    write_back(plan, dx, y, before, dy, d_post_before, (scratch[0], scratch[1]))


def write_back(plan: Plan, g: Ref, y: Ref, record: Ref, dy: Ref, d_post: Ref, scratch: tuple[Ref, Ref]) -> None:
    """dy and dH_post of a tile."""
    columns, sums = scratch
    n, span = plan.streams, range(plan.streams)
    for i in span:
        columns[i] = spread(record[0], n + i)

    def rows(at: Any) -> None:
        post = [columns[i, at] for i in span]

        def lanes(at_lanes: Any, carry: list[Array]) -> list[Array]:
            branch = y[0, at, at_lanes].astype(jnp.float32)
            streams = [g[0, i, at, at_lanes].astype(jnp.float32) for i in span]
            dy[0, at, at_lanes] = total(post[i] * streams[i] for i in span).astype(dy.dtype)
            return [one + stream * branch for one, stream in zip(carry, streams, strict=True)]

        start = [jnp.zeros((ROWS, LANES), jnp.float32)] * n
        ends: list[Array] = over_lanes(plan.width, lanes, start)
        for i in span:
            sums[i, at] = ends[i]

    each_rows(plan, rows)
    d_post[0] = jnp.zeros(d_post.shape[1:], jnp.float32)
    for i in span:
        d_post[0, i : i + 1] = gathered(sums[i])


def read_back(plan: Plan, given: tuple[Ref, ...], wanted: tuple[Ref, Ref, Ref], scratch: list[Ref]) -> None:
    """dX of a tile, and what it adds to dphi and dbias."""
    x, g, g_u, record, d_post, phi, bias = given
    dx, d_phi, d_bias = wanted
    columns, sums, gradients, kept, stage = scratch
    _inner_products(plan, x, g, g_u, sums)
    gradients[...] = jnp.zeros(gradients.shape, jnp.float32)
    for k in [*range(plan.streams), *range(2 * plan.streams, plan.numbers)]:
        gradients[k : k + 1] = gathered(sums[k])
    _to_logits(plan, gradients, record, d_post, bias, kept)
    d_projection, scale = _to_projection(plan, gradients, record, d_bias)
    for k in [*range(plan.streams), *range(2 * plan.streams, plan.numbers)]:
        columns[k] = spread(record[0], k)
    columns[plan.numbers] = spread(scale, 0)
    _d_streams(plan, (x, g, g_u, phi), d_projection, columns, (dx, d_phi), stage)


def _inner_products(plan: Plan, x: Ref, g: Ref, g_u: Ref, sums: Ref) -> None:
    """<g_u, X_j> into j, <G_i, X_j> into `mixes(i, j)` of [numbers, tile, lanes], yet to be summed over the lanes."""
    n, span = plan.streams, range(plan.streams)
    pairs = [(None, j) for j in span] + [(i, j) for i in span for j in span]
    together = [pairs[start : start + _SUMS // n * n] for start in range(0, len(pairs), _SUMS // n * n)]

    def half(at: Any, which: int) -> dict[int, Array]:
        found: dict[int, Array] = {}
        mine = slice(which * HALF, (which + 1) * HALF)

        for some in together:
            lefts = list(dict.fromkeys(i for i, _ in some))

            def lanes(at_lanes: Any, carry: list[Array], lefts=lefts) -> list[Array]:
                right = [x[0, j, at, at_lanes].astype(jnp.float32)[mine] for j in span]
                new = []
                for k, i in enumerate(lefts):
                    block = g_u[0, at, at_lanes] if i is None else g[0, i, at, at_lanes]
                    left = block.astype(jnp.float32)[mine]
                    new += [carry[k * n + j] + left * right[j] for j in span]
                return new

            ends = over_lanes(plan.width, lanes, [jnp.zeros((HALF, LANES), jnp.float32)] * len(some))
            names = [j if i is None else plan.mixes(i, j) for i, j in some]
            found |= dict(zip(names, ends, strict=True))
        return found

    def rows(at: Any) -> None:
        halves = [half(at, which) for which in range(ROWS // HALF)]
        for k in halves[0]:
            sums[k, at] = jnp.concatenate([one[k] for one in halves])

    each_rows(plan, rows)


def _to_logits(plan: Plan, gradients: Ref, record: Ref, d_post: Ref, bias: Ref, kept: Ref) -> None:
    """In place: of H_pre and H_res to that of a; that of H_post comes beside. Rows that are no number become 0."""
    n = plan.streams
    pre, post = record[0, :n], record[0, n : 2 * n]
    logits = record[0, plan.rows : 2 * plan.rows] + bias[: plan.rows, :1]
    places = [[plan.mixes(i, j) for j in range(n)] for i in range(n)]
    matrix = [[logits[k : k + 1] for k in row] for row in places]
    d_mixed = [[gradients[k : k + 1] for k in row] for row in places]
    gradients[:n] = gradients[:n] * pre * (1 - pre)
    gradients[n : 2 * n] = d_post[0, :n] * post * (1 - post / 2)
    for row, found in zip(places, sinkhorn.backward(plan, matrix, d_mixed, kept), strict=True):
        for k, one in zip(row, found, strict=True):
            gradients[k : k + 1] = one


def _to_projection(
    plan: Plan, gradients: Ref, record: Ref, d_bias: Ref
) -> tuple[Float[Array, "packed tile"], Float[Array, "1 tile"]]:
    """dp, 0 where no token is, and c; adds to dbias."""
    rms = record[0, 2 * plan.rows : 2 * plan.rows + 1]
    d_logits = gradients[: plan.packed]
    real = real_tokens(plan, pl.program_id(2))
    if plan.ragged:
        d_logits = jnp.where(real, d_logits, 0.0)
    number = jax.lax.broadcasted_iota(jnp.int32, d_logits.shape, 0) < plan.numbers
    d_logits = jnp.where(number, d_logits, 0.0)
    d_bias[0] += total(d_logits[:, at : at + LANES] for at in range(0, plan.tile, LANES))
    inner = jnp.sum(d_logits[: plan.rows] * record[0, plan.rows : 2 * plan.rows], axis=0, keepdims=True)
    d_projection = rms * d_logits
    if plan.ragged:
        d_projection = jnp.where(real, d_projection, 0.0)
    return d_projection, -jnp.square(rms) * inner / (plan.streams * plan.width)


def _halves(x: Array) -> list[Array]:
    """High and low, float32 numbers that bfloat16 has."""
    high = x.astype(jnp.bfloat16).astype(jnp.float32)
    return [high, x - high]


def _d_streams(
    plan: Plan, given: tuple[Ref, ...], d_projection: Array, columns: Ref, wanted: tuple[Ref, Ref], stage: Ref
) -> None:
    """dX, and what is added to dphi; the matrix products of a slab of lanes beside its multiplies and adds."""
    x, g, g_u, phi = given
    dx, d_phi = wanted
    span = range(plan.streams)
    if plan.exact:
        to_phi, to_streams = d_projection, turned(d_projection)[:, : plan.packed]
    else:
        high, low = _halves(d_projection)
        to_phi = jnp.concatenate([high, low])
        to_streams = turned(jnp.concatenate([high, high, low]))[:, : 3 * plan.packed].astype(jnp.bfloat16)
    real = pl.program_id(2) * plan.tile + jax.lax.broadcasted_iota(jnp.int32, (plan.tile, 1), 0) < plan.length

    def slab(start: Any) -> None:
        there = pl.ds(start, plan.slab)
        for j in span:
            stage[j] = multiply(to_streams, phi[j, :, there], NN, plan.exact)
            right = x[0, j, :, there]
            if plan.ragged:  # past the end of a row lies anything, and 0 times it may be no number
                right = jnp.where(real, right, jnp.zeros_like(right))
            product = multiply(to_phi, right, NN, plan.exact)
            d_phi[0, j, :, there] += product if plan.exact else product[: plan.packed] + product[plan.packed :]

        def rows(at: Any) -> None:
            pre, scale = [columns[j, at] for j in span], columns[plan.numbers, at]
            mix = [[columns[plan.mixes(i, j), at] for j in span] for i in span]
            for lane in range(0, plan.slab, LANES):
                lanes = pl.ds(start + lane, LANES)
                of_read = g_u[0, at, lanes].astype(jnp.float32)
                of_write = [g[0, i, at, lanes].astype(jnp.float32) for i in span]
                for j in span:
                    own = scale * x[0, j, at, lanes].astype(jnp.float32) + stage[j, at, lane : lane + LANES]
                    mixed = total(mix[i][j] * of_write[i] for i in span)
                    dx[0, j, at, lanes] = (mixed + pre[j] * of_read + own).astype(dx.dtype)

        each_rows(plan, rows, unrolled=True)

    each_slab(plan, plan.slab, slab)
