"""The scripts behind the full-size figures, scaled down: a random checkpoint, and the benchmark that grows it."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import bench_grow, disk_floor, write_random_checkpoint
from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs import presets
from gt_jax.errors import Refused


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random") / "source"
    write_random_checkpoint.main([str(path), "--preset", "tiny", "--scale", "0.25", "--seed", "4"])
    return path


def test_a_random_checkpoint_is_a_model_and_follows_its_seed(source: Path, tmp_path: Path) -> None:
    config, params, _, metadata = checkpoint.load_model(source)
    assert (config.width, config.layout, metadata["seed"]) == (64, "DDDG*2", 4)
    values = flatten(params)
    assert all(np.isfinite(value).all() for value in values.values())
    np.testing.assert_allclose(np.std(values["embedding/table"]), config.init_std, rtol=0.05)
    np.testing.assert_allclose(np.mean(values["segment0/layer0/gain"]), 1, atol=4 * config.init_std)
    write = write_random_checkpoint.write
    for seed in (4, 5):
        write(tmp_path / str(seed), config, seed)
    hashes = [checkpoint.content_hash(path) for path in (source, tmp_path / "4", tmp_path / "5")]
    assert hashes[0] == hashes[1] != hashes[2]
    with pytest.raises(Refused, match="exists"):
        write(source, config, 4)


def test_scale_is_about_the_share_of_parameters() -> None:
    scaled = write_random_checkpoint.scaled
    whole = presets.preset("3b")
    assert scaled(whole, 1.0) == whole
    half = scaled(whole, 0.25)
    assert (half.width, half.vocab, half.moe.expert_width, half.deltanet.heads) == (2048, 65536, 512, 16)
    with pytest.raises(Refused, match="above 0"):
        scaled(whole, 0.0)


@pytest.mark.exhaustive  # a benchmark, run where its figures are made
def test_the_benchmark_reports_ratio_and_memory(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_floor, "forget", lambda folder: "nothing")  # other tests use the same caches
    monkeypatch.setattr(disk_floor, "touch_memory", lambda: None)
    words = ["--source", str(source), "--repeats", "1", "--workdir", str(tmp_path), "--json", str(tmp_path / "j")]
    bench_grow.main(words)
    found, = json.loads((tmp_path / "j").read_text())
    assert found["target_bytes"] > 1.8 * found["source_bytes"] and found["ratio"]["median"] > 0
    assert 0.1 < found["peak_gib"] < 1
    assert [path.name for path in tmp_path.iterdir()] == ["j"]
