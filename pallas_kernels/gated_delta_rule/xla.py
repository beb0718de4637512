"""The gated delta rule in chunks, as plain XLA: one scan whose body is matrix products over all heads of a chunk.

* Everything of a chunk happens in the body, from slices of the arguments as they lie: what it touches stays in the
  cache, and nothing but the results has the length of the sequence. (Doing the part that does not need the state
  for all chunks at once is several times slower on a CPU: it is bound by memory.)
* Forward and backward are each one scan under one `custom_vjp`. Saved: the state before each chunk, and A.
* The state, sums of decays, the inverse and all accumulators are float32 (float64 for float64 arguments).

Per chunk and head, with the decays of `chunks` and scale folded into Q:

    L = tril(beta pair (K K^T), -1)         A = (I + L)^-1
    U = A (beta (V - gamma (K S)))          P = pair (Q K^T)
    O = gamma (Q S) + P U                   S' = last S + K^T (lam U)
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.gated_delta_rule.common.chunks import Decays, decays, pad_tokens, put_chunk, runs, take_chunk
from pallas_kernels.gated_delta_rule.common.triangular_inverse import invert_unit_lower

SAVED_NAMES = ("delta_rule_output", "delta_rule_states", "delta_rule_inverse")  # for checkpoint policies


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
) -> tuple[Float[Array, "b t hv v"], Float[Array, "b hv k v"]]:
    """The outputs and the last state, in chunks of `chunk_size` tokens (a power of two), differentiable."""
    length = q.shape[1]
    chunk = min(chunk_size, 1 << (length - 1).bit_length())
    run = None if segment_ids is None else runs(segment_ids, chunk)
    padded = tuple(pad_tokens(x, chunk) for x in (q, k, v, g, beta))
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    output, state = _rule(scale, chunk, padded, initial_state.astype(dtype), run)
    return output[:, :length], state


class _Chunk(NamedTuple):
    """The arguments of one chunk, and the products that forward and backward share."""

    q: Float[Array, "b hv c k"]
    k: Float[Array, "b hv c k"]
    v: Float[Array, "b hv c v"]
    beta: Float[Array, "b hv c"]
    decay: Decays
    qk: Float[Array, "b hv c c"]
    kk: Float[Array, "b hv c c"]


class _Products(NamedTuple):
    """Matrix products, by how exact they are where hardware offers a choice."""

    inside: jax.lax.Precision
    state: jax.lax.Precision

    def chunk(self, equation: str, left: Array, right: Array) -> Array:
        return jnp.einsum(equation, left, right, precision=self.inside, preferred_element_type=left.dtype)

    def with_state(self, equation: str, left: Array, right: Array) -> Array:
        return jnp.einsum(equation, left, right, precision=self.state, preferred_element_type=left.dtype)


def _products(dtype: jnp.dtype) -> _Products:
    """Exact for float32; for bfloat16 three passes inside the chunk, where decays need them, and one with the state."""
    precision = jax.lax.Precision
    if jnp.finfo(dtype).bits < 32:
        return _Products(precision.HIGH, precision.DEFAULT)
    return _Products(precision.HIGHEST, precision.HIGHEST)


def _strictly_lower(chunk: int, dtype: jnp.dtype) -> Array:
    return jnp.tril(jnp.ones((chunk, chunk), dtype), -1)[None, None]


def _load(scale: float, chunk: int, arguments: tuple[Array, ...], run: Array | None, index: Array) -> _Chunk:
    """Chunk `index`, its decays and scores."""
    dtype = jnp.promote_types(arguments[0].dtype, jnp.float32)
    q, k, v, g, beta = (take_chunk(x, index, chunk, dtype) for x in arguments)
    q = q * scale
    products, group = _products(arguments[0].dtype), v.shape[1] // k.shape[1]
    scores = [products.chunk("bhck,bhdk->bhcd", x, k) for x in (q, k)]  # once a group
    q, k, qk, kk = (_share(x, group) for x in (q, k, *scores))
    return _Chunk(q, k, v, beta, decays(g, run, index), qk, kk)


def _share(x: Float[Array, "b h *rest"], group: int) -> Float[Array, "b hv *rest"]:
    return x if group == 1 else jnp.repeat(x, group, axis=1)


def _gather(x: Float[Array, "b hv *rest"], group: int) -> Float[Array, "b h *rest"]:
    return x if group == 1 else x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(2)


def _forward(
    scale: float, chunk: int, arguments: tuple[Array, ...], initial: Array, run: Array | None
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Outputs, last state, and what the backward pass saves: states before the chunks [n, b, hv, k, v], and A."""
    q, _, v = arguments[:3]
    products = _products(q.dtype)
    strict = _strictly_lower(chunk, initial.dtype)

    def step(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        state, output = carry
        x = _load(scale, chunk, arguments, run, index)
        gamma, lam, last, pair, _ = x.decay
        a = invert_unit_lower(strict * x.beta[..., None] * pair * x.kk, products.inside)
        predicted = products.with_state("bhck,bhkv->bhcv", x.k, state)
        u = products.chunk("bhcd,bhdv->bhcv", a, x.beta[..., None] * (x.v - gamma[..., None] * predicted))
        read = gamma[..., None] * products.with_state("bhck,bhkv->bhcv", x.q, state)
        read = read + products.chunk("bhcd,bhdv->bhcv", pair * x.qk, u)
        written = products.with_state("bhck,bhcv->bhkv", x.k, lam[..., None] * u)
        return (last[..., None, None] * state + written, put_chunk(output, index, read)), (state, a)

    carry = initial, jnp.zeros(v.shape, v.dtype)
    (state, output), saved = jax.lax.scan(step, carry, jnp.arange(q.shape[1] // chunk))
    return output, state, saved


def backward(
    scale: float,
    chunk: int,
    arguments: tuple[Array, ...],
    run: Array | None,
    saved: tuple[Array, Array],
    d_output: Array,
    d_final: Array,
) -> tuple[list[Array], Array]:
    """Gradients of the five arguments and of the state before the first chunk [b, hv, k, v]."""
    dtype, group = saved[0].dtype, arguments[2].shape[2] // arguments[0].shape[2]
    products = _products(arguments[0].dtype)

    def step(carry: tuple[Array, list[Array]], xs: tuple[Array, ...]) -> tuple[tuple[Array, list[Array]], None]:
        d_state, gradients = carry
        index, state, a = xs
        x = _load(scale, chunk, arguments, run, index)
        d_read = take_chunk(d_output, index, chunk, dtype)
        d_state, parts = _backward_chunk(products, x, state, a, d_read, d_state)
        parts = [scale * _gather(parts[0], group), _gather(parts[1], group), *parts[2:]]
        return (d_state, [put_chunk(*pair) for pair in zip(gradients, [index] * 5, parts, strict=True)]), None

    count = arguments[0].shape[1] // chunk
    carry = d_final, [jnp.zeros(x.shape, x.dtype) for x in arguments]
    (d_initial, gradients), _ = jax.lax.scan(step, carry, (jnp.arange(count), *saved), reverse=True)
    return gradients, d_initial


def _backward_chunk(
    products: _Products, x: _Chunk, state: Array, a: Array, d_read: Array, d_next: Array
) -> tuple[Array, list[Array]]:
    """Gradient of the state before the chunk, and those of (scaled q, k, v, g, beta) in it.

    With dS' = d_next:  dU = P^T dO + lam (K dS'),  Y = A^T dU,  dV = beta Y,
    dS = last dS' + (gamma Q)^T dO - (beta gamma K)^T Y.
    The gradient of a decay is that of the products it scales, taken with their operands: <q, dq> and <k, dk>, split by
    the part that the key plays. (The products of a token with itself have no decay and stay out of it.)
    """
    inside, with_state = products.chunk, products.with_state
    gamma, lam, last, beta = (y[..., None] for y in (x.decay.gamma, x.decay.lam, x.decay.last, x.beta))
    pair = x.decay.pair
    strict = _strictly_lower(x.k.shape[2], x.k.dtype)
    error = x.v - gamma * with_state("bhck,bhkv->bhcv", x.k, state)
    u = inside("bhcd,bhdv->bhcv", a, beta * error)
    d_u = inside("bhdc,bhdv->bhcv", pair * x.qk, d_read) + lam * with_state("bhck,bhkv->bhcv", x.k, d_next)
    y = inside("bhdc,bhdv->bhcv", a, d_u)
    entered, solved = gamma * d_read, gamma * beta * y

    strict_pair = strict * pair
    d_qk = strict_pair * inside("bhcv,bhdv->bhcd", d_read, u)
    d_kk = -strict_pair * inside("bhcv,bhdv->bhcd", y, u)  # of beta (K K^T)
    itself = _row_sums(d_read * u)[..., None]
    of_key = inside("bhcd,bhdk->bhck", d_kk, x.k)
    d_q = with_state("bhcv,bhkv->bhck", entered, state) + inside("bhcd,bhdk->bhck", d_qk, x.k)
    d_k_asked = beta * of_key - with_state("bhcv,bhkv->bhck", solved, state)
    d_k_written = inside("bhdc,bhdk->bhck", d_qk, x.q) + inside("bhdc,bhdk->bhck", d_kk, beta * x.k)
    d_k_leaving = with_state("bhcv,bhkv->bhck", lam * u, d_next)
    d_k = d_k_asked + d_k_written + d_k_leaving + itself * x.q
    d_state = with_state("bhck,bhcv->bhkv", x.q, entered) - with_state("bhck,bhcv->bhkv", x.k, solved)
    # <Y, U> / beta without the division: beta may be 0.
    d_beta = _row_sums(y * error) + _row_sums(of_key * x.k)
    at_row = _row_sums(x.q * d_q + x.k * (d_k_asked - d_k_written))
    kept = last * (state * d_next).sum((-1, -2))[..., None]
    d_g = _sum_decays(at_row, _row_sums(x.k * d_k_leaving), x.decay.visible) + kept
    d_before = last[..., None] * d_next + d_state
    return d_before, [d_q + itself * x.k, d_k, beta * y, d_g, d_beta]


def _row_sums(x: Float[Array, "b hv c d"]) -> Float[Array, "b hv c"]:
    # As a product with ones: five times faster than XLA's reduction of small rows on a CPU.
    return jnp.einsum("bhcd,d->bhc", x, jnp.ones(x.shape[-1], x.dtype), precision=jax.lax.Precision.HIGHEST)


def _sum_decays(
    at_row: Float[Array, "b hv c"], leaving: Float[Array, "b hv c"], visible: Float[Array, "*b c c"]
) -> Float[Array, "b hv c"]:
    """Token m's decay acts on what its segment reads at i >= m, and on what tokens i < m leave to the next chunk."""
    before = jnp.tril(visible, -1).swapaxes(-1, -2)
    reading = jnp.matmul(at_row, visible, precision=jax.lax.Precision.HIGHEST)
    return reading + jnp.matmul(leaving, before, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rule(
    scale: float, chunk: int, arguments: tuple[Array, ...], initial: Array, run: Array | None
) -> tuple[Array, Array]:
    """The rule on whole chunks of (q, k, v, g, beta), with `run` counting the segment starts."""
    return _forward(scale, chunk, arguments, initial, run)[:2]


def _rule_forward(
    scale: float, chunk: int, arguments: tuple[Array, ...], initial: Array, run: Array | None
) -> tuple[tuple[Array, Array], tuple]:
    output, final, saved = _forward(scale, chunk, arguments, initial, run)
    output, states, inverse = (checkpoint_name(x, name) for x, name in zip((output, *saved), SAVED_NAMES, strict=True))
    return (output, final), (arguments, run, (states, inverse))


def _rule_backward(
    scale: float, chunk: int, residuals: tuple, cotangents: tuple[Array, Array]
) -> tuple[tuple[Array, ...], Array, None]:
    arguments, run, saved = residuals
    gradients, d_initial = backward(scale, chunk, arguments, run, saved, *cotangents)
    return tuple(gradients), d_initial, None


_rule.defvjp(_rule_forward, _rule_backward)
