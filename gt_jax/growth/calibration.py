"""Calibration: the gains of a grown model, fitted so that it does again what its source does (GROWTH.md 7).

Only the gains g [l] move. With x the child's stream, y the source's with its own halting, sums over the real tokens:

    blocks  L = mean over sync points and tokens of |x - y|^2 / |y|^2, at every point of `sync_points`
    final   the same at the end of the stack alone
    kl      L = mean over tokens of KL(p || q), p and q what source and child predict

- Gauss-Newton: with the columns J_l = dx/dg_l (exact, through all later layers), the gradient b = J^T dL/dx and the
  curvature A = J^T M J, the step is -(A + ridge * mean(diag A) * I)^-1 b. M is the metric of the loss: 2 / |y|^2 for
  squares, the pull-back of diag(q) - q q^T for kl.
- All gains at once, not group by group: a gain is also told what it does to the sync points after the next.
- Distances are relative to the token's own state: every layer reads the stream through a norm, so a token of large
  norm does not matter more.
- The ridge damps the step; it does not pull the result anywhere. A step is halved until the loss does not rise.
- Columns of one batch are in memory at a time; A and b are summed over batches in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gt_jax.configs.calibration import ITERATIONS, OBJECTIVE, OBJECTIVES, RIDGE
from gt_jax.configs.model import ModelConfig
from gt_jax.devices.sharding import Rules, on_mesh, reshard
from gt_jax.errors import Refused, refuse_all
from gt_jax.growth.layer_states import States, columns, gains_of, states_after, with_gains
from gt_jax.growth.plan_entries import Plan
from gt_jax.growth.transform import target_config
from gt_jax.models.language_model import LanguageModel, free_passes
from gt_jax.models.layers.adaptive_depth import PassControl, stream_mean
from gt_jax.models.layers.mixer import real_tokens
from gt_jax.models.layers.primitives import widen
from gt_jax.typing import PerToken, Tree

_HALVINGS = 6
_SETTLED = 1e-4  # a step that gains less than this share of the loss is the last one

Batch = Mapping[str, Any]


class Sync(NamedTuple):
    """After target layer `target` the child's stream should be the source's after its layer `source`."""

    target: int
    source: int


class Calibration(NamedTuple):
    """The child's variables with fitted gains, and what the fit did (a JSON object, see `calibrate_gains`)."""

    variables: Tree
    report: dict[str, Any]


class Setting(NamedTuple):
    """What the compiled programs depend on."""

    source: ModelConfig
    target: ModelConfig
    syncs: tuple[Sync, ...]
    rules: Rules


class Sums(NamedTuple):
    """Over the real tokens of one batch: relative squared distance at every sync point [s], KL, how many tokens."""

    residual: Array | np.ndarray
    kl: Array | np.ndarray
    tokens: Array | np.ndarray


def sync_points(plan: Plan) -> tuple[Sync, ...]:
    """Where the child should be where the source is: the plan's prefixes that hold all copies of source layers 0..m.

    The end of the stack is always one, also for a map whose order has no other. Slots without a copy (the identity)
    belong to the point before them.
    """
    copies = [{entry.source} if entry.copy > 0 else set() for entry in plan.entries]
    found: dict[int, int] = {}
    for target in range(len(copies)):
        before, after = set[int]().union(*copies[: target + 1]), set[int]().union(*copies[target + 1 :])
        if after and before == set(range(len(before))) and not before & after:
            found[len(before) - 1] = target
    inner = [Sync(target, source) for source, target in found.items()]
    return (*inner, Sync(len(copies) - 1, len(plan.source_layout) - 1))


