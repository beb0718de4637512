"""Gated sparse attention on TPU: Pallas kernels under one `custom_vjp`; memory O(t * tile), whatever the length.

* `tpu.select`: a strip of queries at a time, the threshold of every row and head, and which tiles hold survivors.
* `tpu.attend`: online softmax over the tiles with survivors; scores are computed again.
* `tpu.diverge`: the KL, which needs the attention of all heads.
* `tpu.backward`: a band of keys at a time, all gradients in one pass; one call a band, with sums for the queries.

Saved for the backward pass: arguments, output, thresholds, the logarithms of the softmax's sums, the slope of the KL.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.positions import Positions
from pallas_kernels.sparse_attention.common.selection import Variance
from pallas_kernels.sparse_attention.reference import Indexer, Statistics, head_mean, relative_entropy
from pallas_kernels.sparse_attention.tpu import layout as layout
from pallas_kernels.sparse_attention.tpu.diverge import TINY
from pallas_kernels.sparse_attention.tpu.launch import (
    Call,
    Laid,
    Shared,
    band_gradients,
    divergence,
    importances,
    select,
    softmax,
)
from pallas_kernels.sparse_attention.tpu.layout import SUBLANES, Shaped4


def sparse_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s h k"],
    v: Float[Array, "b s h v"],
    indexer: Indexer,
    positions: Positions,
    *,
    k_base: int,
    k_min: int,
    k_max: int,
    sinks: int,
    score_scale: float | None = None,
    variance: Variance = "visible",
    head_axes: tuple[str, ...] = (),
    interpret: bool | pltpu.InterpretParams = False,
    tiles: tuple[int, int, int] | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, "b t h v"], Statistics]:
    """`reference.sparse_attention` in kernels; differentiable in reverse mode, also inside a `shard_map`.

    `interpret` runs the kernels on any machine, slowly; `tiles` are those of queries, keys, and a band of keys;
    `chunk` the keys whose exponentials are computed at a time (None: few on a TPU, a tile where interpreted).

    Raises:
        ValueError: listing what these kernels do not do.
    """
    problems = unsupported(q, k, v, indexer)
    if problems:
        raise ValueError("pallas_tpu:\n" + "\n".join(f"  - {problem}" for problem in problems))
    plan = layout.make_plan(
        (q, k, v), indexer.query, tiles, score_scale=score_scale, k_base=k_base, k_min=k_min, k_max=k_max, sinks=sinks,
        variance=variance, head_axes=head_axes,
    )  # fmt: skip
    plan = dataclasses.replace(plan, chunk=chunk or (plan.key_tile if interpret else plan.chunk))
    shared = Shared(indexer.bias, indexer.importance, jax.lax.stop_gradient(indexer.variance_ema))
    return _attend(Call(plan, interpret), (q, k, v), (indexer.query, indexer.key, indexer.weight), shared, positions)


def unsupported(q: Shaped4, k: Shaped4, v: Shaped4, indexer: Indexer) -> list[str]:
    """What about these arguments the kernels do not do, in words; nothing of it is checked when they run."""
    problems = []
    for name, x in (("q", q), ("k", k), ("v", v), ("indexer.query", indexer.query), ("indexer.key", indexer.key)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            problems.append(f"{name} must be float32 or bfloat16, got {x.dtype}")
    plan = layout.make_plan((q, k, v), indexer.query, k_base=0, k_min=0, k_max=0, sinks=0)
    for kernel in layout.KERNELS:
        size = layout.step_bytes(plan, kernel, k.shape[1])
        if size > layout.VMEM_BLOCKS:
            problems.append(
                f"q {q.shape} and k {k.shape}: the blocks of {kernel} take {size >> 20} MiB of VMEM, there are "
                f"{layout.VMEM_BLOCKS >> 20} for them"
            )
    table = 4 * layout.table_size(plan, q, k)
    if table > layout.SCALAR_BYTES:
        problems.append(f"q {q.shape} and k {k.shape}: scalar memory does not hold {table >> 10} KiB of tiles")
    return problems


class _Kept(NamedTuple):
    """Of the forward pass: output; thresholds, ends [b,n,r,t'], place with sink_end [b,8,t'], the table of live tiles;
    log of the softmax's sums [b,n,r,t'], sum P / sum M of each query [b,t'].
    """

    o: Array
    threshold: Array
    end: Array
    place: Array
    table: Array
    log_sum: Array
    share: Array


_Tokens = tuple[Array, Array, Array]


def _laid(call: Call, tokens: _Tokens, parts: _Tokens, shared: Shared, rows: Array, kept: _Kept) -> Laid:
    """The arguments of the kernels; `kept` has the selection."""
    plan, (q, k, v), (query, key, weight) = call.plan, tokens, parts
    return Laid(
        q=layout.lay_tokens(q, plan.query_tile, call.dtype),
        query=layout.lay_indexer(query, plan.query_tile, call.dtype).swapaxes(1, 2),
        place=kept.place, threshold=kept.threshold, end=kept.end,
        weight=layout.lay_heads(weight.astype(jnp.float32), plan.query_tile)[:, :, None],
        bias=shared.bias.astype(jnp.float32)[None], importance=importances(shared)[None],
        k=layout.lay_tokens(k, plan.band, call.dtype), v=layout.lay_tokens(v, plan.band, call.dtype),
        keys=layout.lay_indexer(key, plan.band, call.dtype), rows=rows, table=kept.table,
    )  # fmt: skip


def _key_rows(call: Call, positions: Positions) -> Array:
    segment = jnp.where(positions.key_segment == -1, layout.NOWHERE, positions.key_segment)
    return layout.lay_rows([positions.key, segment], call.plan.band, [0, layout.NOWHERE])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    call: Call, tokens: _Tokens, parts: _Tokens, shared: Shared, positions: Positions
) -> tuple[Array, Statistics]:
    """Outputs and statistics."""
    return _forward(call, tokens, parts, shared, positions)[0]


@functools.partial(jax.jit, static_argnums=0)  # a kernel nobody reads falls away only with a call around it
def _forward(
    call: Call, tokens: _Tokens, parts: _Tokens, shared: Shared, positions: Positions
) -> tuple[tuple[Array, Statistics], _Kept]:
    plan, (q, _, v) = call.plan, tokens
    t, axes = q.shape[1], plan.head_axes
    rows = _key_rows(call, positions)
    place = layout.lay_rows([positions.query, positions.query_segment], plan.query_tile, [0, -1])
    threshold, end, count, seen, variance, flags = select(
        call, layout.lay_indexer(parts[0], plan.query_tile, call.dtype), place,
        layout.lay_heads(parts[2].astype(jnp.float32), plan.query_tile), shared,
        layout.lay_indexer(parts[1], plan.band, call.dtype), rows, jnp.max(positions.query, axis=-1) + 1,
    )  # fmt: skip
    kept = _Kept(q, threshold, end, place.at[:, 2].set(seen[:, 1]), layout.lay_table(flags), place, place)
    x = _laid(call, tokens, parts, shared, rows, kept)
    o, log_sum, entropy = softmax(call, x)
    kl, share = _kl(call, x, log_sum)
    by_head = lambda y: y.reshape(y.shape[0], -1, y.shape[-1])[..., :t]  # noqa: E731
    spread = variance * jnp.square(importances(shared)).reshape(1, plan.indexer_heads, plan.group, 1)
    statistics = Statistics(
        kl=kl[:, :t],
        entropy=head_mean(relative_entropy(by_head(entropy), seen[:, 0, :t]), axes),
        selected=head_mean(by_head(count).astype(jnp.float32), axes),
        score_variance=head_mean(by_head(spread), axes),
    )
    o = layout.take_tokens(o, jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), v.dtype))
    return (o, statistics), kept._replace(o=o, log_sum=log_sum, share=share)


def _kl(call: Call, x: Laid, log_sum: Array) -> tuple[Array, Array]:
    """KL(P || Q) of `reference.indexer_kl`, and sum P / sum M, its slope in that sum."""
    if not call.plan.head_axes:
        cross, target_sum, mass_sum = divergence(call, x, log_sum, None)[0].swapaxes(0, 1)[:3]
    else:

        def step(sums: tuple[Array, Array, Array], band: Array) -> tuple[tuple[Array, Array, Array], None]:
            target, mass = _whole(call, divergence(call, x, log_sum, band))
            ratio = jnp.log(jnp.where(target > 0, target, 1.0)) - jnp.log(jnp.maximum(mass, TINY))
            parts = target * ratio, target, mass
            return jax.tree.map(lambda a, part: a + part.sum(axis=1), sums, parts), None

        zero = jnp.zeros(x.q.shape[:2], jnp.float32)
        (cross, target_sum, mass_sum), _ = jax.lax.scan(step, (zero, zero, zero), _bands(call, x))
    share = jnp.where(mass_sum > TINY, target_sum / jnp.maximum(mass_sum, TINY), 0.0)
    return cross + target_sum * jnp.log(jnp.maximum(mass_sum, TINY)), share


def _bands(call: Call, x: Laid) -> Array:
    return jnp.arange(x.k.shape[1] // call.plan.band, dtype=jnp.int32)


def _whole(call: Call, strips: tuple[Array, ...]) -> tuple[Array, Array]:
    """Mean attention and mass over the heads of all devices."""
    return jax.lax.pmean(strips[0], call.plan.head_axes), jax.lax.psum(strips[1], call.plan.head_axes)


def _attend_forward(
    call: Call, tokens: _Tokens, parts: _Tokens, shared: Shared, positions: Positions
) -> tuple[tuple[Array, Statistics], tuple]:
    results, kept = _forward(call, tokens, parts, shared, positions)
    return results, (tokens, parts, shared, positions, kept)


def _attend_backward(call: Call, residuals: tuple, cotangents: tuple[Array, Statistics]) -> tuple:
    return _backward(call, residuals, cotangents[0], cotangents[1].kl)


@functools.partial(jax.jit, static_argnums=0)
def _backward(call: Call, residuals: tuple, d_o: Array, d_kl: Array) -> tuple:
    """Gradients of the arguments: bands of keys in turn, with sums for the queries carried along."""
    tokens, parts, shared, positions, kept = residuals
    plan = call.plan
    if plan.head_axes:  # every shard's KL came from the sum over shards: what their gradients are to it, they share
        (d_kl,) = jax.linear_transpose(lambda x: jax.lax.psum(x, plan.head_axes), d_kl)(d_kl)
    x = _laid(call, tokens, parts, shared, _key_rows(call, positions), kept)
    wide = [y.astype(jnp.float32) for y in (d_o, kept.o)]
    delta = layout.lay_heads(jnp.sum(wide[0] * wide[1], axis=-1), plan.query_tile).reshape(kept.log_sum.shape)
    d_kl = jnp.pad(d_kl, [(0, 0), (0, x.q.shape[1] - d_kl.shape[1])])
    of_queries = layout.lay_tokens(d_o, plan.query_tile, call.dtype), delta
    live = (x.table & 3).reshape(*x.table.shape[:2], -1, plan.band // plan.key_tile).max(axis=3)
    table = layout.lay_table(jnp.minimum(live, 1).swapaxes(1, 2))

    def step(sums: tuple[Array, ...], band: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        if plan.head_axes:
            target, mass = _whole(call, divergence(call, x, kept.log_sum, band))
            pulled = jnp.where(mass > TINY, target / jnp.maximum(mass, TINY), 0.0)
            d_mass = d_kl[:, None] * (kept.share[:, None] - pulled)
        else:
            d_mass = jnp.stack([d_kl * kept.share, d_kl] + [jnp.zeros_like(d_kl)] * (SUBLANES - 2), axis=1)
        found = band_gradients(call, x, table, band, (*of_queries, kept.log_sum, d_mass), sums)
        return found[:3], found[3:]

    shapes = x.q.swapaxes(1, 2).shape, x.query.shape, x.weight.shape
    start = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    (d_q, d_query, d_weight), bands = jax.lax.scan(step, start, _bands(call, x))
    d_k, d_v, d_keys = (jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, y.shape[3]) for y in bands[:3])
    d_shared = bands[3].sum(axis=(0, 1, 3, 4))
    n, importance = plan.indexer_heads, importances(shared)
    d_importance = d_shared[n:] * importance * (1.0 - importance)
    turned = [y.swapaxes(1, 2) for y in (plan.scale * d_q, plan.score_scale * d_query, d_weight[:, :, 0])]
    (q, k, v), (query, key, weight) = tokens, parts
    none: Any = None  # of integers, and of the running mean
    return (
        (layout.take_tokens(turned[0], q), layout.take_tokens(d_k, k), layout.take_tokens(d_v, v)),
        (
            layout.take_indexer(turned[1], query), layout.take_indexer(d_keys, key),
            turned[2][:, : weight.shape[1]].astype(weight.dtype),
        ),
        Shared(d_shared[:n].astype(shared.bias.dtype), d_importance.astype(shared.importance.dtype), none),
        Positions(none, none, none, none),
    )  # fmt: skip


_attend.defvjp(_attend_forward, _attend_backward)
