"""Every component at once: logits of tiny models against the plain numpy float64 computation in tests/models/oracle.

The rows hold two packed documents, the first ends in padding. Heads decay at all rates; budgets of keys and passes of
tokens vary, the first two tests make sure that they do.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs import presets
from gt_jax.configs.attention import AttentionConfig
from gt_jax.configs.model import (
    AdaptiveConfig,
    DeltaNetConfig,
    EmbeddingConfig,
    GSAConfig,
    HyperConfig,
    MemoryConfig,
    MoEConfig,
    StackConfig,
)
from gt_jax.configs.resolvent import ResolventConfig
from gt_jax.models.language_model import LanguageModel, Memory, abstract, apply_network, fixed_passes, free_passes
from tests.models.oracle import model as oracle
from tests.models.oracle.basics import block, float64, rms_norm
from tests.models.oracle.mixers import gsa
from tests.models.oracle.weights import random_variables
from tests.rarely import rarely

IDS = np.array([[1] * 9 + [2] * 11 + [0] * 4, [1] * 14 + [2] * 10], np.int32)
TOKENS = np.random.default_rng(7).integers(0, 40, IDS.shape).astype(np.int32)
MEMORY = np.random.default_rng(6).standard_normal((2, 16)).astype(np.float32), np.array([1, 2], np.int32)
NO_MEMORY = np.zeros((2, 16), np.float32), np.array([-1, -1], np.int32)

EPSILON = 0.1  # large: seen where a norm forgets it; and what reads next to nothing does not magnify rounding
DELTANET = DeltaNetConfig(heads=2, value_heads=2, key_width=8, value_width=8, chunk_size=8)
GSA = GSAConfig(heads=2, head_width=8, indexer_heads=2, indexer_width=4, k_base=6, k_min=3, k_max=12, sinks=2,
                indexer_loss=0.0)  # fmt: skip
PRESET = presets.tiny_3b()
ORIGIN = PRESET.replace(
    layout="DG*2", width=16, vocab=40, mlp_width=12, norm_epsilon=EPSILON, moe=MoEConfig(experts=4, expert_width=8),
    deltanet=PRESET.deltanet.replace(heads=2, value_heads=2, key_width=8, value_width=8, chunk_size=8),
    gsa=GSA.replace(rope="origin", score_scale=1.0, variance="row"),
    memory=MemoryConfig(chunk=24), adaptive=PRESET.adaptive.replace(batch_share=0.3, p_floor=0.09),
)  # fmt: skip
TOKEN = ORIGIN.replace(
    adaptive=AdaptiveConfig(halting="token"), embedding=EmbeddingConfig("kronecker+table", token_bytes=5),
    deltanet=ORIGIN.deltanet.replace(
        value_heads=4, conv_width=3, rope="standard", read_scale=0.7, activation_on="gate", decay_floor=-1.0
    ),
    gsa=ORIGIN.gsa.replace(heads=4, head_width=4, indexer_heads=2, rope_base=100.0, variance="visible", sinks=1),
    moe=MoEConfig(experts=4, expert_width=6, top_k=3, real_share=0.8), hyper=HyperConfig(streams=2, sinkhorn_rounds=3),
    memory=MemoryConfig(chunk=24, stream=1),
)  # fmt: skip
OWN = presets.tiny().replace(
    layout="DG*2", width=16, vocab=40, mlp_width=24, norm_epsilon=EPSILON, gsa=GSA,
    deltanet=DELTANET.replace(value_heads=4, beta_max=2.0),
)  # fmt: skip
GATED = OWN.replace(  # as Qwen3-Next is made
    layout="DA*2", deltanet=OWN.deltanet.replace(beta_max=1.0, head_gate_bias=False),
    attention=AttentionConfig(4, 2, 8, gate=True, qk_norm="head", rope_base=1e4, rope_share=0.25, bias=True),
    moe=MoEConfig(4, 8, real_share=1.0, shared_gate=True, normalise=False, router_bias=False),
)  # fmt: skip
POST = OWN.replace(  # as Olmo Hybrid is made, with streams
    layout="DA*2", deltanet=OWN.deltanet.replace(head_gate_bias=False, output_epsilon=0.01), hyper=HyperConfig(2),
    attention=AttentionConfig(2, 2, 8, qk_norm="all", rope="none", post_norm=True, window=7),
)  # fmt: skip
RESOLVENT = OWN.replace(layout="DB*2", resolvent=ResolventConfig(4, coupling="learned"))
PLAIN = ORIGIN.plain.replace(memory=None, mtp=None)
STACKS = {
    "residual": StackConfig(),
    "lambda": StackConfig("lambda", skips=((0, 2), (1, 3), (0, 3), (1, 4))),
    "midpoint": StackConfig("midpoint", mixing=0.5),
    "midpoint, reversible": StackConfig("midpoint", mixing=1.0),
}


@functools.cache
def weights(config):
    """Random weights whose tokens run one to four passes."""
    variables = random_variables(config, seed=15)
    for name, segment in variables["params"].items():
        for layer in segment.values() if name.startswith("segment") else ():
            if "halting" in layer:
                layer["halting"]["hidden"]["w"][:, :5] *= 3
                layer["halting"]["output"]["b"] -= 0.5
    return variables


@functools.cache
def ours(config):
    """The library's answer as a function of control and memory, compiled once."""
    variables = jax.tree.map(jnp.asarray, weights(config))

    @jax.jit
    def run(variables, control, memory):
        given = None if config.memory is None else Memory(*memory)
        rows, with_mtp = (jnp.asarray(TOKENS), jnp.asarray(IDS)), config.mtp is not None
        return apply_network(LanguageModel(config), variables, *rows, control=control, memory=given, mtp=with_mtp)

    return lambda control, memory=NO_MEMORY: jax.device_get(run(variables, control, memory))


