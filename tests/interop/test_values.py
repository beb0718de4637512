"""Every tensor of the origin lands where REFERENCE.md's notation puts it, element by element."""

import numpy as np
import pytest

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.interop import expected_tensors
from gt_jax.interop.to_orbax import to_orbax
from tests.interop import origin

C = origin.CONFIG
S, M = "attn_block.sublayer.", "mlp_block.sublayer.moe."
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(the origin's tensors, ours by path)."""
    folder = tmp_path_factory.mktemp("values")
    there = origin.state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expected_tensors, "model_leaves", origin.contract)
        to_orbax([origin.write(folder / "source.safetensors", there)], folder / "target", overrides=origin.OVERRIDES)
    return there, flatten(checkpoint.load(folder / "target"))


def some(shape):
    """A few indices of an array."""
    return [tuple(RANDOM.integers(0, size) for size in shape) for _ in range(40)]


def layer(index):
    """Prefixes of layer `index` there and here, and the block: layer 6 is slot 2 of block 1."""
    return f"layers.{index}.", f"params/segment0/layer{index % 4}/", index // 4


PROJECTIONS = (
    (0, "q_proj", "query"), (5, "k_proj", "key"), (6, "v_proj", "value"), (2, "g_proj", "gate"), (3, "W_q", "query"),
    (7, "W_k", "key"), (3, "W_v", "value"), (7, "W_gv", "value_gate"), (3, "W_go", "output_gate"),
    (7, "W_Iq", "indexer_query"), (3, "W_Ik", "indexer_key"),
)  # fmt: skip


@pytest.mark.parametrize("index,name,ours", PROJECTIONS)
def test_projections_are_transposed_and_split_head_by_head(case, index, name, ours):
    theirs, mine, block = layer(index)
    there, here = case[0][f"{theirs}{S}{name}.weight"], case[1][f"{mine}mixer/{ours}/w"][block]
    width = here.shape[2]
    for i, head, k in some(here.shape):
        assert here[i, head, k] == there[head * width + k, i]


@pytest.mark.parametrize("index", [1, 3])
def test_output_projections_read_head_major(case, index):
    theirs, mine, block = layer(index)
    there, here = case[0][f"{theirs}{S}o_proj.weight"], case[1][f"{mine}mixer/output/w"][block]
    for head, v, o in some(here.shape):
        assert here[head, v, o] == there[o, head * here.shape[1] + v]


@pytest.mark.parametrize("index,name,ours", [(4, "b_proj", "beta"), (4, "gk_proj", "decay"), (3, "W_Iw", "")])
def test_gates(case, index, name, ours):
    theirs, mine, block = layer(index)
    ours = f"{mine}mixer/{ours or 'indexer_weight'}"
    np.testing.assert_array_equal(case[1][f"{ours}/w"][block], case[0][f"{theirs}{S}{name}.weight"].T)
    if name != "W_Iw":
        np.testing.assert_array_equal(case[1][f"{ours}/b"][block], case[0][f"{theirs}{S}{name}.bias"])


@pytest.mark.parametrize("name,ours", [("q", "query"), ("k", "key"), ("v", "value")])
def test_convolutions_have_channel_head_times_width_plus_j(case, name, ours):
    theirs, mine, block = layer(6)
    there, here = case[0][f"{theirs}{S}{name}_conv1d.conv.weight"], case[1][f"{mine}mixer/{ours}_conv/w"][block]
    bias, ours_bias = case[0][f"{theirs}{S}{name}_conv1d.conv.bias"], case[1][f"{mine}mixer/{ours}_conv/b"][block]
    width = here.shape[2]
    for tap, head, j in some(here.shape):
        assert here[tap, head, j] == there[head * width + j, 0, tap]
        assert ours_bias[head, j] == bias[head * width + j]


