"""Small layers and the properties every mixer is tested for."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gt_jax.config import AdaptiveConfig, DeltaNetConfig, GSAConfig, ModelConfig

WIDTH = 32
DELTANET = DeltaNetConfig(heads=2, value_heads=4, key_width=8, value_width=8, chunk_size=16)
GSA = GSAConfig(heads=4, head_width=8, indexer_heads=2, indexer_width=8, k_base=6, k_min=4, k_max=8, sinks=2)


def small_model(layout: str = "DG*2", adaptive: bool = True, **changes: object) -> ModelConfig:
    """A model that compiles in seconds, with every component on."""
    config = ModelConfig(
        layout=layout, width=WIDTH, vocab=264, mlp_width=48, deltanet=DELTANET, gsa=GSA,
        adaptive=AdaptiveConfig() if adaptive else None,
    )  # fmt: skip
    return config.replace(**changes)


def random_tree(tree: object, seed: int, scale: float = 0.3) -> object:
    """The tree with every float leaf moved by noise: no parameter is left at a special value such as 0 or 1."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [leaf + scale * jax.random.normal(k, leaf.shape, leaf.dtype) for leaf, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


def segments(*lengths: int) -> jax.Array:
    """Segment ids of one row whose documents have these lengths: [1, t]."""
    return jnp.concatenate([jnp.full((n,), i + 1, jnp.int32) for i, n in enumerate(lengths)])[None]
