"""Which keys a query attends to: scores of the indexer, the adaptive budget, the exact threshold, ties by index.

The threshold of the k-th largest score is found by bisection on the bits of the score, which order like the scores
because these are positive floats: thirty counting passes, no sort, no index list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.positions import accumulator

Variance = Literal["visible", "row"]
KEY_BITS = 30  # scores lie in [0, 1], so their float32 bits are at most 0x3F800000 < 2^30
SINK_KEY = (1 << KEY_BITS) - 1


def indexer_scores(
    query: Float[Array, "b t n i"],
    key: Float[Array, "b s n i"],
    weight: Float[Array, "b t n"],
    bias: Float[Array, " n"],
    scale: float | None = None,
) -> Float[Array, "b n t s"]:
    """w_t * sigmoid(qI_t . kI_s * scale + bias) per indexer head, float32, in [0, 1] for w in [0, 1].

    `scale` None is width^-0.5.
    """
    wide = accumulator(query)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # what is selected must not hang on how a device rounds the factors of a float32 product by default
    precision = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("btni,bsni->bnts", query, key, precision=precision, preferred_element_type=wide) * scale
    gate = jnp.moveaxis(weight.astype(wide), 2, 1)[..., None]
    return gate * jax.nn.sigmoid(logits + bias.astype(wide)[None, :, None, None])


def visible_variance(scores: Float[Array, "b n t s"], visible: Bool[Array, "b t s"]) -> Float[Array, "b n t"]:
    """Population variance of the scores over the visible keys only, so that a prefix gives the same answer."""
    count = entries(visible)
    return variance_of(lambda f: _visible_sum(f(scores), visible), count, jnp.maximum(count, 1))


def row_variance(
    scores: Float[Array, "b n t s"], visible: Bool[Array, "b t s"], length: Int[Array, " b"]
) -> Float[Array, "b n t"]:
    """Population variance over all `length` entries of the row, those that are not visible counted as 0.

    It shrinks as the row grows, so a prefix, or a document apart from its row, does not give the same answer.
    """
    return variance_of(lambda f: _visible_sum(f(scores), visible), entries(visible), length[:, None])


def _visible_sum(x: Float[Array, "b n t s"], visible: Bool[Array, "b t s"]) -> Float[Array, "b n t"]:
    return jnp.sum(jnp.where(visible[:, None], x, 0.0), axis=-1)


def variance_of(
    total: Callable[[Callable[[Array], Array]], Array], count: Int[Array, "b t"], size: Int[Array, " b #t"]
) -> Float[Array, "b n t"]:
    """Population variance over `size` entries, all but `count` of which are 0; `total(f)` sums f(score) over those."""
    of_all, zeros = (x.astype(jnp.float32)[:, None] for x in (size, size - count))
    mean = total(lambda x: x) / of_all
    return (total(lambda x: jnp.square(x - mean[..., None])) + zeros * jnp.square(mean)) / of_all


def budget(
    variance: Float[Array, "b h t"],
    variance_ema: Float[Array, ""],
    visible_count: Int[Array, "b t"],
    *,
    k_base: int,
    k_min: int,
    k_max: int,
) -> Int[Array, "b h t"]:
    """k_t = clip(floor(k_base Var_t / EMA), k_min, k_max), never more than the visible keys (arXiv 2601.15305).

    An EMA of 0 has not seen a training step yet: then the ratio is 1. k_base may lie outside k_min … k_max.
    """
    ratio = jnp.where(variance_ema > 0, variance / jnp.maximum(variance_ema, 1e-30), 1.0)
    wanted = jnp.floor(jnp.clip(k_base * ratio, k_min, k_max)).astype(jnp.int32)
    return jnp.minimum(wanted, visible_count[:, None])


def select(
    scores: Float[Array, "b n t s"],
    visible: Bool[Array, "b t s"],
    sink: Bool[Array, "b t s"],
    count: Int[Array, "b h t"],
) -> Bool[Array, "b h t s"]:
    """The `count` best visible keys of each query: sinks first, then by score, ties to the smaller index.

    Heads h read the scores of indexer head h // (h/n). The selection has no gradient. Where every query may have all
    that it sees, as in short documents, nothing is compared.
    """
    b, n, t, s = scores.shape
    scores = jax.lax.stop_gradient(scores)

    def best() -> Array:
        keys = ordered(scores, visible, sink)
        index = jnp.arange(s, dtype=jnp.int32)[None, None, None, None]
        counts = count.reshape(b, n, -1, t)
        threshold, end = thresholds(lambda holds: entries(holds(keys[:, :, None], index)), counts, s)
        return chosen(keys, threshold.reshape(count.shape), end.reshape(count.shape))

    everything = jnp.all(count >= entries(visible)[:, None])
    return jax.lax.cond(everything, lambda: all_visible(visible, count.shape[1]), best)


def all_visible(visible: Bool[Array, "b t s"], heads: int) -> Bool[Array, "b h t s"]:
    """`select` where the budget of every query is at least what it sees."""
    return jnp.repeat(visible[:, None], heads, axis=1)


def ordered(
    scores: Float[Array, "b n t s"], visible: Bool[Array, "b t s"], sink: Bool[Array, "b t s"]
) -> Int[Array, "b n t s"]:
    """Integers that order like the selection: 0 where not visible, then by score, sinks the largest."""
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32) + 1
    return jnp.where(visible[:, None], jnp.where(sink[:, None], SINK_KEY, bits), 0)


def thresholds(
    counted: Callable[[Callable[[Array, Array], Array]], Array], count: Int[Array, "b n r t"], length: int,
    digit: int = 1,
) -> tuple[Int[Array, "b n r t"], Int[Array, "b n r t"]]:  # fmt: skip
    """(threshold, end): the `count` largest keys are those above the threshold, and those equal to it before `end`.

    `counted(holds)` is the number of keys of each row with `holds(key, index)`, by which these are seen; their indices
    are below `length`. `digit` bits are found at once.
    """
    enough = lambda c: counted(lambda key, _: key >= c[..., None]) >= count  # noqa: E731
    threshold = largest(KEY_BITS, count.shape, enough, digit)
    missing = count - counted(lambda key, _: key > threshold[..., None])
    tied = counted(lambda key, _: key == threshold[..., None])

    def before(c: Array) -> Array:
        return counted(lambda key, index: (key == threshold[..., None]) & (index < c[..., None])) <= missing

    end = jax.lax.cond(  # ties beyond the budget are rare, and a third of the work
        jnp.all(tied == missing),
        lambda: jnp.full(count.shape, length, jnp.int32),
        lambda: largest(length.bit_length(), count.shape, before, digit),
    )
    return threshold, end


def chosen(
    keys: Int[Array, "b n t s"], threshold: Int[Array, "b h t"], end: Int[Array, "b h t"], first: Array | int = 0
) -> Bool[Array, "b h t s"]:
    """Which keys are selected; `first` is the index of the first of them in the row that `thresholds` saw."""
    b, n, t, s = keys.shape
    keys, threshold, end = keys[:, :, None], threshold.reshape(b, n, -1, t, 1), end.reshape(b, n, -1, t, 1)
    index = first + jnp.arange(s, dtype=jnp.int32)[None, None, None, None]
    kept = (keys > threshold) | ((keys == threshold) & (index < end))
    return (kept & (keys > 0)).reshape(b, -1, t, s)


def entries(mask: Bool[Array, "*rest s"]) -> Int[Array, "*rest"]:
    """How many are true, along the last axis."""
    return jnp.sum(mask, axis=-1, dtype=jnp.int32)


def largest(
    bits: int, shape: tuple[int, ...], holds: Callable[[Array], Array], digit: int = 1
) -> Int[Array, "..."]:
    """The largest c below 2^bits at which `holds(c)`, a predicate true up to some c; `digit` bits at a time.

    With one bit that is bisection. With more, 2^digit - 1 candidates are tried at once, which a GPU counts in one
    kernel; `bits` are then rounded up to whole digits.
    """
    rounds = -(-bits // digit)

    def body(i: Array | int, found: Array) -> Array:
        shift = digit * (rounds - 1 - i)
        if digit == 1:
            candidate = found | (1 << shift)
            return jnp.where(holds(candidate), candidate, found)
        taken = [holds(found | (jnp.int32(one) << shift)) for one in range(1, 1 << digit)]
        return found | (sum(one.astype(jnp.int32) for one in taken) << shift)

    return jax.lax.fori_loop(0, rounds, body, jnp.zeros(shape, jnp.int32))
