"""From the arrays of the interface to those of the TPU kernels, what a grid step takes, and what it moves.

In the kernels keys lie in the sublanes and queries in the lanes: what belongs to a query, its threshold, its maximum,
its sums, is a row of lanes, and sums over keys need no shuffling. Tokens [b, t, h, w] lie as [b, t', h w'], whole tiles
of t and whole registers of w, so that a head is a slice of lanes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels.matrix_unit import LANES
from pallas_kernels.sparse_attention.common.selection import Variance
from pallas_kernels.sparse_attention.common.tiles import Keys, Queries
from pallas_kernels.tiles import reach

Shaped4 = Array | jax.ShapeDtypeStruct  # [b, t, heads, width], or only the shape of it
SUBLANES = 8
CHUNK = 16  # keys: two registers of exponentials for each 128 queries
KERNELS = ("select", "attend", "diverge", "backward")
TILES = ((256, 256, 512), (256, 256, 256), (128, 256, 256), (128, 128, 128))  # queries, keys, band of keys
VMEM_BLOCKS = 44 << 20  # of the 51 MiB that are 0.8 of the smallest chip's; the rest is for what spills
VMEM_LIMIT = 51 << 20
SCALAR_BYTES = 512 << 10
NOWHERE = jnp.iinfo(jnp.int32).min  # segment of keys that nothing sees


@dataclass(frozen=True)
class Plan:
    """What is fixed when a kernel is compiled.

    heads share the scores of an indexer head in groups; widths are padded to registers, `depth` is that of all indexer
    heads side by side. exact: float32 products for float32 inputs. A strip is what `select` takes of queries at once:
    all indexer heads of `strip` queries side by side in the lanes. A band is what the backward pass takes of keys, a
    chunk what is computed of exponentials at a time.
    """

    heads: int
    indexer_heads: int
    key_width: int
    value_width: int
    depth: int
    indexer_width: int
    scale: float
    score_scale: float
    exact: bool
    k_base: int
    k_min: int
    k_max: int
    sinks: int
    variance: Variance
    head_axes: tuple[str, ...]
    query_tile: int
    key_tile: int
    band: int
    chunk: int

    @property
    def group(self) -> int:
        """Attention heads an indexer head."""
        return self.heads // self.indexer_heads

    @property
    def strip(self) -> int:
        """Queries of one step of `select`: those of all indexer heads fill the lanes."""
        slots = 1 << (self.indexer_heads - 1).bit_length()
        return max(SUBLANES, LANES // slots)

    @property
    def lanes(self) -> int:
        """Lanes of one step of `select`, whole registers."""
        return padded(self.strip * self.indexer_heads, LANES)

    @property
    def item(self) -> int:
        """Bytes of a number of the tokens."""
        return 4 if self.exact else 2

    def members(self, indexer_head: int) -> range:
        """The attention heads that read the scores of an indexer head."""
        return range(indexer_head * self.group, (indexer_head + 1) * self.group)


def padded(size: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return size + -size % unit


def lay_tokens(x: Float[Array, "b t h w"], tile: int, dtype: jnp.dtype) -> Float[Array, "b padded hw"]:
    """Whole tiles and whole registers, zeros between: heads side by side in the lanes."""
    x = jnp.pad(x.astype(dtype), [(0, 0), (0, -x.shape[1] % tile), (0, 0), (0, -x.shape[3] % LANES)])
    return x.reshape(*x.shape[:2], -1)


def take_tokens(x: Float[Array, "b padded hw"], like: Shaped4) -> Array:
    """Back to the shape and dtype of `like` [b, t, h, w]."""
    _, length, heads, width = like.shape
    return x.reshape(*x.shape[:2], heads, -1)[:, :length, :, :width].astype(like.dtype)


def lay_indexer(x: Float[Array, "b t n i"], tile: int, dtype: jnp.dtype) -> Float[Array, "b padded depth"]:
    """Indexer heads side by side, as narrow as they are, up to whole registers together."""
    x = x.astype(dtype).reshape(*x.shape[:2], -1)
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % tile), (0, -x.shape[2] % LANES)])


def take_indexer(x: Float[Array, "b padded depth"], like: Array) -> Array:
    """Back to the shape and dtype of `like` [b, t, n, i]."""
    length, heads, width = like.shape[1:]
    return x[:, :length, : heads * width].reshape(like.shape).astype(like.dtype)


def lay_rows(columns: list[Int[Array, "b t"]], tile: int, fill: list[int]) -> Int[Array, "b 8 padded"]:
    """Integers of each token as rows of lanes, with what stands in the padding."""
    size = columns[0].shape[1]
    rows = [
        jnp.pad(x.astype(jnp.int32), [(0, 0), (0, -size % tile)], constant_values=value)
        for x, value in zip(columns, fill, strict=True)
    ]
    return jnp.pad(jnp.stack(rows, axis=1), [(0, 0), (0, SUBLANES - len(rows)), (0, 0)])


def lay_heads(x: Array, tile: int) -> Array:
    """[b, t, heads] as rows of lanes [b, heads, t']."""
    return jnp.pad(x.swapaxes(1, 2), [(0, 0), (0, 0), (0, -x.shape[1] % tile)])


def lay_strips(plan: Plan, x: Shaped[Array, "b padded n *rest"]) -> Shaped[Array, "b strips *rest lanes"]:
    """Of each strip of queries, the indexer heads side by side in the lanes."""
    b, size, n, *rest = x.shape
    x = x.reshape(b, size // plan.strip, plan.strip, n, *rest)
    x = jnp.moveaxis(x, (3, 2), (-2, -1)).reshape(b, size // plan.strip, *rest, n * plan.strip)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, plan.lanes - x.shape[-1])])


def lay_strip_queries(plan: Plan, x: Float[Array, "b padded depth"]) -> Float[Array, "b strips depth lanes"]:
    """Block-diagonal: in the lanes of an indexer head only its own part of the depth, so that one product does all."""
    part = jnp.arange(plan.depth) // plan.indexer_width
    own = part[None] == jnp.arange(plan.indexer_heads)[:, None]
    spread = jnp.where(own[None, None], x[:, :, None], jnp.zeros((), x.dtype))
    return lay_strips(plan, spread)


def take_strips(plan: Plan, x: Shaped[Array, "b strips r lanes"]) -> Shaped[Array, "b n r t"]:
    """A row of lanes for each."""
    b, strips, r, _ = x.shape
    x = x[..., : plan.indexer_heads * plan.strip].reshape(b, strips, r, plan.indexer_heads, plan.strip)
    return x.transpose(0, 3, 2, 1, 4).reshape(b, plan.indexer_heads, r, strips * plan.strip)


def lay_table(flags: Int[Array, "b queries keys"]) -> Int[Array, "b queries keys"]:
    """4 * (the key tile to hold in VMEM) + flag: a tile without survivors keeps the one before it and loads nothing."""
    index = jnp.arange(flags.shape[2], dtype=jnp.int32)[None, None]
    held = jax.lax.cummax(jnp.where(flags > 0, index, -1), axis=2)
    first = jnp.min(jnp.where(flags > 0, index, flags.shape[2] - 1), axis=2, keepdims=True)
    return 4 * jnp.where(held < 0, first, held) + flags


def strip_spans(plan: Plan, query: Int[Array, "b 8 t"], key: Int[Array, "b 8 s"]) -> Int[Array, "b strips 2"]:
    """First key tile and the one after the last that each strip may see."""
    queries = Queries(query, query, query, query[:, 0], query[:, 1])
    segment = jnp.where(key[:, 1] == NOWHERE, -1, key[:, 1])
    found = reach(queries, Keys(key, key, key, key[:, 0], segment), plan.strip, plan.key_tile)
    return jnp.stack([found.first_key, found.end_key], axis=-1)


def make_plan(
    arguments: tuple[Shaped4, Shaped4, Shaped4],
    query: Shaped4,
    tiles: tuple[int, int, int] | None = None,
    *,
    score_scale: float | None = None,
    k_base: int,
    k_min: int,
    k_max: int,
    sinks: int,
    variance: Variance = "visible",
    head_axes: tuple[str, ...] = (),
) -> Plan:
    """The largest `TILES` of (q, k, v) that fit into VMEM, or those given."""
    q, k, v = arguments
    n, i = query.shape[2:]
    plan = Plan(
        heads=q.shape[2], indexer_heads=n, key_width=padded(q.shape[3], LANES), value_width=padded(v.shape[3], LANES),
        depth=padded(n * i, LANES), indexer_width=i, scale=q.shape[3] ** -0.5,
        score_scale=i**-0.5 if score_scale is None else score_scale,
        exact=any(x.dtype != jnp.bfloat16 for x in (*arguments, query)),
        k_base=k_base, k_min=k_min, k_max=k_max, sinks=sinks, variance=variance, head_axes=head_axes,
        query_tile=0, key_tile=0, band=0, chunk=CHUNK,
    )  # fmt: skip
    plans = [dataclasses.replace(plan, query_tile=a, key_tile=b, band=c) for a, b, c in ([tiles] if tiles else TILES)]
    fitting = [x for x in plans if max(step_bytes(x, name, k.shape[1]) for name in KERNELS) <= VMEM_BLOCKS]
    return fitting[0] if fitting else plans[-1]


def table_size(plan: Plan, q: Shaped4, k: Shaped4) -> int:
    """Entries of the table of live tiles, which the kernels hold in scalar memory, one a lane of a padded row."""
    queries, keys = padded(q.shape[1], plan.query_tile), padded(k.shape[1], plan.band)
    return q.shape[0] * padded(queries // plan.query_tile, SUBLANES) * padded(keys // plan.key_tile, LANES)


def step_bytes(plan: Plan, kernel: str, keys: int) -> int:
    """VMEM of the blocks of one grid step of a kernel, two of each, and of the scratch; `keys` tokens a row."""
    t, s, item = plan.query_tile, plan.key_tile, plan.item
    k_row, v_row, depth = plan.heads * plan.key_width * item, plan.heads * plan.value_width * item, plan.depth * item
    if kernel == "select":
        rows = padded(keys, plan.band)
        blocks = rows * (depth + 4 * SUBLANES) + plan.lanes * (depth + 4 * (3 * SUBLANES + 3 * padded(plan.group, 8)))
        return 2 * blocks + 4 * plan.lanes * rows
    block, of_heads = s * t, plan.indexer_heads * padded(plan.group, SUBLANES)
    rows = 4 * t * (SUBLANES * (1 + plan.indexer_heads) + 3 * of_heads)
    room = plan.indexer_heads * depth * t + 4 * block * 2 * (1 + plan.group)
    common = 2 * (t * (k_row + depth) + rows) + room + 8 * s * 4 * SUBLANES
    if kernel == "attend":
        sums = 4 * t * (plan.heads * plan.value_width + 3 * of_heads)
        return common + 2 * (s * (k_row + v_row + depth) + t * v_row) + sums + 2 * plan.group * block * (4 + item)
    if kernel == "diverge":
        strips = 4 * 4 * block if plan.head_axes else 0
        return common + 2 * s * (k_row + depth) + strips + 8 * block
    widths = plan.heads * (plan.key_width + plan.value_width) + plan.depth
    band = plan.band * widths * (4 * item + 4)
    sums = 4 * 4 * t * (plan.heads * plan.key_width + plan.depth + plan.indexer_heads * SUBLANES)
    strip = 8 * plan.band * t if plan.head_axes else 0
    own = 4 * block * (2 + plan.indexer_heads)
    return common + 2 * t * (v_row + depth) + band + sums + strip + own


def moved_bytes(
    plan: Plan, kernel: str, queries: int, keys: int, live: Bool[Array, "queries keys"] | None = None
) -> int:
    """Between HBM and VMEM, one row of the batch; `live` are the tiles with survivors, None the causal ones."""
    t, s = padded(queries, plan.query_tile), padded(keys, plan.band)
    steps, columns = t // plan.query_tile, s // plan.key_tile
    if live is None:
        last = (np.arange(steps)[:, None] + 1) * plan.query_tile
        found = np.arange(columns)[None] * plan.key_tile < last
    else:
        found = np.asarray(live)
    item = plan.item
    k_row, v_row, depth = plan.heads * plan.key_width * item, plan.heads * plan.value_width * item, plan.depth * item
    heads = 4 * plan.heads
    if kernel == "select":
        strips = t // plan.strip
        return s * (depth + 4 * SUBLANES) + strips * plan.lanes * (depth + 4 * (3 * plan.group + 2 * SUBLANES + 2))
    loaded, held = int(found.sum()) * plan.key_tile, t * (k_row + depth + 2 * heads + 4 * SUBLANES)
    if kernel == "attend":
        return loaded * (k_row + v_row + depth + 4 * SUBLANES) + held + t * (v_row + 2 * heads)
    if kernel == "diverge":
        return loaded * (k_row + depth + 4 * SUBLANES) + held + t * (heads + 4 * SUBLANES)
    bands = found.reshape(steps, s // plan.band, -1).any(-1)
    passing = int(bands.sum()) * plan.query_tile
    sums = 8 * (plan.heads * plan.key_width + plan.depth + plan.indexer_heads)
    per_query = k_row + v_row + 2 * depth + 4 * heads + 8 * SUBLANES + sums
    return passing * per_query + 2 * s * (k_row + v_row + depth)
