"""Hyper-connections on TPU: a kernel for each of read, write, write with the next read, and for each one's gradients.

* Streams go in as [b, n, t, d], which is the layout that the compiler then gives the state [b, t, n, d]: no copy.
* A grid step is a tile of tokens with all streams and their whole width. Forward all steps are independent; backward
  they are summed into dphi and dbias, which stay in VMEM, one of each for each half of the batch: for chips whose two
  cores share a program.
* Between the backward kernels of a sublayer G, the gradient of X', goes round the branch as the gradient of the X in
  `Open`, and is what `tpu.backward` says, not the derivative: whoever took X out of an `Open` would get a wrong
  gradient. So an `Open` is used once, by `between` or `leave`, and is nobody else's business.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pallas_kernels.hyper_connections.reference import Settings, Weights
from pallas_kernels.hyper_connections.tpu import backward, cost, forward
from pallas_kernels.hyper_connections.tpu.plan import SUBLANES, TILE, VMEM_LIMIT, Plan, up
from pallas_kernels.matrix_unit import LANES

_VMEM_BLOCKS = 48 << 20  # what blocks and scratch of a backward step may take


class Open(NamedTuple):
    """A sublayer between its read and its write: X, where dH_post goes, and what is kept of every token."""

    x: Float[Array, "b n t d"]
    post: Float[Array, "b n8 tp"]
    record: Float[Array, "b r tp"]


_Entered = tuple[Array, Array, Array, Array]  # u, and the fields of `Open`


class _Call(NamedTuple):
    plan: Plan
    batch_axes: tuple[str, ...] | None
    interpret: bool | pltpu.InterpretParams


def unsupported(shape: tuple[int, ...], dtype: Any) -> list[str]:
    """What about streams [b, t, n, d] the kernels do not do, in words."""
    problems = []
    _, t, n, d = shape
    if d % LANES:
        problems.append(f"x {shape}: width {d} must be a multiple of {LANES} lanes")
    if dtype not in (jnp.float32, jnp.bfloat16):
        problems.append(f"x must be float32 or bfloat16, got {dtype}")
    if not problems:
        plan = Plan(n, d, t, 1, 0.0, 0.0, dtype == jnp.float32)
        taken = cost.block_bytes(plan)
        if taken > _VMEM_BLOCKS:
            problems.append(
                f"x {shape}: a tile of {TILE} tokens of {n} streams of {d} in {jnp.dtype(dtype)} takes "
                f"{taken / 2**20:.0f} MiB of VMEM with its gradients, at most {_VMEM_BLOCKS >> 20} fit; "
                "fewer streams, a smaller width or bfloat16 would"
            )
    return problems


def enter(
    x: Float[Array, "b t n d"], weights: Weights, settings: Settings, *, interpret: bool | pltpu.InterpretParams = False
) -> tuple[Float[Array, "b t d"], Open]:
    """The input of a sublayer's branch, and the sublayer left open for its write; see `api.enter`."""
    call = _call(x.shape, x.dtype, settings, interpret)
    u, *opened = _enter(call, jnp.swapaxes(x, 1, 2), *_lay(call.plan, weights))
    return u, Open(*opened)


def between(
    opened: Open, y: Float[Array, "b t d"], weights: Weights, settings: Settings,
    *, interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "b t d"], Open]:  # fmt: skip
    """`leave` and the next sublayer's `enter` in one pass over X."""
    call = _call(_outside(opened.x.shape), opened.x.dtype, settings, interpret)
    u, *after = _between(call, opened, y, *_lay(call.plan, weights))
    return u, Open(*after)


def leave(
    opened: Open, y: Float[Array, "b t d"], settings: Settings, *, interpret: bool | pltpu.InterpretParams = False
) -> Float[Array, "b t n d"]:
    """X' of the sublayer whose branch gave y."""
    call = _call(_outside(opened.x.shape), opened.x.dtype, settings, interpret)
    return jnp.swapaxes(_leave(call, opened, y), 1, 2)


