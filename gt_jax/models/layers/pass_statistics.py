"""What the passes of a layer say of themselves, by pass: means over tokens, and how those of pieces become one."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gt_jax.configs.model import AdaptiveConfig
from gt_jax.models.layers.mixer import masked_mean
from gt_jax.typing import PerToken


class PassStatistics(NamedTuple):
    """Per pass [p], float32, means over tokens: what `measure` and the training metrics read.

    `survival` is the mean weight w_k, `alive` the share of tokens with s_k >= threshold, `ran` of those that the pass
    moves (these; under halting "batch" all, where it runs for the batch), `cost` the mean of `smooth_count` for passes
    after the first and `cost_slope` its slope in a number added to the logits of all gates of the layer, `computed` 1
    where the pass was computed for the batch, else 0, `s_after` the mean s after the pass (under soft weights finished
    tokens keep theirs), `p_mean`, `p_std` and `p_floored` (share at the floor) are of the continue gate over alive
    tokens, `delta_ratio` is |dh|/|h|, at most 10 for a token, and `update_ratio` that times |gain| alpha_k w_k, the
    size of what the pass adds, over alive tokens ("batch": over all, a pass moves them all); `weight_moments` [p, 4]
    are the means of w^2, (w d)^2, w d^2 and d^2, d the size, cut alike, of what the pass would add at weight 1 (0 for
    tokens that it is not shown, under `context` "alive"); the rest comes from mixer and MLP; `experts` [p, e] is the
    share of the real picks that went to each expert, e = 0 for a dense MLP.

    A layer's `mean_weight`, `passes_run` and `passes_computed` are the sums of `survival`, `ran` and `computed` over
    passes.
    """

    survival: Array
    alive: Array
    ran: Array
    cost: Array
    cost_slope: Array
    computed: Array
    s_after: Array
    p_mean: Array
    p_std: Array
    p_floored: Array
    delta_ratio: Array
    update_ratio: Array
    weight_moments: Array
    auxiliary_loss: Array
    entropy: Array
    score_variance: Array
    router_loss: Array
    router_entropy: Array
    null_rate: Array
    experts: Array


def mean_over_tokens(
    statistics: PassStatistics, tokens: Float[Array, " pieces"], adaptive: AdaptiveConfig | None, leaving: bool = False
) -> PassStatistics:  # fmt: skip
    """Statistics [l, p] of a text from those of its pieces [pieces, l, p]: what is a mean over tokens stays one.

        whole = sum_i n_i x_i / sum_i n_i,    n_i the `tokens` of piece i that x_i is a mean over

    Those are the real ones; for the gates those alive; for what mixer and MLP show, those that the pass was computed
    for, which are those alive where tokens leave the stack (`leaving`); for `experts` the picks of these that are real.
    `p_std` is of all tokens together, not a mean of deviations.
    `computed` is a mean over pieces: each is a batch by itself, for which a pass runs or does not.
    """
    if (count := statistics.alive.shape[0]) == 1:
        return jax.tree.map(lambda a: a[0], statistics)
    moves_all = adaptive is not None and adaptive.halting == "batch"
    alone = leaving or (adaptive is not None and adaptive.context == "alive")
    everyone = jnp.broadcast_to(tokens[:, None, None], statistics.alive.shape)
    alive = everyone * statistics.alive
    shown = alive if alone else jnp.where(statistics.computed > 0, everyone, 0.0)
    of = {name: alive for name in ("p_mean", "p_floored", "delta_ratio", *(() if moves_all else ("update_ratio",)))}
    of |= {name: shown for name in ("entropy", "score_variance", "router_entropy", "null_rate")}
    of |= {"experts": shown * (1 - statistics.null_rate)}

    def mean(values: Array, weights: Array) -> Array:
        shares = token_shares(weights)
        return jnp.sum(shares.reshape(*shares.shape, *[1] * (values.ndim - 3)) * values, axis=0)

    found = {name: mean(values, of.get(name, everyone)) for name, values in statistics._asdict().items()}
    spread = jnp.square(statistics.p_std) + jnp.square(statistics.p_mean - found["p_mean"][None])
    found |= {"p_std": jnp.sqrt(mean(spread, alive)), "computed": jnp.sum(statistics.computed, axis=0) / count}
    return PassStatistics(**found)


def token_shares(tokens: Float[Array, "pieces ..."]) -> Float[Array, "pieces ..."]:
    """What each piece weighs in a mean over tokens: n_i / sum_i n_i, equal shares where there is no token."""
    total = jnp.sum(tokens, axis=0, keepdims=True)
    return jnp.where(total > 0, tokens / jnp.where(total > 0, total, 1.0), 1 / tokens.shape[0])


def weight_moments(weight: PerToken, size: PerToken, real: PerToken) -> Array:
    """Means over real tokens of w^2, (w d)^2, w d^2, d^2: float32 [4]."""
    square = jnp.square(size)
    return jnp.stack([masked_mean(x, real) for x in (weight**2, weight**2 * square, weight * square, square)])


def of_everyone(
    seen: PassStatistics, living: Array, alive: PerToken, real: PerToken, s: PerToken, computed: Array
) -> PassStatistics:
    """Statistics of a pass that was shown its living tokens alone, as those of all real tokens; `s` [b, t] after it.

    In an audit tokens below the threshold live too, and are not among the `alive`.
    """
    share = masked_mean(living.astype(jnp.float32), real)
    means = {name: share * getattr(seen, name) for name in ("survival", "cost", "cost_slope", "weight_moments")}
    shares = dict.fromkeys(("alive", "ran"), masked_mean(alive, real))
    return seen._replace(**means, **shares, computed=computed, s_after=masked_mean(s, real))


def no_statistics(experts: int) -> PassStatistics:
    """The statistics of a pass that did not run: zeros."""
    zeros = {name: jnp.zeros((), jnp.float32) for name in PassStatistics._fields}
    wide = {"experts": jnp.zeros((experts,), jnp.float32), "weight_moments": jnp.zeros((4,), jnp.float32)}
    return PassStatistics(**{**zeros, **wide})
