"""What a model of the study says of batches: the answers of a task, or the loss of text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules
from gt_jax.evaluation.answer_table import answer_table
from gt_jax.models.language_model import fixed_passes
from gt_jax.training.step import Batch, evaluate, make_evaluation
from gt_jax.typing import Tree

ANSWERS = ("accuracy", "accuracy_all", "accuracy_hardest", "nats", "passes", "spearman")


def figures(
    config: ModelConfig, variables: Tree, batches: Sequence[Batch], forced: int | None = None
) -> dict[str, Any]:
    """`nats` a target; of a task also `ANSWERS`, as `answer_table` gives them: right answers, passes, by difficulty.

    With so many passes `forced`; None leaves them to the gates.
    """
    control = None if forced is None else fixed_passes(forced)
    if "difficulty" not in batches[0]:
        return {"nats": evaluate(_evaluation(config), variables, batches, control)}
    table = answer_table(config, variables, batches, control, forced=(), cuts=False).to_json()
    return {name: table[name] for name in ANSWERS}


@functools.lru_cache(maxsize=4)
def _evaluation(config: ModelConfig) -> Callable[..., Any]:
    return make_evaluation(config, Rules())
