"""Gated sparse attention: one interface, one file an implementation; arguments are checked here.

`implementation=None` takes the best there is for the shape; a name takes that one or raises ValueError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_args

from jaxtyping import Array, Float

from pallas_kernels.arguments import check_kinds, whole_problems
from pallas_kernels.platform import target_device
from pallas_kernels.positions import Positions
from pallas_kernels.sparse_attention import pallas_tpu, reference, xla
from pallas_kernels.sparse_attention.common.selection import Variance
from pallas_kernels.sparse_attention.reference import Indexer, Statistics

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, Statistics]]] = {
    "reference": reference.sparse_attention,
    "xla": xla.sparse_attention,
    "pallas_tpu": pallas_tpu.sparse_attention,
    "pallas_tpu_interpreted": functools.partial(pallas_tpu.sparse_attention, interpret=True),  # as plain JAX, slowly
}
TILED_FROM = 512  # tokens of a row: from here tiles are faster on a CPU; below, dense compiles sooner and holds little

__all__ = ["IMPLEMENTATIONS", "TILED_FROM", "Indexer", "Positions", "Statistics", "Variance", "sparse_attention"]


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

    `implementation` None is the best one for the platform and the length. Where queries times keys are at least
    `TILED_FROM` squared, in tiles with memory O(t): when compiling for a TPU the Pallas kernels, if they take these
    arguments, and "xla" otherwise; below, "reference", dense. Raises ValueError listing what does not fit.
    """
    check_arguments(q, k, v, indexer, positions, k_min, k_max, sinks, implementation, k_base=k_base, variance=variance)
    if implementation is None:
        implementation = _best(q, k, v, indexer)
    options: dict[str, Any] = {
        "k_base": k_base, "k_min": k_min, "k_max": k_max, "sinks": sinks, "score_scale": score_scale,
        "variance": variance, "head_axes": head_axes,
    }  # fmt: skip
    return IMPLEMENTATIONS[implementation](q, k, v, indexer, positions, **options)


def _best(q: Array, k: Array, v: Array, indexer: Indexer) -> str:
    if q.shape[1] * k.shape[1] < TILED_FROM**2:
        return "reference"
    fits = target_device()[0] == "tpu" and not pallas_tpu.unsupported(q, k, v, indexer)
    return "pallas_tpu" if fits else "xla"


def check_arguments(
    q: Float[Array, "..."],
    k: Float[Array, "..."],
    v: Float[Array, "..."],
    indexer: Indexer,
    positions: Positions,
    k_min: int,
    k_max: int,
    sinks: int = 0,
    implementation: str | None = None,
    *,
    k_base: int | None = None,
    variance: str = "visible",
) -> None:
    """Raise one ValueError that lists every argument of `sparse_attention` that does not fit."""
    problems = []
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        problems.append(f"implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    elif implementation == "pallas_tpu" and target_device()[0] != "tpu":
        problems.append(
            f"implementation 'pallas_tpu' needs a TPU, this is for {target_device()[0]}; 'pallas_tpu_interpreted' runs "
            "its kernels anywhere, slowly"
        )
    counts = {"k_min": k_min, "k_max": k_max, "sinks": sinks, "k_base": k_min if k_base is None else k_base}
    problems += whole_problems(counts)
    if variance not in get_args(Variance):
        problems.append(f"variance {variance!r} is not one of {', '.join(get_args(Variance))}")
    if k_base is not None and k_base < 1:
        problems.append(f"k_base {k_base} must be at least 1")
    if not 0 <= k_min <= k_max:
        problems.append(f"k_min {k_min} must be at least 0 and at most k_max, {k_max}")
    if sinks < 0:
        problems.append(f"sinks {sinks} must be at least 0")
    kinds = check_kinds({"q": q, "k": k, "v": v, **_named("indexer", indexer)}, _named("positions", positions))
    problems += kinds.problems
    if not kinds.arrays:
        _raise(problems)
    shapes = {"q": q.shape, "k": k.shape, "v": v.shape, "indexer.query": indexer.query.shape}
    if any(len(shape) != 4 for shape in shapes.values()):
        problems.append("q must be [b, t, h, k], k [b, s, h, k], v [b, s, h, v], indexer.query [b, t, n, i], got "
                        + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))  # fmt: skip
    else:
        of_shapes = _shape_problems(q, k, v, indexer, positions)
        problems += of_shapes
        if not of_shapes and implementation in ("pallas_tpu", "pallas_tpu_interpreted"):
            problems += pallas_tpu.unsupported(q, k, v, indexer)
    _raise(problems)


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError("sparse_attention:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _named(name: str, arrays: Indexer | Positions) -> dict[str, Any]:
    return {f"{name}.{field}": array for field, array in arrays._asdict().items()}


def _shape_problems(q: Array, k: Array, v: Array, indexer: Indexer, positions: Positions) -> list[str]:
    (b, t, h, width), s, (n, i) = q.shape, k.shape[1], indexer.query.shape[2:]
    expected = [
        ("k", k, "b, s, h, k", (b, s, h, width)),
        ("v", v, "b, s, h, v", (b, s, h, v.shape[3])),
        ("indexer.query", indexer.query, "b, t, n, i", (b, t, n, i)),
        ("indexer.key", indexer.key, "b, s, n, i", (b, s, n, i)),
        ("indexer.weight", indexer.weight, "b, t, n", (b, t, n)),
        ("indexer.bias", indexer.bias, "n", (n,)),
        ("indexer.importance", indexer.importance, "h", (h,)),
        ("indexer.variance_ema", indexer.variance_ema, "", ()),
        ("positions.query", positions.query, "b, t", (b, t)),
        ("positions.query_segment", positions.query_segment, "b, t", (b, t)),
        ("positions.key", positions.key, "b, s", (b, s)),
        ("positions.key_segment", positions.key_segment, "b, s", (b, s)),
    ]
    problems = [
        f"{name} must be [{letters}] = {shape}, got {array.shape}"
        for name, array, letters, shape in expected
        if array.shape != shape
    ]
    if min(t, s) < 1:
        problems.append(f"there must be at least one query and one key, got {t} and {s}")
    if n < 1 or h % n:
        problems.append(f"{h} heads are no multiple of {n} indexer heads")
    return problems
