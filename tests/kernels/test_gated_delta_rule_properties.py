"""What the gated delta rule is, without a second implementation: memory, causality, identities, transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import PartitionSpec

from pallas_kernels.gated_delta_rule import api
from pallas_kernels.gated_delta_rule.api import gated_delta_rule, gated_delta_rule_step
from pallas_kernels.gated_delta_rule.xla import SAVED_NAMES

IMPLEMENTATIONS = ("reference", "xla")
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
SHAPE = (2, 150, 2, 4, 16, 8)


def make_inputs(shape=SHAPE, seed=0):
    b, t, h, hv, k, v = shape
    rng = np.random.default_rng(seed)
    q, key = (rng.normal(size=(b, t, h, k)) for _ in range(2))
    q, key = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, key))
    g, beta = -rng.exponential(size=(b, t, hv)) * 0.1, rng.uniform(0.1, 1, size=(b, t, hv))
    return [q, key, rng.normal(size=(b, t, hv, v)), g, beta, rng.normal(size=(b, hv, k, v))]


def float32(arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


@functools.partial(jax.jit, static_argnames=("implementation", "scale"))
def rule(q, k, v, g, beta, initial_state=None, segment_ids=None, implementation=None, scale=None):
    return gated_delta_rule(
        q, k, v, g, beta, initial_state=initial_state, segment_ids=segment_ids, return_state=True,
        implementation=implementation, scale=scale,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="implementation")
def gradients(inputs, d_output, d_state, segment_ids=None, implementation=None):
    return jax.vjp(lambda *x: rule(*x, segment_ids, implementation), *inputs)[1]((d_output, d_state))


@every_implementation
def test_orthonormal_keys_give_back_their_values(implementation):
    rng = np.random.default_rng(0)
    keys = np.linalg.qr(rng.normal(size=(64, 64)))[0][None, :, None]
    values = rng.normal(size=(1, 64, 1, 8))
    one, zero = np.ones((1, 64, 1)), np.zeros((1, 64, 1))
    o, state = rule(*float32([keys, keys, values, zero, one]), implementation=implementation, scale=1.0)
    np.testing.assert_allclose(o, values, atol=1e-5)
    np.testing.assert_allclose(jnp.einsum("tk,kv->tv", keys[0, :, 0], state[0, 0]), values[0, :, 0], atol=1e-5)


@every_implementation
def test_beta_one_on_orthonormal_keys_is_a_dictionary(implementation):
    """Writing a key replaces its value; reading one that was never written gives zero."""
    rng = np.random.default_rng(1)
    basis, length = np.linalg.qr(rng.normal(size=(16, 16)))[0], 150
    written, asked = rng.integers(0, 12, size=length), rng.integers(0, 16, size=length)
    values = rng.normal(size=(length, 8))
    dictionary, expected = {}, []
    for key, question, value in zip(written, asked, values, strict=True):
        dictionary[key] = value
        expected.append(dictionary.get(question, np.zeros(8)))
    one, zero = np.ones((1, length, 1)), np.zeros((1, length, 1))
    inputs = float32([basis[asked][None, :, None], basis[written][None, :, None], values[None, :, None], zero, one])
    o, _ = rule(*inputs, implementation=implementation, scale=1.0)
    np.testing.assert_allclose(o[0, :, 0], expected, atol=1e-5)


@every_implementation
def test_causal(implementation):
    """No gradient reaches a token from the outputs before it: exactly none."""
    inputs = float32(make_inputs())
    for last in (0, 40, 63, 64, 149):
        d_output = np.random.default_rng(last).normal(size=inputs[2].shape)
        d_output[:, last + 1 :] = 0
        d = gradients(inputs, *float32([d_output, np.zeros(inputs[5].shape)]), implementation=implementation)
        assert all(not x[:, last + 1 :].any() for x in d[:5])
        assert all(x[:, last].any() for x in d[1:3])


@every_implementation
def test_no_gradient_crosses_a_segment_boundary_or_the_batch(implementation):
    inputs = float32(make_inputs())
    ids = jnp.asarray(np.stack([np.repeat([0, 1, 2], [50, 64, 36])] * 2), jnp.int32)
    d_output = np.zeros(inputs[2].shape)
    d_output[0, 50:114] = np.random.default_rng(0).normal(size=d_output[0, 50:114].shape)
    d = gradients(inputs, *float32([d_output, np.zeros(inputs[5].shape)]), ids, implementation=implementation)
    for gradient in d[:5]:
        assert gradient[0, 50:114].any()
        assert not gradient[0, :50].any() and not gradient[0, 114:].any() and not gradient[1].any()
    assert not d[5].any()


@every_implementation
def test_a_sequence_may_be_split(implementation):
    *tokens, state = float32(make_inputs((2, 140, 2, 4, 16, 8)))
    whole = rule(*tokens, state, implementation=implementation)
    first, between = rule(*(x[:, :70] for x in tokens), state, implementation=implementation)
    second, last = rule(*(x[:, 70:] for x in tokens), between, implementation=implementation)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole[0], atol=2e-6)
    np.testing.assert_allclose(last, whole[1], atol=2e-6)


def test_steps_are_the_sequence():
    *tokens, state = float32(make_inputs())
    whole, _ = rule(*tokens, state)
    step = jax.jit(gated_delta_rule_step)
    for i in range(10):
        o, state = step(*(x[:, i] for x in tokens), state)
        np.testing.assert_allclose(o, whole[:, i], atol=2e-6)
    one, after = rule(*(x[:, 10:11] for x in tokens), state)  # a sequence of one token takes the step
    np.testing.assert_allclose(one[:, 0], whole[:, 10], atol=2e-6)
    o, state = step(*(x[:, 10] for x in tokens), state)
    np.testing.assert_array_equal(one[:, 0], o)
    np.testing.assert_array_equal(after, state)


def test_no_initial_state_is_zeros():
    *tokens, state = float32(make_inputs())
    for with_zeros, without in zip(rule(*tokens, jnp.zeros_like(state)), rule(*tokens), strict=True):
        np.testing.assert_array_equal(with_zeros, without)


@every_implementation
def test_gradient_identities(implementation):
    """dG_i = <dO_i, O_i> - <dV_i, V_i>, + <dS', S'> at the last; beta_i dbeta_i = <dV_i, v_i - S_i^T k_i>."""
    rng = np.random.default_rng(5)
    _, k, v, g, beta, state = inputs = make_inputs()
    d_o, d_s = rng.normal(size=v.shape), rng.normal(size=state.shape)
    with jax.enable_x64(True):
        o, s = map(np.asarray, rule(*inputs, implementation=implementation))
        _, _, d_v, d_g, d_beta, _ = map(np.asarray, gradients(inputs, d_o, d_s, implementation=implementation))
    d_sum = (d_o * o).sum(-1) - (d_v * v).sum(-1)
    d_sum[:, -1] += (d_s * s).sum((-1, -2))
    np.testing.assert_allclose(d_g, np.flip(np.cumsum(np.flip(d_sum, 1), axis=1), 1), atol=1e-10)
    errors = np.zeros_like(v)
    keys = np.repeat(k, 2, axis=2)
    for i in range(v.shape[1]):  # an independent scan
        state = np.exp(g[:, i, :, None, None]) * state
        errors[:, i] = v[:, i] - np.einsum("bhk,bhkv->bhv", keys[:, i], state)
        state = state + np.einsum("bh,bhk,bhv->bhkv", beta[:, i], keys[:, i], errors[:, i])
    np.testing.assert_allclose(s, state, atol=1e-12)
    np.testing.assert_allclose(beta * d_beta, (d_v * errors).sum(-1), atol=1e-10)


def loss(*inputs):
    o, state = gated_delta_rule(*inputs[:5], initial_state=inputs[5], return_state=True)
    return (o**2).sum() + (state**2).sum()


grad = jax.grad(loss, argnums=(0, 1, 2, 3, 4, 5))


def test_inside_shard_map():
    """Eight devices, batch and heads split: the same numbers as on one."""
    inputs = float32(make_inputs((4, 70, 2, 2, 8, 8)))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tokens, state = PartitionSpec("data", None, "model"), PartitionSpec("data", "model")
    specs = (*[tokens] * 5, state)
    split = jax.jit(jax.shard_map(grad, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False))(*inputs)
    for a, b in zip(split, jax.jit(grad)(*inputs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_inside_scan_cond_and_checkpoint():
    """A stack of two rules whose second may be skipped, rematerialised: the gradients of the plain stack."""
    inputs = float32(make_inputs((1, 70, 2, 2, 8, 8)))
    q, k, v, g, beta, _ = inputs

    def block(x):
        return x + gated_delta_rule(q, k, x, g, beta, implementation="xla")

    def stacked(x):
        def layer(x, use):
            return jax.lax.cond(use, jax.checkpoint(block), lambda x: x, x), None

        return (jax.lax.scan(layer, x, jnp.array([True, True, False]))[0] ** 2).sum()

    np.testing.assert_allclose(
        jax.jit(jax.grad(stacked))(v),
        jax.jit(jax.grad(lambda x: (block(block(x)) ** 2).sum()))(v),
        rtol=2e-5,
        atol=1e-4,
    )


def test_saved_names_spare_the_second_forward_pass():
    inputs = float32(make_inputs((1, 70, 2, 2, 8, 8)))

    def scans(policy):
        remat = jax.checkpoint(lambda *x: jnp.sin(gated_delta_rule(*x)).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.grad(remat))(*inputs[:5])).count(" scan[")

    assert scans(jax.checkpoint_policies.nothing_saveable) == 3
    assert scans(jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)) == 2


def test_same_inputs_same_bytes():
    inputs = float32(make_inputs())
    for a, b in zip(rule(*inputs), rule(*inputs), strict=True):
        assert a.tobytes() == b.tobytes()


def test_unknown_implementation_names_those_there_are():
    with pytest.raises(ValueError, match=r"'pallas_mars' is not available, there are reference, xla"):
        gated_delta_rule(*float32(make_inputs()[:5]), implementation="pallas_mars")


def test_all_problems_are_reported_at_once():
    q, k, v, g, beta, state = float32(make_inputs())
    with pytest.raises(ValueError) as caught:
        api.check_arguments(q, k[:, 1:], v[:, :, :3], g, beta[..., 0], state[0], jnp.zeros((2, 7), jnp.int32), 48)
    message = str(caught.value)
    for part in ("k must be", "value heads must be a multiple", "g must be", "beta must be", "initial_state must be",
                 "segment_ids must be", "chunk_size 48 must be a power of two"):  # fmt: skip
        assert part in message
    with pytest.raises(ValueError, match=r"q must be \[b, t, h, k\]"):
        api.check_arguments(q[0], k, v, g, beta)
    with pytest.raises(ValueError, match="at least one token"):
        gated_delta_rule(*(x[:, :0] for x in (q, k, v, g, beta)))


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_tpu_decode"])
def test_an_implementation_that_the_platform_lacks_names_those_it_has(implementation):
    message = f"'{implementation}' needs a TPU, this is for cpu, where there are reference, xla, pallas_tpu_interpreted"
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(*float32(make_inputs()[:5]), implementation=implementation)


def test_head_counts_and_widths_that_do_not_fit_are_named():
    q, k, v, g, beta, _ = float32(make_inputs((1, 8, 2, 4, 8, 8)))
    with pytest.raises(ValueError, match="value heads must be a multiple of query/key heads, got 3 and 2"):
        gated_delta_rule(q, k, v[:, :, :3], g[..., :3], beta[..., :3])
    with pytest.raises(ValueError, match="chunk_size 24 must be a power of two"):
        gated_delta_rule(q, k, v, g, beta, chunk_size=24)
    wide = jnp.zeros((1, 8, 2, 257))
    for name in ("pallas_tpu_interpreted", "pallas_tpu_decode_interpreted"):
        with pytest.raises(ValueError, match=r"k \(1, 8, 2, 257\) is wider than 256"):
            gated_delta_rule(wide, wide, v, g, beta, implementation=name)


def test_debug_names_the_first_value_that_is_out_of_range():
    q, k, v, g, beta, _ = float32(make_inputs((1, 8, 2, 2, 8, 8)))
    gated_delta_rule(q, k, v, g, beta.at[0, 3].set(0.0), debug=True)
    bad_g, bad_beta = g.at[0, 5, 1].set(0.5), beta.at[0, 2, 0].set(2.5)
    with pytest.raises(ValueError) as caught:
        gated_delta_rule(q, k, v, bad_g, bad_beta, debug=True)
    assert "g (1, 8, 2) is 0.5 at (0, 5, 1); a log decay is at most 0" in str(caught.value)
    assert "beta (1, 8, 2) is 2.5 at (0, 2, 0); it must be in [0, 2]" in str(caught.value)
    for value in (-0.5, np.nan):
        with pytest.raises(ValueError, match="beta"):
            gated_delta_rule(q, k, v, g, beta.at[0, 0, 0].set(value), debug=True)


def test_debug_inside_jit_is_checkify():
    q, k, v, g, beta, _ = float32(make_inputs((1, 8, 2, 2, 8, 8)))
    careful = jax.jit(checkify.checkify(functools.partial(gated_delta_rule, debug=True)))
    error, o = careful(q, k, v, g, beta)
    error.throw()
    np.testing.assert_allclose(o, gated_delta_rule(q, k, v, g, beta), atol=1e-6)
    error, _ = careful(q, k, v, g.at[0, 5, 1].set(0.5), beta)
    with pytest.raises(ValueError, match=r"g \(1, 8, 2\) is 0.5 at 11, counted through; a log decay is at most 0"):
        error.throw()
    error, _ = careful(q, k, v, g, beta.at[0, 2, 0].set(2.5))
    with pytest.raises(ValueError, match=r"beta \(1, 8, 2\) is 2.5 at 4, counted through; it must be in \[0, 2\]"):
        error.throw()
