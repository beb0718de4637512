"""The TPU kernels through Pallas' interpreter: what every implementation does, and what only kernels get wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_delta_rule import pallas_tpu
from pallas_kernels.gated_delta_rule.api import gated_delta_rule
from tests.kernels.delta_rule_cases import (
    HARD_CASES,
    RESULTS,
    TOLERANCE,
    assert_close,
    cast,
    hard_inputs,
    make_inputs,
    token_scan,
)
from tests.rarely import rarely

HARD_SHAPE = (1, 75, 2, 2, 16, 16)


@functools.partial(jax.jit, static_argnames=("chunk", "interpret", "matrix_unit", "heads_per_step", "most_beta"))
def run(
    inputs, cotangents, segment_ids=None, chunk=64, interpret=True, matrix_unit=256, heads_per_step=None, most_beta=1.0
):
    """Output, final state and the gradients of all six arguments."""
    scale = inputs[0].shape[-1] ** -0.5

    def rule(*x):
        return pallas_tpu.gated_delta_rule(
            *x, segment_ids, scale, chunk, interpret=interpret, matrix_unit=matrix_unit, heads_per_step=heads_per_step,
            most_beta=most_beta,
        )  # fmt: skip

    outputs, pull = jax.vjp(rule, *inputs)
    return dict(zip(RESULTS, (*outputs, *pull(tuple(cotangents))), strict=True))


@pytest.mark.parametrize(
    "shape, dtype, options",
    [
        rarely((2, 75, 2, 2, 64, 64), "float32", {}),  # what all tests of HARD_SHAPE do
        ((1, 130, 3, 3, 100, 60), "bfloat16", {}),  # an odd number of heads stands alone in its registers
        rarely((1, 150, 1, 4, 64, 128), "bfloat16", {}),  # four value heads a key head
        ((1, 75, 2, 6, 16, 16), "float32", {}),  # three: the second pack has two keys
        ((1, 75, 2, 2, 16, 16), "bfloat16", {"matrix_unit": 128}),
        ((1, 140, 4, 4, 16, 16), "float32", {"heads_per_step": 2}),
        ((1, 140, 2, 2, 16, 16), "bfloat16", {"chunk": 128}),
        rarely((1, 75, 1, 2, 16, 16), "bfloat16", {"chunk": 128, "matrix_unit": 128}),
        ((1, 65, 2, 2, 256, 200), "bfloat16", {}),
    ],
    ids=str,
)
def test_agrees_with_token_scan(shape, dtype, options):
    inputs, cotangents = cast(*make_inputs(shape), dtype)
    results = run(inputs, cotangents, **options)
    assert results["o"].dtype == dtype
    assert results["state"].dtype == jnp.float32
    assert_close(results, token_scan(inputs, cotangents), TOLERANCE[dtype])


@pytest.mark.parametrize("length", [1, rarely(63), 64, rarely(65)])  # 75 and 130 are no whole chunks either
def test_any_length(length):
    inputs, cotangents = cast(*make_inputs((1, length, 1, 2, 8, 8)), "float32")
    assert_close(run(inputs, cotangents), token_scan(inputs, cotangents), TOLERANCE["float32"])


def test_gates_may_be_wider_than_the_rest():
    inputs, cotangents = cast(*make_inputs(HARD_SHAPE), "bfloat16")
    inputs[3:5] = [x.astype(jnp.float32) for x in inputs[3:5]]
    results = run(inputs, cotangents)
    assert results["dg"].dtype == results["dbeta"].dtype == jnp.float32
    assert results["dq"].dtype == jnp.bfloat16
    assert_close(results, token_scan(inputs, cotangents), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("case", HARD_CASES)
def test_hard_inputs(case):
    inputs, cotangents = cast(*hard_inputs(case, HARD_SHAPE), "float32")
    # Parallel keys and beta 2: |A| |I + L| is 250 in a chunk, and float32 rounds each k_i . k_j the same way.
    tolerance = 5e-5 if "keys, beta = 2" in case else 1e-5
    assert_close(run(inputs, cotangents), token_scan(inputs, cotangents), dict.fromkeys(RESULTS, tolerance))


@pytest.mark.exhaustive  # float32 is in the suite
@pytest.mark.parametrize("case", ["correlated keys, beta = 1, g = -1e-4", "g = -30", "zero rows", "beta zero rows"])
def test_hard_inputs_in_bfloat16(case):
    inputs, cotangents = cast(*hard_inputs(case, HARD_SHAPE), "bfloat16")
    assert_close(run(inputs, cotangents), token_scan(inputs, cotangents), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("case", [
    "identical keys, beta = 2, g = 0", rarely("correlated keys, beta = 2, g = -1e-4"), rarely("beta = 2, g = 0"),
])  # fmt: skip
def test_beta_above_1_in_bfloat16(case):
    """The inverse cancels there: products of bfloat16 had gradients off by 0.6 of their size."""
    inputs, cotangents = cast(*hard_inputs(case, HARD_SHAPE), "bfloat16")
    assert_close(run(inputs, cotangents, most_beta=2.0), token_scan(inputs, cotangents), TOLERANCE["bfloat16"])


SEGMENTS = jnp.asarray(np.repeat([0, 1, 2, 4, 5, 2], [1, 1, 61, 1, 56, 30])[None], jnp.int32)


@pytest.mark.parametrize(
    "shape, dtype", [((1, 150, 1, 2, 16, 16), "float32"), rarely((1, 150, 3, 3, 8, 8), "bfloat16")], ids=str
)
def test_segments_agree_with_token_scan(shape, dtype):
    """Boundaries at a chunk's start, at its last token and inside; one segment crosses a chunk."""
    inputs, cotangents = cast(*make_inputs(shape), dtype)
    results = run(inputs, cotangents, SEGMENTS)
    assert_close(results, token_scan(inputs, cotangents, SEGMENTS), TOLERANCE[dtype])


