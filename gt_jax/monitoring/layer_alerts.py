"""What can be sick in a single layer: its update, its gate, its router, its numbers; each layer looked at by itself.

Each function takes records whose values are arrays by layer, and gives what it found by (sickness, place). What is not
finite in one layer says nothing of the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gt_jax.configs.price import PriceConfig
from gt_jax.configs.run import RunConfig

Record = Mapping[str, Any]
Found = dict[tuple[str, str], str]
"""(sickness, place) -> what to say."""

READ = ("delta_ratio", "update_ratio", "mean_weight", "passes_run", "gate_mean", "gate_std", "gate_floored",
        "null_rate", "experts")  # fmt: skip

PATIENCE = 20  # records that must agree: one batch says little, and an audit comes every 20th step
RATIO_HIGH = 5.0  # half of where |dh|/|h| is clipped; the first layer, which makes the stream, is always there
RATIO_LOW = 1e-3  # in bfloat16 a smaller update (2^-9 is half a unit) is mostly rounded away
ONE_PASS = 1.02  # passes run: at most 2 % of the tokens run a second pass, the share that `measure` ignores
PRICE_AT_TOP = 0.99  # of the highest price; there one pass is what the price asks for
ALL_PASSES = 0.98  # of what the cap on p allows
GATE_SHARE = 0.99  # of the alive tokens at the floor
GATE_EDGE = 0.005  # how near its cap the mean of p is, and how narrow its spread: sigmoid' < 0.5 % of its argument
STARVED = 0.1  # of the fair share: the balance loss holds healthy experts within a factor of three
NULL_EDGE = 0.005  # of 0 or of 1; healthy runs begin with null rates of 0.01 to 0.04
REACHED = 0.02  # of the tokens, the share that `measure` ignores
LONGER, LATER = 0.1, 0.05  # of the run: how much more of forced passes is advised, and how long after it the price


def _values(records: Sequence[Record], name: str) -> np.ndarray | None:
    """[records, layers, ...]; None where not all of the records have it."""
    values = [record[name] for record in records if name in record]
    return np.stack(values) if values and len(values) == len(records) else None


def _mean(records: Sequence[Record], name: str) -> np.ndarray | None:
    """[layers, ...], over the records; NaN in a layer where it was not always finite."""
    values = _values(records, name)
    return None if values is None else np.mean(np.where(np.isfinite(values), values, np.nan), axis=0)


def not_finite(record: Record) -> Found:
    """The first layer with a value that is NaN or infinite: those after it read what it wrote."""
    sick = _sick_layers(record)
    if not sick:
        return {}
    first, *others = sick
    after = f"; nor are {', '.join(others)} after it" if others else ""
    return {("a layer is not finite", first):
            f"{first} is not finite: {', '.join(sick[first])}{after}; lower --learning-rate, or look at the weights of "
            "this layer and at the batch"}  # fmt: skip


def _sick_layers(record: Record) -> dict[str, list[str]]:
    """Layer -> what of it is not finite, from the first layer on."""
    sick: dict[int, list[str]] = {}
    for name in READ:
        if name in record:
            values = np.atleast_1d(record[name])
            layers = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
            for layer in layers.tolist():
                sick.setdefault(layer, []).append(name)
    return {f"layer {layer}": sick[layer] for layer in sorted(sick)}


def updates(recent: Sequence[Record]) -> Found:
    """What the first pass of each layer adds to the stream: |dh|/|h| times its gain and strength."""
    own, found = _mean(recent, "delta_ratio"), Found()
    ratios = _mean(recent, "update_ratio")
    ratios = own if ratios is None else ratios  # records of earlier runs do not have it
    for layer, ratio in enumerate(() if ratios is None else ratios):
        place = f"layer {layer}"
        if layer and ratio > RATIO_HIGH:
            found["an update explodes", place] = (
                f"{place} replaces the stream: |dh|/|h| is {ratio:.3g} over {PATIENCE} records, from {RATIO_HIGH:g} on "
                "it is no residual update; lower --learning-rate")  # fmt: skip
        elif ratio < RATIO_LOW:
            gain = f", its gain makes that of {own[layer]:.2g}" if own is not None and own[layer] >= RATIO_LOW else ""
            found["an update vanishes", place] = (
                f"{place} does nothing: |dh|/|h| is {ratio:.2g} over {PATIENCE} records{gain}; below {RATIO_LOW:g} the "
                "compute dtype rounds it away")  # fmt: skip
    return found


def routers(recent: Sequence[Record], config: RunConfig) -> Found:
    """Of each layer the null rate at an end, and experts that get next to nothing."""
    moe = config.model.moe
    if moe is None:
        return {}
    found: Found = {}
    rates, shares = _mean(recent, "null_rate"), _mean(recent, "experts")
    for layer, rate in enumerate(() if rates is None or not moe.null_experts else rates):
        if min(rate, 1 - rate) < NULL_EDGE:
            what = "no pick is null: every token pays for all its experts" if rate < 0.5 else \
                "every pick is null: no token reaches an expert"
            found["a null rate is at its end", f"layer {layer}"] = (
                f"layer {layer}: {what} (null rate {rate:.3f}, wanted {1 - moe.real_share:.2f}); raise moe.null_loss")
    if shares is None:
        return found
    for layer, expert in np.argwhere(shares < STARVED / moe.experts).tolist():
        if shares[layer].sum() < 0.5:
            continue  # nobody is routed here, which is another sickness
        found["an expert starves", f"layer {layer}, expert {expert}"] = (
            f"layer {layer}, expert {expert} starves: it gets {100 * shares[layer, expert]:.2g} % of the picks over "
            f"{PATIENCE} records, its fair share is {100 / moe.experts:.2g} %; raise moe.balance_loss")
    return found


def gates(free: Sequence[Record], config: RunConfig, caps: Sequence[float]) -> Found:
    """The gate of each layer, from records without forced passes; `caps` are the highest p of each.

    A gate at the end of its range is told as that, one that is not finite by `not_finite`; depth is judged in the other
    layers.
    """
    found = _saturated(free, config, caps[-1])
    told = {place for record in free for place in _sick_layers(record)} | {place for _, place in found}
    return found | {key: words for key, words in _depth(free, config, caps).items() if key[1] not in told}


def _saturated(free: Sequence[Record], config: RunConfig, cap: float) -> Found:
    """The continue gate of a layer at the floor for all tokens, or at its top: the cap, or its bounded logit's."""
    adaptive = config.model.adaptive
    if adaptive is not None and adaptive.logit_bound:
        cap = min(cap, 1 / (1 + math.exp(-adaptive.logit_bound)))
    floored, mean, spread = (_mean(free, f"gate_{name}") for name in ("floored", "mean", "std"))
    if floored is None or mean is None or spread is None:
        return {}
    found: Found = {}
    for layer in range(len(mean)):
        key, place = ("a gate saturates", f"layer {layer}"), f"the continue gate of layer {layer}"
        if floored[layer] > GATE_SHARE:
            found[key] = (f"{place} saturates: p is at its floor for {100 * floored[layer]:.0f} % of the tokens over "
                          f"{PATIENCE} records; they run no further pass, so audits alone can raise it")  # fmt: skip
        elif mean[layer] > cap - GATE_EDGE and spread[layer] < GATE_EDGE:
            found[key] = (f"{place} saturates: p is {mean[layer]:.3f} for every token over {PATIENCE} records, its top "
                          f"is {cap:.3g}; it no longer depends on the token")  # fmt: skip
    return found


