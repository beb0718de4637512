"""The gated delta rule, forward and backward, at the shapes that the report shows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernels_measured.cases import Case, Kernel
from experiments.kernels_measured.chips import Chip
from pallas_kernels.gated_delta_rule import pallas_tpu, xla
from pallas_kernels.gated_delta_rule.tpu import layout
from pallas_kernels.gated_delta_rule.tpu.cost import Sizes, chunk_flops

BATCH, CHUNKS = 2, 32  # with one row the compiler would keep a single buffer for the states


@dataclass(frozen=True)
class Shape:
    """Heads, their width (k = v), and how they come."""

    key_heads: int = 32
    value_heads: int = 32
    width: int = 128
    chunk: int = 64
    dtype: str = "bfloat16"
    segments: bool = False


SHAPES = {
    "plain": Shape(),
    "grouped": Shape(key_heads=16),
    "segments": Shape(segments=True),
    "chunk 128": Shape(chunk=128),
    "width 64": Shape(width=64),
    "width 256": Shape(key_heads=8, value_heads=8, width=256),
    "float32": Shape(key_heads=8, value_heads=8, dtype="float32"),
    "one head": Shape(key_heads=1, value_heads=1),
}


def cases() -> list[Case]:
    """All of them."""
    return [_case(name, shape) for name, shape in SHAPES.items()]


def _case(name: str, shape: Shape) -> Case:
    tokens, h, hv, w = CHUNKS * shape.chunk, shape.key_heads, shape.value_heads, shape.width
    head, value, state = ((BATCH, tokens, h, w), (BATCH, tokens, hv, w), (BATCH, hv, w, w))
    gates = ((BATCH, tokens, hv), "float32")
    arguments = [*[(x, shape.dtype) for x in (head, head, value)], gates, gates, (state, "float32")]
    arguments += [((BATCH, tokens), "int32"), (value, shape.dtype), (state, "float32")]
    return Case(
        name=name,
        operation="gated delta rule",
        unit="chunk and value head",
        arguments=arguments,
        run=lambda chip: _both_ways(
            shape, functools.partial(pallas_tpu.gated_delta_rule, most_beta=1.0, matrix_unit=chip.matrix_unit)
        ),
        beside=_both_ways(shape, xla.gated_delta_rule),
        kernels=lambda chip: _kernels(shape, chip),
    )


def _both_ways(shape: Shape, rule: Callable[..., Any]) -> Callable[..., Any]:
    """Results and gradients of the rule in one function."""

    def both(q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, ids: Any, d_output: Any, d_final: Any) -> Any:
        def forward(*x: Any) -> Any:
            return rule(*x, ids if shape.segments else None, shape.width**-0.5, shape.chunk)

        outputs, pull = jax.vjp(forward, q, k, v, g, beta, state)
        return outputs, pull((d_output, d_final))

    return both


def _kernels(shape: Shape, chip: Chip) -> Sequence[Kernel]:
    q, v = (
        jax.ShapeDtypeStruct((BATCH, CHUNKS * shape.chunk, heads, shape.width), jnp.dtype(shape.dtype))
        for heads in (shape.key_heads, shape.value_heads)
    )

    def a_step(q: Any, v: Any) -> Any:
        exact = shape.dtype != "bfloat16"
        plan = layout.make_plan(q, v, shape.chunk, 1.0, exact, shape.segments, chip.matrix_unit)
        return jnp.zeros(plan.heads)

    heads = jax.eval_shape(a_step, q, v).size
    steps = BATCH * CHUNKS * shape.value_heads // heads
    return [
        Kernel(name, f"gated_delta_rule_{name}", steps, heads, BATCH * CHUNKS * flops(shape, back), least(shape, back))
        for name, back in (("forward", False), ("backward", True))
    ]


def flops(shape: Shape, backward: bool) -> float:
    """Of a chunk, all heads: the matrix products."""
    sizes = Sizes(shape.chunk, shape.key_heads, shape.value_heads, shape.width, shape.width)
    return chunk_flops(sizes, backward)


def least(shape: Shape, backward: bool) -> int:
    """Bytes to and from HBM: forward q k g beta S, o S' and the states and A that are kept; backward all gradients."""
    item = jnp.dtype(shape.dtype).itemsize
    key, value = (heads * shape.chunk * shape.width * item for heads in (shape.key_heads, shape.value_heads))
    kept = shape.value_heads * (shape.width**2 + shape.chunk**2) * item
    gates = 2 * shape.value_heads * shape.chunk * 4
    ids = 4 * shape.chunk if shape.segments else 0
    chunk = (4 * key + 3 * value + 2 * gates if backward else 2 * key + 2 * value + gates) + kept + ids
    return BATCH * (CHUNKS * chunk + 2 * shape.value_heads * shape.width**2 * 4)