def test_gradient_identities():
    """dG_i = <dO_i, O_i> - <dV_i, V_i>, + <dS', S'> at the last; beta_i dbeta_i = <dV_i, v_i - S_i^T k_i>."""
    inputs, cotangents = cast(*make_inputs((1, 75, 1, 2, 16, 16)), "float32")
    x = {name: np.asarray(value, np.float64) for name, value in run(inputs, cotangents).items()}
    _, k, v, g, beta, state = (np.asarray(array, np.float64) for array in inputs)
    d_o, d_s = (np.asarray(array, np.float64) for array in cotangents)
    d_sum = (d_o * x["o"]).sum(-1) - (x["dv"] * v).sum(-1)
    d_sum[:, -1] += (d_s * x["state"]).sum((-1, -2))
    np.testing.assert_allclose(x["dg"], np.flip(np.cumsum(np.flip(d_sum, 1), axis=1), 1), atol=5e-5)
    keys, errors = np.repeat(k, 2, axis=2), np.zeros_like(v)
    for i in range(v.shape[1]):  # an independent scan
        state = np.exp(g[:, i, :, None, None]) * state
        errors[:, i] = v[:, i] - np.einsum("bhk,bhkv->bhv", keys[:, i], state)
        state = state + np.einsum("bh,bhk,bhv->bhkv", beta[:, i], keys[:, i], errors[:, i])
    np.testing.assert_allclose(beta * x["dbeta"], (x["dv"] * errors).sum(-1), atol=5e-5)


def test_causal():
    """No gradient reaches a token from the outputs before it: exactly none."""
    inputs, cotangents = cast(*make_inputs(HARD_SHAPE), "float32")
    for last in (0, 40, 63, 64):
        d_o = cotangents[0].at[:, last + 1 :].set(0)
        d = run(inputs, [d_o, jnp.zeros_like(cotangents[1])])
        for name in ("dq", "dk", "dv", "dg", "dbeta"):
            assert not d[name][:, last + 1 :].any(), name


def test_neither_races_nor_reads_what_nobody_wrote():
    """Several steps of every axis with memory poisoned, copies as late as allowed, parallel axes in any order."""
    shape = (2, 130, 4, 4, 8, 8)
    inputs, cotangents = cast(*make_inputs(shape), "bfloat16")
    ids = jnp.asarray(np.stack([np.repeat([0, 1], [70, 60]), np.repeat([0, 1], [64, 66])]), jnp.int32)
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", dma_execution_mode="on_wait", random_seed=1
    )
    results = run(inputs, cotangents, ids, interpret=params, heads_per_step=2)
    jax.block_until_ready(results)
    assert_close(results, token_scan(inputs, cotangents, ids), TOLERANCE["bfloat16"])
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


def test_agrees_with_xla_through_the_interface():
    inputs, _ = cast(*make_inputs((1, 70, 1, 2, 16, 16)), "float32")
    results = [
        gated_delta_rule(*inputs[:5], initial_state=inputs[5], return_state=True, implementation=name)
        for name in ("xla", "pallas_tpu_interpreted")
    ]
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_saved_names_spare_the_second_forward_pass():
    inputs, _ = cast(*make_inputs((1, 70, 1, 2, 8, 8)), "float32")

    def kernels(policy):
        rule = functools.partial(gated_delta_rule, implementation="pallas_tpu_interpreted")
        remat = jax.checkpoint(lambda *x: jnp.sin(rule(*x)).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.grad(remat))(*inputs[:5])).count("pallas_call[")

    assert kernels(jax.checkpoint_policies.nothing_saveable) == 3
    assert kernels(jax.checkpoint_policies.save_only_these_names(*pallas_tpu.SAVED_NAMES)) == 2


def test_what_the_kernels_do_not_do_is_said():
    q, k, v, g, beta = (jnp.zeros(shape) for shape in [(1, 8, 1, 257)] * 2 + [(1, 8, 1, 300)] + [(1, 8, 1)] * 2)
    with pytest.raises(ValueError) as caught:
        gated_delta_rule(q, k, v, g, beta, implementation="pallas_tpu", chunk_size=32)
    for part in ("'pallas_tpu' needs a TPU, this is for cpu", "chunk_size 32 must be one of 64, 128",
                 "k (1, 8, 1, 257) is wider than 256", "v (1, 8, 1, 300) is wider than 256"):  # fmt: skip
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="q must be float32 or bfloat16, got float16"):
        pallas_tpu.gated_delta_rule(
            *(x[..., :8].astype(jnp.float16) for x in (q, k, v)), g, beta, jnp.zeros((1, 1, 8, 8)), None, 1.0, 64
        )