@functools.cache
def theirs(config, forced=None, memory=False):
    """The oracle's answer."""
    return oracle.logits(config, weights(config), TOKENS, IDS, forced=forced, memory=MEMORY if memory else NO_MEMORY)


def assert_same_logits(got, wanted):
    assert 0.5 < wanted.logits[wanted.real].std() < 5
    np.testing.assert_allclose(got.logits[wanted.real], wanted.logits[wanted.real], atol=1e-4, rtol=0)


def assert_same_depth(got, wanted):
    np.testing.assert_allclose(got.statistics.survival, wanted.survival, atol=1e-5)
    np.testing.assert_allclose(got.statistics.alive, wanted.alive, atol=1e-6)
    np.testing.assert_allclose(np.sum(got.statistics.router_loss, axis=1), wanted.auxiliary, atol=1e-5)


def test_tokens_run_one_to_four_passes_and_some_layers_end_early():
    for config in (ORIGIN, TOKEN, OWN):
        result = theirs(config)
        assert {int(n) for d in result.depths for n in d.alive.sum(0)[result.real]} == {1, 2, 3, 4}
    assert theirs(ORIGIN).executed.tolist() == [2, 2, 4, 4] and theirs(OWN).executed.tolist() == [4, 3, 2, 4]
    went_on = [(d.weight[: d.executed] < 0.1).any() for d in theirs(ORIGIN).depths]
    assert any(went_on)  # the batch rule: finished tokens go on with the others


@pytest.mark.parametrize("config", [ORIGIN, OWN], ids=["row", "visible"])
def test_budgets_of_keys_vary(config):
    variables = float64(weights(config))
    p = block(variables["params"]["segment0"]["layer1"], 0)
    x = rms_norm(np.random.default_rng(8).standard_normal((24, 16)), p["mixer_norm"]["scale"], EPSILON)
    ema = variables["statistics"]["segment0"]["layer1"]["mixer"]["variance_ema"][0]
    chosen = gsa(config.gsa, p["mixer"], x, np.ones(24, int), ema)[1]
    budgets = {len(keys) for head in chosen for keys in head[12:]}
    assert len(budgets) >= 4 and min(budgets) < config.gsa.k_max


