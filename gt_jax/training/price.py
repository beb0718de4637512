"""The compute price: what a pass costs, and when; `budget.py` has what moves the price of rule "budget".

Rule "budget":  price loss = price * sum_l sum_{k>1} c(w_lk),  c the `smooth_count`; without a target the price stands.

Rule "ouro" (OuroSpec):  price loss = lambda * sum_l relu( 0.85 ponder_l + 0.15 (passes_run_l - 1)/(K - 1) - coupon ),
ponder_l = relu(mean_weight_l - 1)/(K - 1),  coupon = 2.0 relu(CE after pass 1 - CE), without gradient.

- "CE after pass 1" is read where the last layer has run one pass: the loss the model would have had without the rest.
- lambda is a dual variable: lambda += rate/steps * (mean over layers - target), clipped; the reference moves by 5e-5 a
  step over 20,000 steps, hence rate 1.0. What it holds at the target is `target_of`: the mean weight, or the passes
  that tokens run. The second is a count without gradient. Lambda needs none, and the loss is the same for both.
- Every phase is a fraction of the run, so a run of 300 steps has all of them. Two forced passes last for 30 % of it:
  layers that never met a second pass learn to do without (4 %, the share of 800 in 20,000 steps, left a 400-step run
  at a mean weight of 1.06; 30 % brings it to the target of 1.30 at the same loss).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gt_jax.configs.price import PriceConfig
from gt_jax.models.layers.adaptive_depth import PassControl
from gt_jax.models.layers.pass_statistics import PassStatistics
from gt_jax.training.budget import BudgetState, initial_budget
from gt_jax.typing import Scalar


class PriceState(NamedTuple):
    """`value` is lambda; `high_steps` counts the steps in a row it has spent above half its bound."""

    value: Float[Array, ""]
    high_steps: Int[Array, ""]


def initial_price(config: PriceConfig) -> PriceState | BudgetState:
    """Where the price starts: lambda at its lower bound, or at what a pass is said to cost."""
    if config.rule == "budget":
        return initial_budget(config)
    return PriceState(jnp.asarray(config.lowest, jnp.float32), jnp.zeros((), jnp.int32))


class Phase(NamedTuple):
    """What the schedule says of one step: pass control, whether the price is charged, whether lambda moves, and by how
    much the last bias of every halting head rises."""

    control: PassControl
    charged: Array
    moves: Array
    opens: Array | float = 0.0


def phase(config: PriceConfig, step: Int[Array, ""], steps: int, passes: int) -> Phase:
    """Forced passes first, then free ones with p capped, then the price; every `audit_every`-th step is an audit.

    An audit of rule "ouro" forces passes and charges nothing. One of rule "budget" runs every pass with its own weight,
    however small, and is charged; the price moves by none. `passes` is K, the most that are forced where their number
    is drawn.
    """
    done = step.astype(jnp.float32) / steps
    warming = done < config.forced_until
    audit = jnp.logical_not(warming) & (step % config.audit_every == config.audit_every - 1)
    count: int | Array = config.forced_passes or passes
    if config.forced_ramp:
        # 32-bit floats: a step at a stage's border may fall to either side, a step early or late
        count = 1 + jnp.minimum((count - 1) * done / config.forced_ramp, count - 1).astype(jnp.int32)
    if not config.forced_passes:  # a function of the step alone
        count = jax.random.randint(jax.random.fold_in(jax.random.key(passes), step), (), 1, count + 1)
    opens = jnp.where(warming, config.gates_opened / max(1, math.ceil(config.forced_until * steps - 1e-6)), 0.0)
    ouro = config.rule == "ouro"
    forced = jnp.where(warming | (audit & ouro), count, 0).astype(jnp.int32)
    p_max = jnp.where(done < config.clipped_until, config.p_max, 1.0).astype(jnp.float32)
    begun = done >= config.price_from
    moves = begun & jnp.logical_not(audit)
    uncut = jnp.where(audit & (not ouro), 1.0, 0.0)
    return Phase(PassControl(forced, p_max, uncut), moves if ouro else begun, moves, opens)


def price_loss(
    config: PriceConfig, value: Scalar, statistics: PassStatistics, cross_entropy: Scalar, first_pass: Scalar
) -> Scalar:
    """lambda times what the passes cost, by the config's rule; differentiable through the weights of the passes."""
    if config.rule == "budget":
        return value * jnp.sum(statistics.cost)
    passes = statistics.survival.shape[-1]
    scale = max(passes - 1, 1)
    ponder = jax.nn.relu(jnp.sum(statistics.survival, axis=-1) - 1.0) / scale
    run = (jnp.sum(statistics.alive, axis=-1) - 1.0) / scale
    coupon = config.coupon * jax.nn.relu(jax.lax.stop_gradient(first_pass - cross_entropy))
    return value * jnp.sum(jax.nn.relu(0.85 * ponder + 0.15 * run - coupon))


def move_price(config: PriceConfig, state: PriceState, steered: Scalar, moves: Array, steps: int) -> PriceState:
    """One dual step of rule "ouro"; `steered` is the mean over layers of what `target_of` names.

    Once high for `settled_after` of the run: only outside [-2 %, +5 %] of the target, half speed.
    """
    assert config.target is not None
    settled = state.high_steps >= max(1, round(config.settled_after * steps))
    excess = steered - config.target
    outside = (excess < -0.02 * config.target) | (excess > 0.05 * config.target)
    speed = jnp.where(settled, jnp.where(outside, 0.5, 0.0), 1.0)
    moved = jnp.clip(state.value + speed * (config.rate / steps) * excess, config.lowest, config.highest)
    value = jnp.where(moves, moved, state.value)
    high = value >= 0.5 * config.highest
    return PriceState(value, jnp.where(high, state.high_steps + 1, jnp.where(settled, state.high_steps, 0)))