def _outside(shape: tuple[int, ...]) -> tuple[int, ...]:
    b, n, t, d = shape
    return b, t, n, d


def _call(shape: tuple[int, ...], dtype: Any, settings: Settings, interpret: bool | pltpu.InterpretParams) -> _Call:
    problems = unsupported(shape, dtype)
    if problems:
        raise ValueError("pallas_tpu:\n" + "\n".join(f"  - {problem}" for problem in problems))
    _, t, n, d = shape
    exact, constants = dtype == jnp.float32, (settings.rounds, settings.floor, settings.epsilon)
    plan = Plan(n, d, t, *constants, exact, unrolled=not interpret)
    return _Call(plan, settings.batch_axes, interpret)


def _lay(plan: Plan, weights: Weights) -> tuple[Array, Array]:
    """phi [n, d, m] and bias [m] with numbers in whole registers: [n, packed, d], [packed, 1]."""
    past = plan.packed - plan.numbers
    phi = jnp.pad(jnp.swapaxes(weights.phi, 1, 2), ((0, 0), (0, past), (0, 0)))
    return phi, jnp.pad(weights.bias, (0, past))[:, None]


def _factors(plan: Plan, phi: Float[Array, "n packed d"]) -> Float[Array, "n phi_rows d"]:
    """phi as the matrix unit takes it: float32, or its high, low and high halves."""
    if plan.exact:
        return phi
    high = phi.astype(jnp.bfloat16)
    low = (phi - high.astype(jnp.float32)).astype(jnp.bfloat16)
    return jnp.concatenate([high, low, high], axis=1)


class _Operand(NamedTuple):
    """An operand or a result of a kernel: its shape [b or halves or none, ...], dtype and block.

    `of` says what the first axis counts: "row" of the batch, "half" of it, or "all".
    """

    shape: tuple[int, ...]
    dtype: Any
    block: tuple[int, ...]
    of: str
    tiled: int | None  # the axis cut into tiles of tokens


def _operands(plan: Plan, dtype: Any) -> dict[str, _Operand]:
    """By kind, for one row of the batch, or half."""
    n, t, d, rows, tile = plan.streams, plan.length, plan.width, plan.packed, plan.tile
    post, floats = up(n, SUBLANES), jnp.float32
    factors = jnp.dtype(floats if plan.exact else jnp.bfloat16)
    return {
        "x": _Operand((1, n, t, d), dtype, (1, n, tile, d), "row", 2),
        "y": _Operand((1, t, d), dtype, (1, tile, d), "row", 1),
        "record": _Operand((1, plan.record, plan.padded), floats, (1, plan.record, tile), "row", 2),
        "post": _Operand((1, post, plan.padded), floats, (1, post, tile), "row", 2),
        "phi": _Operand((n, plan.phi_rows, d), factors, (n, plan.phi_rows, d), "all", None),
        "bias": _Operand((rows, 1), floats, (rows, 1), "all", None),
        "d_phi": _Operand((1, n, rows, d), floats, (1, n, rows, d), "half", None),
        "d_bias": _Operand((1, rows, LANES), floats, (1, rows, LANES), "half", None),
    }


def _spec(operand: _Operand, rows: int) -> pl.BlockSpec:
    """Of a grid (half of the batch, its rows, tiles)."""

    def index(half: Any, row: Any, tile: Any) -> tuple[Any, ...]:
        first = {"row": half * rows + row, "half": half, "all": 0}[operand.of]
        return (first, *(tile if axis == operand.tiled else 0 for axis in range(1, len(operand.shape))))

    return pl.BlockSpec(operand.block, index)


_SCRATCH = {
    "columns": lambda plan: (plan.numbers + 1, plan.tile, LANES),
    "sums": lambda plan: (plan.numbers, plan.tile, LANES),
    "squares": lambda plan: (plan.tile, LANES),
    "projection": lambda plan: (plan.packed, plan.tile),
    "logits": lambda plan: (plan.rows, plan.tile),
    "gradients": lambda plan: (LANES, plan.tile),
    "kept": lambda plan: (plan.rounds, 2 * plan.streams, plan.tile),
    "stage": lambda plan: (plan.streams, plan.tile, plan.slab),
}


