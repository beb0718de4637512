"""The public face of the gated delta rule: arguments are checked here, the work is done by an implementation."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, Float, Int

from pallas_kernels.arguments import check_kinds
from pallas_kernels.gated_delta_rule import pallas_gpu, pallas_tpu, reference, xla
from pallas_kernels.gated_delta_rule.reference import gated_delta_rule_step as _step
from pallas_kernels.gated_delta_rule.tpu import decode
from pallas_kernels.platform import compute_capability, target_device

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "reference": reference.gated_delta_rule,
    "xla": xla.gated_delta_rule,
    "pallas_tpu": pallas_tpu.gated_delta_rule,
    "pallas_tpu_decode": decode.gated_delta_rule,
    "pallas_gpu": pallas_gpu.gated_delta_rule,
    "pallas_tpu_interpreted": functools.partial(pallas_tpu.gated_delta_rule, interpret=True),  # as plain JAX, slowly
    "pallas_tpu_decode_interpreted": functools.partial(decode.gated_delta_rule, interpret=True),
    "pallas_gpu_interpreted": functools.partial(pallas_gpu.gated_delta_rule, interpret=True),
}
_ONLY = {"pallas_tpu": "tpu", "pallas_tpu_decode": "tpu", "pallas_gpu": "gpu"}
_HOPPER = "9.0"
MOST_BETA = 2.0  # I - beta k k^T turns no unit key into a longer one


def gated_delta_rule(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t hv v"],
    g: Float[Array, "b t hv"],
    beta: Float[Array, "b t hv"],
    *,
    initial_state: Float[Array, "b hv k v"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    scale: float | None = None,
    chunk_size: int = 64,
    return_state: bool = False,
    implementation: str | None = None,
    most_beta: float = MOST_BETA,
    debug: bool = False,
) -> Float[Array, "b t hv v"] | tuple[Float[Array, "b t hv v"], Float[Array, "b hv k v"]]:
    """Gated delta rule over a whole sequence: a linear-attention state that decays and corrects itself.

    Per token S <- e^g S;  S <- S + beta k (v - S^T k)^T;  o = scale S^T q.  Differentiable in reverse mode, in all
    array arguments and through both results.

    Args:
        q: queries, float32 or bfloat16 (or float64; the state then has it too).
        k: keys, normalised by the caller.
        v: values; hv is a multiple of h, consecutive value heads share one query/key head.
        g: log decay, at most 0.
        beta: writing strength in [0, 2].
        initial_state: float32, what the segment of the first token starts from; None is zeros.
        segment_ids: the state is emptied wherever the id differs from that of the token before.
        scale: of the read; None is k^-0.5.
        chunk_size: tokens a chunk of the chunked implementations, a power of two; 32 is as fast for heads of 32.
        return_state: also return the float32 state after the last token.
        implementation: a name out of `IMPLEMENTATIONS`; None is the best one for the platform and the length: when
            compiling for a TPU, or in bfloat16 for a GPU of compute capability 9.0, the Pallas kernels, if they take
            these arguments, and XLA otherwise. For a topology that is not here the trace must stand in `shard_map` or
            under `jax.set_mesh` of its devices. The one for up to 8 tokens on a TPU writes the state where
            `initial_state` was: donate it, or carry it through the loop.
        most_beta: what beta never exceeds, by the caller's word; at most 1 spares the kernels the passes that keep a
            cancelling inverse exact.
        debug: also look at the values, of g and beta, as `check_values` does.

    Returns:
        o in v's dtype, or (o, state).

    Raises:
        ValueError: listing every argument that does not fit, with what would.

    Source: arXiv 2412.06464, equation 10; the chunk form is section 3.3 there.
    """
    check_arguments(q, k, v, g, beta, initial_state, segment_ids, chunk_size, implementation)
    if debug:
        check_values(g, beta)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if initial_state is None:
        shape = (v.shape[0], v.shape[2], q.shape[3], v.shape[3])
        initial_state = jnp.zeros(shape, jnp.promote_types(q.dtype, jnp.float32))
    chosen = implementation or _best(q, k, v, chunk_size)
    if implementation is None and chosen == "xla" and q.shape[1] == 1:
        token, state = _step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], initial_state, scale)
        output = token[:, None]
    else:
        run = IMPLEMENTATIONS[chosen]
        if chosen.startswith("pallas") and "decode" not in chosen:
            run = functools.partial(run, most_beta=most_beta)
        output, state = run(q, k, v, g, beta, initial_state, segment_ids, scale, chunk_size)
    return (output, state) if return_state else output


def _best(q: Array, k: Array, v: Array, chunk_size: int) -> str:
    if target_device()[0] == "tpu":
        if q.shape[1] <= decode.WORTHWHILE and not decode.unsupported(q, k, v):
            return "pallas_tpu_decode"
        if not pallas_tpu.unsupported(q, k, v, chunk_size):
            return "pallas_tpu"
    if target_device()[0] == "gpu" and q.shape[1] > 1:
        problems = _of_the_card() + pallas_gpu.missing() + pallas_gpu.unsupported(q, k, v, chunk_size)
        if any(x.dtype == jnp.float32 for x in (q, k, v)):
            problems.append("float32 tokens, which XLA multiplies in full; bfloat16 ones have a kernel")
        if not problems:
            return "pallas_gpu"
        _say_once("; ".join(problems))
    return "xla"


def _of_the_card() -> list[str]:
    found = compute_capability()
    if found == _HOPPER:
        return []
    card = f"{target_device()[1]}{'' if found is None else f' of compute capability {found}'}"
    return [f"this is for {card}, the kernels are for {_HOPPER} (H100, H200, GH200)"]


@functools.cache
def _say_once(reasons: str) -> None:
    logging.getLogger(__name__).warning("gated_delta_rule takes the XLA path on this GPU: %s", reasons)


def gated_delta_rule_step(
    q: Float[Array, "b h k"],
    k: Float[Array, "b h k"],
    v: Float[Array, "b hv v"],
    g: Float[Array, "b hv"],
    beta: Float[Array, "b hv"],
    state: Float[Array, "b hv k v"],
    scale: float | None = None,
) -> tuple[Float[Array, "b hv v"], Float[Array, "b hv k v"]]:
    """One token of `gated_delta_rule`, for generation: returns o in v's dtype and the float32 state after it.

    S <- e^g S;  S <- S + beta k (v - S^T k)^T;  o = scale S^T q.  Raises ValueError listing every argument that does
    not fit. Source: arXiv 2412.06464, equation 10.
    """
    given = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    _raise(check_kinds(given, {}).problems)
    tokens = [x[:, None] for x in given.values()]
    output, state = gated_delta_rule(*tokens, initial_state=state, scale=scale, return_state=True)
    return output[:, 0], state


def check_arguments(
    q: Float[Array, "..."],
    k: Float[Array, "..."],
    v: Float[Array, "..."],
    g: Float[Array, "..."],
    beta: Float[Array, "..."],
    initial_state: Float[Array, "..."] | None = None,
    segment_ids: Int[Array, "..."] | None = None,
    chunk_size: int = 64,
    implementation: str | None = None,
) -> None:
    """Raise one ValueError that lists every argument of `gated_delta_rule` that does not fit."""
    problems = []
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        problems.append(f"implementation {implementation!r} is not available, there are {', '.join(IMPLEMENTATIONS)}")
    elif implementation is not None:
        problems += _platform_problems(implementation)
    if not isinstance(chunk_size, int) or chunk_size < 1 or chunk_size & (chunk_size - 1):
        problems.append(f"chunk_size {chunk_size} must be a power of two")
    kinds = check_kinds({"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": initial_state},
                        {"segment_ids": segment_ids})  # fmt: skip
    problems += kinds.problems
    if not kinds.arrays:
        _raise(problems)
    if q.ndim != 4 or v.ndim != 4:
        problems.append(f"q must be [b, t, h, k] and v [b, t, hv, v], got {q.shape} and {v.shape}")
    else:
        problems += _shape_problems(q, k, v, g, beta, initial_state, segment_ids)
        if implementation in ("pallas_tpu", "pallas_tpu_interpreted"):
            problems += pallas_tpu.unsupported(q, k, v, chunk_size)
        elif implementation in ("pallas_tpu_decode", "pallas_tpu_decode_interpreted"):
            problems += decode.unsupported(q, k, v)
        elif implementation in ("pallas_gpu", "pallas_gpu_interpreted"):
            problems += pallas_gpu.unsupported(q, k, v, chunk_size)
    _raise(problems)


def _platform_problems(implementation: str) -> list[str]:
    platform, needed = target_device()[0], _ONLY.get(implementation)
    if needed in (None, platform):
        if implementation == "pallas_gpu":
            return _of_the_card() + pallas_gpu.missing()
        return pallas_gpu.missing(interpret=True) if implementation == "pallas_gpu_interpreted" else []
    others = ", ".join(name for name in IMPLEMENTATIONS if _ONLY.get(name) in (None, platform))
    return [f"implementation {implementation!r} needs a {needed.upper()}, this is for {platform}, where there are "
            f"{others}"]  # fmt: skip


def check_values(g: Float[Array, "b t hv"], beta: Float[Array, "b t hv"]) -> None:
    """Raise a ValueError if g is anywhere above 0, or beta outside [0, 2]: such a state grows without bound.

    It names the first offending value. beta = 0 is allowed: a token that writes nothing, as padding is. Inside `jit`
    the checks are those of `checkify`: transform the whole function with `jax.experimental.checkify.checkify` and call
    `throw()` on the error that it returns, which raises a ValueError.
    """
    checks = [
        ("g", g, g <= 0, "a log decay is at most 0"),
        ("beta", beta, (beta >= 0) & (beta <= MOST_BETA), f"it must be in [0, {MOST_BETA:g}]"),
    ]
    if not any(isinstance(x, jax.core.Tracer) for x in (g, beta)):
        _raise([_first_offence(*check) for check in checks if not np.all(check[2])])
        return
    for name, x, right, rule in checks:
        first = jnp.argmax(~right)
        checkify.check(
            jnp.all(right),
            f"gated_delta_rule: {name} {x.shape} is {{value}} at {{index}}, counted through; {rule}",
            value=x.reshape(-1)[first].astype(jnp.float32),
            index=first,
        )


def _first_offence(name: str, x: Array, right: Array, rule: str) -> str:
    at = tuple(int(i) for i in np.argwhere(~np.asarray(right))[0])
    return f"{name} {x.shape} is {float(x[at]):g} at {at}; {rule}"


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError("gated_delta_rule:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _shape_problems(
    q: Array, k: Array, v: Array, g: Array, beta: Array, initial_state: Array | None, segment_ids: Array | None
) -> list[str]:
    batch, length, heads, key_width = q.shape
    value_heads, value_width = v.shape[2:]
    expected = [
        ("k", k, "b, t, h, k", q.shape),
        ("v", v, "b, t, hv, v", (batch, length, value_heads, value_width)),
        ("g", g, "b, t, hv", (batch, length, value_heads)),
        ("beta", beta, "b, t, hv", (batch, length, value_heads)),
        ("initial_state", initial_state, "b, hv, k, v", (batch, value_heads, key_width, value_width)),
        ("segment_ids", segment_ids, "b, t", (batch, length)),
    ]
    problems = [
        f"{name} must be [{letters}] = {shape}, got {array.shape}"
        for name, array, letters, shape in expected
        if array is not None and array.shape != shape
    ]
    if length < 1:
        problems.append(f"q must have at least one token, got {q.shape}")
    if heads < 1 or value_heads < 1 or value_heads % heads:
        problems.append(f"value heads must be a multiple of query/key heads, got {value_heads} and {heads}")
    return problems
