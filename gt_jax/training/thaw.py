"""Restricted fine-tuning: for the first steps only a few layers move, then everything does (GROWTH.md 7).

With m = 1 for the chosen layers' slices of the stacked leaves [blocks, …], 0 elsewhere, and open = (step >= steps):

    gradient <- gradient where m or open, else 0;  then the optimizer;  new value kept where m or open, else the old one

- The gradient is masked before it is clipped: what does not move has no say in how far the rest moves.
- So the moments of frozen tensors stay 0. When they thaw, Adam's count is already past its bias correction, and their
  first updates are 0.45, 0.61, 0.72 … of a fresh optimizer's at the usual b1 0.9 and b2 0.95: a short warm-up.
- Values are chosen, not updates set to 0: weight decay does not reach a frozen tensor, and it keeps every bit (-0 + 0
  would be +0). The statistics of frozen layers stay too.
- A price of rule "budget" stands meanwhile, and moves no gates: it steers the mean over all layers, and frozen ones
  cannot follow. What it summed up of that would be let loose on all of them at the switch.
- The step is a traced counter: the switch compiles nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gt_jax.configs.layout import Layout
from gt_jax.configs.thaw import ThawConfig
from gt_jax.typing import Tree


def trainable_mask(tree: Tree, depth: Layout, layers: Sequence[int]) -> Tree:
    """Which slices of the leaves belong to `layers`: bool [blocks, 1, …] for stacked leaves, False for all others.

    `tree` holds arrays or their shapes, keyed segment<i>, layer<slot> as the model's collections are.
    """
    chosen = {depth.position(layer) for layer in layers}

    def mask(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        names = [str(getattr(key, "key", key)) for key in path]
        if not names[0].startswith("segment"):
            return np.zeros((), bool)
        segment, slot = int(names[0].removeprefix("segment")), int(names[1].removeprefix("layer"))
        blocks = [(segment, block, slot) in chosen for block in range(leaf.shape[0])]
        return np.array(blocks).reshape(-1, *[1] * (len(leaf.shape) - 1))

    return jax.tree_util.tree_map_with_path(mask, tree)


def thawed(thaw: ThawConfig, step: Array) -> Array:
    """Whether `step` is past the restricted phase: then everything trains."""
    return step >= thaw.steps


def keep_frozen(thaw: ThawConfig, depth: Layout, step: Array, new: Tree, old: Tree) -> Tree:
    """`new` where the layer trains or `step` is past the restricted phase, else `old`, bit for bit."""
    past = thawed(thaw, step)

    def choose(mask: np.ndarray, fresh: Array, before: Array) -> Array:
        return jnp.where(jnp.asarray(mask) | past, fresh, before)

    return jax.tree.map(choose, trainable_mask(new, depth, thaw.layers), new, old)
