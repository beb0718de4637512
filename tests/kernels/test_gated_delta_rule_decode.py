"""The TPU kernel for a few tokens, through Pallas' interpreter: against the token scan in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_delta_rule import xla
from pallas_kernels.gated_delta_rule.api import gated_delta_rule
from pallas_kernels.gated_delta_rule.tpu import decode
from tests.kernels.delta_rule_cases import TOLERANCE, cast, hard_inputs, make_inputs, relative_error, token_scan


@functools.partial(jax.jit, static_argnames="interpret")
def run(inputs, segment_ids=None, interpret=True):
    scale = inputs[0].shape[-1] ** -0.5
    outputs = decode.gated_delta_rule(*inputs, segment_ids, scale, 64, interpret=interpret)
    return dict(zip(("o", "state"), outputs, strict=True))


def assert_agrees(results, truth, dtype):
    for name, x in results.items():
        assert relative_error(x, truth[name]) <= TOLERANCE[dtype][name], name


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((1, 1, 2, 2, 128, 128), "float32"),
        ((3, 1, 2, 4, 128, 128), "bfloat16"),  # two value heads a key head
        ((2, 5, 3, 3, 60, 100), "bfloat16"),
        ((2, 4, 1, 3, 16, 8), "float32"),
        ((1, 32, 1, 1, 256, 200), "float32"),
    ],
    ids=str,
)
def test_agrees_with_token_scan(shape, dtype):
    inputs, cotangents = cast(*make_inputs(shape), dtype)
    results = run(inputs)
    assert results["o"].dtype == dtype and results["state"].dtype == jnp.float32
    assert_agrees(results, token_scan(inputs, cotangents), dtype)


@pytest.mark.parametrize("case", ["beta = 1, g = -1000", "identical keys, beta = 2, g = 0", "beta = 0"])
def test_hard_inputs(case):
    inputs, cotangents = cast(*hard_inputs(case, (2, 8, 2, 2, 16, 16)), "float32")
    assert_agrees(run(inputs), token_scan(inputs, cotangents), "float32")


def test_segments_agree_with_token_scan():
    inputs, cotangents = cast(*make_inputs((2, 8, 2, 2, 16, 16)), "float32")
    ids = jnp.asarray([[0, 0, 1, 1, 1, 2, 2, 0], [3, 4, 4, 4, 4, 4, 4, 4]], jnp.int32)
    assert_agrees(run(inputs, ids), token_scan(inputs, cotangents, ids), "float32")


def test_neither_races_nor_reads_what_nobody_wrote(monkeypatch):
    """Several steps of both axes, and several rows a step, with memory poisoned and copies as late as allowed."""
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", dma_execution_mode="on_wait", random_seed=1
    )
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    monkeypatch.setattr(decode, "_STATE_BYTES", 4 * 8 * 128 * 4)  # four heads of [8, 8]
    for shape, steps in (((4, 2, 2, 4, 8, 8), (4, 1)), ((2, 2, 8, 8, 8, 8), (2, 2)), ((8, 2, 1, 2, 8, 8), (4, 1))):
        inputs, cotangents = cast(*make_inputs(shape), "bfloat16")
        plan = decode.make_plan(inputs[0], inputs[2], 1.0)
        assert (shape[0] // plan.rows, shape[2] // plan.key_heads) == steps
        results = jax.block_until_ready(run(inputs, interpret=params))
        assert_agrees(results, token_scan(inputs, cotangents), "bfloat16")
        assert not interpret_pallas_call.races.races_found


def test_long_generation_stays_exact():
    """300 tokens of one state, a call a token as generation does, bfloat16 in and a float32 state between."""
    inputs, cotangents = cast(*make_inputs((1, 300, 1, 2, 16, 16)), "bfloat16")

    @jax.jit
    def generate(*inputs):
        def step(state, token):
            o, state = gated_delta_rule(
                *(x[:, None] for x in token), initial_state=state, return_state=True,
                implementation="pallas_tpu_decode_interpreted",
            )  # fmt: skip
            return state, o[:, 0]

        tokens = [x.swapaxes(0, 1) for x in inputs[:5]]
        state, o = jax.lax.scan(step, inputs[5], tokens)
        return {"o": o.swapaxes(0, 1), "state": state}

    results = generate(*inputs)
    assert_agrees(results, token_scan(inputs, cotangents), "bfloat16")
    assert relative_error(results["state"], token_scan(inputs, cotangents)["state"]) < 1e-5


def test_gradients_are_those_of_xla():
    inputs, cotangents = cast(*make_inputs((2, 3, 1, 2, 16, 16)), "float32")
    ids = jnp.asarray([[0, 0, 1], [0, 0, 0]], jnp.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(rule, *inputs):
        return jax.vjp(lambda *x: rule(*x, ids, 0.25, 64), *inputs)[1](tuple(cotangents))

    for ours, theirs in zip(
        gradients(functools.partial(decode.gated_delta_rule, interpret=True), *inputs),
        gradients(xla.gated_delta_rule, *inputs),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_what_the_kernel_does_not_do_is_said():
    q, k, v, g, beta = (jnp.zeros(shape) for shape in [(1, 33, 1, 257)] * 2 + [(1, 33, 1, 300)] + [(1, 33, 1)] * 2)
    with pytest.raises(ValueError) as caught:
        gated_delta_rule(q, k, v, g, beta, implementation="pallas_tpu_decode_interpreted")
    for part in ("q (1, 33, 1, 257) has more than 32 tokens", "k (1, 33, 1, 257) is wider than 256",
                 "v (1, 33, 1, 300) is wider than 256"):  # fmt: skip
        assert part in str(caught.value)