def calibrate_gains(
    source_config: ModelConfig, source_variables: Tree, target_config: ModelConfig, target_variables: Tree, plan: Plan,
    batches: Sequence[Batch], rules: Rules | None = None, *, objective: str = OBJECTIVE, iterations: int = ITERATIONS,
    ridge: float = RIDGE, held_out: Sequence[Batch] = (), control: PassControl | None = None,
    progress: Callable[[str], None] | None = None,
) -> Calibration:  # fmt: skip
    """Fit the gains of a grown model in memory; every other tensor of `target_variables` is passed through.

    `batches` (tokens and segment_ids [b, t]) are what is fitted, `held_out` what is only looked at. `control` fixes the
    source's passes; without it the halting heads decide. The report holds "objective", "iterations" (steps taken),
    "ridge", "tokens", "loss" (the objective at the start and after each step), "gains" {"before", "after"}, and of the
    fitted and the held-out batches {"kl": {"before", "after"}, "sync": [{"target", "source", "before", "after"}]}: KL
    in nats a token, and |x - y| / |y|, the root mean square over tokens, at each sync point.

    Raises `Refused` for models that do not belong together by the plan, for options out of range, for no batches, and
    for states that are not finite.
    """
    rules, control, say = rules or Rules(), control or free_passes(), progress or (lambda line: None)
    refuse_all(
        [*mismatches(source_config, target_config, plan), *_wrong(objective, iterations, ridge, batches)],
        "these models cannot be calibrated:",
    )
    setting = Setting(source_config, target_config, sync_points(plan), rules)
    models = (source_variables, target_variables, _by_layer(control, len(source_config.depth)))
    start = gains_of(target_config, target_variables)
    gains, trace = _fit(setting, objective, models, start, batches, iterations, ridge, say)
    report: dict[str, Any] = {
        "objective": objective, "iterations": len(trace) - 1, "ridge": float(ridge), "loss": trace,
        "gains": {"before": start.tolist(), "after": gains.tolist()},
        "fitted": _before_and_after(setting, models, start, gains, batches),
        "held_out": _before_and_after(setting, models, start, gains, held_out) if held_out else None,
    }  # fmt: skip
    return Calibration(with_gains(target_config, target_variables, gains), report)


def mismatches(source: ModelConfig, target: ModelConfig, plan: Plan) -> list[str]:
    """Why the target is not what the plan makes of the source."""
    if target.adaptive is not None:
        return ["the grown model is adaptive; calibration is for one whose layers run once"]
    if target.gated_copies is not None:
        return ["the grown model keeps its gates: its strengths are each token's own, there is no mean to fit"]
    if target.stack.skips or source.stack.skips:
        return ["the models have skips between their layers, which calibration does not run"]
    try:
        grown = target_config(source, plan)
    except Refused as error:
        return [str(error)]
    same = {name: getattr(grown, name) for name in ("param_dtype", "compute_dtype", "remat")}
    if target.replace(**same) != grown:
        return [f"the grown model (layout {target.layout}, width {target.width}) is not what the plan makes of the "
                f"source (layout {grown.layout}, width {grown.width}); give the source that it was grown from"]
    return []


def _wrong(objective: str, iterations: int, ridge: float, batches: Sequence[Batch]) -> list[str]:
    wrong = [] if batches else ["there are no batches to fit; at least one is needed"]
    if objective not in OBJECTIVES:
        wrong.append(f"objective {objective!r} is not one of {', '.join(OBJECTIVES)}")
    if iterations < 1:
        wrong.append(f"iterations is {iterations}; at least 1 is needed")
    if not 0 <= ridge < np.inf:
        wrong.append(f"ridge is {ridge}; a finite number, 0 or more, is needed")
    return wrong


def _by_layer(control: PassControl, depth: int) -> PassControl:
    """One number of passes a layer: a control of one shape compiles once."""
    return control._replace(forced=jnp.asarray(np.broadcast_to(np.asarray(control.forced, np.int32), (depth,))))


Models = tuple[Tree, Tree, PassControl]
Vector = Float[np.ndarray, "l"]


def _fit(
    setting: Setting, objective: str, models: Models, start: Vector, batches: Sequence[Batch], iterations: int,
    ridge: float, say: Callable[[str], None],
) -> tuple[Vector, list[float]]:  # fmt: skip
    """(gains, the loss at the start and after each step that was taken)."""

    def loss_at(gains: Vector) -> float:
        return _loss(objective, _totals(setting, models, gains, batches))

    gains, trace = start, [loss_at(start)]
    if not np.isfinite(trace[0]):
        raise Refused(f"the {objective} distance of the two models is {trace[0]} on this text; a model whose "
                      "states are not finite cannot be calibrated")
    for iteration in range(1, iterations + 1):
        gradient, curvature = _equations(setting, objective, models, gains, batches)
        damping = ridge * np.trace(curvature) / len(gains)
        step = -np.linalg.lstsq(curvature + damping * np.eye(len(gains)), gradient, rcond=None)[0]
        found = _shortened(loss_at, gains, step, trace[-1])
        if found is None:
            break
        gains, loss = found
        trace.append(loss)
        say(f"step {iteration}/{iterations}: {objective} loss {loss:.6g}, at the start {trace[0]:.6g}")
        if trace[-2] - loss <= _SETTLED * trace[-2]:
            break
    return gains, trace