class Kernel(NamedTuple):
    """A body, and the kinds of its operands, results and scratch."""

    name: str
    body: Callable[..., None]
    operands: tuple[str, ...]
    results: tuple[str, ...]
    scratch: tuple[str, ...]


_READS = ("squares", "projection", "logits", "columns")
_BACK = ("columns", "sums", "gradients", "kept", "stage")
ENTER = Kernel("enter", forward.enter_kernel, ("x", "phi", "bias"), ("y", "record"), _READS)
LEAVE = Kernel("leave", forward.leave_kernel, ("x", "y", "record"), ("x",), ("columns",))
BETWEEN = Kernel(
    "between", forward.between_kernel, ("x", "y", "record", "phi", "bias"), ("x", "y", "record"), _READS
)
ENTER_BACK = Kernel(
    "enter_back", backward.enter_back_kernel, ("x", "x", "y", "record", "post", "phi", "bias"),
    ("x", "d_phi", "d_bias"), _BACK,
)  # fmt: skip
LEAVE_BACK = Kernel(
    "leave_back", backward.leave_back_kernel, ("x", "y", "record"), ("y", "post"), ("columns", "sums")
)
BETWEEN_BACK = Kernel(
    "between_back", backward.between_back_kernel,
    ("x", "x", "y", "record", "post", "phi", "bias", "y", "record"),
    ("x", "d_phi", "d_bias", "y", "post"), _BACK,
)  # fmt: skip
KERNELS = (ENTER, LEAVE, BETWEEN, ENTER_BACK, LEAVE_BACK, BETWEEN_BACK)


