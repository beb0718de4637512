"""Causal attention: one interface, one file an implementation; arguments are checked here.

`implementation=None` takes the best there is for the shape; a name takes that one or raises ValueError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from jaxtyping import Array, Float

from pallas_kernels.arguments import check_kinds, whole_problems
from pallas_kernels.causal_attention import pallas_tpu, reference, xla
from pallas_kernels.platform import target_device
from pallas_kernels.positions import Positions

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "reference": reference.causal_attention,
    "xla": xla.causal_attention,
    "cudnn": reference.by_cudnn,
    "pallas_tpu": pallas_tpu.causal_attention,
    "pallas_tpu_interpreted": functools.partial(pallas_tpu.causal_attention, interpret=True),  # as plain JAX, slowly
}
TILED_FROM = 512  # tokens of a row: from here tiles; below, dense compiles sooner and holds little
FEW = 16  # queries: the logits of so few take no more memory than the keys

__all__ = ["FEW", "IMPLEMENTATIONS", "TILED_FROM", "Positions", "causal_attention"]


def causal_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s n k"],
    v: Float[Array, "b s n k"],
    positions: Positions,
    window: int | None = None,
    *,
    same_tokens: bool = False,
    implementation: str | None = None,
) -> Float[Array, "b t h k"]:
    """Attention to the visible keys, `h` heads of queries to `n` of keys and values; see `reference.causal_attention`.

    A query sees the keys of its segment that stand not after it and, with `window`, at most window - 1 places before
    it. `same_tokens` says that keys and queries are of the same tokens in the same order. `implementation` None is the
    best one for the platform and the length. Where queries times keys are at least `TILED_FROM` squared, and queries
    more than a `FEW`, in tiles with memory O(t): when compiling for a TPU the splash kernels, if they take these
    arguments, and "xla" otherwise; else "reference", dense. Raises ValueError listing what does not fit.
    """
    problems = _problems(q, k, v, positions, window, same_tokens, implementation)
    if problems:
        raise ValueError("causal_attention:\n" + "\n".join(f"  - {problem}" for problem in problems))
    if implementation is None:
        implementation = _best(q, k, window, same_tokens)
    return IMPLEMENTATIONS[implementation](q, k, v, positions, window)


def _best(q: Array, k: Array, window: int | None, same_tokens: bool) -> str:
    if q.shape[1] <= FEW or q.shape[1] * k.shape[1] < TILED_FROM**2:
        return "reference"
    fits = target_device()[0] == "tpu" and not pallas_tpu.unsupported(q, window, same_tokens)
    return "pallas_tpu" if fits else "xla"


def _problems(
    q: Array, k: Array, v: Array, positions: Positions, window: int | None, same_tokens: bool, asked: str | None
) -> list[str]:
    """What does not fit, a line each."""
    problems = []
    if asked is not None and asked not in IMPLEMENTATIONS:
        problems.append(f"implementation {asked!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    for name, needed in (("pallas_tpu", "tpu"), ("cudnn", "gpu")):
        if asked == name and (found := target_device()[0]) != needed:
            problems.append(f"implementation {name!r} needs a {needed.upper()}, this is for {found}")
    problems += whole_problems({} if window is None else {"window": window})
    if window is not None and window < 1:
        problems.append(f"window {window} must be at least 1")
    if not isinstance(positions, Positions):
        return [*problems, f"positions must be a Positions, got {type(positions).__name__}"]
    kinds = check_kinds({"q": q, "k": k, "v": v}, {f"positions.{name}": x for name, x in positions._asdict().items()})
    problems += kinds.problems
    if not kinds.arrays:
        return problems
    if any(x.ndim != 4 for x in (q, k, v)):
        return [*problems, f"q must be [b, t, h, k], k and v [b, s, n, k], got {q.shape}, {k.shape}, {v.shape}"]
    (b, t, heads, width), (s, kv_heads) = q.shape, k.shape[1:3]
    expected = [
        ("k", k, "b, s, n, k", (b, s, kv_heads, width)),
        ("v", v, "b, s, n, k", (b, s, kv_heads, width)),
        ("positions.query", positions.query, "b, t", (b, t)),
        ("positions.query_segment", positions.query_segment, "b, t", (b, t)),
        ("positions.key", positions.key, "b, s", (b, s)),
        ("positions.key_segment", positions.key_segment, "b, s", (b, s)),
    ]
    problems += [
        f"{name} must be [{letters}] = {shape}, got {array.shape}"
        for name, array, letters, shape in expected
        if array.shape != shape
    ]
    if min(t, s) < 1:
        problems.append(f"there must be at least one query and one key, got {t} and {s}")
    if kv_heads < 1 or heads % kv_heads:
        problems.append(f"{heads} heads are no multiple of {kv_heads} heads of keys")
    if asked in ("pallas_tpu", "pallas_tpu_interpreted"):
        problems += pallas_tpu.unsupported(q, window, same_tokens)
    return problems
