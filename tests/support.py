"""Small layers and the properties every mixer is tested for."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from gt_jax.checkpoints.tree_paths import flatten, nest
from gt_jax.configs.attention import AttentionConfig
from gt_jax.configs.model import (
    AdaptiveConfig,
    DeltaNetConfig,
    EmbeddingConfig,
    GSAConfig,
    HyperConfig,
    MemoryConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
)
from gt_jax.configs.resolvent import ResolventConfig
from gt_jax.models.language_model import LanguageModel, abstract, apply_network, empty_cache
from gt_jax.text.token_bytes import default_texts, token_table

WIDTH = 32
DELTANET = DeltaNetConfig(heads=2, value_heads=4, key_width=8, value_width=8, chunk_size=16)
GSA = GSAConfig(heads=4, head_width=8, indexer_heads=2, indexer_width=8, k_base=6, k_min=4, k_max=8, sinks=2)
ATTENTION = AttentionConfig(heads=4, kv_heads=2, head_width=8, gate=True, qk_norm="head", rope_share=0.5)
RESOLVENT = ResolventConfig(heads=4)


def small_model(layout: str = "DG*2", adaptive: bool = True, **changes: object) -> ModelConfig:
    """A model that compiles in seconds."""
    config = ModelConfig(
        layout=layout, width=WIDTH, vocab=264, mlp_width=48, deltanet=DELTANET, gsa=GSA,
        attention=ATTENTION if "A" in layout else None, resolvent=RESOLVENT if "B" in layout else None,
        adaptive=AdaptiveConfig() if adaptive else None,
    )  # fmt: skip
    return config.replace(**changes)


def tokens(length: int, rows: int = 2, seed: int = 3) -> jax.Array:
    """Random bytes, [rows, length]."""
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, 257)


def drawn(shapes: object, std: float, seed: int = 1, middle: Mapping[str, float] | None = None) -> dict[str, object]:
    """A nested dict of arrays drawn by numpy: compiling `init` would take most of a test's time.

    Normal around 0, or around the value that `middle` has for the last name of the path.
    """
    random, middle = np.random.default_rng(seed), middle or {}

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = middle.get(path.rsplit("/", 1)[-1], 0.0) + std * random.standard_normal(leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return nest({path: draw(path, leaf) for path, leaf in flatten(shapes).items()})


@functools.cache
def perturbed(config: ModelConfig, std: float = 0.1) -> dict[str, object]:
    """Variables drawn by numpy from the model's shapes: no parameter is at a special value, and nothing is compiled."""
    random = np.random.default_rng(1)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path.rsplit("/", 1)[-1]
        if not np.issubdtype(leaf.dtype, np.floating):
            table = dict(zip(("token_bytes", "token_length"), token_table(default_texts(config.vocab)), strict=True))
            return jnp.asarray(table[name])
        middle = 1.0 if name in ("scale", "gain", "residual_scale") else 0.0
        spread = 0.0 if name == "variance_ema" else std
        return jnp.asarray(middle + spread * random.standard_normal(leaf.shape), leaf.dtype)

    return nest({path: draw(path, leaf) for path, leaf in flatten(abstract(config)).items()})


def full_model(layout: str = "DG", adaptive: bool = True, **changes: object) -> ModelConfig:
    """`small_model` with streams, experts, the Kronecker code, multi-token prediction and a memory stream."""
    return small_model(
        layout, adaptive, moe=MoEConfig(experts=4, expert_width=16), hyper=HyperConfig(streams=2),
        embedding=EmbeddingConfig("kronecker+table"), mtp=MTPConfig(), memory=MemoryConfig(chunk=12, stream=1),
    ).replace(**changes)  # fmt: skip


def random_tree(tree: object, seed: int, scale: float = 0.3) -> object:
    """The tree with every float leaf moved by noise: no parameter is left at a special value such as 0 or 1."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [leaf + scale * jax.random.normal(k, leaf.shape, leaf.dtype) for leaf, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


def rounding_bound(terms: int, chain: int) -> float:
    """How far two float32 programs of the same equations may be apart, in units of the result's largest value.

    A sum of n terms, in whatever order, with or without fused multiply-add, errs by at most about 3 sqrt(n) u of its
    scale, u = 2^-24 (Higham and Mary, SIAM J. Sci. Comput. 41, 2019: the probabilistic bound lambda sqrt(n) u with
    lambda = 3). `chain` sums follow each other and pass their errors on; two programs err both:

        2 * chain * 3 sqrt(terms) * 2^-24
    """
    return 2 * chain * 3 * terms**0.5 * 2.0**-24


def assert_rounded_alike(got: object, wanted: object, *, terms: int, chain: int) -> None:
    """Trees of two programs that compute the same: every leaf within `rounding_bound` of its own largest value.

    Equal bits are asked of the same program alone: another mesh, another number of rows or a skipped branch is another
    program, and which bits it gives depends on the processor.
    """
    bound = rounding_bound(terms, chain)
    there, alone = flatten(got), flatten(wanted)
    assert set(there) == set(alone)
    for path, value in alone.items():
        value = np.asarray(value, np.float64)
        allowed = bound * np.abs(value).max(initial=0.0)
        np.testing.assert_allclose(np.asarray(there[path], np.float64), value, rtol=0, atol=allowed, err_msg=path)


def segments(*lengths: int) -> jax.Array:
    """Segment ids of one row whose documents have these lengths: [1, t]."""
    return jnp.concatenate([jnp.full((n,), i + 1, jnp.int32) for i, n in enumerate(lengths)])[None]


def decoded(config: ModelConfig, variables: dict[str, object], x: jax.Array, prompt: int) -> tuple[jax.Array, object]:
    """(logits of all tokens, the cache after them): `prompt` tokens in one call with a cache, then one at a time."""
    go_on = jax.jit(lambda v, t, cache: apply_network(LanguageModel(config), v, t, cache=cache))
    first = go_on(variables, x[:, :prompt], empty_cache(config, *x.shape))
    cache, parts = first.cache, [first.logits]
    for i in range(prompt, x.shape[1]):
        output = go_on(variables, x[:, i : i + 1], cache)
        cache = output.cache
        parts.append(output.logits)
    return jnp.concatenate(parts, 1), cache
