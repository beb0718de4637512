"""Hyper-connections: two sublayers, forward and backward, which run each of the six kernels once.

A unit is a token. The kernels' loops have constant counts, and their cycles are those of all rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernels_measured.cases import Case, Kernel
from pallas_kernels.hyper_connections import pallas_tpu, xla
from pallas_kernels.hyper_connections.reference import Settings, Weights
from pallas_kernels.hyper_connections.tpu.cost import token_flops
from pallas_kernels.hyper_connections.tpu.plan import Plan

BATCH, TOKENS = 2, 4096


@dataclass(frozen=True)
class Shape:
    """Streams, their width and dtype."""

    streams: int = 4
    width: int = 4096
    dtype: str = "bfloat16"

    @property
    def numbers(self) -> int:
        """Of a token."""
        return self.streams * (self.streams + 2)


SHAPES = {
    "streams 4": Shape(),
}


def cases() -> list[Case]:
    """All of them."""
    return [_case(name, shape) for name, shape in SHAPES.items()]


def _case(name: str, shape: Shape) -> Case:
    streams, branch = (BATCH, TOKENS, shape.streams, shape.width), (BATCH, TOKENS, shape.width)
    phi, bias = (shape.streams, shape.width, shape.numbers), (shape.numbers,)
    weights = [(phi, "float32"), (bias, "float32")]
    return Case(
        name=name,
        operation="hyper-connections",
        unit="token",
        arguments=[(streams, shape.dtype), *weights, *weights, *[(branch, shape.dtype)] * 2, (streams, shape.dtype)],
        run=lambda chip: _both_ways(pallas_tpu),
        beside=_both_ways(xla),
        kernels=lambda chip: _kernels(shape),
    )


def _both_ways(operation: Any) -> Callable[..., Any]:
    """Results and gradients of two sublayers whose branches multiply what they read by y_1 and y_2.

    The streams come as the kernels take them, [b, n, t, d]: in a model the compiler gives them that layout.
    """

    def both(x: Any, phi_1: Any, bias_1: Any, phi_2: Any, bias_2: Any, y_1: Any, y_2: Any, gradient: Any) -> Any:
        def two(x: Any, phi_1: Any, bias_1: Any, phi_2: Any, bias_2: Any) -> Any:
            settings = Settings()
            u, opened = operation.enter(x, Weights(phi_1, bias_1), settings)
            u, opened = operation.between(opened, u * y_1, Weights(phi_2, bias_2), settings)
            return operation.leave(opened, u * y_2, settings)

        after, pull = jax.vjp(two, x, phi_1, bias_1, phi_2, bias_2)
        return after, pull(gradient)

    return both


def _kernels(shape: Shape) -> Sequence[Kernel]:
    plan = Plan(shape.streams, shape.width, TOKENS, 20, 1e-6, 1e-6, shape.dtype == "float32")
    tokens, steps = BATCH * TOKENS, BATCH * plan.tiles
    return [
        Kernel(
            kernel.name, f"hyper_connections_{kernel.name}", steps, plan.tile,
            tokens * token_flops(plan, kernel.name), least(shape, kernel), counted_loops=True,
        )
        for kernel in pallas_tpu.KERNELS
    ]  # fmt: skip


def least(shape: Shape, kernel: pallas_tpu.Kernel) -> int:
    """Bytes to and from HBM: streams and branches once each, phi and its gradient once, and the numbers of a token.

    Those are coefficients, normed projection and root mean square, where they are written or all of them read.
    """
    item, numbers, tokens = jnp.dtype(shape.dtype).itemsize, shape.numbers, BATCH * TOKENS
    branch, phi = tokens * shape.width * item, 4 * shape.streams * shape.width * numbers
    sizes = {
        "x": shape.streams * branch, "y": branch, "record": 4 * tokens * (2 * numbers + 1),
        "post": 4 * tokens * shape.streams, "phi": phi, "bias": 4 * numbers, "d_phi": phi, "d_bias": 4 * numbers,
    }  # fmt: skip
    return sum(sizes[name] for name in (*kernel.operands, *kernel.results))
