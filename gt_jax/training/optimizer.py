"""AdamW with warm-up and cosine or WSD decay, gradient clipping, and a group of their own for scalars.

- Matrices are decayed; gains, norms, biases, convolutions and other vectors are not, nor are the gates: what says of a
  head or a token how much it writes, keeps, reads or goes on (beta, decay, the read of a state, halting, exit, memory).
  The router and the coefficients of hyper-connections choose among several; they are matrices.
- The learning rate goes by the step, as the phases of the price do, also after a step that was not applied; the bias
  correction of the moments goes by the updates they have seen.
- Moments are float32. Of weights stored in bfloat16 a float32 copy is kept beside them and moved in their place: most
  steps are smaller than half the distance between two bfloat16 numbers, and would be lost.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.typing import Tree


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then cosine to `final` of the peak, or constant with a linear fall over the last `decay`."""
    peak, (warm, top, down) = config.learning_rate, config.boundaries(steps)
    rise = optax.linear_schedule(peak / warm, peak, warm)
    if config.schedule == "cosine":
        return optax.join_schedules([rise, optax.cosine_decay_schedule(peak, down, config.final)], [warm])
    fall = optax.linear_schedule(peak, peak * config.final, down)
    return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warm, top])


GATES = ("halting", "exit", "memory", "beta", "decay", "state_gate")


def is_scalar(path: str) -> bool:
    """Whether a parameter moves with the scalars: all but tables and the `w` of what is no gate or convolution."""
    parts = path.split("/")
    small = any(part.endswith("_conv") or part in GATES for part in parts)
    return parts[-1] not in ("w", "table") or small


def groups(params: Tree) -> Tree:
    """ "matrix", "scalar" or "residual_scale" for every leaf."""

    def group(path: tuple, _: object) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("/residual_scale"):
            return "residual_scale"
        return "scalar" if is_scalar(name) else "matrix"

    return jax.tree_util.tree_map_with_path(group, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW on matrices and Adam on scalars, those of the lambda stack's residual slower."""
    rate = learning_rate(config, steps)

    def scalar_rate(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        return config.scalar_scale * rate(step)

    inner = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.partition(
            {
                "matrix": optax.adamw(rate, config.b1, config.b2, weight_decay=config.weight_decay),
                "scalar": optax.adam(scalar_rate, config.b1, config.b2),
                # a of the lambda stack acts on the whole stream: 1/100 of the rate of b (modded-nanogpt PR 159)
                "residual_scale": optax.adam(lambda step: 0.01 * scalar_rate(step), config.b1, config.b2),
            },
            groups,
        ),
    )
    return in_float32(with_halting_scaled(inner, config.halting_scale))


def with_halting_scaled(inner: optax.GradientTransformation, scale: float) -> optax.GradientTransformation:
    """`inner`, its updates of halting heads times `scale`; its state as it is."""

    def one(path: tuple, update: Any) -> Any:
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return scale * update if "halting" in parts else update

    def update(gradients: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        updates, moved = inner.update(gradients, state, params)
        return jax.tree_util.tree_map_with_path(one, updates), moved

    return inner if scale == 1 else optax.GradientTransformation(inner.init, update)


def at_step(state: Any, step: Array) -> Any:
    """The optimizer's state with the count of its schedules at `step`, which runs on where an update was skipped."""
    scheduled = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
    return jax.tree.map(lambda node: node._replace(count=step) if scheduled(node) else node, state, is_leaf=scheduled)


class Float32State(NamedTuple):
    """The state of the optimizer inside, and a float32 copy of each narrower weight, `MaskedNode` for the others."""

    inner: Any
    copies: Tree


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on float32 weights: w32 <- w32 + update(g32, w32), w = w32 rounded to the dtype of w.

    Where all weights are float32 it is `inner`, its state included.
    """

    def init(params: Tree) -> Any:
        if not any(_narrow(leaf) for leaf in jax.tree.leaves(params)):
            return inner.init(params)
        copies = jax.tree.map(lambda p: p.astype(jnp.float32) if _narrow(p) else optax.MaskedNode(), params)
        return Float32State(inner.init(_whole(params, copies)), copies)

    def update(gradients: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        if not isinstance(state, Float32State):
            return inner.update(gradients, state, params)
        wide = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
        whole = _whole(params, state.copies)
        updates, moved = inner.update(wide, state.inner, whole)
        new = optax.apply_updates(whole, updates)
        # the difference of two near bfloat16 numbers is exact in float32: w + step is the rounded copy, bit for bit
        steps = jax.tree.map(
            lambda w, p, u: w.astype(p.dtype).astype(jnp.float32) - p.astype(jnp.float32) if _narrow(p) else u,
            new, params, updates,
        )  # fmt: skip
        copies = jax.tree.map(lambda w, p: w if _narrow(p) else optax.MaskedNode(), new, params)
        return steps, Float32State(moved, copies)

    return optax.GradientTransformation(init, update)


def _narrow(leaf: Any) -> bool:
    return jnp.dtype(leaf.dtype).itemsize < 4


def _whole(params: Tree, copies: Tree) -> Tree:
    """The weights, those that have a copy by it."""
    masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(lambda c, p: p if masked(c) else c, copies, params, is_leaf=masked)