@pytest.mark.parametrize("index,name,ours", [
    (5, S + "A_log", "mixer/a_log"), (5, S + "D", "mixer/skip"), (5, S + "dt_bias", "mixer/dt_bias"),
    (5, S + "o_norm.norm.weight", "mixer/output_norm/scale"), (7, S + "gate_bias", "mixer/indexer_bias"),
    (7, S + "head_importance_bias", "mixer/head_importance"), (2, "attn_block.norm.weight", "mixer_norm/scale"),
    (7, "mlp_block.norm.weight", "mlp_norm/scale"), (1, "layer_emb", "halting/embedding"),
    (1, "continue_head.net.0.bias", "halting/hidden/b"), (1, "continue_head.net.2.bias", "halting/output/b"),
    (6, M + "W_gate", "mlp/experts/gate/w"), (6, M + "W_up", "mlp/experts/up/w"),
    (6, M + "W_down", "mlp/experts/down/w"), (3, "mlp_block.coeffs.rms.weight", "mlp_hyper/norm/scale"),
    (6, M + "gate.logit_bias", "mlp/router/b"), (6, M + "gate.null_logit", "mlp/router/null_logit"),
    (2, "attn_block.coeffs.b_res", "mixer_hyper/res/b"), (2, "mlp_block.coeffs.b_pre", "mlp_hyper/pre/b"),
    (2, "mlp_block.coeffs.alpha_post", "mlp_hyper/post/alpha"),
])  # fmt: skip
def test_tensors_that_are_alike(case, index, name, ours):
    theirs, mine, block = layer(index)
    np.testing.assert_array_equal(case[1][mine + ours][block], case[0][theirs + name])


@pytest.mark.parametrize("name,ours", [
    ("continue_head.net.0.weight", "halting/hidden/w"), ("continue_head.net.2.weight", "halting/output/w"),
    (M + "gate.gate.weight", "mlp/router/w"), (M + "shared_gate.weight", "mlp/shared/gate/w"),
    (M + "shared_up.weight", "mlp/shared/up/w"), (M + "shared_down.weight", "mlp/shared/down/w"),
])  # fmt: skip
def test_matrices_are_transposed(case, name, ours):
    theirs, mine, block = layer(5)
    np.testing.assert_array_equal(case[1][mine + ours][block], case[0][theirs + name].T)


@pytest.mark.parametrize("which", ["pre", "post", "res"])
def test_hyper_connections_read_vec_x_stream_major(case, which):
    theirs, mine, block = layer(7)
    there = case[0][f"{theirs}attn_block.coeffs.phi_{which}.weight"]
    here = case[1][f"{mine}mixer_hyper/{which}/w"][block]
    for stream, channel, m in some(here.shape):
        assert here[stream, channel, m] == there[m, stream * C.width + channel]


def test_top_level(case):
    there, here = case[0], {path.removeprefix("params/"): value for path, value in case[1].items()}
    np.testing.assert_array_equal(here["unembedding/w"], there["lm_head.weight"].T)
    np.testing.assert_array_equal(here["final_norm/scale"], there["norm.weight"])
    np.testing.assert_array_equal(here["embedding/norm/scale"], there["embed_norm.weight"])
    np.testing.assert_array_equal(here["memory/strength"], there["lambda_r_raw"])
    np.testing.assert_array_equal(here["memory/norm/scale"], there["memory_ln.weight"])
    np.testing.assert_array_equal(here["memory/norm/bias"], there["memory_ln.bias"])
    np.testing.assert_array_equal(here["memory/gate/w"], there["memory_gate_proj.weight"][0])
    np.testing.assert_array_equal(here["memory/gate/b"], there["memory_gate_proj.bias"][0])
    for byte, position, channel in some((256, 32, C.width)):
        assert here["embedding/kronecker/w"][byte, position, channel] == there["pf_to_model.weight"][
            channel, byte * 32 + position]


def test_prediction_block(case):
    there, here = case[0], case[1]
    h = np.arange(C.width, dtype=np.float32)
    both = np.concatenate([h, 2 * h])  # [h ; embedding]
    fusion = here["params/mtp/fusion/w"]
    wanted = there["mtp_block.fusion_proj.weight"] @ both
    np.testing.assert_allclose(h @ fusion[0] + 2 * h @ fusion[1], wanted, rtol=1e-5)
    np.testing.assert_array_equal(here["params/mtp/layer/mixer/head_importance"],
                                  there[f"mtp_block.{S}head_importance_bias"])
    np.testing.assert_array_equal(here["params/mtp/layer/mlp/router/w"], there[f"mtp_block.{M}gate.gate.weight"].T)
    assert here["statistics/mtp/layer/mixer/variance_ema"] == there[f"mtp_block.{S}variance_ema"]
    assert "params/mtp/layer/gain" not in here


def test_statistics_gains_and_bytes(case):
    there, here = case
    for block, index in enumerate((3, 7)):
        assert here["statistics/segment0/layer3/mixer/variance_ema"][block] == there[f"layers.{index}.{S}variance_ema"]
    for slot in range(4):
        np.testing.assert_array_equal(here[f"params/segment0/layer{slot}/gain"], [1, 1])
    np.testing.assert_array_equal(here["statistics/embedding/token_bytes"][:256, 0], np.arange(256))
    np.testing.assert_array_equal(here["statistics/embedding/token_length"][:257], [1] * 256 + [5])