def _launch(call: _Call, kernel: Kernel, *arguments: Array) -> tuple[Array, ...]:
    """The kernel on each device's rows of the batch; results that are sums are those of all devices."""
    kinds = {name: operand.of for name, operand in _operands(call.plan, jnp.float32).items()}

    def spec(name: str, result: bool) -> P:
        return P() if kinds[name] == "all" or (result and kinds[name] == "half") else P(call.batch_axes)

    def local(*given: Array) -> tuple[Array, ...]:
        found = _run(call, kernel, given)
        if not call.batch_axes:
            return found
        return tuple(
            jax.lax.psum(x, call.batch_axes) if kinds[name] == "half" else x
            for name, x in zip(kernel.results, found, strict=True)
        )

    if call.batch_axes is None:
        return local(*arguments)
    specs = tuple(spec(name, result=False) for name in kernel.operands)
    out = tuple(spec(name, result=True) for name in kernel.results)
    return jax.shard_map(local, in_specs=specs, out_specs=out, check_vma=False)(*arguments)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(call: _Call, kernel: Kernel, arguments: tuple[Array, ...]) -> tuple[Array, ...]:
    """On one device."""
    plan, x = call.plan, arguments[0]
    batch = x.shape[0]
    halves = 2 if batch % 2 == 0 else 1
    kinds = _operands(plan, x.dtype)
    firsts = {"row": batch, "half": halves}
    made = [
        jax.ShapeDtypeStruct((firsts[kinds[name].of], *kinds[name].shape[1:]), kinds[name].dtype)
        for name in kernel.results
    ]
    moved: list[Any] = [*arguments, *made]
    found = pl.pallas_call(
        functools.partial(_zeroing, kernel, plan),
        grid=(halves, batch // halves, plan.tiles),
        in_specs=[_spec(kinds[name], batch // halves) for name in kernel.operands],
        out_specs=[_spec(kinds[name], batch // halves) for name in kernel.results],
        out_shape=made,
        scratch_shapes=[pltpu.VMEM(_SCRATCH[name](plan), jnp.float32) for name in kernel.scratch],
        cost_estimate=pl.CostEstimate(
            flops=round(batch * plan.length * cost.token_flops(plan, kernel.name)),
            transcendentals=batch * plan.padded * plan.numbers,
            bytes_accessed=sum(math.prod(one.shape) * one.dtype.itemsize for one in moved),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=call.interpret,
        name=f"hyper_connections_{kernel.name}",
    )(*arguments)
    return tuple(
        jnp.sum(x, axis=0) if kinds[name].of == "half" else x for name, x in zip(kernel.results, found, strict=True)
    )


def _zeroing(kernel: Kernel, plan: Plan, *refs: Any) -> None:
    """The body, with sums over the grid set to 0 at the first of their steps."""
    results = refs[len(kernel.operands) :][: len(kernel.results)]
    sums = [ref for ref, name in zip(results, kernel.results, strict=True) if name in ("d_phi", "d_bias")]

    if sums:

        @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
        def _start() -> None:
            for ref in sums:
                ref[...] = jnp.zeros_like(ref)

    kernel.body(plan, *refs)


def _slot(plan: Plan, record: Float[Array, "b r tp"]) -> Float[Array, "b n8 tp"]:
    """An array for the gradient of H_post; its own values are not read."""
    return record[:, : up(plan.streams, SUBLANES)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _enter(call: _Call, x: Array, phi: Array, bias: Array) -> _Entered:
    u, record = _launch(call, ENTER, x, _factors(call.plan, phi), bias)
    return u, x, _slot(call.plan, record), record


def _enter_forward(call: _Call, x: Array, phi: Array, bias: Array) -> tuple[_Entered, tuple[Array, ...]]:
    found = _enter(call, x, phi, bias)
    return found, (x, phi, bias, found[3])


def _enter_backward(call: _Call, saved: tuple[Array, ...], gradients: tuple[Array, ...]) -> tuple[Array, ...]:
    x, phi, bias, record = saved
    g_u, g, d_post, _ = gradients
    dx, d_phi, d_bias = _launch(call, ENTER_BACK, x, g, g_u, record, d_post, _factors(call.plan, phi), bias)
    return dx, d_phi, jnp.sum(d_bias, axis=1, keepdims=True)


_enter.defvjp(_enter_forward, _enter_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _between(call: _Call, opened: Open, y: Array, phi: Array, bias: Array) -> _Entered:
    after, u, record = _launch(call, BETWEEN, opened.x, y, opened.record, _factors(call.plan, phi), bias)
    return u, after, _slot(call.plan, record), record


def _between_forward(
    call: _Call, opened: Open, y: Array, phi: Array, bias: Array
) -> tuple[_Entered, tuple[Array, ...]]:
    found = _between(call, opened, y, phi, bias)
    return found, (found[1], y, opened.record, found[3], phi, bias)


def _between_backward(
    call: _Call, saved: tuple[Array, ...], gradients: tuple[Array, ...]
) -> tuple[Open, Array, Array, Array]:
    after, y, before, record, phi, bias = saved
    g_u, g, d_post, _ = gradients
    dx, d_phi, d_bias, dy, d_post_before = _launch(
        call, BETWEEN_BACK, after, g, g_u, record, d_post, _factors(call.plan, phi), bias, y, before)
    gradient = Open(dx, d_post_before, jnp.zeros_like(before))
    return gradient, dy, d_phi, jnp.sum(d_bias, axis=1, keepdims=True)


_between.defvjp(_between_forward, _between_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _leave(call: _Call, opened: Open, y: Array) -> Array:
    return _launch(call, LEAVE, opened.x, y, opened.record)[0]


def _leave_forward(call: _Call, opened: Open, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return _leave(call, opened, y), (opened.record, y)


def _leave_backward(call: _Call, saved: tuple[Array, Array], g: Array) -> tuple[Open, Array]:
    record, y = saved
    dy, d_post = _launch(call, LEAVE_BACK, g, y, record)
    return Open(g, d_post, jnp.zeros_like(record)), dy


_leave.defvjp(_leave_forward, _leave_backward)
