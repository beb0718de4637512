"""Do two models predict the same text alike? Loss gap, KL, top-1 agreement and cosine, in one pass, with intervals.

- Logits are never whole: of a piece of each row at a time both models' are computed from the state before the
  unembedding, and seven numbers a token are kept, of which the host keeps sums by unit. What is held does not grow with
  the number of batches, and no vocabulary is held over a sequence.
- Both models stay on the mesh meanwhile, in the dtype they are stored in. For a source of 3 billion parameters and a
  child of 8 in float32 that is 12 + 32 = 44 GB, 1.4 GB on each of the 32 chips of a v5p-64 (95 GB each). To keep the
  source's logits instead and load the child after it would take 4,096 x 128,256 x 2 bytes = 1 GB a row even in 16 bits,
  on a disk or in host memory, for what is 28 bytes a token here.
- gap = sum of the target's losses / sum of the source's - 1; intervals are over the units of `held_out_rows`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules, global_batch
from gt_jax.evaluation.confidence_intervals import Interval, ratio_interval
from gt_jax.evaluation.held_out_rows import HeldOutRows
from gt_jax.evaluation.intermediates import hidden_rows
from gt_jax.evaluation.pieces import in_pieces
from gt_jax.evaluation.proportions import proportion_interval
from gt_jax.models.language_model import LanguageModel, free_passes
from gt_jax.training.step import Batch, shard_batch
from gt_jax.typing import Activations, PerToken, Tree

GOOD, USABLE, COSINE = 0.03, 0.10, 0.995

Say = Callable[[str], None]


class Agreement(NamedTuple):
    """By token, 0 where there is no target: nats where they are losses; no fixed loss where nothing was fixed."""

    source_loss: PerToken
    source_fixed_loss: PerToken | None
    target_loss: PerToken
    kl: PerToken
    same_top1: PerToken
    cosine: PerToken
    tokens: PerToken


def agreement(
    source: Float[Array, "b t v"], fixed: Float[Array, "b t v"] | None, target: Float[Array, "b t v"],
    targets: Int[Array, "b t"],
) -> Agreement:  # fmt: skip
    """Losses, KL(source || target), equality of the most likely token and cosine of centred logits, of each token."""
    counted = (targets >= 0).astype(jnp.float32)

    def loss(logits: Array) -> Array:
        # a one-hot sum, not a gather: it keeps a vocabulary axis sharded
        hit = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None] == targets[..., None]
        return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)

    same = (jnp.argmax(source, axis=-1) == jnp.argmax(target, axis=-1)).astype(jnp.float32)
    a = source - jnp.mean(source, axis=-1, keepdims=True)
    b = target - jnp.mean(target, axis=-1, keepdims=True)
    norms = jnp.sqrt(jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1))
    cosine = jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-30)
    forced = None if fixed is None else counted * loss(fixed)
    return Agreement(counted * loss(source), forced, counted * loss(target), counted * relative_entropy(source, target),
                     counted * same, counted * cosine, counted)  # fmt: skip


def relative_entropy(p: Float[Array, "*c s"], q: Float[Array, "*c s"]) -> Float[Array, "*c"]:
    """KL(softmax p || softmax q) over the last axis, nats."""
    log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


class Predictor(NamedTuple):
    """A model and the states [b, t, d] before its final norm, of which logits are made piece by piece."""

    network: LanguageModel
    variables: Tree
    hidden: Activations

    def logits(self, hidden: Activations) -> Float[Array, "b t v"]:
        """Of states of any length."""
        found: Any = self.network.apply(self.variables, hidden, method=LanguageModel.unembed)
        return found.astype(jnp.float32)


def agreement_in_pieces(
    source: Predictor, fixed: Activations | None, target: Predictor, targets: Int[Array, "b t"], rules: Rules,
) -> Agreement:  # fmt: skip
    """`agreement` of both models' logits, those of one piece of the rows at a time; `fixed` are the source's states."""

    def one(before: Array, forced: Any, after: Array, wanted: Array) -> Agreement:
        logits = None if forced is None else source.logits(forced)
        return agreement(source.logits(before), logits, target.logits(after), wanted)

    arrays, fillings = (source.hidden, fixed, target.hidden, targets), (0, 0, 0, -1)
    return cast(Agreement, in_pieces(one, arrays, fillings, source.network.config, rules))


def sums_by_unit(found: Agreement, units: Int[np.ndarray, "b t"], count: int) -> Float64[np.ndarray, "fields units"]:
    """The sums of each field over the tokens of each of `count` units; NaN for what is None."""
    flat = units.ravel()
    return np.stack([
        np.full(count, np.nan) if one is None
        else np.bincount(flat, np.asarray(one, np.float64).ravel(), minlength=count) for one in found
    ])  # fmt: skip


def summary(sums: Float64[np.ndarray, "fields units"], kind: str, confidence: float = 0.95) -> dict[str, Any]:
    """Means over tokens and their intervals, gap and verdicts, of `sums_by_unit`; JSON values."""
    there = sums[Agreement._fields.index("tokens")] > 0
    by = dict(zip(Agreement._fields, sums[:, there], strict=True))
    tokens = by["tokens"]
    total = float(tokens.sum())
    mean = {name: None if np.isnan(one).any() and name == "source_fixed_loss" else float(one.sum()) / max(total, 1.0)
            for name, one in by.items()}  # fmt: skip
    nothing = Interval(float("nan"), None, None)
    gap = ratio_interval(by["target_loss"] - by["source_loss"], by["source_loss"], confidence) if (
        by["source_loss"].sum() > 0) else nothing  # fmt: skip
    between = {"gap": gap}
    for name, interval in (("kl", ratio_interval), ("same_top1", proportion_interval), ("cosine", ratio_interval)):
        between[name] = interval(by[name], tokens, confidence) if total else nothing
    return {
        **mean, "tokens": int(total), "gap": gap.value, "verdict": verdict(gap, kind),
        "cosine_verdict": said(between["cosine"], (COSINE,), ("below", "good"), kind),
        "intervals": {name: one.to_json() for name, one in between.items()},
        "confidence": confidence, "units": {"kind": kind, "count": len(tokens)},
    }  # fmt: skip


def verdict(gap: Interval, kind: str) -> str:
    """What the limits of the gap leave open: "good", "good or usable", …, or why they say nothing."""
    return said(gap, (GOOD, USABLE), ("good", "usable", "poor"), kind)


def said(figure: Interval, cuts: Sequence[float], words: Sequence[str], kind: str) -> str:
    """The words of the classes between the ascending `cuts` that the limits reach, or why there are no limits."""
    reached = figure.between(cuts)
    return figure.without_limits(kind) if reached is None else " or ".join(words[reached[0]:reached[1] + 1])


@functools.lru_cache(maxsize=8)
def make_predictions(
    source: ModelConfig, target: ModelConfig, rules: Rules
) -> Callable[[Tree, Tree, Batch], Agreement]:
    """The jitted agreement(source variables, target variables, batch), both running as many passes as they like."""
    shallow, deep = LanguageModel(source, rules), LanguageModel(target, rules)

    def predictions(source_variables: Tree, target_variables: Tree, batch: Batch) -> Agreement:
        batch = shard_batch(batch, rules)
        rows = batch["tokens"], batch["segment_ids"]
        sides = [Predictor(network, variables, hidden_rows(network, variables, *rows, free_passes())[0])
                 for network, variables in ((shallow, source_variables), (deep, target_variables))]  # fmt: skip
        return agreement_in_pieces(sides[0], None, sides[1], batch["targets"], rules)

    return jax.jit(predictions)


def compare_predictions(
    source: tuple[ModelConfig, Tree], target: tuple[ModelConfig, Tree], rows: HeldOutRows, rules: Rules | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Loss gap, KL, top-1 agreement and cosine of two models in memory on held-out rows, as JSON values.

    Keys: source_loss, target_loss, kl (nats a token), same_top1, cosine, gap, verdict, tokens, and `intervals` of gap,
    kl, same_top1 and cosine over `units`. One pass over the rows.
    """
    rules = rules or Rules()
    predictions = make_predictions(source[0], target[0], rules)
    sums, count = None, 1 + max(int(one.max()) for one in rows.units)
    for number, (batch, units) in enumerate(zip(rows.batches, rows.units, strict=True), 1):
        say(f"batch {number}/{len(rows.batches)}")
        found = jax.device_get(predictions(source[1], target[1], global_batch(dict(batch), rules)))
        more = sums_by_unit(found, units, count)
        sums = more if sums is None else sums + more
    assert sums is not None
    return summary(sums, rows.kind)
