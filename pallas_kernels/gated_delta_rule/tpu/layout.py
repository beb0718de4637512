"""From the arrays of the interface to those of the TPU kernels, and back: all of it small or free for XLA.

Tokens [b, t, h, k] lie as [b, t', h k'], whole chunks of t and widths of whole registers, so that a head is a slice of
lanes; zeros in between are exact no-ops. Gates lie by grid step: [b, steps, chunks, C, gates * heads].
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.gated_delta_rule.common.chunks import pad_tokens
from pallas_kernels.gated_delta_rule.tpu.packs import MASKED, Plan
from pallas_kernels.matrix_unit import LANES

_LOWEST_DECAY = -110.0  # e^-110 is 0 in float32
_COARSE = 256.0
_MOST_HEADS = 32
VMEM_LIMIT = 50 << 20  # of the 64 MiB of the smallest chip
_VMEM_BLOCKS = 28 << 20  # what the blocks of a backward step may take; as much again is left for what spills


def padded_width(width: int) -> int:
    """The next whole number of registers."""
    return width + -width % LANES


def make_plan(
    q: Array,
    v: Array,
    chunk: int,
    scale: float,
    exact: bool,
    segmented: bool,
    matrix_unit: int,
    heads: int | None = None,
) -> Plan:
    """As many value heads a step as divide those of v, up to `heads`, 32, and what fits into VMEM."""
    group = v.shape[2] // q.shape[2]
    plan = Plan(
        chunk, 1, group, padded_width(q.shape[3]), padded_width(v.shape[3]), scale, exact, segmented, matrix_unit
    )
    most = min(heads or _MOST_HEADS, max(1, _VMEM_BLOCKS // step_bytes(plan, backward=True) * plan.heads))
    fitting = [n for n in range(1, q.shape[2] + 1) if q.shape[2] % n == 0 and (n == 1 or n * group <= most)]
    return dataclasses.replace(plan, key_heads=fitting[-1])


def moved_bytes(plan: Plan, backward: bool) -> dict[str, int]:
    """Between HBM and VMEM: a chunk of one step's heads, and once a sequence. The forward pass saves for the other."""
    item = 4 if plan.exact else 2
    key, value = (heads * plan.chunk * width * item for heads, width in _widths(plan))
    state = plan.heads * plan.key_width * plan.value_width
    saved = (state + plan.heads * plan.chunk**2) * item
    gates = 4 * plan.chunk * (padded_width(len(plan.gates) * plan.heads) + len(plan.gates) * plan.heads)
    if backward:
        d_gates = 4 * plan.chunk * padded_width(2 * plan.heads)
        return {"chunk": 4 * key + 3 * value + saved + gates + d_gates, "sequence": 2 * state * 4}
    return {"chunk": 2 * key + 2 * value + saved + gates, "sequence": 2 * state * 4}


def step_bytes(plan: Plan, backward: bool) -> int:
    """VMEM of the blocks of one grid step, two of each."""
    return 2 * sum(moved_bytes(plan, backward).values())


def _widths(plan: Plan) -> list[tuple[int, int]]:
    return [(plan.key_heads, plan.key_width), (plan.heads, plan.value_width)]


def lay_tokens(x: Float[Array, "b t h w"], chunk: int, dtype: jnp.dtype) -> Float[Array, "b padded hw"]:
    """[b, t, h, w] as [b, whole chunks, h * whole registers]."""
    x = pad_tokens(x.astype(dtype), chunk)
    x = jnp.pad(x, [(0, 0)] * 3 + [(0, -x.shape[3] % LANES)])
    return x.reshape(*x.shape[:2], -1)


def take_tokens(x: Float[Array, "b padded hw"], like: Array) -> Array:
    """Back to the shape and dtype of `like` [b, t, h, w]."""
    _, length, heads, width = like.shape
    return x.reshape(*x.shape[:2], heads, -1)[:, :length, :, :width].astype(like.dtype)


def lay_state(x: Float[Array, "b hv k v"]) -> Float[Array, "b hv kp vp"]:
    """A state in whole registers."""
    return jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % LANES), (0, -x.shape[3] % LANES)])


def take_state(x: Float[Array, "b hv kp vp"], like: Array) -> Float[Array, "b hv k v"]:
    """Back to the shape of `like`."""
    return x[:, :, : like.shape[2], : like.shape[3]]


def lay_gates(
    plan: Plan, g: Float[Array, "b t hv"], beta: Float[Array, "b t hv"], run: Int[Array, "b padded"] | None
) -> tuple[Float[Array, "b steps n c columns"], Float[Array, "b steps n rows pc"]]:
    """`plan.gates` of each head: a column a head, and again as rows, a pack a row.

    G = cumsum(g) in the chunk as a coarse sum, which is exact, and a fine one where float32 results are asked for:
    differences of large sums stay accurate. gamma = e^G and lam = e^(G_C - G), 0 across a segment boundary.
    """
    g, beta = (_by_step(plan, x.astype(jnp.float32)) for x in (g, beta))
    g = jnp.maximum(g, _LOWEST_DECAY)
    coarse = jnp.round(g * _COARSE) / _COARSE
    sums = [jnp.cumsum(x, axis=3) for x in (coarse, g - coarse)]
    into = sums[0] + sums[1]
    out = (sums[0][..., -1:, :] - sums[0]) + (sums[1][..., -1:, :] - sums[1])
    if run is not None:
        inside = run.reshape(run.shape[0], 1, -1, plan.chunk)
        before = jnp.concatenate([jnp.zeros_like(inside[:, :, :1, 0]), inside[:, :, :-1, -1]], axis=2)
        into = jnp.where((inside == before[..., None])[..., None], into, MASKED)
        out = jnp.where((inside == inside[..., -1:])[..., None], out, MASKED)
    sums = sums if "fine" in plan.gates else [sums[0] + sums[1]]
    gates = [*sums, jnp.exp(into), jnp.exp(out), beta]
    rows = [x.swapaxes(3, 4).reshape(*x.shape[:3], plan.packs, plan.pack * plan.chunk) for x in gates]
    return jnp.concatenate(gates, axis=-1), jnp.concatenate(rows, axis=3)


def take_gates(
    plan: Plan, x: Float[Array, "b steps n c columns"], length: int
) -> tuple[Float[Array, "b t hv"], Float[Array, "b t hv"]]:
    """dg and dbeta out of their columns."""
    parts = []
    for columns in (x[..., : plan.heads], x[..., plan.heads :]):
        tokens = columns.transpose(0, 2, 3, 1, 4)
        parts.append(tokens.reshape(x.shape[0], -1, x.shape[1] * plan.heads)[:, :length])
    return parts[0], parts[1]


def lay_runs(plan: Plan, run: Int[Array, "b padded"]) -> tuple[Int[Array, "b n c 1"], Int[Array, "b n 1 pc"]]:
    """The counts of segment starts as a column, and as a row over the lanes of a pack."""
    inside = run.reshape(run.shape[0], -1, plan.chunk)
    return inside[..., None], jnp.tile(inside, (1, 1, plan.pack))[:, :, None]


def _by_step(plan: Plan, x: Float[Array, "b t hv"]) -> Float[Array, "b steps n c heads"]:
    x = pad_tokens(x, plan.chunk)
    x = x.reshape(x.shape[0], x.shape[1] // plan.chunk, plan.chunk, -1, plan.heads)
    return x.transpose(0, 3, 1, 2, 4)
