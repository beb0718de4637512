"""The Hopper kernels through the interpreter of Mosaic GPU, on a CPU: against the token scan in float64.

They need a JAX that has that interpreter, and more threads of XLA than a block has warpgroups, or they wait for ever:
`make test-gpu-compile` sees to both.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from pallas_kernels.gated_delta_rule import pallas_gpu
from pallas_kernels.gated_delta_rule.api import gated_delta_rule
from tests.kernels.delta_rule_cases import (
    RESULTS,
    TOLERANCE,
    assert_close,
    cast,
    hard_inputs,
    make_inputs,
    token_scan,
)

THREADS = max(int(os.environ.get("NPROC", "0")), len(os.sched_getaffinity(0)))
HARD_SHAPE = (1, 75, 1, 1, 16, 16)
# Two bfloat16 parts hold 17 bits: a float32 result is right to about as many.
TOLERANCE_OF_PARTS = dict.fromkeys(RESULTS, 2e-5)

pytestmark = [
    pytest.mark.skipif(
        bool(pallas_gpu.missing(interpret=True)),
        reason="; ".join(pallas_gpu.missing(interpret=True)) + " (make test-gpu-compile)",
    ),
    pytest.mark.skipif(
        THREADS < 5, reason="the interpreter needs five threads: NPROC=16 PJRT_NPROC=16 (make test-gpu-compile)"
    ),
    pytest.mark.slow,
]


@functools.partial(jax.jit, static_argnames="most_beta")
def run(inputs, cotangents, segment_ids=None, most_beta=1.0):
    """Output, final state and the gradients of all six arguments."""
    scale = inputs[0].shape[-1] ** -0.5

    def rule(*x):
        return pallas_gpu.gated_delta_rule(*x, segment_ids, scale, 64, most_beta=most_beta, interpret=True)

    outputs, pull = jax.vjp(rule, *inputs)
    return dict(zip(RESULTS, (*outputs, *pull(tuple(cotangents))), strict=True))


@pytest.mark.parametrize(
    "shape",
    [
        (1, 130, 1, 2, 64, 64),  # two value heads a key head
        (2, 65, 2, 2, 100, 70),  # a slab of 128 columns, two tiles of values
        (1, 64, 1, 1, 200, 130),  # two slabs, three tiles
        (1, 1, 1, 1, 16, 16),
    ],
    ids=str,
)
def test_agrees_with_token_scan(shape):
    inputs, cotangents = cast(*make_inputs(shape), "bfloat16")
    results = run(inputs, cotangents)
    assert results["o"].dtype == jnp.bfloat16 and results["state"].dtype == jnp.float32
    assert_close(results, token_scan(inputs, cotangents), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("width", [16, 100])
def test_float32_in_two_parts(width):
    inputs, cotangents = cast(*make_inputs((1, 75, 1, 2, width, 16)), "float32")
    results = run(inputs, cotangents)
    assert results["o"].dtype == jnp.float32
    assert_close(results, token_scan(inputs, cotangents), TOLERANCE_OF_PARTS)


@pytest.mark.parametrize(
    "case",
    [
        "identical keys, beta = 2, g = 0", "correlated keys, beta = 2, g = -1e-4", "beta = 2, g = 0",
        "correlated keys, abrupt g", "g = -30", "beta = 1, g = -1000", "zero rows", "beta zero rows", "beta = 0",
    ],
)  # fmt: skip
def test_hard_inputs(case):
    inputs, cotangents = cast(*hard_inputs(case, HARD_SHAPE), "bfloat16")
    assert_close(run(inputs, cotangents, most_beta=2.0), token_scan(inputs, cotangents), TOLERANCE["bfloat16"])


def test_segments_agree_with_token_scan_and_the_same_bits_come_again():
    """Boundaries at a chunk's start, at its last token and inside; one segment crosses a chunk."""
    ids = jnp.asarray(np.repeat([0, 1, 2, 4, 5, 2], [1, 1, 61, 1, 56, 30])[None], jnp.int32)
    inputs, cotangents = cast(*make_inputs((1, 150, 1, 1, 16, 16)), "bfloat16")
    results = run(inputs, cotangents, ids)
    assert_close(results, token_scan(inputs, cotangents, ids), TOLERANCE["bfloat16"])
    again = run(inputs, cotangents, ids)
    for name in RESULTS:
        np.testing.assert_array_equal(results[name], again[name])


def test_agrees_with_xla_through_the_interface():
    inputs, _ = cast(*make_inputs(HARD_SHAPE), "float32")
    results = [
        gated_delta_rule(*inputs[:5], initial_state=inputs[5], return_state=True, implementation=name)
        for name in ("xla", "pallas_gpu_interpreted")
    ]
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


def calls(jaxpr, name):
    """How often a jitted function of that name stands in a program and what it calls."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.params.get("name") == name
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)):
            if isinstance(inner, core.Jaxpr | core.ClosedJaxpr):
                found += calls(getattr(inner, "jaxpr", inner), name)
    return found


def test_saved_names_spare_the_second_forward_pass():
    """Traced as for the card: `jax.checkpoint` does not take what the interpreter does on the way."""
    inputs, _ = cast(*make_inputs(HARD_SHAPE), "bfloat16")

    def passes(policy):
        rule = jax.checkpoint(lambda *x: pallas_gpu.gated_delta_rule(*x, None, 1.0, 64)[0], policy=policy)
        traced = jax.make_jaxpr(jax.grad(lambda *x: jnp.sin(rule(*x).astype(jnp.float32)).sum()))(*inputs)
        return calls(traced.jaxpr, "_forward"), calls(traced.jaxpr, "_backward")

    names = ("delta_rule_output", "delta_rule_states", "delta_rule_inverse")
    assert passes(jax.checkpoint_policies.nothing_saveable) == (2, 1)
    assert passes(jax.checkpoint_policies.save_only_these_names(*names)) == (1, 1)
