"""The gated delta rule on Hopper (compute capability 9.0): Mosaic GPU kernels under one `custom_vjp`.

* Forward: `gpu.inside` makes each chunk's inverse and scores, all chunks at once; `gpu.across` walks over the chunks.
* Backward: `gpu.back` walks back, `gpu.gradients` makes the rest, all chunks at once; where these are not for the
  widths or the precision (`gpu.plan.has_backward`), XLA goes back from what the forward pass saved.
* Saved, by name for checkpoint policies: the states before the chunks, the inverses and scores.
* `gpu.plan` says what the products round, and what fits.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.gated_delta_rule import xla
from pallas_kernels.gated_delta_rule.common.chunks import pad_tokens, runs
from pallas_kernels.gated_delta_rule.gpu import layout
from pallas_kernels.gated_delta_rule.gpu.plan import (
    WIDEST,
    C,
    Plan,
    has_backward,
    padded_key_width,
    padded_value_width,
    too_large,
    with_stages,
)
from pallas_kernels.ptxas import find_ptxas

LEAST_JAX = (0, 12)
_SAVED = ("delta_rule_states", "delta_rule_inverse", "delta_rule_inverse")


def gated_delta_rule(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t hv v"],
    g: Float[Array, "b t hv"],
    beta: Float[Array, "b t hv"],
    initial_state: Float[Array, "b hv k v"],
    segment_ids: Int[Array, "b t"] | None,
    scale: float,
    chunk_size: int,
    *,
    most_beta: float = 2.0,
    interpret: bool = False,
) -> tuple[Float[Array, "b t hv v"], Float[Array, "b hv k v"]]:
    """The outputs and the last state, differentiable.

    Args as of the other implementations, and: `most_beta` is what beta never exceeds; at most 1 spares the products
    that keep a cancelling inverse exact. `interpret` runs the kernels on any machine, slowly.

    Raises:
        ValueError: listing what these kernels do not do.
    """
    problems = unsupported(q, k, v, chunk_size) + missing(interpret)
    if problems:
        raise ValueError("pallas_gpu:\n" + "\n".join(f"  - {problem}" for problem in problems))
    run = None if segment_ids is None else runs(segment_ids, C)
    plan = make_plan(q, k, v, scale, fine=most_beta > 1, segmented=run is not None, interpreted=interpret)
    return _rule(plan, (q, k, v, g, beta), initial_state.astype(jnp.float32), run)


def make_plan(
    q: Array, k: Array, v: Array, scale: float, *, fine: bool, segmented: bool = False, interpreted: bool = False
) -> Plan:
    """What the kernels are compiled for."""
    exact = any(x.dtype != jnp.bfloat16 for x in (q, k, v))
    widths = padded_key_width(k.shape[3]), padded_value_width(v.shape[3])
    return with_stages(Plan(*widths, v.shape[2] // q.shape[2], scale, fine, exact, segmented, interpreted))


def unsupported(q: Array, k: Array, v: Array, chunk_size: int) -> list[str]:
    """What about these arguments the kernels do not do, in words; nothing of it is checked when they run."""
    problems = []
    if chunk_size != C:
        problems.append(f"chunk_size {chunk_size} must be {C}")
    for name, x in (("k", k), ("v", v)):
        if x.shape[-1] > WIDEST:
            problems.append(f"{name} {x.shape} is wider than {WIDEST} a head")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            problems.append(f"{name} must be float32 or bfloat16, got {x.dtype}")
    return problems or too_large(make_plan(q, k, v, 1.0, fine=True))


def missing(interpret: bool = False) -> list[str]:
    """What this installation lacks to compile the kernels, or to interpret them, and what would be right."""
    problems = []
    if jax.__version_info__[:2] < LEAST_JAX:
        least = ".".join(map(str, LEAST_JAX))
        problems.append(f"JAX {jax.__version__} is too old: these kernels need {least} or newer")
    if not interpret and not find_ptxas():
        problems.append("there is no ptxas: install nvidia-cuda-nvcc, as jax[cuda13] does, or put CUDA's on the PATH")
    return problems


class _Laid(NamedTuple):
    """The arguments as the kernels take them."""

    q: Array
    k: Array
    v: Array
    gates: layout.Gates


def _lay(plan: Plan, arguments: tuple[Array, ...], run: Array | None) -> _Laid:
    q, k, v, g, beta = arguments
    return _Laid(
        layout.lay_tokens(q, plan.key_width, plan.token_parts),
        layout.lay_tokens(k, plan.key_width, plan.token_parts),
        layout.lay_tokens(v, plan.value_width, plan.token_parts),
        layout.lay_gates(g, beta, run, plan.exact),
    )


@functools.partial(jax.jit, static_argnums=(0, 4))
def _forward(
    plan: Plan, arguments: tuple[Array, ...], initial: Array, run: Array | None, saving: bool
) -> tuple[Array, Array, tuple[Array, ...]]:
    """Outputs, last state, and what the backward pass needs: S^T, A and P of every chunk, in parts."""
    from pallas_kernels.gated_delta_rule.gpu.across import across  # Mosaic GPU takes a second to import
    from pallas_kernels.gated_delta_rule.gpu.inside import inside

    x, v = _lay(plan, arguments, run), arguments[2]
    inverse, scores = inside(plan, x.q, x.k, x.gates.sums, x.gates.gates[:, :, 2], run)
    state = layout.lay_state(initial, plan.key_width, plan.value_width)
    output, final, states = across(plan, x.q, x.k, x.v, inverse, scores, x.gates.gates, state, v.dtype, saving)
    return layout.take_tokens(output, v), layout.take_state(final, initial), (states, inverse, scores)


@functools.partial(jax.jit, static_argnums=0)
def _backward(
    plan: Plan, arguments: tuple[Array, ...], run: Array | None, saved: tuple[Array, ...], d_output: Array,
    d_final: Array,
) -> tuple[tuple[Array, ...], Array]:  # fmt: skip
    """Gradients of the five arguments and of the initial state."""
    from pallas_kernels.gated_delta_rule.gpu.back import back
    from pallas_kernels.gated_delta_rule.gpu.gradients import gradients

    if not has_backward(plan):
        return _backward_by_scan(plan, arguments, run, saved, d_output, d_final)
    (q, k, v, g, beta), (states, inverse, scores) = arguments, saved
    x = _lay(plan, arguments, run)
    d_o = layout.lay_tokens(d_output, plan.value_width, plan.token_parts)
    end = layout.lay_state(d_final, plan.key_width, plan.value_width)
    y, ends, d_initial = back(plan, x.q, x.k, d_o, inverse, scores, x.gates.gates, end)
    d_q, d_k, d_v, sums = gradients(
        plan, (x.q, x.k, x.v, d_o, y), states, ends, inverse, x.gates.gates, x.gates.sums, run
    )
    d_g, d_beta = layout.take_gates(sums, x.gates.gates, run, g.shape[1])
    of_tokens = (layout.take_tokens(layout.gather(d, like), like) for d, like in ((d_q, q), (d_k, k), (d_v, v)))
    return (*of_tokens, d_g.astype(g.dtype), d_beta.astype(beta.dtype)), layout.take_state(d_initial, d_final)


def _backward_by_scan(
    plan: Plan, arguments: tuple[Array, ...], run: Array | None, saved: tuple[Array, ...], d_output: Array,
    d_final: Array,
) -> tuple[tuple[Array, ...], Array]:  # fmt: skip
    """The same by the XLA implementation: for widths whose kernels do not fit."""
    k, v = arguments[1:3]
    states, inverse = (jnp.moveaxis(x.astype(jnp.float32).sum(0), 2, 0) for x in saved[:2])
    states = states.swapaxes(3, 4)[..., : k.shape[3], : v.shape[3]]
    padded = tuple(pad_tokens(x, C) for x in arguments)
    found, d_initial = xla.backward(plan.scale, C, padded, run, (states, inverse), pad_tokens(d_output, C), d_final)
    return tuple(d[:, : v.shape[1]] for d in found), d_initial


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(plan: Plan, arguments: tuple[Array, ...], initial: Array, run: Array | None) -> tuple[Array, Array]:
    """The rule on (q, k, v, g, beta), with `run` counting the segment starts."""
    return _forward(plan, arguments, initial, run, saving=False)[:2]


def _rule_forward(
    plan: Plan, arguments: tuple[Array, ...], initial: Array, run: Array | None
) -> tuple[tuple[Array, Array], tuple]:
    output, final, saved = _forward(plan, arguments, initial, run, saving=True)
    output = checkpoint_name(output, xla.SAVED_NAMES[0])
    saved = tuple(checkpoint_name(x, name) for x, name in zip(saved, _SAVED, strict=True))
    return (output, final), (arguments, run, saved)


def _rule_backward(
    plan: Plan, residuals: tuple, cotangents: tuple[Array, Array]
) -> tuple[tuple[Array, ...], Array, None]:
    arguments, run, saved = residuals
    gradients, d_initial = _backward(plan, arguments, run, saved, *cotangents)
    return gradients, d_initial, None


_rule.defvjp(_rule_forward, _rule_backward)
