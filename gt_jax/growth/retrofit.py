"""A plain model becomes an adaptive one that computes the same: its own tensors, and halting heads with closed gates.

    p = sigmoid(0 h + b),  b = logit(threshold / 2):    s_2 = p < threshold, so no token is alive after pass 1
    X <- X + gain * s_1 * alpha_1 * Delta(X) = X + gain * Delta(X),    s_1 = alpha_1 = 1

- No second pass runs, forward or backward. Logits are the source's bit for bit where the compiler sums both programs
  alike, as it does wherever that was tried, and to rounding everywhere else. With a cache later passes have states of
  their own, which pass 1 never reads; what they add has weight 0.
- A closed gate is far below the threshold, where the loss has no gradient to open it. So training forces
  all passes, and lets the last bias of every head rise meanwhile (`PriceConfig.gates_opened`); then gates and price are
  free. The schedule lies in the metadata: `train --start` goes by it.
- Second moments of the source's optimizer come along; those of the heads are 0: Adam's first steps are short so.

Source: recurrence retrofitted into pretrained models, arXiv 2511.07384.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from gt_jax.checkpoints.folders import StrPath
from gt_jax.checkpoints.moments import SECOND
from gt_jax.checkpoints.opened import Opened
from gt_jax.checkpoints.tree_paths import flatten, nest
from gt_jax.configs.adaptive import AdaptiveConfig
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.price import PriceConfig
from gt_jax.devices.sharding import Rules
from gt_jax.errors import refuse_all
from gt_jax.growth.moments import moment_leaves
from gt_jax.growth.pipeline import Settings
from gt_jax.growth.plan import identity_plan
from gt_jax.growth.provenance import standing_record
from gt_jax.growth.stream import MEMORY, Target, versions, write_target
from gt_jax.growth.transform import child_abstract, match
from gt_jax.models.layers.adaptive_depth import FEATURES, HaltingHead
from gt_jax.typing import Tree

_PARAMS = "params/"


class Retrofitted(NamedTuple):
    """An adaptive model's config and variables."""

    config: ModelConfig
    variables: Tree


def closed(adaptive: AdaptiveConfig) -> AdaptiveConfig:
    """`adaptive` with gates that start closed: `initial_bias` = logit(threshold / 2)."""
    p = adaptive.threshold / 2
    return adaptive.replace(initial_bias=math.log(p / (1 - p)))


def retrofitted_config(source: ModelConfig, adaptive: AdaptiveConfig) -> ModelConfig:
    """The source's config with this adaptive depth, its gates closed; `remat` "layer" becomes "pass".

    Raises `Refused`, listing all, for a source that has gates already and for what excludes adaptive depth.
    """
    wrong = []
    if source.adaptive is not None:
        wrong.append("it is adaptive already; train it on, or measure and grow it")
    if source.gated_copies is not None:
        wrong.append("its layers are copies that keep their gates (grow --keep-gates): it has gates already")
    if adaptive.alpha[0] != 1.0:
        wrong.append(f"the strength of pass 1 would be {adaptive.alpha[0]:g}; it must be 1, or the model would compute "
                     "something else")
    least = 1 / (1 + math.exp(min(adaptive.logit_bound, 700.0)))  # of a gate; more is no float
    if adaptive.logit_bound and least >= adaptive.threshold:
        wrong.append(f"with logit_bound {adaptive.logit_bound:g} no gate says less than {least:.3g}, which is not "
                     f"below the threshold {adaptive.threshold:g}: none can be closed; raise one of them")
    refuse_all(wrong, "the model cannot be retrofitted:")
    return source.replace(adaptive=closed(adaptive), remat="pass" if source.remat == "layer" else source.remat)


def closed_heads(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """The halting heads of an adaptive config by path, each [blocks, ...], float32: fresh, but for an output that is
    `initial_bias` whatever the head sees."""
    assert config.adaptive is not None
    head, layout = HaltingHead(config.adaptive, Rules()), config.depth
    features, state = jnp.zeros((1, 1, FEATURES), jnp.float32), jnp.zeros((1, 1, config.width), jnp.float32)

    def one(layer: jax.Array) -> Tree:
        key = jax.random.fold_in(jax.random.key(seed), layer)
        made = head.init(key, features, state, jnp.zeros((), jnp.int32))
        return meta.unbox(made)["params"]

    every = {name: np.asarray(leaf) for name, leaf in flatten(jax.jit(jax.vmap(one))(np.arange(len(layout)))).items()}
    every["output/w"] = np.zeros_like(every["output/w"])
    found: dict[str, np.ndarray] = {}
    for segment, part in enumerate(layout.segments):
        for slot in range(len(part.pattern)):
            layers = [layout.layer(segment, block, slot) for block in range(part.repeats)]
            found |= {f"{_PARAMS}segment{segment}/layer{slot}/halting/{name}": leaf[layers]
                      for name, leaf in every.items()}
    return found


def retrofit(config: ModelConfig, variables: Tree, adaptive: AdaptiveConfig, seed: int = 0) -> Retrofitted:
    """The adaptive model of a plain one in memory; `seed` draws what the heads see. Raises as `retrofitted_config`."""
    made = retrofitted_config(config, adaptive)
    return Retrofitted(made, nest({**flatten(variables), **closed_heads(made, seed)}))


def retrofit_checkpoint(source: StrPath, target: StrPath, *, adaptive: AdaptiveConfig, price: PriceConfig,
                        seed: int = 0, memory: int = MEMORY, resume: bool = False, moments: bool = True,
                        progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Write the adaptive model of the checkpoint, or of a run's newest step, `source` to `target`; returns a report.

    Streamed, killed, resumed and refused as `grow_checkpoint` is, whose report it has, with "retrofitted_from" in place
    of "grown_from". `price` is the schedule that `train --start` opens the gates by.
    """
    def made(where: Path, opened: Opened) -> Target:
        return target_of(where, opened, adaptive, price, seed, moments)

    return write_target(source, target, "retrofitted", made, memory=memory, resume=resume, progress=progress)


def target_of(where: Path, opened: Opened, adaptive: AdaptiveConfig, price: PriceConfig, seed: int,
              moments: bool) -> Target:
    """Every tensor of the source as it is, and the heads; what the metadata say of it."""
    config, plan = retrofitted_config(opened.config, adaptive), identity_plan(opened.config.depth)
    leaves, dropped = match(opened.model, child_abstract(opened.config, plan), plan, "gain")
    new: Mapping[str, np.ndarray] = closed_heads(config, seed)
    carried = moment_leaves(opened.tensors, leaves) if moments else ()
    if carried:
        new = {**new, **{f"{SECOND}/{path.removeprefix(_PARAMS)}": np.zeros_like(one) for path, one in new.items()}}
    assert config.adaptive is not None
    record = {"source": str(where), "step": opened.metadata.get("step"), "adaptive": config.adaptive.to_json(),
              "price": price.to_json(), "seed": seed, "versions": versions(), "moments": bool(carried),
              **standing_record(opened.metadata)}
    return Target(config, record, leaves, carried, new, dropped, Settings("gain", 0.0, seed))