def _depth(free: Sequence[Record], config: RunConfig, caps: Sequence[float]) -> Found:
    """Layers that run one pass for every token though the price does not ask for it, or all passes at full weight.

    "All passes" is of what the price steers: where that is the weight, passes that weigh little may all be run. Under
    halting "batch" a token runs its batch's passes, which the price does not steer: nothing is said of them.
    Price rule "budget" has neither: there every gate has a gradient, and the price goes where it must.
    """
    adaptive, price = config.model.adaptive, config.train.price
    if price.rule == "budget" or price.target is None:
        return {}
    runs, weights = _values(free, "passes_run"), _values(free, "mean_weight")
    if adaptive is None or runs is None or weights is None:
        return {}
    found: Found = {}
    asked = [float(record.get("price", 0.0)) for record in free]
    most = np.sum(np.asarray(caps)[:, None] ** np.arange(adaptive.max_passes), axis=1, keepdims=True)
    steered = weights if price.target_of == "mean_weight" else runs
    top = most if price.target_of == "mean_weight" else np.full_like(most, adaptive.max_passes)
    shut = (runs < ONE_PASS).all(axis=0) & (price.target > ONE_PASS) & (max(asked) < PRICE_AT_TOP * price.highest)
    level = 1 + ALL_PASSES * (top - 1)
    told = adaptive.max_passes > 1 and not (adaptive.halting == "batch" and price.target_of == "passes_run")
    wide = (steered >= np.maximum(level, price.target)).all(axis=0) & told
    for layer in np.flatnonzero(shut).tolist():
        place = f"layer {layer}"
        found["all tokens halt at once", place] = (
            f"all tokens halt at once in {place}: they run at most {runs[:, layer].max():.3f} passes over {PATIENCE} "
            f"records, and the price {asked[-1]:.2g} does not ask for it (its top is {price.highest:g}); below the "
            f"threshold a gate has no gradient: {_advice(config)}")  # fmt: skip
    for layer in np.flatnonzero(wide).tolist():
        place = f"layer {layer}"
        found["no token halts", place] = (
            f"no token halts in {place}: over {PATIENCE} records it runs at least {runs[:, layer].min():.3f} of "
            f"{adaptive.max_passes} passes, which weigh at least {weights[:, layer].min():.3f} of {most[-1, 0]:.3f}; "
            f"the price is {asked[-1]:.2g}, raise its top (train.price.highest) or its rate")  # fmt: skip
    return found


def _advice(config: RunConfig) -> str:
    """What keeps gates open in the next run."""
    again = "start again from an earlier checkpoint" if config.start else (
        f"start again with a higher adaptive.initial_bias (now {config.model.adaptive.initial_bias:g})"
        if config.model.adaptive else "start again")
    longer = longer_forced(config.train.price)
    fields = ", ".join(f"{name} {value:g}" for name, value in longer.items())
    return again + (f", or with forced passes for longer (train.price: {fields})" if longer else "")


def longer_forced(price: PriceConfig) -> dict[str, float]:
    """Phases with forced passes for longer, all three, since each must end before the next; {} where there is no room.

    `price.replace(**longer_forced(price))` is a config that is accepted.
    """
    forced = round(price.forced_until + LONGER, 4)
    begins = max(price.price_from, round(forced + LATER, 4))
    phases = {"forced_until": forced, "price_from": begins, "clipped_until": max(price.clipped_until, begins)}
    return phases if begins <= 1 else {}


def exits(recent: Sequence[Record]) -> Found:
    """A model whose tokens may leave the stack: the first layer that none of them reaches."""
    shares = _mean(recent, "passes_run")
    if shares is None or not (shares < REACHED).any():
        return {}
    first = int(np.argmax(shares < REACHED))
    return {("a layer is not reached", f"layer {first}"):
            f"layer {first} is not reached: {100 * shares[first]:.2g} % of the tokens stay that long over {PATIENCE} "
            "records, and it learns nothing; lower exit.ponder"}  # fmt: skip
