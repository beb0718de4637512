"""Growth of a model in memory, in one call: counts to a plan, the plan to the deep model's config and variables."""

from __future__ import annotations

from typing import NamedTuple

from gt_jax.configs.model import ModelConfig
from gt_jax.errors import Refused
from gt_jax.growth import transform
from gt_jax.growth.kept_gates import keeping_gates
from gt_jax.growth.plan import Plan, make_plan
from gt_jax.growth.repetition import Repetition
from gt_jax.typing import Tree


class Grown(NamedTuple):
    """The deep feed-forward model, and the plan that says which source layer and pass each of its layers stands for."""

    config: ModelConfig
    variables: Tree
    plan: Plan


def grow(
    config: ModelConfig, variables: Tree, counts: Repetition | Plan, *, plan: str = "dealt", carry: str = "gain",
    noise_std: float = 0.0, seed: int = 0, keep_gates: bool = False,
) -> Grown:  # fmt: skip
    """Grow a model by the pass counts that `gt_jax.measure` gave, or by a plan of one's own.

        target layer i = copy of source layer l_i with its gain times  alpha_j * survival_j,  j the pass it stands for

    `plan` is one of `growth.plan.PLANS` (with counts), `carry` one of "gain", "output" and "weights" (what is scaled).
    With `keep_gates` the copies keep their halting gates: alpha_j times each token's own s_j, not its mean. That needs
    a plan with every pass in order, such as "layer".
    Runs under `jax.jit` too. Raises `Refused` for counts of another layout or
    other strengths, a plan of another layout, and what is neither. Source: GROWTH 2 and 3.

    >>> import gt_jax, jax.numpy as jnp
    >>> config = gt_jax.preset("tiny").replace(layout="DG")
    >>> variables = gt_jax.initialise(config, seed=0)
    >>> counts = gt_jax.measure(config, variables, [jnp.arange(16).reshape(1, 16)])
    >>> grown = gt_jax.grow(config, variables, counts)
    >>> grown.config.adaptive is None and len(grown.config.depth) >= 2
    True
    """
    if isinstance(counts, Repetition):
        counts.unsaid(config.depth, None if config.adaptive is None else config.adaptive.alpha)
    elif not isinstance(counts, Plan):
        raise Refused(f"counts is a {type(counts).__name__}; what `gt_jax.measure` gives, or "
                      "`gt_jax.growth.repetition.read` of its file, or a plan is needed")  # fmt: skip
    own = counts if isinstance(counts, Plan) else make_plan(plan, counts, config.depth)
    if keep_gates:
        own = keeping_gates(own, () if config.adaptive is None else config.adaptive.alpha)
    tree = transform.grow(variables, own, config, carry=carry, noise_std=noise_std, seed=seed)
    return Grown(transform.target_config(config, own), tree, own)