def _shortened(
    loss_at: Callable[[Vector], float], gains: Vector, step: Vector, loss: float
) -> tuple[Vector, float] | None:
    """The gains after the whole step, or half of it, a quarter …: the first that do not raise the loss."""
    for halving in range(_HALVINGS + 1):
        candidate = (gains + 0.5**halving * step).astype(np.float32)
        reached = loss_at(candidate)
        if reached <= loss:
            return candidate, reached
    return None


def _equations(
    setting: Setting, objective: str, models: Models, gains: Vector, batches: Sequence[Batch]
) -> tuple[Vector, Float[np.ndarray, "l l"]]:
    """Gradient and curvature of the loss, summed over batches, float64."""
    gradient = np.zeros(len(gains))
    curvature = np.zeros((len(gains), len(gains)))
    for batch in batches:
        b, a = jax.device_get(_normal(setting, objective, *models, gains, _rows(batch)))
        gradient += b.astype(np.float64)
        curvature += a.astype(np.float64)
    return gradient, (curvature + curvature.T) / 2


def _totals(setting: Setting, models: Models, gains: Vector, batches: Sequence[Batch]) -> Sums:
    """`_look` over all batches, float64: means over tokens, and how many."""
    sums = Sums(np.zeros(len(setting.syncs)), np.zeros(()), np.zeros(()))
    for batch in batches:
        one = jax.device_get(_look(setting, *models, gains, _rows(batch)))
        sums = Sums(*(total + np.asarray(part, np.float64) for total, part in zip(sums, one, strict=True)))
    count = np.maximum(sums.tokens, 1.0)
    return Sums(sums.residual / count, sums.kl / count, sums.tokens)


def _loss(objective: str, means: Sums) -> float:
    """L of the objective."""
    if objective == "kl":
        return float(means.kl)
    return float(means.residual.mean() if objective == "blocks" else means.residual[-1])


def _before_and_after(
    setting: Setting, models: Models, start: Vector, gains: Vector, batches: Sequence[Batch]
) -> dict[str, Any]:
    before, after = (_totals(setting, models, one, batches) for one in (start, gains))
    distances = zip(setting.syncs, np.sqrt(before.residual).tolist(), np.sqrt(after.residual).tolist(), strict=True)
    return {
        "tokens": int(before.tokens), "kl": {"before": float(before.kl), "after": float(after.kl)},
        "sync": [{**sync._asdict(), "before": old, "after": new} for sync, old, new in distances],
    }  # fmt: skip


def _rows(batch: Batch) -> dict[str, Any]:
    return {name: batch[name] for name in ("tokens", "segment_ids")}


def _source_states(
    setting: Setting, syncs: Sequence[Sync], variables: Tree, batch: Mapping[str, Array], control: PassControl
) -> States:
    return states_after(setting.source, setting.rules, variables, [sync.source for sync in syncs], batch, control)


def _target_states(
    setting: Setting, syncs: Sequence[Sync], variables: Tree, gains: Array, batch: Mapping[str, Array]
) -> States:
    own = with_gains(setting.target, variables, gains)
    return states_after(setting.target, setting.rules, own, [sync.target for sync in syncs], batch, free_passes())


def _mask(setting: Setting, batch: Mapping[str, Array]) -> PerToken:
    return real_tokens(reshard(jnp.asarray(batch["segment_ids"]), setting.rules.spec("batch", None)))


def _logits(setting: Setting, variables: Tree, x: Array) -> Array:
    """float32 logits [b, t, v] of the stream after the last layer."""
    network = LanguageModel(setting.target, setting.rules)
    return widen(cast(Array, network.apply(variables, stream_mean(x), method=LanguageModel.unembed)))


