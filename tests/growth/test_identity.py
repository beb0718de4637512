"""The identity of growth: strengths fixed, nothing rounded, no noise: the grown model *is* the recurrence, unrolled."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.growth.plan import block_plan
from gt_jax.growth.repetition import from_json
from gt_jax.growth.transform import grow, target_config
from gt_jax.models.language_model import LanguageModel, apply_network, fixed_passes
from tests.support import ATTENTION, perturbed, small_model

K_EXEC = (3, 1, 2, 4)
# Blocks of one layer: copies in the order of the recurrence. Whole DDDG blocks are exact where all counts are one.
SOURCE = small_model("A,G*2,D", attention=ATTENTION.replace(post_norm=True))


@functools.cache
def logits(config):
    return jax.jit(lambda v, tokens, control: apply_network(LanguageModel(config), v, tokens, control=control).logits)


@pytest.fixture(scope="module")
def grown():
    variables = perturbed(SOURCE)
    counts = {f"layer{i}": {"k_exec": k, "survival": [1.0] * k + [0.0] * (4 - k)} for i, k in enumerate(K_EXEC)}
    plan = block_plan(from_json(counts, "test", SOURCE.adaptive.alpha), SOURCE.depth, coefficient="expected")
    child = target_config(SOURCE, plan)
    assert child.layout == "A*3,G*3,D*4"
    return variables, plan, child, grow(variables, plan, SOURCE, carry="gain", noise_std=0.0)


def test_the_grown_model_equals_the_source_at_fixed_passes(grown):
    variables, _, child, tree = grown
    tokens = jax.random.randint(jax.random.key(2), (2, 30), 0, 257)
    source = logits(SOURCE)(variables, tokens, fixed_passes(K_EXEC))
    np.testing.assert_allclose(logits(child)(tree, tokens, fixed_passes(1)), source, atol=1e-5)
    other = logits(SOURCE)(variables, tokens, fixed_passes((3, 1, 2, 3)))
    assert np.abs(source - other).max() > 1e-3, "the passes matter, or the test would say nothing"


def test_a_wrong_strength_is_seen(grown):
    variables, _, child, tree = grown
    tokens = jax.random.randint(jax.random.key(2), (2, 30), 0, 257)
    source = logits(SOURCE)(variables, tokens, fixed_passes(K_EXEC))
    broken = jax.tree.map(jnp.copy, tree)
    gain = broken["params"]["segment0"]["layer0"]["gain"]
    broken["params"]["segment0"]["layer0"]["gain"] = gain.at[1].multiply(1.2)
    assert np.abs(logits(child)(broken, tokens, fixed_passes(1)) - source).max() > 1e-3
