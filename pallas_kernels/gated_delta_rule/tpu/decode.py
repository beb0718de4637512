"""The TPU kernel for one token or a few, as in generation: bound by the states, which it reads once and writes once.

Grid (rows of the batch, steps of heads); a step holds some MiB of states S [k, v] and takes the tokens in turn, all on
the vector unit and in float32. With d = e^g, 0 where a segment starts (nothing before it is left):

    p = S^T k,   r = S^T q           e = beta (v - d p)
    o = scale (d r + (q.k) e)        S <- d S + k e^T

Both reads are of the state as it came in, so that one pass over it does for a token. The new states take the place of
the old ones where those are donated or carried by a loop; XLA copies them first where somebody still needs them.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.gated_delta_rule import xla
from pallas_kernels.gated_delta_rule.tpu.layout import VMEM_LIMIT, padded_width
from pallas_kernels.matrix_unit import Ref

LONGEST = 32
WORTHWHILE = 8  # tokens; a chunk of the other kernels costs as much as some 5 to 8 of these, see kernel_levers.md
WIDEST = 256
_STATE_BYTES = 2 << 20  # of a grid step, in and out and two of each: long beside the start of a copy
_TOGETHER = 16  # heads that are scheduled together: about 500 cycles of latency to share


class Plan(NamedTuple):
    """What is fixed when the kernel is compiled; a step takes `rows` of the batch, all tokens, `key_heads` heads."""

    rows: int
    tokens: int
    key_heads: int
    group: int
    key_width: int
    value_width: int
    scale: float

    @property
    def heads(self) -> int:
        return self.key_heads * self.group


def gated_delta_rule(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t hv v"],
    g: Float[Array, "b t hv"],
    beta: Float[Array, "b t hv"],
    initial_state: Float[Array, "b hv k v"],
    segment_ids: Int[Array, "b t"] | None,
    scale: float,
    chunk_size: int,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "b t hv v"], Float[Array, "b hv k v"]]:
    """The outputs and the last state of up to `LONGEST` tokens; gradients are those of the XLA implementation.

    `chunk_size` matters to the gradients only; `interpret` runs the kernel on any machine, slowly.

    Raises:
        ValueError: listing what this kernel does not do.
    """
    problems = unsupported(q, k, v)
    if problems:
        raise ValueError("pallas_tpu_decode:\n" + "\n".join(f"  - {problem}" for problem in problems))
    arguments = (q, k, v, g, beta, initial_state.astype(jnp.float32))
    return _rule(scale, chunk_size, interpret, arguments, segment_ids)


def unsupported(q: Array, k: Array, v: Array) -> list[str]:
    """What about these arguments the kernel does not do, in words."""
    problems = []
    if q.shape[1] > LONGEST:
        problems.append(f"q {q.shape} has more than {LONGEST} tokens")
    for name, x in (("k", k), ("v", v)):
        if x.shape[-1] > WIDEST:
            problems.append(f"{name} {x.shape} is wider than {WIDEST} a head")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            problems.append(f"{name} must be float32 or bfloat16, got {x.dtype}")
    return problems


def make_plan(q: Array | jax.ShapeDtypeStruct, v: Array | jax.ShapeDtypeStruct, scale: float) -> Plan:
    """As many heads a step as divide those there are and fit; where all do, as many rows of the batch."""
    batch, tokens, key_heads, key_width = q.shape
    group, value_width = v.shape[2] // key_heads, v.shape[3]
    per_key_head = group * (key_width + -key_width % 8) * padded_width(value_width) * 4
    most = min(_STATE_BYTES // per_key_head, batch * key_heads // 2)  # two steps at least: one is copied, one computed
    heads = _largest_divisor(key_heads, most)
    rows = 1 if heads < key_heads else _largest_divisor(batch, most // key_heads)
    return Plan(rows, tokens, heads, group, key_width, value_width, scale)


def _largest_divisor(number: int, most: int) -> int:
    return max(n for n in range(1, number + 1) if number % n == 0 and n <= max(1, most))


def decode_kernel(plan: Plan, gates: Ref, q: Ref, k: Ref, v: Ref, state: Ref, o: Ref, final: Ref) -> None:
    """Blocks [rows, t, heads, width], states [rows, heads, k, v]; gates, scalars: [1, rows * t * (d, beta) * heads]."""

    def row(index: Array, carry: None) -> None:
        _token(plan, (index, 0), (gates, q, k, v), state, o, final)

        def later(token: Array, carry: None) -> None:
            _token(plan, (index, token), (gates, q, k, v), final, o, final)

        return jax.lax.fori_loop(1, plan.tokens, later, carry)

    jax.lax.fori_loop(0, plan.rows, row, None, unroll=_largest_divisor(plan.rows, _TOGETHER // plan.heads))


def _token(plan: Plan, at: tuple[Array, Array | int], arguments: tuple[Ref, ...], state: Ref, o: Ref, new: Ref) -> None:
    """One token of one row, all heads of the step."""
    gates, *tokens = arguments
    queries, keys, values = (ref[at].astype(jnp.float32) for ref in tokens)
    match = (queries * keys).sum(1, keepdims=True)
    columns = queries.T, keys.T
    row, outputs = at[0], []
    scalars = (row * plan.tokens + at[1]) * 2 * plan.heads
    for head in range(plan.heads):
        own = head // plan.group
        shape = (plan.key_width, plan.value_width)
        query, key = (jnp.broadcast_to(x[:, own : own + 1], shape) for x in columns)
        decay, rate = gates[0, scalars + head], gates[0, scalars + plan.heads + head]
        before = state[row, head]
        error = rate * (values[head : head + 1] - decay * (before * key).sum(0, keepdims=True))
        read = decay * (before * query).sum(0, keepdims=True) + match[own : own + 1] * error
        outputs.append(plan.scale * read)
        new[row, head] = decay * before + key * error
    o[at] = jnp.concatenate(outputs, axis=0).astype(o.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(
    scale: float, interpret: bool | pltpu.InterpretParams, arguments: tuple[Array, ...], segment_ids: Array | None
) -> tuple[Array, Array]:
    q, k, v, g, beta, state = arguments
    plan = make_plan(q, v, scale)
    steps = q.shape[2] // plan.key_heads
    decay = jnp.exp(g.astype(jnp.float32))
    if segment_ids is not None:
        starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        decay = jnp.where(starts[..., None], 0.0, decay)
    gates = jnp.stack([x.astype(jnp.float32).reshape(*g.shape[:2], steps, plan.heads) for x in (decay, beta)], axis=3)
    gates = gates.reshape(-1, plan.rows, *gates.shape[1:]).transpose(0, 3, 1, 2, 4, 5)
    gates = gates.reshape(*gates.shape[:2], 1, -1)  # one row a step: scalar memory pads the last axis to 128
    tokens = [x.reshape(*x.shape[:2], steps, -1, x.shape[3]) for x in (q, k, v)]

    def block(heads: int, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((plan.rows, plan.tokens, None, heads, width), lambda b, h: (b, 0, h, 0, 0))

    scalars = pl.BlockSpec((None, None, *gates.shape[2:]), lambda b, h: (b, h, 0, 0), memory_space=pltpu.SMEM)
    key, value = block(plan.key_heads, plan.key_width), block(plan.heads, plan.value_width)
    states = pl.BlockSpec((plan.rows, plan.heads, *state.shape[2:]), lambda b, h: (b, h, 0, 0))
    # S^T k and S^T q, 2 k v each; d S + k e^T, 3 k v; the state comes and goes, what belongs to tokens once
    products = 7 * v.shape[1] * math.prod(state.shape)
    moved = sum(x.size * x.dtype.itemsize for x in (gates, q, k, v, v, state, state))
    output, final = pl.pallas_call(
        functools.partial(decode_kernel, plan),
        grid=(q.shape[0] // plan.rows, steps),
        in_specs=[scalars, key, key, value, states],
        out_specs=[value, states],
        out_shape=[jax.ShapeDtypeStruct(tokens[2].shape, v.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)],
        input_output_aliases={4: 1},
        cost_estimate=pl.CostEstimate(flops=products, transcendentals=0, bytes_accessed=moved),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret,
        name="gated_delta_rule_decode",
    )(gates, *tokens, state)
    return output.reshape(v.shape), final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _rule(
    scale: float, chunk: int, interpret: bool | pltpu.InterpretParams, arguments: tuple[Array, ...],
    segment_ids: Array | None,
) -> tuple[Array, Array]:  # fmt: skip
    return _forward(scale, interpret, arguments, segment_ids)


def _rule_forward(
    scale: float, chunk: int, interpret: bool | pltpu.InterpretParams, arguments: tuple[Array, ...],
    segment_ids: Array | None,
) -> tuple[tuple[Array, Array], tuple]:  # fmt: skip
    return _forward(scale, interpret, arguments, segment_ids), (arguments, segment_ids)


def _rule_backward(
    scale: float, chunk: int, interpret: bool | pltpu.InterpretParams, residuals: tuple,
    cotangents: tuple[Array, Array],
) -> tuple[tuple[Array, ...], None]:  # fmt: skip
    """A forward and a backward pass of the XLA implementation: whoever trains on so few tokens is not in a hurry."""
    arguments, segment_ids = residuals

    def rule(q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array) -> tuple[Array, Array]:
        return xla.gated_delta_rule(q, k, v, g, beta, state, segment_ids, scale, chunk)

    _, pull = jax.vjp(rule, *arguments)
    return pull(cotangents), None


_rule.defvjp(_rule_forward, _rule_backward)
