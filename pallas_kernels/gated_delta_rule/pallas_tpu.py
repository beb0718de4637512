"""The gated delta rule on TPU: two Pallas kernels, forward and backward, under one `custom_vjp`.

* Grid (batch, steps of up to 32 value heads, chunks); chunks in order, or in reverse order in the backward kernel, with
  the states, or their gradients, in VMEM between them: in the block of the result, which leaves at the end.
* The equations stand in `tpu.forward` and `tpu.backward`; how heads share registers and matrix products in `tpu.packs`.
* A few tokens are `tpu.decode`'s.
* Saved for the backward pass, by name for checkpoint policies: the states before the chunks, and A^T, in the dtype of
  the inputs. What is computed again costs less than to load it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.gated_delta_rule.common.chunks import runs
from pallas_kernels.gated_delta_rule.tpu import layout as layout
from pallas_kernels.gated_delta_rule.tpu.backward import backward_kernel
from pallas_kernels.gated_delta_rule.tpu.cost import estimate
from pallas_kernels.gated_delta_rule.tpu.forward import forward_kernel
from pallas_kernels.gated_delta_rule.tpu.packs import Plan
from pallas_kernels.gated_delta_rule.xla import SAVED_NAMES
from pallas_kernels.platform import matrix_unit_width, target_device

CHUNK_SIZES = (64, 128)
WIDEST = 256


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
    interpret: bool | pltpu.InterpretParams = False,
    heads_per_step: int | None = None,
    matrix_unit: int | None = None,
) -> tuple[Float[Array, "b t hv v"], Float[Array, "b hv k v"]]:
    """The outputs and the last state, differentiable.

    Args as of the other implementations, and: `most_beta` is what beta never exceeds; above 1 the inverse cancels, and
    bfloat16 arguments are computed, and saved, as float32 ones are. `interpret` runs the kernels on any machine,
    slowly; `heads_per_step` bounds the value heads of a grid step; `matrix_unit` is the width of the chip's, None that
    of the target.

    Raises:
        ValueError: listing what these kernels do not do.
    """
    problems = unsupported(q, k, v, chunk_size)
    if problems:
        raise ValueError("pallas_tpu:\n" + "\n".join(f"  - {problem}" for problem in problems))
    run = None if segment_ids is None else runs(segment_ids, chunk_size)
    matrix_unit = matrix_unit or matrix_unit_width(target_device()[1])
    exact = most_beta > 1 or any(x.dtype != jnp.bfloat16 for x in (q, k, v))
    plan = layout.make_plan(q, v, chunk_size, scale, exact, run is not None, matrix_unit, heads_per_step)
    call = _Call(plan, interpret)
    return _rule(call, (q, k, v, g, beta), initial_state.astype(jnp.float32), run)


def unsupported(q: Array, k: Array, v: Array, chunk_size: int) -> list[str]:
    """What about these arguments the kernels do not do, in words; nothing of it is checked when they run."""
    problems = []
    if chunk_size not in CHUNK_SIZES:
        problems.append(f"chunk_size {chunk_size} must be one of {', '.join(map(str, CHUNK_SIZES))}")
    for name, x in (("k", k), ("v", v)):
        if x.shape[-1] > WIDEST:
            problems.append(f"{name} {x.shape} is wider than {WIDEST} a head")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            problems.append(f"{name} must be float32 or bfloat16, got {x.dtype}")
    return problems


class _Call(NamedTuple):
    plan: Plan
    interpret: bool | pltpu.InterpretParams

    @property
    def dtype(self) -> jnp.dtype:
        """Of tokens in the kernels, and of what is saved."""
        return jnp.dtype(jnp.float32 if self.plan.exact else jnp.bfloat16)


@dataclass(frozen=True)
class _Specs:
    """Blocks of one grid step (row of the batch, heads, chunk)."""

    key: pl.BlockSpec
    value: pl.BlockSpec
    columns: pl.BlockSpec
    rows: pl.BlockSpec
    runs: list[pl.BlockSpec]
    state: pl.BlockSpec
    states: pl.BlockSpec
    inverse: pl.BlockSpec
    d_gates: pl.BlockSpec


def _specs(plan: Plan, count: int, reverse: bool) -> _Specs:
    def at(i: Any) -> Any:
        return count - 1 - i if reverse else i

    def gates(*block: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, 1, *block), lambda b, h, i: (b, h, at(i), 0, 0))

    def tokens(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, plan.chunk, width), lambda b, h, i: (b, at(i), h))

    def per_chunk(*block: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, plan.packs, *block), lambda b, h, i: (b, at(i), h, 0, 0))

    lanes, columns = plan.pack * plan.chunk, len(plan.gates)
    state = (plan.key_width, plan.value_width) if reverse else (plan.value_width, plan.key_width)
    counts = [pl.BlockSpec((1, 1, *block), lambda b, h, i: (b, at(i), 0, 0)) for block in ((plan.chunk, 1), (1, lanes))]
    return _Specs(
        key=tokens(plan.key_heads * plan.key_width),
        value=tokens(plan.heads * plan.value_width),
        columns=gates(plan.chunk, columns * plan.heads),
        rows=gates(columns * plan.packs, lanes),
        runs=counts if plan.segmented else [],
        state=pl.BlockSpec((1, plan.heads, *state), lambda b, h, i: (b, h, 0, 0)),
        states=per_chunk(plan.key_width, plan.pack * plan.value_width),
        inverse=per_chunk(plan.chunk, lanes),
        d_gates=gates(plan.chunk, 2 * plan.heads),
    )


def _launch(
    call: _Call, kernel: Callable[..., None], backward: bool, count: int, operands: list[Array], in_specs: list[Any],
    results: list[tuple[tuple[int, ...], Any]], out_specs: list[Any],
) -> tuple[Array, ...]:  # fmt: skip
    plan, q, v = call.plan, operands[0], operands[2]
    grid = (q.shape[0], v.shape[2] // (plan.heads * plan.value_width), count)
    made = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=made,
        cost_estimate=estimate(plan, backward, grid[0] * count, grid[1], [*operands, *made]),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=layout.VMEM_LIMIT
        ),
        interpret=call.interpret,
        name=f"gated_delta_rule_{'backward' if backward else 'forward'}",
    )(*operands)


class _Operands(NamedTuple):
    """The arguments as both kernels take them."""

    arrays: list[Array]
    specs: list[Any]


def _operands(call: _Call, arguments: tuple[Array, ...], run: Array | None, specs: _Specs) -> _Operands:
    q, k, v, g, beta = arguments
    tokens = [layout.lay_tokens(x, call.plan.chunk, call.dtype) for x in (q, k, v)]
    gates = layout.lay_gates(call.plan, g, beta, run)
    counted = [] if run is None else layout.lay_runs(call.plan, run)
    in_specs = [specs.key, specs.key, specs.value, specs.columns, specs.rows, *specs.runs]
    return _Operands([*tokens, *gates, *counted], in_specs)


@functools.partial(jax.jit, static_argnums=(0, 4))  # a kernel nobody reads falls away only with a call around it
def _forward(
    call: _Call, arguments: tuple[Array, ...], initial: Array, run: Array | None, saving: bool
) -> tuple[Array, Array, list[Array]]:
    """Outputs, last state, and what the backward pass needs: S [b, n, packs, k, p v], A^T [b, n, packs, C, p C]."""
    plan, q, v = call.plan, arguments[0], arguments[2]
    count = -(-q.shape[1] // plan.chunk)
    specs = _specs(plan, count, reverse=False)
    x = _operands(call, arguments, run, specs)
    state, packs = layout.lay_state(initial).swapaxes(2, 3), v.shape[2] // plan.pack  # the forward kernel's are S^T
    results = [(x.arrays[2].shape, v.dtype), (state.shape, jnp.float32)]
    out_specs = [specs.value, specs.state]
    if saving:
        shapes = [(plan.key_width, plan.pack * plan.value_width), (plan.chunk, plan.pack * plan.chunk)]
        results += [((q.shape[0], count, packs, *shape), call.dtype) for shape in shapes]
        out_specs += [specs.states, specs.inverse]
    output, final, *saved = _launch(
        call, functools.partial(forward_kernel, plan, saving), False, count,
        [*x.arrays, state], [*x.specs, specs.state], results, out_specs,
    )  # fmt: skip
    return layout.take_tokens(output, v), layout.take_state(final.swapaxes(2, 3), initial), saved


@functools.partial(jax.jit, static_argnums=0)
def _backward(
    call: _Call, arguments: tuple[Array, ...], run: Array | None, saved: list[Array], d_output: Array, d_final: Array
) -> tuple[tuple[Array, ...], Array]:
    """Gradients of the five arguments and of the initial state."""
    plan, (q, k, v, g, beta) = call.plan, arguments
    count = -(-q.shape[1] // plan.chunk)
    specs = _specs(plan, count, reverse=True)
    x = _operands(call, arguments, run, specs)
    d_state, d_o = layout.lay_state(d_final), layout.lay_tokens(d_output, plan.chunk, call.dtype)
    steps = v.shape[2] // plan.heads
    tokens = [(array.shape, like.dtype) for array, like in zip(x.arrays[:3], (q, k, v), strict=True)]
    gates = (q.shape[0], steps, count, plan.chunk, 2 * plan.heads)
    d_q, d_k, d_v, d_gates, d_initial = _launch(
        call, functools.partial(backward_kernel, plan), True, count,
        [*x.arrays, *saved, d_o, d_state], [*x.specs, specs.states, specs.inverse, specs.value, specs.state],
        [*tokens, (gates, jnp.float32), (d_state.shape, jnp.float32)],
        [specs.key, specs.key, specs.value, specs.d_gates, specs.state],
    )  # fmt: skip
    d_g, d_beta = layout.take_gates(plan, d_gates, q.shape[1])
    of_tokens = [layout.take_tokens(d, like) for d, like in zip((d_q, d_k, d_v), (q, k, v), strict=True)]
    gradients = (*of_tokens, d_g.astype(g.dtype), d_beta.astype(beta.dtype))
    return gradients, layout.take_state(d_initial, d_final)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(call: _Call, arguments: tuple[Array, ...], initial: Array, run: Array | None) -> tuple[Array, Array]:
    """The rule on (q, k, v, g, beta), with `run` counting the segment starts."""
    return _forward(call, arguments, initial, run, saving=False)[:2]


def _rule_forward(
    call: _Call, arguments: tuple[Array, ...], initial: Array, run: Array | None
) -> tuple[tuple[Array, Array], tuple]:
    output, final, saved = _forward(call, arguments, initial, run, saving=True)
    output, *saved = (checkpoint_name(x, name) for x, name in zip((output, *saved), SAVED_NAMES, strict=True))
    return (output, final), (arguments, run, saved)


def _rule_backward(
    call: _Call, residuals: tuple, cotangents: tuple[Array, Array]
) -> tuple[tuple[Array, ...], Array, None]:
    arguments, run, saved = residuals
    gradients, d_initial = _backward(call, arguments, run, saved, *cotangents)
    return gradients, d_initial, None


_rule.defvjp(_rule_forward, _rule_backward)
