"""The ways of growing that the study takes, and their plans."""

from __future__ import annotations

from typing import NamedTuple

from gt_jax.configs.layout import Layout
from gt_jax.growth.plan import identity_plan, make_plan
from gt_jax.growth.plan_entries import Plan
from gt_jax.growth.repetition import Repetition, whole_passes

LAYER, STACK = "layer", "stack"


class Recipe(NamedTuple):
    """A plan of `kind`, its coefficients and what carries them; with `new` the added copies are random instead.

    Kind "layer" has each layer as often in a row as the target does, kind "stack" the whole stack, whatever was
    measured.
    """

    name: str
    kind: str
    coefficient: str = "expected"
    carry: str = "gain"
    new: bool = False


FULL = Recipe("each pass a layer, at full strength", LAYER, "schedule")
EXPECTED = Recipe("each pass a layer, at its mean weight", LAYER)
DEALT = Recipe("dealt + expected + gain", "dealt")
README = Recipe("readme: blocks, alpha into every weight", "block", "schedule", "weights")
ONCE = Recipe("every layer once", "once")
NEW = Recipe("random new layers", "block", "schedule", new=True)
STACK_ONCE = Recipe("the whole stack again, at full strength", STACK, "schedule")
"""Of a source whose layers ran once, which has no counts (arXiv 2405.15319)."""


def plan_of(recipe: Recipe, counts: Repetition | None, source: Layout, target: Layout) -> Plan:
    """The recipe's plan to the depth of `target`, of a source without counts where they are not read; raises `Refused`
    where it cannot reach that."""
    times = len(target) // len(source)
    if recipe.kind == "once":
        return identity_plan(source)
    if recipe.kind == STACK:
        return make_plan(STACK, whole_passes(len(source), times), source, target_layers=len(target),
                         coefficient=recipe.coefficient)  # fmt: skip
    assert counts is not None
    if recipe.kind == LAYER:
        order = [layer for layer in range(len(source)) for _ in range(times)]
        return make_plan("map", counts, source, layers=order, coefficient=recipe.coefficient, target_layout=target)
    return make_plan(recipe.kind, counts, source, round="balance", target_layers=len(target),
                     coefficient=recipe.coefficient)  # fmt: skip
