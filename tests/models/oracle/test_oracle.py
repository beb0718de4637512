"""The oracle against cases that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from gt_jax.configs import presets
from gt_jax.configs.model import (
    AdaptiveConfig,
    DeltaNetConfig,
    EmbeddingConfig,
    GSAConfig,
    HyperConfig,
    MoEConfig,
    StackConfig,
)
from tests.models.oracle import hyper, model
from tests.models.oracle.basics import rms_norm, rotate, sigmoid, silu, softmax
from tests.models.oracle.embedding import kronecker_code
from tests.models.oracle.mixers import deltanet, gsa, selected_keys
from tests.models.oracle.mlp import dense, mixture
from tests.models.oracle.weights import Draw, random_variables

RNG = np.random.default_rng(0)
OWN = presets.tiny().replace(
    layout="DG", width=8, vocab=12, mlp_width=6,
    deltanet=DeltaNetConfig(heads=2, value_heads=4, key_width=4, value_width=4),
    gsa=GSAConfig(heads=2, head_width=4, indexer_heads=2, indexer_width=4, k_base=4, k_min=2, k_max=6, sinks=1),
)  # fmt: skip
ROWS = np.array([[1] * 5 + [2] * 5, [1] * 8 + [0] * 2])
TOKENS = np.random.default_rng(1).integers(0, OWN.vocab, ROWS.shape)


def answer(config, tokens=TOKENS, ids=ROWS, seed=0, **options):
    return model.logits(config, random_variables(config, seed), tokens, ids, **options)


def test_a_deltanet_with_full_writes_and_no_decay_is_a_dictionary():
    n, width = 4, 3
    d = 2 * n + width + 1  # key, query, value, a constant for the biases
    config = DeltaNetConfig(heads=1, value_heads=1, key_width=n, value_width=width, read_scale=1.0)
    p = Draw(OWN.replace(deltanet=config, width=d), RNG).deltanet()
    eye = np.eye(d)
    for name, start, end in (("key", 0, n), ("query", n, 2 * n), ("value", 2 * n, d - 1)):
        p[name]["w"] = eye[:, None, start:end]
    for name in ("query_conv", "key_conv", "value_conv"):
        p[name]["w"] = np.zeros_like(p[name]["w"])
        p[name]["w"][-1] = 100.0 if name != "value_conv" else 1.0
    p["gate"]["w"] = np.zeros((d, 1, width))
    p["gate"]["w"][-1] = 2.0
    p["beta"]["b"], p["a_log"] = np.array([800.0]), np.array([-np.inf])
    writes, reads = RNG.integers(0, n, (2, 12))
    values = RNG.standard_normal((12, width))
    x = np.concatenate([np.eye(n)[writes], np.eye(n)[reads], values, np.ones((12, 1))], axis=1)
    known, wanted = {}, []
    ids = np.array([1] * 7 + [2] * 5)
    for t in range(12):
        known = {} if t == 7 else known
        known[writes[t]] = silu(values[t])
        found = known.get(reads[t], np.zeros(width))
        wanted.append(silu(2.0) * rms_norm(found, p["output_norm"]["scale"], 1e-6) @ p["output"]["w"][0])
    np.testing.assert_allclose(deltanet(config, p, x, ids, 1e-6), wanted, atol=1e-5)


def test_sparse_attention_over_every_key_is_attention():
    t, d, config = 7, 8, OWN.gsa.replace(k_min=99, k_base=99, k_max=99, rope="none")
    p, x = Draw(OWN, RNG).gsa(), RNG.standard_normal((t, d))
    got, chosen = gsa(config, p, x, np.ones(t, int), 0.001)
    q, k, v, value_gate, output_gate = (
        np.einsum("td,dhk->htk", x, p[name]["w"]) for name in ("query", "key", "value", "value_gate", "output_gate")
    )
    scores = np.where(np.tri(t), np.einsum("htk,hsk->hts", q, k) / 2, -np.inf)
    read = softmax(scores) @ (v * sigmoid(value_gate)) * sigmoid(output_gate)
    np.testing.assert_allclose(got, np.einsum("htk,hkd->td", read, p["output"]["w"]), atol=1e-12)
    assert chosen[0][4] == [0, 1, 2, 3, 4]


def test_selection_keeps_the_sinks_and_then_the_highest_scores():
    config = GSAConfig(heads=1, head_width=4, indexer_heads=1, k_base=4, k_min=1, k_max=6, sinks=2)
    scores, ids = np.array([0.1, 0.2, 0.9, 0.5, 0.5, 0.7, 0.3, 5.0]), np.ones(8, int)
    assert selected_keys(config, scores, 6, ids, 0) == [0, 1, 2, 5]
    assert selected_keys(config, scores, 6, ids, scores[:7].var() / 1.3) == [0, 1, 2, 3, 5]  # tie: 3 before 4
    assert selected_keys(config, scores, 6, np.array([1, 1, 1, 2, 2, 2, 2, 2]), 0) == [3, 4, 5, 6]
    row = config.replace(variance="row")
    variance = np.array([*scores[:7], 0]).var()
    assert len(selected_keys(row, scores, 6, ids, variance * 4 / 3.01)) == 3


@pytest.mark.parametrize("kind", ["standard", "origin"])
def test_rotation_keeps_lengths_and_sees_only_distances(kind):
    q, k = (np.tile(RNG.standard_normal((1, 1, 8)), (9, 1, 1)) for _ in range(2))
    scores = np.einsum("thk,shk->ts", rotate(q, kind), rotate(k, kind))
    for distance in range(9):
        np.testing.assert_allclose(np.diagonal(scores, -distance), scores[distance, 0], atol=1e-12)
    frequencies = {"standard": [1, 0.1, 0.01, 0.001], "origin": [1, 0.01, 1, 0.01]}[kind]
    pairs = rotate(np.ones((2, 1, 8)), kind)[1, 0]
    first = pairs[:4] if kind == "standard" else pairs[0::2]
    np.testing.assert_allclose(first, np.cos(frequencies) - np.sin(frequencies), atol=1e-12)


def test_a_mixture_of_one_expert_and_one_of_nulls():
    x, real = RNG.standard_normal((2, 3, 8)), np.ones((2, 3), bool)
    one = MoEConfig(experts=1, expert_width=6, top_k=1, real_share=1.0)
    p = Draw(OWN.replace(moe=one), RNG).mlp()
    only = {name: {"w": leaf["w"][0]} for name, leaf in p["experts"].items()}
    got = mixture(one, p, x, real)
    np.testing.assert_allclose(got.y, dense(p["shared"], x).y + dense(only, x).y, atol=1e-12)
    logits = x @ p["router"]["w"] + p["router"]["b"]
    assert got.experts.tolist() == [1] and got.null_rate == 0
    np.testing.assert_allclose(got.auxiliary, 2e-2 + 1e-3 * (logits**2).mean(), atol=1e-12)
    half = MoEConfig(experts=2, expert_width=6)
    p = Draw(OWN.replace(moe=half), RNG).mlp()
    p["router"]["null_logit"] = np.array(100.0)
    nothing = mixture(half, p, x, real)
    np.testing.assert_array_equal(nothing.y, dense(p["shared"], x).y)
    assert nothing.null_rate == 1 and nothing.experts.tolist() == [0, 0]


def test_sinkhorn_is_doubly_stochastic_and_one_stream_is_the_plain_residual():
    m = hyper.sinkhorn(RNG.standard_normal((5, 4, 4)), 20, 1e-6)
    np.testing.assert_allclose(m.sum(-1), 1, atol=1e-4)
    np.testing.assert_allclose(m.sum(-2), 1, atol=1e-12)
    config = OWN.replace(hyper=HyperConfig(streams=1), adaptive=None)
    variables = random_variables(config)
    for layer in variables["params"]["segment0"].values():
        for name in ("mixer_hyper", "mlp_hyper"):
            for part, bias in (("pre", 800.0), ("post", 0.0)):
                layer[name][part]["alpha"], layer[name][part]["b"] = np.zeros(1), np.full((1, 1), bias)
    with_streams = model.logits(config, variables, TOKENS, ROWS).logits
    plain = model.logits(config.replace(hyper=None), variables, TOKENS, ROWS).logits
    np.testing.assert_allclose(with_streams, plain, atol=1e-12)


def test_hyper_connections_keep_the_stream_mean_of_a_zero_branch():
    config, x = HyperConfig(), RNG.standard_normal((1, 2, 4, 8))
    c = hyper.coefficients(config, Draw(OWN.replace(hyper=config), RNG).hyper(), x, 1e-6)
    after = hyper.write(c, x, np.zeros((1, 2, 8)))
    np.testing.assert_allclose(after.mean(2), x.mean(2), atol=1e-12)
    assert np.abs(after - x).max() > 0.1


def test_the_kronecker_code_is_standardised():
    code = kronecker_code(np.array([7, 9], np.uint8), 2, 32)
    assert abs(code.mean()) < 1e-12 and abs(code.std(ddof=1) - 1) < 1e-3
    assert code[7, 0] == code[9, 1] > 50 and (np.delete(code.ravel(), [7 * 32, 9 * 32 + 1]) < 0).all()


def test_forced_passes_unroll_the_layer():
    config = OWN.replace(layout="D", adaptive=AdaptiveConfig(alpha=(1.0, 1.0)))
    variables = random_variables(config)
    twice = {"params": {**variables["params"], "segment1": variables["params"]["segment0"]}, "statistics": {}}
    wanted = model.logits(config.plain.replace(layout="D,D"), twice, TOKENS, ROWS).logits
    for halting in ("token", "batch"):
        rule = config.replace(adaptive=config.adaptive.replace(halting=halting))
        got = model.logits(rule, variables, TOKENS, ROWS, forced=2)
        np.testing.assert_allclose(got.logits, wanted, atol=1e-12)
        assert got.expected_k.tolist() == [2.0] and got.executed.tolist() == [2]


def test_a_finished_token_stays_and_a_batch_goes_on():
    token, batch = (answer(OWN.replace(adaptive=AdaptiveConfig(halting=rule))) for rule in ("token", "batch"))
    for depth in token.depths:
        assert ((depth.weight == 0) | (depth.weight >= 0.1)).all()
        survived = depth.weight[0] > 0
        for weight in depth.weight[1:]:
            assert not (weight[~survived] > 0).any()
            survived = weight > 0
    first = batch.depths[0]
    assert (first.weight[1:] < 0.1).any() and (first.weight[: first.executed] > 0).all()
    alone = answer(OWN, TOKENS[:1], ROWS[:1])
    np.testing.assert_allclose(token.logits[:1], alone.logits, atol=1e-12)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_batch_ends_once_few_enough_tokens_would_go_on(share):
    adaptive = AdaptiveConfig(halting="batch", batch_share=share)
    result = answer(OWN.replace(adaptive=adaptive))
    for depth in result.depths:
        entering = [((s >= 0.1) & result.real).sum() / result.real.sum() for s in depth.weight * depth.go_on]
        assert all(e > share for e in entering[: depth.executed - 1])
        assert depth.executed == adaptive.max_passes or entering[depth.executed - 1] <= share
    np.testing.assert_allclose(result.expected_k, [d.expected_k[result.real].mean() for d in result.depths])


@pytest.mark.parametrize("components", ["own", "origin"])
def test_documents_of_a_row_do_not_meet_and_nothing_looks_ahead(components):
    """Rotary embedding sees distances, so a document answers the same wherever it stands."""
    config = OWN if components == "own" else OWN.replace(
        hyper=HyperConfig(streams=2), moe=MoEConfig(experts=4, expert_width=6), embedding=EmbeddingConfig("kronecker"),
        deltanet=OWN.deltanet.replace(conv_bias=True, skip=True, activation_on="output", decay_floor=-2.0),
    )  # fmt: skip
    whole = answer(config).logits
    second = answer(config, TOKENS[:1, 5:], ROWS[:1, 5:]).logits
    np.testing.assert_allclose(whole[:1, 5:], second, atol=1e-10)
    changed = TOKENS.copy()
    changed[:, 7] = (changed[:, 7] + 1) % OWN.vocab
    np.testing.assert_array_equal(answer(config, changed).logits[:, :7], whole[:, :7])


def test_stacks_meet_the_residual_stack_where_they_should():
    config = OWN.replace(layout="DG,D", adaptive=None)
    variables = random_variables(config.replace(stack=StackConfig("lambda", skips=((0, 2),))))
    params = variables["params"]
    plain = model.logits(config, variables, TOKENS, ROWS)
    for layer in (*params["segment0"].values(), *params["segment1"].values()):
        layer["residual_scale"], layer["x0_scale"] = np.ones(1), np.zeros(1)
    params["skips"] = np.zeros(1)
    for enters in ("after_mixing", "before_mixing"):
        stack = StackConfig("lambda", skips=((0, 2),))
        got = model.logits(config.replace(stack=stack), variables, TOKENS, ROWS, skip_enters=enters)
        np.testing.assert_allclose(got.logits, plain.logits, atol=1e-12)
    one = config.replace(layout="DG")
    midpoint = model.logits(one.replace(layout="D", stack=StackConfig("midpoint", step=2.0)), variables, TOKENS, ROWS)
    first = model.logits(one.replace(layout="D"), variables, TOKENS, ROWS)
    np.testing.assert_allclose(midpoint.logits, first.logits, atol=1e-12)  # p_0 + 0.5 step Delta


def test_memory_enters_its_own_document_only():
    config = presets.tiny_3b().replace(
        layout="D", width=8, vocab=12, mlp_width=6, deltanet=OWN.deltanet, gsa=OWN.gsa, mtp=None,
        adaptive=AdaptiveConfig(), moe=None,
    )  # fmt: skip
    without = answer(config)
    given = (RNG.standard_normal((2, 8)), np.array([2, 5]))
    got = answer(config, memory=given)
    differs = np.abs(got.logits - without.logits).max(-1) > 1e-9
    np.testing.assert_array_equal(differs, (ROWS == 2) & (np.arange(2) == 0)[:, None])
    assert got.memory[0].shape == (2, 8) and got.memory[1].tolist() == [2, 0]


def test_the_second_next_token_is_predicted_from_the_next_one_and_never_from_it_on():
    config = presets.tiny_3b().replace(
        layout="D", width=8, vocab=12, mlp_width=6, deltanet=OWN.deltanet, gsa=OWN.gsa,
        moe=MoEConfig(experts=2, expert_width=4), adaptive=AdaptiveConfig(),
    )  # fmt: skip
    ids = np.ones_like(TOKENS)
    changed = TOKENS.copy()
    changed[:, 6] = (changed[:, 6] + 1) % config.vocab
    before, after = (answer(config, tokens, ids).mtp_logits for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(before[:, 5] - after[:, 5]).max() > 1e-6
