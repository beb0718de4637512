"""Gradient accumulation: a batch in parts, one after the other, with the gradient of the whole.

    loss = sum over parts of (sum of the part's token losses / targets of the batch
                              + its other losses * real tokens of the part / real tokens of the batch)

Means over tokens are those of the whole batch, however its targets and its padding fall into parts; so is what is
reported. What a layer charges for itself (router, indexer, price) is what it charges each part, by tokens. Gradients
are summed in float32. Running statistics move once, by the mean over the tokens of all parts (`running_means`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules, on_mesh
from gt_jax.models.layers.primitives import widen
from gt_jax.models.memory_chunks import floats
from gt_jax.training.running_means import moved_once
from gt_jax.typing import Scalar, Tree

TOKENS = 16384  # of a part that is evaluated on one device, where a row has no more


def accumulate_gradients(
    loss: Callable[..., tuple[Scalar, dict[str, Any]]], parts: int, rules: Rules,
    counts: Callable[[Mapping[str, Array]], Any], together: Callable[[Any, Array], Any],
) -> Callable[..., tuple[tuple[Scalar, dict[str, Any]], Tree]]:
    """gradient(params, statistics, batch, *rest) -> ((loss, {"report", "statistics"}), gradients by params).

    `loss` takes the same arguments and `counts`: the tokens that its means divide by, None for its own; beside report
    and statistics it says how many real `tokens` it saw. `counts(batch)` counts those of a batch, and `together`
    makes one report of those of the parts and their tokens. Every part has whole rows of every device.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)

    def run(params: Tree, statistics: Tree, batch: Mapping[str, Array], *rest: Any) -> Any:
        shares = jax.tree.map(lambda count: count / parts, counts(batch))

        def one(sums: Tree, part: tuple[Any, Array]) -> tuple[Tree, Any]:
            (total, extra), more = gradient(params, statistics, part[0], *rest, counts=shares, part=part[1])
            seen = (floats(extra["statistics"]), extra["tokens"])
            with jax.named_scope("accumulation"):
                sums = jax.tree.map(lambda a, b: a + widen(b), sums, more)
            return sums, (total, extra["report"], seen)

        with jax.named_scope("accumulation"):
            start = jax.tree.map(lambda p: jnp.zeros_like(widen(p)), params)
        pieces = {name: rows_in_parts(array, parts, rules) for name, array in batch.items()}
        numbers = jnp.arange(parts, dtype=jnp.int32)
        sums, (totals, reports, seen) = jax.lax.scan(one, start, (pieces, numbers))
        total = jnp.mean(totals, axis=0)
        extra = {"report": together(reports, seen[1]), "statistics": moved_once(statistics, *seen)}
        with jax.named_scope("accumulation"):
            return (total, extra), jax.tree.map(lambda s: s / parts, sums)

    return run


def parts_that_fit(ids: Array, model: ModelConfig, rules: Rules) -> int:
    """In how many parts a batch of `ids` [b, t] is evaluated: a device has at most `TOKENS` of each, or one row.

    A batch that many devices trained on fits one of them so. Under halting "batch" tokens wait for each other: 1.
    """
    rows, length = ids.shape
    here = rows // rules.shards("batch")
    if model.halting is not None and model.halting.halting == "batch":
        return 1
    return next((parts for parts in range(1, here) if here % parts == 0 and here // parts * length <= TOKENS), here)


def rows_in_parts(array: Array, parts: int, rules: Rules) -> Array:
    """[b, t] -> [parts, b / parts, t]; every part takes rows from every device, so that none of them moves."""
    rows = (array.shape[0] // parts, parts, array.shape[1])
    split = jnp.reshape(array, rows, out_sharding=on_mesh(rules.spec("batch", None, None)))
    return jnp.moveaxis(split, 1, 0)
