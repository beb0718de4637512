"""The public face of hyper-connections: arguments are checked here, the work is done by an implementation.

A sublayer is opened by its read and closed by its write, with the branch F in between:

    u, opened = enter(x, weights, settings)
    x = leave(opened, F(u), settings)

and two in a row pass over the streams once less:

    u, opened = enter(x, weights_1, settings)
    u, opened = between(opened, F_1(u), weights_2, settings)
    x = leave(opened, F_2(u), settings)
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.arguments import check_kinds, whole_problems
from pallas_kernels.hyper_connections import pallas_tpu, reference, xla
from pallas_kernels.hyper_connections.reference import Coefficients, Settings, Weights
from pallas_kernels.platform import target_device

_INTERPRETED = SimpleNamespace(
    **{name: functools.partial(getattr(pallas_tpu, name), interpret=True) for name in ("enter", "between", "leave")}
)
IMPLEMENTATIONS: dict[str, Any] = {
    "reference": reference,
    "xla": xla,
    "pallas_tpu": pallas_tpu,
    "pallas_tpu_interpreted": _INTERPRETED,  # as plain JAX, slowly
}
MOST_STREAMS = 8
WORTHWHILE = 128  # tokens of a row: fewer leave most of a tile empty

Opened = reference.Open | pallas_tpu.Open

__all__ = ["Coefficients", "Opened", "Settings", "Weights", "between", "coefficients", "enter", "leave"]


def enter(
    x: Float[Array, "b t n d"], weights: Weights, settings: Settings
) -> tuple[Float[Array, "b t d"], Opened]:
    """(u, opened): the input of a sublayer's branch, u = sum_j H_pre[j] X_j, and the sublayer open for its write.

    z = vec X / rms(vec X);  a = z phi + bias;  H_pre = sigmoid(a_pre), H_post = 2 sigmoid(a_post), H_res = Sinkhorn of
    a_res row by row;  coefficients, norm and Sinkhorn in float32, u in x's dtype.

    Args:
        x: n streams, 1 to 8, of width d; float32 or bfloat16 (float64 but for the kernels).
        weights: phi [n, d, n^2 + 2n] and bias [n^2 + 2n], float32; first n columns for the read, n for the write.
        settings: Sinkhorn's rounds and floor, the norm's epsilon; `batch_axes`, the axes of the mesh in context that
            cut b, None without a mesh; `implementation`, None for the kernels when compiling for a TPU and rows have at
            least 128 tokens, if they take these arguments, and XLA otherwise.

    `opened` goes to one `between` or `leave` and nowhere else. Differentiable in reverse mode.

    Raises:
        ValueError: listing every argument that does not fit, with what would.

    Source: arXiv 2512.24880.
    """
    check_arguments(x, weights, settings)
    found: tuple[Array, Opened] = _chosen(x, settings).enter(x, weights, settings)
    return found


def between(
    opened: Opened, y: Float[Array, "b t d"], weights: Weights, settings: Settings
) -> tuple[Float[Array, "b t d"], Opened]:
    """`leave`, then `enter` of the sublayer that follows, in one pass over the streams; (u, opened)."""
    _raise([*_branch_problems(opened, y), *_weight_problems(_streams_and_width(opened), weights)])
    found: tuple[Array, Opened] = _of(opened, settings).between(opened, y, weights, settings)
    return found


def leave(opened: Opened, y: Float[Array, "b t d"], settings: Settings) -> Float[Array, "b t n d"]:
    """X'_i = sum_j H_res[i, j] X_j + H_post[i] y, computed in float32, in the dtype of X; y is what the branch gave.

    Raises ValueError for a y of another shape or dtype than u had.
    """
    _raise(_branch_problems(opened, y))
    found: Array = _of(opened, settings).leave(opened, y, settings)
    return found


def coefficients(x: Float[Array, "b t n d"], weights: Weights, settings: Settings) -> Coefficients:
    """What a sublayer would read, write and keep: H_pre, H_post [b, t, n], H_res [b, t, n, n] in float32; by XLA."""
    check_arguments(x, weights, settings)
    return xla.coefficients(x, weights, settings)


def check_arguments(x: Float[Array, "..."], weights: Weights, settings: Settings) -> None:
    """Raise one ValueError that lists every argument of `enter` that does not fit."""
    name, problems = settings.implementation, []
    if name is not None and name not in IMPLEMENTATIONS:
        problems.append(f"implementation {name!r} is not available, there are {', '.join(IMPLEMENTATIONS)}")
    elif name == "pallas_tpu" and target_device()[0] != "tpu":
        others = ", ".join(other for other in IMPLEMENTATIONS if other != "pallas_tpu")
        problems.append(f"implementation 'pallas_tpu' needs a TPU, this is for {target_device()[0]}, where there are "
                        f"{others}")  # fmt: skip
    wrong_rounds = whole_problems({"rounds": settings.rounds})
    problems += wrong_rounds
    kinds = check_kinds({"x": x, "weights.phi": weights.phi, "weights.bias": weights.bias}, {})
    if not kinds.arrays:
        _raise([*problems, *kinds.problems])
    if not wrong_rounds and settings.rounds < 1:
        problems.append(f"rounds is {settings.rounds}; it must be at least 1")
    if not 0 < settings.floor < 1:
        problems.append(f"floor is {settings.floor}; it must lie in (0, 1)")
    if x.ndim != 4:
        problems.append(f"x must be [b, t, n, d], got {x.shape}")
    else:
        n = x.shape[2]
        if not 1 <= n <= MOST_STREAMS:
            problems.append(f"x {x.shape} has {n} streams; there must be 1 to {MOST_STREAMS}")
        if min(x.shape) < 1:
            problems.append(f"x must have at least one element an axis, got {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == jnp.float16:
            problems.append(f"x must be float32, bfloat16 or float64, got {x.dtype}")
        problems += _weight_problems(x.shape[2:], weights)
        if not problems and name is not None and name.startswith("pallas_tpu"):
            problems += pallas_tpu.unsupported(x.shape, x.dtype)
    _raise(problems)


def _weight_problems(streams_and_width: tuple[int, ...], weights: Weights) -> list[str]:
    n, d = streams_and_width
    wanted = {"phi": (n, d, n * n + 2 * n), "bias": (n * n + 2 * n,)}
    problems = [
        f"weights.{name} must be {shape}, got {getattr(weights, name).shape}"
        for name, shape in wanted.items()
        if getattr(weights, name).shape != shape
    ]
    return problems + [
        f"weights.{name} must be float32 or float64, got {getattr(weights, name).dtype}"
        for name in wanted
        if getattr(weights, name).dtype not in (jnp.float32, jnp.float64)
    ]


def _streams_and_width(opened: Opened) -> tuple[int, int]:
    shape = opened.x.shape
    return (shape[1] if isinstance(opened, pallas_tpu.Open) else shape[2]), shape[3]


def _branch_problems(opened: Opened, y: Any) -> list[str]:
    if not (kinds := check_kinds({"y": y}, {})).arrays:
        return kinds.problems
    b, *inner, d = opened.x.shape
    t = inner[1] if isinstance(opened, pallas_tpu.Open) else inner[0]
    if y.shape != (b, t, d) or y.dtype != opened.x.dtype:
        return [f"y must be [b, t, d] = {(b, t, d)} in {opened.x.dtype}, got {y.shape} in {y.dtype}"]
    return []


def _chosen(x: Array, settings: Settings) -> Any:
    if settings.implementation is not None:
        return IMPLEMENTATIONS[settings.implementation]
    on_tpu = target_device()[0] == "tpu" and x.shape[1] >= WORTHWHILE
    return pallas_tpu if on_tpu and not pallas_tpu.unsupported(x.shape, x.dtype) else xla


def _of(opened: Opened, settings: Settings) -> Any:
    """The implementation that opened it."""
    if isinstance(opened, pallas_tpu.Open):
        return _INTERPRETED if settings.implementation == "pallas_tpu_interpreted" else pallas_tpu
    return reference if settings.implementation == "reference" else xla


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError("hyper_connections:\n" + "\n".join(f"  - {problem}" for problem in problems))