@functools.partial(jax.jit, static_argnums=0)
def _look(
    setting: Setting, source: Tree, target: Tree, control: PassControl, gains: Array, batch: Mapping[str, Array]
) -> Sums:
    """How far the child is from its source on one batch."""
    wanted = _source_states(setting, setting.syncs, source, batch, control)
    got = _target_states(setting, setting.syncs, target, gains, batch)
    real = _mask(setting, batch)
    difference, size = widen(got) - widen(wanted), widen(wanted)
    axes = tuple(range(3, got.ndim))
    relative = jnp.sum(difference * difference, axis=axes) / _size(jnp.sum(size * size, axis=axes))
    residual = jnp.sum(relative * real[None], axis=(1, 2))
    p, q = (jax.nn.log_softmax(_logits(setting, variables, x[-1])) for variables, x in
            ((source, wanted), (target, got)))  # fmt: skip
    kl = jnp.sum(jnp.sum(jnp.exp(p) * (p - q), axis=-1) * real)
    return Sums(residual, kl, jnp.sum(real))


def _size(square: Array) -> Array:
    """|y|^2, kept from 0."""
    return jnp.maximum(square, 1e-12)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _normal(
    setting: Setting, objective: str, source: Tree, target: Tree, control: PassControl, gains: Array,
    batch: Mapping[str, Array],
) -> tuple[Float[Array, " l"], Float[Array, "l l"]]:  # fmt: skip
    """(J^T dL/dx, J^T M J) of one batch, sums over its real tokens; for squares both halved, which no step notices."""
    syncs = setting.syncs if objective == "blocks" else setting.syncs[-1:]
    wanted = _source_states(setting, syncs, source, batch, control)
    got, moves = columns(lambda g: _target_states(setting, syncs, target, g, batch), gains)
    real = _mask(setting, batch)
    if objective == "kl":
        pull, metric = _kl_metric(setting, source, target, wanted, got, real)
    else:
        pull, metric = _square_metric(wanted, got, real)
    weighed = jax.lax.map(metric, moves)
    flat = [a.reshape(*a.shape[:4], -1) for a in (moves, weighed, pull[None])]
    gradient = _inner(flat[0], flat[2])[:, 0]
    return gradient, _inner(flat[0], flat[1])


def _inner(a: Float[Array, "i s b t f"], b: Float[Array, "j s b t f"]) -> Float[Array, "i j"]:
    """All inner products, float32."""
    return jnp.einsum(
        "isbtf,jsbtf->ij", widen(a), widen(b), precision=jax.lax.Precision.HIGHEST,
        out_sharding=on_mesh(jax.sharding.PartitionSpec(None, None)),
    )  # fmt: skip


Metric = Callable[[Array], Array]


def _square_metric(wanted: States, got: States, real: PerToken) -> tuple[Array, Metric]:
    """(dL/dx, v -> M v) of half the sum of |x - y|^2 / |y|^2."""
    square = jnp.sum(jnp.square(widen(wanted)), axis=tuple(range(3, wanted.ndim)), keepdims=True)
    weight = real.reshape(1, *real.shape, *[1] * (wanted.ndim - 3)) / _size(square)

    def metric(v: Array) -> Array:
        return weight * widen(v)

    return metric(widen(got) - widen(wanted)), metric


def _kl_metric(
    setting: Setting, source: Tree, target: Tree, wanted: States, got: States, real: PerToken
) -> tuple[Array, Metric]:
    """(dL/dx, v -> M v) of the sum of KL(p || q) at the end of the stack."""
    p = jax.nn.softmax(_logits(setting, source, wanted[0]))
    x = widen(got[0])

    def logits(x: Array) -> Array:
        return _logits(setting, target, x.astype(got.dtype))

    z, pull = jax.vjp(logits, x)
    q = jax.nn.softmax(z)

    def metric(v: Array) -> Array:
        u = jax.jvp(logits, (x,), (widen(v[0]),))[1]
        curved = q * (u - jnp.sum(q * u, axis=-1, keepdims=True))
        return pull(curved * real[..., None])[0][None]

    return pull((q - p) * real[..., None])[0][None], metric
