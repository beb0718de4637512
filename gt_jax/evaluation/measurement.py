"""How deep every layer wants to be: mean pass statistics of held-out text as the repetition object of GROWTH 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gt_jax.checkpoints import checkpoint
from gt_jax.configs.lineage import newest
from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules
from gt_jax.errors import Refused, refuse_all
from gt_jax.evaluation.loading import load_for_text
from gt_jax.evaluation.spread import weight_spread
from gt_jax.growth.repetition import Repetition, from_json
from gt_jax.models.given import HEADING, checked_batch, checked_tokens, wrong_variables
from gt_jax.models.layers.pass_statistics import mean_over_tokens
from gt_jax.training.step import Batch, make_evaluation
from gt_jax.typing import Tree

ALIVE_SHARE = 0.02


def k_exec(alive: np.ndarray) -> int:
    """The least k >= 1 after which at most 2 % of the tokens are alive; `alive[k]` is the share entering pass k + 1."""
    after = np.append(alive[1:], 0.0)
    return int(np.argmax(after <= ALIVE_SHARE)) + 1


def halting_entropy(alive: np.ndarray) -> float:
    """Entropy over log K of the number of passes a token takes; a layer of `gated_copies` may be left out whole."""
    share = -np.diff(np.concatenate([[1.0], alive, [0.0]]))
    share = share[share > 0]
    return float(-np.sum(share * np.log(share)) / np.log(max(len(alive), 2)))


def repetition(statistics: Any, types: str, meta: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of GROWTH 1 from mean pass statistics with axes [l, p]."""
    s = {name: np.asarray(value, np.float64) for name, value in statistics._asdict().items()}
    between = weight_spread(s["survival"], s["weight_moments"])
    layers: dict[str, Any] = {"_meta": {**meta, "spread": between.whole}}
    for layer, kind in enumerate(types):
        weight = float(s["survival"][layer].sum())
        passes = s["survival"].shape[1]
        entropy = halting_entropy(s["alive"][layer]) if kind != "G" else float(s["entropy"][layer][0])
        layers[f"layer{layer}"] = {
            "type": kind,
            "k_exec": k_exec(s["alive"][layer]),
            "mean_weight": weight,
            "passes_run": float(s["ran"][layer].sum()),
            "passes_computed": float(s["computed"][layer].sum()),
            "s_fin": float(s["s_after"][layer][-1]),
            "entropy": entropy,
            "p_mu": float(s["p_mean"][layer][0]),
            "p_std": float(s["p_std"][layer][0]),
            "p_floored": float(s["p_floored"][layer][0]),
            "ponder": max(weight - 1.0, 0.0) / max(passes - 1, 1),
            "survival": s["survival"][layer].tolist(),
            "alive": s["alive"][layer].tolist(),
            "weight_std": between.std[layer].tolist(),
            "spread": between.spread[layer].tolist(),
            "update_square": between.update_square[layer].tolist(),
            "delta_ratio": s["delta_ratio"][layer].tolist(),
        }
    return layers


def pass_counts(
    evaluation: Any, variables: Any, batches: Sequence[Any], config: Any, **meta: Any
) -> dict[str, Any]:
    """Run `evaluation` (`training.step.make_evaluation`) over the batches and return the repetition object.

    Means over tokens weigh a batch by its real tokens: the last one may be nearly all padding. `passes_computed` is a
    mean over batches. Of gated copies each layer has one pass, with the source layer and copy that it stands for.
    Raises `Refused` for a plain model, which has no passes to measure.
    """
    copies = config.gated_copies
    if config.halting is None:
        runs = "this one runs every layer once" if config.exit is None else (
            "tokens of this one leave the stack early, of which `evaluate` and training say how many layers they use")
        raise Refused(f"measure needs an adaptive model; {runs}")
    found, real, loss, count = [], [], 0.0, 0.0
    for batch in batches:
        ce, tokens, statistics = jax.device_get(evaluation(variables, batch))
        loss, count = loss + float(ce), count + float(tokens)
        found.append(statistics)
        real.append(np.count_nonzero(np.asarray(batch["segment_ids"])))
    together = jax.tree.map(lambda *of: jnp.stack(of), *found)
    mean = mean_over_tokens(together, jnp.asarray(real, jnp.float32), config.adaptive, config.exit is not None)
    meta = {
        **meta,
        "tokens": int(count),
        "loss": loss / count if count else None,  # rows of one token have no target
        "alpha": list(config.halting.alpha if copies is None else (1.0,)),
        "threshold": config.halting.threshold,
        "layout": config.layout,
        "entropy": "G: of the attention over log of the visible keys; D: of the number of passes over log K",
    }
    counts = repetition(mean, config.depth.types, meta)
    for layer, (source, copy) in enumerate(() if copies is None else copies.copies):
        counts[f"layer{layer}"] |= {"source": source, "copy": copy}
    return counts


def measure(
    config: ModelConfig, variables: Tree, batches: Sequence[Mapping[str, Any] | ArrayLike | Sequence[Any]],
    rules: Rules | None = None,
) -> Repetition:  # fmt: skip
    """How many passes every layer of an adaptive model runs on these batches.

    A batch is {"tokens", "targets", "segment_ids"}, each int32 [b, t], or the tokens alone: then a row is one document
    and each token's target the next. Raises `Refused` for a model whose layers run once, gated copies among them, for
    variables of another config, and for batches that are none, or have ids outside the vocabulary.

    >>> import gt_jax, jax.numpy as jnp
    >>> config = gt_jax.preset("tiny").replace(layout="DG")
    >>> variables = gt_jax.initialise(config, seed=0)
    >>> counts = gt_jax.measure(config, variables, [jnp.arange(16).reshape(1, 16)])
    >>> len(counts.k_exec), all(1 <= k <= 4 for k in counts.k_exec)
    (2, True)
    """
    if config.gated_copies is not None:
        raise Refused("counts are what a growth is planned by, and copies that keep their gates do not grow again; "
                      "`pass_counts` gives their figures")
    refuse_all(wrong_variables(config, variables), HEADING)
    whole = [_whole_batch(batch, config.vocab) for batch in batches]
    if not whole:
        raise Refused("there are no batches; measure needs one at least")
    return from_json(pass_counts(make_evaluation(config, rules or Rules()), variables, whole, config))


def _whole_batch(batch: Mapping[str, Any] | ArrayLike | Sequence[Any], vocab: int) -> Batch:
    if isinstance(batch, Mapping):
        return checked_batch(batch, vocab)
    tokens, _ = checked_tokens(batch, vocab)
    ahead = jnp.concatenate([tokens[:, 1:], jnp.full_like(tokens[:, :1], -1)], axis=1)
    return {"tokens": tokens, "targets": ahead, "segment_ids": jnp.ones_like(tokens)}


def measure_checkpoint(source: Path, data: Any, batches: int) -> dict[str, Any]:
    """`pass_counts` of a checkpoint and a DataConfig (None: the text it was trained on)."""
    step = checkpoint.resolve(source)  # once: a run that goes on may save another meanwhile
    loaded = load_for_text(step, data, batches)
    evaluation = make_evaluation(loaded.config, loaded.rules)
    meta = {
        "source": str(source), "step": loaded.metadata.get("step"), "lambda_p": newest(loaded.metadata, "price"),
        "content_hash": checkpoint.content_hash(step, ("params", "statistics")), "notes": loaded.notes,
    }  # fmt: skip
    return pass_counts(evaluation, loaded.variables, loaded.batches, loaded.config, **meta, text=loaded.text)
