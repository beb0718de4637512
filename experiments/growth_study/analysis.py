"""What the step-0 gaps of block and dealt plan, with expected gains, are made of: computed, on the same batches.

One program runs every layer of the source K times in the recurrence's own order, at strengths that are data. So:

    spread    all K passes at the mean weight alpha_k * survival_k, against the source's own weights token by token
    tail      the passes alone that the plan grants a copy
    order     the same passes in the order of the plan instead of the recurrence's: the grown model itself

The parts add up to a gap; each is what its step costs after those before it. As a check of the whole chain, the same
program at strengths alpha_k for k <= k_exec must give the source's loss with its passes fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.growth_study.engine import Engine
from experiments.growth_study.study import Batch, StudyConfig
from gt_jax.configs.layout import Layout, Segment
from gt_jax.errors import Failed
from gt_jax.growth.plan_entries import Demand, Entry, Plan
from gt_jax.growth.repetition import Repetition
from gt_jax.growth.transform import grow, target_config
from gt_jax.typing import Tree

CHECK = 1e-3  # nats a byte: far above float32 rounding through all passes, far below the differences in the tables


def unrolled(study: StudyConfig, measured: Repetition, strength: Callable[[int, int], float]) -> Plan:
    """Every layer K times in a row; copy k of layer l at strength(l, k)."""
    layout, passes = study.source.depth, len(measured.alpha)
    entries = tuple(Entry(layer, k, strength(layer, k)) for layer in range(len(layout)) for k in range(1, passes + 1))
    target: list[Segment] = []
    for kind in layout.types:
        if target and target[-1].pattern == kind:
            target[-1] = Segment(kind, target[-1].repeats + passes)
        else:
            target.append(Segment(kind, passes))
    demands = tuple(Demand(k_exec, float(k_exec), sum(strength(layer, k) for k in range(1, passes + 1)))
                    for layer, k_exec in enumerate(measured.k_exec))
    return Plan("layer", layout, Layout(tuple(target)), entries, demands)


def analyse(
    engine: Engine, study: StudyConfig, source: Tree, measured: Repetition, batches: Sequence[Batch],
    losses: Mapping[str, float], grown: Mapping[str, tuple[Plan, float]],
) -> dict[str, Any]:  # fmt: skip
    """The parts in % of the source's loss, from `losses` of the source ("adaptive", "fixed") and of `grown` models.

    "models" holds tail, order and total of each of `grown` (plan, loss); "check" is the difference of the unrolled
    program from the source with passes fixed, in nats a byte.
    """

    def loss(strength: Callable[[int, int], float]) -> float:
        plan = unrolled(study, measured, strength)
        config = target_config(study.source, plan)
        return engine.losses(config, grow(source, plan, study.source, carry="gain"), batches).mean

    def expected(layer: int, k: int) -> float:
        return measured.alpha[k - 1] * measured.layers[layer].survival[k - 1]

    base, k_exec = losses["adaptive"], measured.k_exec
    everything = loss(expected)
    executed = loss(lambda layer, k: expected(layer, k) if k <= k_exec[layer] else 0.0)
    fixed = loss(lambda layer, k: measured.alpha[k - 1] if k <= k_exec[layer] else 0.0)

    def percent(after: float, before: float) -> float:
        return 100 * (after - before) / base

    if abs(fixed - losses["fixed"]) > CHECK:
        raise Failed(f"the unrolled source has the loss {fixed}, the source with its passes fixed {losses['fixed']}: "
                     "growth and evaluation do not agree, no figure of this study means anything")  # fmt: skip
    models = {}
    for name, (plan, reached) in grown.items():
        granted = {(entry.source, entry.copy): entry.coefficient for entry in plan.entries}
        cut = loss(lambda layer, k, granted=granted: granted.get((layer, k), 0.0))  # type: ignore[misc]
        models[name] = {"tail": percent(cut, everything), "order": percent(reached, cut),
                        "total": percent(reached, base)}  # fmt: skip
    return {
        "spread": percent(everything, base),
        "tail_beyond_k_exec": percent(executed, everything),
        "passes_fixed": percent(losses["fixed"], base),
        "check": abs(fixed - losses["fixed"]),
        "models": models,
    }
