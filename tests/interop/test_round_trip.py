"""There and back, bit for bit, whatever the dtypes, the components and the depth."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.tree_paths import flatten, nest
from gt_jax.configs.lineage import chain, tree_lines
from gt_jax.configs.model import EmbeddingConfig, ModelConfig
from gt_jax.errors import Refused
from gt_jax.interop.shards import Source
from gt_jax.interop.to_orbax import to_orbax
from gt_jax.interop.to_safetensors import refuse_other_models, to_safetensors
from gt_jax.models import language_model
from gt_jax.text.token_bytes import default_texts, token_table
from tests.interop import origin
from tests.interop.origin import BF16, CONFIG, OVERRIDES

PLAIN = CONFIG.plain
CONFIGS = {
    "everything": CONFIG,
    "plain, 20 layers, table and code, without streams": PLAIN.replace(
        layout="DDDG*5", hyper=None, mtp=None, memory=None, embedding=EmbeddingConfig("kronecker+table")),
    "table, another pattern": PLAIN.replace(layout="D*2,G,D", embedding=EmbeddingConfig("table")),
    "G alone": CONFIG.replace(layout="G*2", deltanet=None),
}  # fmt: skip


def assert_same(a: Source, b: Source) -> None:
    assert a.tensors == b.tensors
    for name in a.tensors:
        assert a.read(name).tobytes() == b.read(name).tobytes(), name


def assert_same_leaves(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype and a[path].tobytes() == b[path].tobytes(), path


def overrides(config: ModelConfig) -> dict:
    return {name: value for name, value in OVERRIDES.items() if getattr(config, name) is not None}


RARE = ("table, another pattern", "plain, 20 layers, table and code, without streams")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.exhaustive] if name in RARE else []) for name in CONFIGS])  # fmt: skip
def test_there_and_back(tmp_path, name):
    config = CONFIGS[name]
    source = origin.write(tmp_path / "a.safetensors", origin.state(config))
    report = to_orbax([source], tmp_path / "ours", overrides=overrides(config), step=7)
    assert ModelConfig.from_json(report["config"]) == config
    to_safetensors(tmp_path / "ours", tmp_path / "b.safetensors")
    assert_same(Source([source]), Source([tmp_path / "b.safetensors"]))
    again = to_orbax([tmp_path / "b.safetensors"], tmp_path / "again")
    assert again["config"] == report["config"] and again["step"] == 7
    assert_same_leaves(flatten(checkpoint.load(tmp_path / "again")), flatten(checkpoint.load(tmp_path / "ours")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "again", "b.safetensors", "ours"]


def test_bfloat16(tmp_path):
    source = origin.write(tmp_path / "a.safetensors", origin.state(dtype=BF16))
    report = to_orbax([source], tmp_path / "ours", overrides=OVERRIDES)
    assert report["config"]["param_dtype"] == report["config"]["compute_dtype"] == "bfloat16"
    assert report["config"]["adaptive"]["alpha"] == [1.0, 0.7, 0.5, 0.35]
    leaves, _ = checkpoint.describe(tmp_path / "ours")
    assert leaves["params/unembedding/w"].dtype == BF16 and leaves["params/final_norm/scale"].dtype == np.float32
    to_safetensors(tmp_path / "ours", tmp_path / "b.safetensors")
    assert_same(Source([source]), Source([tmp_path / "b.safetensors"]))


def test_mixed_dtypes_and_shapes_of_scalars_come_back_as_they_were(tmp_path):
    state = origin.state(dtype=BF16)
    random = np.random.default_rng(1)
    for name in state:
        if name.endswith(("lambda_r_raw", "null_logit", "alpha_pre", "variance_ema")):
            state[name] = state[name].reshape(1)
        elif name.endswith("b_res"):
            state[name] = state[name].reshape(-1)
        elif name.endswith(("gate_bias", "layer_emb")):
            state[name] = state[name][None]
        if name.startswith("layers.2."):
            dtype = random.choice([np.float16, np.float32])
            state[name] = random.normal(size=state[name].shape).astype(dtype)
        if name.endswith("layers.2.alpha"):
            state[name] = np.array(CONFIG.adaptive.alpha, np.float32)
    source = origin.write(tmp_path / "a.safetensors", state)
    report = to_orbax([source], tmp_path / "ours", overrides=OVERRIDES)
    assert report["config"]["param_dtype"] == "float32"
    assert report["config"]["adaptive"]["alpha"] == [1.0, 0.7, 0.5, 0.35]
    to_safetensors(tmp_path / "ours", tmp_path / "b.safetensors")
    assert_same(Source([source]), Source([tmp_path / "b.safetensors"]))


def test_special_values_keep_their_bits(tmp_path):
    state = origin.state()
    state["lm_head.weight"][:2, :3] = [[np.nan, -0.0, np.inf], [-np.inf, 1e-45, -np.nan]]
    state["layers.0.attn_block.sublayer.q_proj.weight"][0, :2] = [-0.0, np.nan]
    source = origin.write(tmp_path / "a.safetensors", state)
    to_orbax([source], tmp_path / "ours", overrides=OVERRIDES)
    to_safetensors(tmp_path / "ours", tmp_path / "b.safetensors")
    assert_same(Source([source]), Source([tmp_path / "b.safetensors"]))


def test_a_checkpoint_of_ours_goes_there_and_comes_back_with_its_own_config(tmp_path):
    config = CONFIG.replace(layout="DDG,G,DDDG", norm_epsilon=3e-6, param_dtype="bfloat16",
                            deltanet=CONFIG.deltanet.replace(heads=1, key_width=8, rope="none"))
    random = np.random.default_rng(2)
    leaves = {path: np.ones(leaf.shape, leaf.dtype) if path.endswith("/gain") else
              random.normal(size=leaf.shape).astype(leaf.dtype) for path, leaf in origin.contract(config).items()}
    table = token_table(default_texts(264), 32)
    leaves |= dict(zip(("statistics/embedding/token_bytes", "statistics/embedding/token_length"), table, strict=True))
    trained = {**nest(leaves), "optimizer": {"mu": np.zeros(3)}}
    metadata = {"config": config.to_json(), "kind": "train", "step": 40, "run": {"data": {"tokenizer": "bytes"}}}
    checkpoint.save(tmp_path / "run" / "40", trained, metadata)
    report = to_safetensors(tmp_path / "run", tmp_path / "there.safetensors")
    assert report["step"] == 40 and report["warnings"] == ["deltanet.rope is 'none'; the origin computes with 'origin'"]
    back = to_orbax([tmp_path / "there.safetensors"], tmp_path / "back")
    assert ModelConfig.from_json(back["config"]) == config and back["step"] == 40
    assert_same_leaves(flatten(checkpoint.load(tmp_path / "back")), leaves)
    steps = chain(checkpoint.describe(tmp_path / "back")[1])
    assert [step["kind"] for step in steps] == ["train", "exported", "converted"]
    assert steps[0]["run"] == metadata["run"] and steps[1]["exported"] == {"source": str(tmp_path / "run" / "40")}
    assert [line.strip(" └─").split(" from")[0] for line in tree_lines(checkpoint.describe(tmp_path / "back")[1])
            if " from " in line][:2] == ["converted at step 40", "exported at step 40"]


def test_a_tied_embedding_and_a_midpoint_stack_have_no_place_in_the_origin():
    config = origin.CONFIG.replace(layout="DDDG", embedding=origin.CONFIG.embedding.replace(kind="table", tied=True))
    other = origin.CONFIG.replace(adaptive=None, stack=origin.CONFIG.stack.replace(kind="midpoint"))
    for model, words in ((config, "it has a tied embedding"), (other, "it has the midpoint stack")):
        with pytest.raises(Refused, match=words):
            refuse_other_models(Path("ours"), model)


def test_metadata_say_where_it_came_from(tmp_path):
    source = origin.write(tmp_path / "a.safetensors", origin.state())
    report = to_orbax([source], tmp_path / "ours", overrides=OVERRIDES, step=12000)
    _, metadata = checkpoint.describe(tmp_path / "ours")
    assert metadata["kind"] == "converted" and metadata["step"] == 12000 and metadata["config"] == report["config"]
    assert metadata["converted_from"] == {
        "source": str(tmp_path), "files": {"a.safetensors": source.stat().st_size}, "tensors": report["tensors"],
        "forms": {}}
    json.dumps(metadata)


@pytest.mark.slow
def test_the_contract_is_what_the_model_says_and_its_checkpoint_opens(tmp_path):
    abstract = language_model.abstract(CONFIG)
    said = {path: (leaf.shape, leaf.dtype) for path, leaf in flatten(abstract).items()}
    assert said == {path: (leaf.shape, leaf.dtype) for path, leaf in origin.contract(CONFIG).items()}
    source = origin.write(tmp_path / "a.safetensors", origin.state())
    to_orbax([source], tmp_path / "ours", overrides=OVERRIDES)
    config, params, statistics, _ = checkpoint.load_model(tmp_path / "ours", abstract)
    assert config == CONFIG and jax.tree.structure({"params": params, "statistics": statistics}) == jax.tree.structure(
        abstract)
    stand_ins = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    loaded = flatten(ocp.load(tmp_path / "ours", stand_ins))
    np.testing.assert_array_equal(loaded["params/unembedding/w"], origin.state()["lm_head.weight"].T)
