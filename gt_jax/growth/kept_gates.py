"""A plan whose copies keep their halting gates, so that each token has its own weight in each of them.

    feed-forward copy:  c_j = alpha_j * mean(s_j)         copy that keeps its gate:  c_j = alpha_j, times s_j(token)

The weight s_j follows from the gates of the copies 1 to j - 1 (gt_jax.models.layers.gated_copies), so a plan must hold
all passes that a layer uses, from the first on and in order. Where it holds them in the recurrence's own order, as a
layer plan does, and no token is alive after the last of them, the child is the source to float32 rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gt_jax.configs.model import GatedCopiesConfig, ModelConfig
from gt_jax.growth.plan_entries import GATES, Entry, Plan


def keeping_gates(plan: Plan, alpha: Sequence[float]) -> Plan:
    """The same layers at strength alpha_j, and 0 for a pass that the source cannot run."""
    strength = [0.0, *alpha, *[0.0] * len(plan.entries)]  # by copy from 0, the identity
    entries = tuple(Entry(one.source, one.copy, strength[one.copy]) for one in plan.entries)
    demands = tuple(one._replace(mass=math.fsum(alpha[: one.k_exec])) for one in plan.demands)
    options = {**plan.options, "coefficient": GATES, "correct": None, "alpha": list(alpha)}
    return dataclasses.replace(plan, entries=entries, demands=demands, options=options)


def cannot_keep_gates(source: ModelConfig, plan: Plan) -> list[str]:
    """Why no child by this plan can keep the gates of `source`: all that is in the way, in words."""
    if source.adaptive is None:
        return ["--keep-gates: the source is not adaptive, it has no gates"]
    wrong, gate = list[str](), source.adaptive
    if source.stack.kind == "lambda":
        wrong.append("--keep-gates: the source's stack is 'lambda'; copies that keep gates need 'residual'")
    if gate.halting != "token":
        wrong.append(f"--keep-gates: adaptive.halting is {gate.halting!r}, where weights depend on the batch; 'token' "
                     "is needed")
    if gate.context != "all":
        wrong.append(f"--keep-gates: adaptive.context is {gate.context!r}, where finished tokens are absent from later "
                     "passes; in a layer of its own all tokens are there, so 'all' is needed")
    return wrong + wrong_order(plan, gate.max_passes)


def wrong_order(plan: Plan, most: int) -> list[str]:
    """The passes that the plan lacks, has at the wrong place, or has though no source of `most` passes runs them."""
    wrong, done = [], Counter[int]()
    for target, entry in enumerate(plan.entries):
        if entry.copy == 0:
            wrong.append(f"--keep-gates: target layer {target} is the identity, which is no pass of a layer")
        elif entry.copy != done[entry.source] + 1:
            wrong.append(f"--keep-gates: target layer {target} is pass {entry.copy} of source layer {entry.source}, "
                         f"where pass {done[entry.source] + 1} would be in order")
        elif entry.copy > most:
            wrong.append(f"--keep-gates: target layer {target} is pass {entry.copy} of source layer {entry.source}; "
                         f"the source runs at most {most}")
        done[entry.source] = max(entry.copy, done[entry.source])
    for layer, demand in enumerate(plan.demands):
        if done[layer] < min(demand.k_exec, most):
            wrong.append(f"--keep-gates: source layer {layer} uses {demand.k_exec} passes, the plan holds "
                         f"{done[layer]} of them")
    better = "--plan layer, --from k_exec and --round up" if plan.kind == "layer" else "--plan layer"
    return [*wrong, f"{better}: that is every pass in order"] if wrong else []


def flags_without_gates(given: Mapping[str, Any]) -> list[str]:
    """Those of the command's options, by name, that --keep-gates has no use for."""
    wrong = [f"--{name} has no meaning with --keep-gates: a token's own weight takes the mean's place"
             for name in ("coefficient", "correct", "recipe") if given[name] is not None]
    if given["carry"] not in (None, "gain"):
        wrong.append(f"--carry {given['carry']} has no meaning with --keep-gates, whose strengths are gains")
    if given["plan"] == "identity":
        wrong.append("--plan identity runs every layer once, there is nothing to gate; take --plan layer")
    return wrong


def gates_of(source: ModelConfig, plan: Plan) -> GatedCopiesConfig | None:
    """What the child's config says of its gates; None for a plan that keeps none."""
    if not plan.keeps_gates or source.adaptive is None:
        return None
    return GatedCopiesConfig(tuple((entry.source, entry.copy) for entry in plan.entries), source.adaptive)
