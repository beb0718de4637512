"""The options that steer adaptive depth, and what they make of a run's config: gates, price, forced passes."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from gt_jax.errors import Refused, refuse_all
from gt_jax.options import whole


def add_gate_flags(p: Any) -> None:
    """What halting heads see, and how their word counts."""
    p.add_argument("--gates", choices=("features", "state"), help="what the halting heads see: features of the "
                   "pass, or the token's state and the number of the pass too (default: as the preset has it)")
    p.add_argument("--weights", choices=("soft", "hard"), help="how much of a pass a token gets: as much as its gates "
                   "leave it, until that is below 0.1, or all of it, until that is below 0.5 (default: as the preset "
                   "has it)")  # fmt: skip


def add_price_flags(p: Any) -> None:
    """What a pass costs, and how many are forced at first."""
    from gt_jax.configs.price import Rule, TargetOf

    p.add_argument("--target", type=float, help="depth of a layer that the compute price aims at (1.30)")
    p.add_argument("--target-of", choices=get_args(TargetOf),
                   help="what that is the mean of: a token's summed weights (mean_weight, default), or the passes "
                   "that it runs")
    p.add_argument("--price-rule", choices=get_args(Rule),
                   help="what steers the depth: a price that only ever rises above 0 (ouro, default), or one of "
                   "both signs that brings the depth to the target and holds it (budget)")
    p.add_argument("--pass-price", type=float, metavar="NATS",
                   help="instead of a target: what one more pass of a token in a layer costs (--price-rule budget)")
    p.add_argument("--halting-scale", type=float, metavar="X", help="how fast halting heads learn, times the rate "
                   "of other weights (1; 10 under --price-rule budget)")
    p.add_argument("--forced-passes", type=whole, metavar="N", help="passes that every token runs at first, before "
                   "its gates decide (2; under --price-rule budget none); given with --curriculum their number rises "
                   "from 1, as the difficulty does; 0 draws their number for each step anew, from 1 to all there are")
    p.add_argument("--forced-until", type=float, metavar="F", help="until this fraction of the run")


def with_gates(model: Any, sees: str | None, weights: str | None) -> Any:
    """`model` (a ModelConfig) whose halting heads see what --gates says, and whose passes count by --weights."""
    given = {"gates": sees, "weights": weights}
    if model.adaptive is None:
        refuse_all([f"--{name} {value}: the model has no adaptive depth, so there are no gates"
                    for name, value in given.items() if value is not None], "the model's gates cannot be set so:")
        return model
    adaptive = model.adaptive
    if sees is not None:
        adaptive = adaptive.seeing_state if sees == "state" else adaptive.seeing_features
    if weights is not None and weights != adaptive.weights:
        adaptive = adaptive.hard if weights == "hard" else adaptive.soft
    return model.replace(adaptive=adaptive)


def hardened(before: Any, after: Any, arguments: argparse.Namespace) -> str | None:
    """What to know of a start whose soft weights become hard, with no passes forced; else None."""
    if not arguments.start or before.adaptive is None or after.adaptive is None:
        return None
    if (before.adaptive.weights, after.adaptive.weights) != ("soft", "hard") or arguments.forced_passes:
        return None
    return ("note: --weights hard gives a token its second pass where the gates of --start leave it half or more; "
            "where they leave less, layers run once. --forced-passes 4 --forced-until 0.3 begins with all passes")


def depth_misfits(adaptive: Any, arguments: argparse.Namespace) -> list[str]:
    """What the flags that steer depth ask for and a model of this AdaptiveConfig, or of none, cannot do."""
    flags = ("target", "target_of", "price_rule", "pass_price", "halting_scale", "forced_passes", "forced_until")
    given = {name: value for name in flags if (value := getattr(arguments, name)) is not None}
    if adaptive is None:
        return [f"--{name.replace('_', '-')} {value}: the model has no adaptive depth, every layer runs once; leave it "
                "out" for name, value in given.items()]  # fmt: skip
    return [f"--{name.replace('_', '-')} is {given[name]}; a layer runs {adaptive.max_passes} times at most"
            for name in ("target", "forced_passes") if given.get(name, 0) > adaptive.max_passes]


def with_price(price: Any, optimizer: Any, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(PriceConfig, OptimizerConfig) with --price-rule, --target, --target-of and --pass-price."""
    from gt_jax.configs.price import budget, fits_rule

    target, cost, rule = arguments.target, arguments.pass_price, arguments.price_rule or price.rule
    if price.gates_opened and rule != price.rule:
        raise Refused(f"--price-rule {rule}: what the model starts from opens its gates by a schedule of rule "
                      f"{price.rule!r}; make it again with gt_jax.retrofit --price-rule {rule}")
    wrong = fits_rule(rule, target, cost)
    none = cost is not None or (price.target is None and rule == price.rule)
    if arguments.target_of is not None and target is None and none:
        wrong.append(f"target-of {arguments.target_of} says what a target is the mean of; a pass price has none")
    refuse_all(wrong, "the price cannot be set so:")
    kept = {} if price.target is None else {"target": price.target, "target_of": price.target_of}
    aim = {} if target is None else {"target": target}
    aim |= {} if arguments.target_of is None else {"target_of": arguments.target_of}
    aim = {"target": None, "value": cost} if cost is not None else aim
    if rule == price.rule:
        return price.replace(**aim), optimizer
    if rule == "budget":  # its heads learn ten times as fast as other scalars
        return budget(**{"target": None, **kept, **aim}), optimizer.replace(halting_scale=10.0)
    return type(price)(**kept | aim), optimizer.replace(halting_scale=1.0)


def with_forced_passes(price: Any, passes: int | None, until: float | None, curriculum: float | None) -> Any:
    """`price` (a PriceConfig) with --forced-passes and --forced-until; gates and price are free from there on."""
    fields: dict[str, Any] = {} if passes is None else {"forced_passes": passes}
    if until is not None and not 0 <= until <= 1:
        raise Refused(f"--forced-until is {until}; it is a fraction of the run, from 0 to 1, for example 0.7")
    if until is not None:
        fields |= {"forced_until": until, "price_from": max(until, price.price_from if price.rule == "ouro" else 0.0)}
        fields["clipped_until"] = max(fields["price_from"], price.clipped_until if price.rule == "ouro" else 0.0)
        fields["forced_ramp"] = min(until, price.forced_ramp)
    if passes is None:
        if until and not price.forced_passes and not price.forced_until:
            raise Refused(f"--forced-until {until}: rule {price.rule!r} forces no passes unless it is told how many; "
                          "say so, for example --forced-passes 4")
        return price.replace(**fields)
    end = fields.get("forced_until", price.forced_until)
    if not end:
        raise Refused(f"--forced-passes {passes}: the gates of rule {price.rule!r} are free from the first step on; "
                      "say until when passes are forced, for example --forced-until 0.7")
    if curriculum is not None and passes and curriculum > end:
        raise Refused(f"--curriculum {curriculum}: the difficulty rises for longer than passes are forced, which is "
                      f"until {end}; give --forced-until {curriculum} or more")
    ramp = min(end, price.forced_ramp) if curriculum is None else curriculum
    return price.replace(**{**fields, "forced_ramp": ramp if passes else 0.0})