@pytest.mark.parametrize(
    "config", [TOKEN, PLAIN.replace(stack=STACKS["lambda"]), GATED, POST, RESOLVENT],
    ids=["all", "lambda", "gated", "post", "resolvent"],
)
def test_the_oracle_knows_every_parameter(config):
    def shapes(tree):
        return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}

    assert shapes(abstract(config)) == shapes(weights(config))


@pytest.mark.parametrize(
    "config", [ORIGIN, TOKEN, OWN, rarely(GATED), rarely(POST), RESOLVENT],
    ids=["batch", "token", "own", "gated", "post", "resolvent"],
)
def test_adaptive_depth(config):
    got, wanted = ours(config)(free_passes()), theirs(config)
    assert_same_logits(got, wanted)
    assert_same_depth(got, wanted)


@pytest.mark.parametrize("config", [ORIGIN, TOKEN, OWN], ids=["batch", "token", "own"])
def test_what_the_halting_head_sees_of_a_mixer_decides(config):
    """The other reading of the features is another model: with streams, and with nothing but a norm between them."""
    other = {"mixer_input": "stream_mean", "stream_mean": "mixer_input"}[config.adaptive.features]
    changed = config.replace(adaptive=config.adaptive.replace(features=other))
    assert np.abs(theirs(config).logits - theirs(changed).logits)[IDS > 0].max() > 0.05
    if config is OWN:  # the two configs with streams compute with one reading each; here is the other of the third
        assert_same_logits(ours(changed)(free_passes()), theirs(changed))


@pytest.mark.parametrize("forced", [1, 2, 4])
@pytest.mark.parametrize("config", [ORIGIN, TOKEN, OWN], ids=["batch", "token", "own"])
def test_forced_passes(config, forced):
    got, wanted = ours(config)(fixed_passes(forced)), theirs(config, forced=forced)
    assert_same_logits(got, wanted)
    assert_same_depth(got, wanted)
    np.testing.assert_array_equal(wanted.executed, forced)


@pytest.mark.parametrize("config", [ORIGIN, TOKEN], ids=["batch", "token"])
def test_a_memory_enters_and_the_next_one_leaves(config):
    got, wanted = ours(config)(free_passes(), MEMORY), theirs(config, memory=True)
    assert_same_logits(got, wanted)
    assert np.abs(wanted.logits - theirs(config).logits)[wanted.real].max() > 0.1
    value, segment = wanted.memory
    np.testing.assert_array_equal(got.memory.segment, segment)
    np.testing.assert_allclose(got.memory.value[segment > 0], value[segment > 0], atol=1e-4)


@pytest.mark.parametrize("config", [ORIGIN, TOKEN], ids=["batch", "token"])
def test_multi_token_prediction(config):
    got, wanted = ours(config)(free_passes()), theirs(config)
    same_document = (IDS[:, :-1] == IDS[:, 1:]) & (IDS[:, :-1] > 0)
    np.testing.assert_allclose(
        got.mtp_logits[:, :23][same_document], wanted.mtp_logits[:, :-1][same_document], atol=1e-4, rtol=0
    )


# "residual" is what every model without a stack of its own computes
@pytest.mark.parametrize("name", [rarely(n) if n == "residual" else n for n in STACKS])
def test_the_same_weights_in_every_stack(name):
    config = PLAIN.replace(stack=STACKS[name])
    assert_same_logits(ours(config)(free_passes()), theirs(config))


def test_the_stacks_differ():
    answers = [theirs(PLAIN.replace(stack=stack)).logits for stack in STACKS.values()]
    assert all(np.abs(a - b).max() > 0.1 for i, a in enumerate(answers) for b in answers[:i])


def test_the_plain_form_of_own_models():
    """A dense MLP, no streams, decay and gate as in our own models, every layer once."""
    assert_same_logits(ours(OWN.plain)(free_passes()), theirs(OWN.plain))
