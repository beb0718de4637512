"""Looking inside models of other stacks than the residual one, and of tokens that leave early."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from gt_jax.configs.model import DeltaNetConfig, ExitConfig, SlidingConfig, StackConfig
from gt_jax.devices.sharding import Rules
from gt_jax.evaluation.comparison import compare_models, make_comparison, strengths
from gt_jax.evaluation.held_out_rows import HeldOutRows
from gt_jax.models.language_model import abstract
from tests.support import perturbed, small_model


def test_layers_that_read_another_and_the_reversible_stack_show_their_states():
    """By shape: what an S layer reads of a D layer is shown with it; a stack that runs backward is looked into too."""
    pairs = DeltaNetConfig(heads=2, value_heads=2, key_width=8, value_width=8, chunk_size=16, variant="groundthink")
    window = SlidingConfig(heads=2, head_width=8, window=4)
    sliding = small_model("D", False).replace(layout="DS", deltanet=pairs, sliding=window)
    midpoint = small_model("D*3", False, stack=StackConfig("midpoint", mixing=1.0))
    batch = {name: jnp.ones((2, 8), jnp.int32) for name in ("tokens", "targets", "segment_ids")}
    for config, layers in ((sliding, [1]), (midpoint, [])):
        shapes = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract(config))
        *_, inside = jax.eval_shape(make_comparison(config, config, None, Rules(), 1), shapes, shapes, batch)
        assert inside.states.shape == (len(config.depth), 1, 1, 8, 32) and list(inside.links) == layers
    assert strengths(midpoint, jax.tree.map(lambda a: a + 1, shapes)) == [[0.125], [0.5], [0.5]]


def test_a_stack_that_tokens_leave_early_is_compared_by_what_it_predicts():
    config = small_model("D", False, exit=ExitConfig())
    tokens = jax.random.randint(jax.random.key(0), (1, 8), 0, 257)
    batch = {"tokens": tokens, "targets": tokens, "segment_ids": jnp.ones_like(tokens)}
    variables = perturbed(config)
    rows = HeldOutRows([batch], [np.zeros((1, 8), np.int32)], "document")
    result = compare_models(config, variables, config, variables, None, rows, Rules(), jacobian_rows=1)
    assert "leave the target's stack early" in result["notes"][0] and result["jacobian"] is None
    assert abs(result["gap"]) < 1e-6 and result["layers"][0]["delta_ratio"] > 0
    assert result["layers"][0]["jacobian"] is None
