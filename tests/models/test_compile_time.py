"""Blocks are scanned, and so are neighbours of a kind: what the compiler is given does not grow with their number."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import pytest

from gt_jax.configs.model import ModelConfig, StackConfig
from gt_jax.configs.run import TrainConfig
from gt_jax.devices.sharding import Rules
from gt_jax.models import language_model
from gt_jax.models.language_model import LanguageModel, abstract, scan_unroll
from gt_jax.models.layers import block
from gt_jax.training.optimizer import make_optimizer
from gt_jax.training.state import new_state
from gt_jax.training.step import make_step
from tests.support import drawn, perturbed, small_model, tokens


@pytest.mark.slow
def test_the_training_step_is_the_same_program_at_2_and_at_20_blocks():
    train = TrainConfig(steps=10)
    optimizer = make_optimizer(train.optimizer, train.steps)
    sizes = []
    for blocks in (2, 20):
        config = small_model(f"D*{blocks}")
        state = jax.eval_shape(lambda v: new_state(v, optimizer, train.price), abstract(config))
        batch = {name: jax.ShapeDtypeStruct((2, 16), "int32") for name in ("tokens", "targets", "segment_ids")}
        step = make_step(config, train.price, optimizer, train.steps, Rules())
        sizes.append(len(step.lower(state, batch).as_text().splitlines()))
    assert sizes[1] <= 1.01 * sizes[0], f"{sizes} lines of StableHLO"


ALIKE = {
    "residual": small_model("DDD", adaptive=False, remat="layer"),
    "lambda": small_model("DDDG", adaptive=False, remat="layer", stack=StackConfig("lambda", skips=((0, 2),))),
    "midpoint": small_model("DDDG", adaptive=False, remat="layer", stack=StackConfig("midpoint", mixing=0.5)),
    "adaptive": small_model("DDDG"),
}


@pytest.mark.exhaustive  # test_whole_model.py has scanned layers by the oracle
@pytest.mark.parametrize("name", ALIKE)
def test_neighbours_of_a_kind_are_one_program_that_computes_the_same(monkeypatch, name):
    """Values, statistics and gradients of three D layers scanned, and one after the other; of the rare, before a G."""
    config = ALIKE[name]
    lines, answers = [], []
    for together in (True, False):
        monkeypatch.setattr(block, "compiled_once", lambda _, together=together: together)
        run = jax.jit(jax.value_and_grad(answer(config), has_aux=True))
        lowered = run.lower(perturbed(config)["params"])
        lines.append(len(lowered.as_text().splitlines()))
        answers.append(lowered.compile()(perturbed(config)["params"]))
    assert lines[0] < 0.8 * lines[1]
    chex.assert_trees_all_close(*answers, rtol=2e-5, atol=2e-6)


def answer(config: ModelConfig):
    """params -> (a number that depends on every logit, statistics)."""
    network, x = LanguageModel(config), tokens(12)
    rest = {name: tree for name, tree in perturbed(config).items() if name != "params"}

    def run(params):
        output = network.apply({"params": params} | rest, x)
        return jnp.mean(jnp.sin(output.logits)), output.statistics

    return run


def test_only_few_blocks_of_a_plain_model_that_keeps_everything_are_laid_out_one_by_one():
    """On the CPUs of the tests; what a loop's backward pass needs is stacked there, and cut out again."""
    keeps = small_model("D*4", adaptive=False, remat="none")
    assert [scan_unroll(keeps, blocks) for blocks in (1, 2, 16, 17)] == [1, 2, 16, 1]
    assert [scan_unroll(keeps, blocks, 4) for blocks in (1, 4, 5)] == [1, 4, 1]
    for other in (keeps.replace(remat="block"), keeps.replace(remat="kernels"), small_model("D*4", remat="none")):
        assert scan_unroll(other, 4) == 1


@pytest.mark.exhaustive
def test_blocks_one_by_one_are_the_loop_over_them(monkeypatch):
    config = small_model("DG*2", adaptive=False, remat="none")
    variables, row = drawn(abstract(config), 0.1, middle={"scale": 1.0, "gain": 1.0}), tokens(16)

    def loss(params, statistics):
        output = LanguageModel(config).apply({"params": params, "statistics": statistics}, row)
        return jnp.mean(jnp.square(jax.nn.log_softmax(output.logits)))

    found = []
    for most in (language_model.UNROLLED, 0):
        monkeypatch.setattr(language_model, "UNROLLED", most)
        jax.clear_caches()
        gradient = jax.jit(jax.value_and_grad(loss))
        arguments = variables["params"], variables["statistics"]
        lowered = gradient.lower(*arguments)
        found.append((lowered.as_text().count("stablehlo.while"), lowered.compile()(*arguments)))
    assert found[0][0] < found[1][0]
    chex.assert_trees_all_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
