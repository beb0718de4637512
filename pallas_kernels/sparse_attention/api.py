"""Gated sparse attention: one interface, one file an implementation.

`implementation=None` takes the best there is for the platform; a name takes that one or raises ValueError.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.sparse_attention import reference, xla
from pallas_kernels.sparse_attention.reference import Indexer, Positions, Statistics
from pallas_kernels.sparse_attention.selection import Variance

IMPLEMENTATIONS = {"reference": reference.sparse_attention, "xla": xla.sparse_attention}

__all__ = ["IMPLEMENTATIONS", "Indexer", "Positions", "Statistics", "Variance", "sparse_attention"]


def sparse_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s h k"],
    v: Float[Array, "b s h v"],
    indexer: Indexer,
    positions: Positions,
    *,
    k_base: int,
    k_min: int,
    k_max: int,
    sinks: int = 4,
    score_scale: float | None = None,
    variance: Variance = "visible",
    head_axes: tuple[str, ...] = (),
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], Statistics]:
    """Attention over at most `k_max` keys a query, chosen by the indexer; see `reference.sparse_attention`.

    Raises ValueError for an unknown implementation and for heads that are no multiple of the indexer heads.
    """
    name = implementation or "reference"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"sparse_attention: implementation {name!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    heads, indexer_heads = q.shape[2], indexer.query.shape[2]
    if heads % indexer_heads:
        raise ValueError(f"sparse_attention: {heads} heads are no multiple of {indexer_heads} indexer heads")
    options: dict[str, Any] = {
        "k_base": k_base, "k_min": k_min, "k_max": k_max, "sinks": sinks, "score_scale": score_scale,
        "variance": variance, "head_axes": head_axes,
    }  # fmt: skip
    return IMPLEMENTATIONS[name](q, k, v, indexer, positions, **options)
