"""The ways of growing that are compared: what each is, its plan, and its variables.

A name says plan, coefficient and carry; what is not said is the default: noise as the study has it, gains carried.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from experiments.growth_study.flops import calibration_flops
from experiments.growth_study.study import Batch, StudyConfig
from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules
from gt_jax.growth import repetition
from gt_jax.growth.plan import identity_plan, make_plan
from gt_jax.growth.plan_entries import Plan
from gt_jax.growth.transform import grow, target_config
from gt_jax.training.thaw import trainable_mask
from gt_jax.typing import Tree

PlanKind = Literal["block", "dealt", "layer", "split", "re-entry", "stack", "once"]


class Operator(NamedTuple):
    """`coefficient` "plain" is 1 for every copy; `new` says what the added copies are: copies, nothing, or random."""

    name: str
    what: str
    plan: PlanKind = "block"
    coefficient: Literal["expected", "schedule", "plain"] = "expected"
    correct: str = "none"
    carry: str = "gain"
    new: Literal["copies", "identity", "random"] = "copies"
    calibrated: bool = False


ONCE = "every layer once"
README, BLOCK, DEALT = "readme", "block + expected + gain", "dealt + expected + gain"
CALIBRATED = f"{DEALT}, calibrated"
OPERATORS: tuple[Operator, ...] = (
    Operator(README, "blocks, alpha into every weight", coefficient="schedule", carry="weights"),
    Operator("block + schedule + output", "blocks, alpha on the residual outputs", coefficient="schedule",
             carry="output"),
    Operator("block + schedule + gain", "blocks, alpha as gain", coefficient="schedule"),
    Operator(BLOCK, "blocks, alpha x survival as gain"),
    Operator("block + expected + ratio", "the same, times k over the block's mean k", correct="ratio"),
    Operator("block + expected + capped", "the same, times min(ratio, 1)", correct="capped"),
    Operator("block + expected + mass", "the same, each layer's sum as in the recurrence", correct="mass"),
    Operator("layer + expected + gain", "each layer k_exec times in a row: the recurrence's own order", plan="layer"),
    Operator("split + expected + gain", "k_exec copies dealt into groups of the pattern", plan="split"),
    Operator(DEALT, "the slots of the blocks dealt to the strongest passes, in the recurrence's order", plan="dealt"),
    Operator("re-entry map", "1-8,1-4,1-8 with expected gains", plan="re-entry"),
    Operator("stack, plain", "the whole stack three times at strength 1 (G_stack)", plan="stack", coefficient="plain"),
    Operator("block, plain", "blocks, every copy at strength 1", coefficient="plain"),
    Operator("identity copies", "blocks, added copies at strength 0", coefficient="plain", new="identity"),
    Operator("random new layers", "blocks, added layers freshly initialised", coefficient="plain", new="random"),
    Operator(ONCE, "no growth: the source's layers without the recurrence", plan="once"),
    Operator("readme, calibrated", "readme, then gains fitted", coefficient="schedule", carry="weights",
             calibrated=True),
    Operator(f"{BLOCK}, calibrated", "blocks, alpha x survival, then gains fitted", calibrated=True),
    Operator(CALIBRATED, "dealt slots, then gains fitted", plan="dealt", calibrated=True),
)  # fmt: skip


class Grown(NamedTuple):
    """A contender at the moment of growth. `cost` is the FLOPs of calibration, `report` what it says of itself."""

    config: ModelConfig
    variables: Tree
    plan: Plan
    seconds: float
    cost: float
    report: dict[str, Any] | None


def plan_of(operator: Operator, measured: repetition.Repetition, study: StudyConfig) -> Plan:
    """The operator's plan for a measured source.

    Block and dealt plans are rounded to `target_layers`; layer and split plans have the depth that k_exec gives them;
    the stack is repeated three times. Raises `Refused` as `make_plan` does.
    """
    layout = study.source.depth
    once = tuple(range(len(layout)))
    if operator.plan == "once":
        return identity_plan(layout)
    coefficient = "schedule" if operator.coefficient == "plain" else operator.coefficient
    how: dict[str, Any] = {"coefficient": coefficient, "correct": operator.correct}
    if operator.plan in ("block", "dealt"):
        how |= {"round": "balance", "target_layers": study.target_layers}
        plan = make_plan(operator.plan, measured, layout, **how)
    elif operator.plan in ("layer", "split"):
        plan = make_plan(operator.plan, measured, layout, **how)
    else:
        half = once[: len(once) // 2]
        order = once * 3 if operator.plan == "stack" else once + half + once
        plan = make_plan("map", measured, layout, layers=order, **how)
    if operator.coefficient != "plain":
        return plan
    rest = 0.0 if operator.new == "identity" else 1.0
    entries = tuple(dataclasses.replace(entry, coefficient=1.0 if entry.copy == 1 else rest) for entry in plan.entries)
    return dataclasses.replace(plan, entries=entries)


def build(
    operator: Operator, study: StudyConfig, source: Tree, measured: repetition.Repetition, seed: int,
    calibration: Sequence[Batch], passes: Sequence[float], fresh: Callable[[ModelConfig, int], Tree],
) -> Grown:  # fmt: skip
    """Grow in memory; `calibration` batches and the source's `passes` run are used by calibrated operators alone.

    `fresh(config, seed)` draws new variables.
    """
    began = time.monotonic()
    plan = plan_of(operator, measured, study)
    config = target_config(study.source, plan)
    noise = 0.0 if operator.plan == "once" else study.noise_std
    variables = grow(source, plan, study.source, carry=operator.carry, noise_std=noise, seed=seed)
    if operator.new == "random":
        variables = with_random_layers(config, variables, plan, fresh(config, seed))
    if not operator.calibrated:
        return Grown(config, variables, plan, time.monotonic() - began, 0.0, None)
    from gt_jax.growth.calibration import calibrate_gains

    fitted = calibrate_gains(study.source, source, config, variables, plan, calibration, Rules(),
                             iterations=study.calibration_iterations)  # fmt: skip
    seen = len(calibration) * study.tokens_per_step
    taken = fitted.report.get("iterations", study.calibration_iterations)
    cost = calibration_flops(study.source, config, study.sequence_length, passes, seen, taken)
    return Grown(config, fitted.variables, plan, time.monotonic() - began, cost, fitted.report)


def with_random_layers(config: ModelConfig, variables: Tree, plan: Plan, fresh: Tree) -> Tree:
    """The grown variables, the layers that stand for a second or later pass taken from `fresh`."""

    added = [target for target, entry in enumerate(plan.entries) if entry.copy > 1]

    def chosen(mask: np.ndarray, old: jax.Array, new: jax.Array) -> np.ndarray:
        return np.where(mask, np.asarray(new), np.asarray(old))

    return {name: jax.tree.map(chosen, trainable_mask(tree, config.depth, added), tree, fresh[name])
            for name, tree in variables.items()}  # fmt: skip
