"""One token of the gated delta rule, as in generation, at three sizes of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernels_measured.cases import Case, Kernel
from pallas_kernels.gated_delta_rule import reference
from pallas_kernels.gated_delta_rule.tpu import decode

HEADS, WIDTH = 32, 128


def cases() -> list[Case]:
    """Batches of 1, 8 and 256 rows."""
    return [_case(batch) for batch in (1, 8, 256)]


def _case(batch: int) -> Case:
    token, state = (batch, 1, HEADS, WIDTH), (batch, HEADS, WIDTH, WIDTH)
    gates = ((batch, 1, HEADS), "float32")
    return Case(
        name=f"decode {batch}",
        operation="decode",
        unit="value head",
        arguments=[*[(token, "bfloat16")] * 3, gates, gates, (state, "float32")],
        run=lambda chip: _rule(decode.gated_delta_rule),
        beside=_rule(reference.gated_delta_rule),
        kernels=lambda chip: [_kernel(batch)],
    )


def _rule(rule: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: rule(*arguments, None, WIDTH**-0.5, 64)


def _kernel(batch: int) -> Kernel:
    token = jax.ShapeDtypeStruct((batch, 1, HEADS, WIDTH), jnp.bfloat16)
    plan = decode.make_plan(token, token, 1.0)
    assert plan.rows == 1  # rows of a step are a loop, which the schedule has once
    steps, heads = batch * HEADS // plan.heads, batch * HEADS
    # S^T k and S^T q, 2 k v each; d S + k e^T, 3 k v. The state comes and goes; q, k, v, o, g, beta once.
    return Kernel("one token", "gated_delta_rule_decode", steps, plan.heads, 7 * heads * WIDTH**2,
                  heads * (2 * 4 * WIDTH**2 + 4 * 2 * WIDTH + 2 * 4))  # fmt: skip
