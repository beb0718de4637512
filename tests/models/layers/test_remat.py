"""What the backward pass computes again: the same gradients, and a recurrence runs as often as the policy says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.models.language_model import LanguageModel
from tests.support import perturbed, small_model, tokens


def gradient(remat):
    config = small_model("D*2", adaptive=False).replace(remat=remat)
    network = LanguageModel(config)

    def loss(params, statistics, x):
        return jnp.sum(jnp.sin(network.apply({"params": params, "statistics": statistics}, x).logits))

    return jax.jit(jax.grad(loss))


@functools.cache
def inputs():
    variables = perturbed(small_model("D*2", adaptive=False))
    return variables["params"], variables.get("statistics", {}), tokens(12)


@functools.cache
def wanted():
    return gradient("none")(*inputs())


@pytest.mark.parametrize("remat", ["layer", "block", "kernels"])
def test_what_is_rematerialised_has_the_same_gradients(remat):
    found = gradient(remat)(*inputs())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max())), found, wanted())


def test_the_kernels_policy_does_not_run_the_recurrence_again():
    scans = {remat: str(jax.make_jaxpr(gradient(remat))(*inputs())).count(" scan[") for remat in ("block", "kernels")}
    assert scans["kernels"] == scans["block"] - 1
