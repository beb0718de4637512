"""The benchmarks of the training step and of checkpoints, scaled down: both sides are alike, what is said adds up."""

from __future__ import annotations

import importlib.util
import json
import statistics

import jax
import numpy as np
import pytest

from experiments import bench_checkpoints, bench_training
from experiments.training_measured import sizes
from experiments.training_measured.turns import Contestant, Job, Turn
from gt_jax.errors import Failed, Refused
from gt_jax.models.language_model import abstract
from tests.rarely import rarely

TOY = ["--size", "toy", "--batch", "2", "--tokens", "16", "--rounds", "2"]


@pytest.mark.parametrize("experts", [rarely(0), 4])
def test_both_sides_have_the_same_matrices(experts):
    """Counted from the equations of Qwen3-Next; ours has a value gate and an indexer more, theirs less than 1 %."""
    config = sizes.plain_form("small", experts)
    q = sizes.qwen3_next(config, 256)
    d, heads, wide = q["hidden_size"], q["linear_num_value_heads"], q["linear_value_head_dim"]
    delta = d * 2 * heads * (q["linear_key_head_dim"] + wide) + d * 2 * heads + heads * wide * d
    attention = d * q["num_attention_heads"] * q["head_dim"] * 5
    mlp = 3 * d * q["intermediate_size"]
    if experts:
        shared, own = q["shared_expert_intermediate_size"], q["moe_intermediate_size"]
        mlp = 3 * d * shared + experts * (3 * d * own + d)
    kinds = q["layer_types"]
    theirs = 2 * q["vocab_size"] * d + kinds.count("linear_attention") * delta
    theirs += kinds.count("full_attention") * attention + len(kinds) * mlp
    ours = abstract(config)["params"]
    gsa = ours["segment0"]["layer3"]["mixer"]
    extra = sum(leaf.size for name in gsa if name == "value_gate" or name.startswith("indexer")
                for leaf in jax.tree.leaves(gsa[name]))  # fmt: skip
    count = sum(leaf.size for leaf in jax.tree.leaves(ours)) - extra
    assert theirs <= count <= 1.002 * theirs
    assert config.adaptive is None and (config.remat, config.compute_dtype) == ("none", "float32")


def test_the_tokens_follow_the_step_and_leave_much_to_learn():
    one, two, again = (sizes.rows_of_tokens(4096, 8, 256, step) for step in (1, 2, 1))
    assert one.shape == (8, 257) and one.dtype == np.int32 and (one == again).all() and (one != two).any()
    share = np.bincount(one.ravel(), minlength=4096) / one.size
    entropy = -np.sum(share[share > 0] * np.log(share[share > 0]))
    assert one.min() >= 0 and one.max() < 4096 and entropy < np.log(4096) - 1


def test_the_ratio_is_to_the_faster_way_round_by_round():
    turns = {"ours": [2.0, 2.0, 4.0], "eager": [5.0, 3.0, 4.0], "compiled": [9.0, 1.0, 9.0]}
    found = bench_training.compared({by: [Turn(one, 0.0, []) for one in times] for by, times in turns.items()})
    assert found == {"fastest": "eager", "ratio": {"median": 1.5, "least": 1.0, "most": 2.5}}
    assert bench_training.compared({"ours": [Turn(1.0, 0.0, [])]}) == {}


def test_what_cannot_be_measured_is_refused_with_what_would_be_right(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"torch and transformers not installed: pip install 'gt-jax\[bench\]'"):
        bench_training.main(TOY)
    with pytest.raises(Refused, match=r"(?s)--rounds 0.*--tokens 1.*is no folder"):
        bench_training.main(["--rounds", "0", "--tokens", "1", "--output", str(tmp_path / "none")])
    with pytest.raises(Refused, match=r"(?s)--every 0.*--workdir"):
        bench_checkpoints.main(["--every", "0", "--workdir", str(tmp_path / "none")])
    with pytest.raises(Refused, match="--experts 1"):
        sizes.plain_form("toy", 1)


@pytest.mark.exhaustive  # a benchmark, run where its figures are made
def test_a_contestant_trains_in_a_process_of_its_own():
    job = Job("ours", sizes.plain_form("toy", 0), 2, 16, 1)
    with Contestant(job) as ours:
        first, turn = ours.turn(1), ours.turn(9)
        about = ours.about()
        with pytest.raises(Failed, match="ours: no answer within 0 s"):
            ours.turn(100_000, 0.01)
    assert turn.losses[-1] < first.losses[0] and len(turn.losses) == 9
    assert turn.seconds > 0 and about["passes"] == 1.0
    assert about["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(abstract(job.config)["params"]))


@pytest.mark.slow
def test_beside_pytorch(capsys, tmp_path):
    for name in bench_training.NEEDED:
        pytest.importorskip(name)
    assert bench_training.main([*TOY, "--steps", "25", "--models", "dense", "experts", "--theirs", "eager", "--json",
                                "--output", str(tmp_path)]) == 0  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "bench_training_toy.json").read_text()) == report
    assert (tmp_path / "bench_training_toy.md").read_text().count("\n| dense | ") == 2
    for model in report["models"]:
        sides = model["sides"]
        assert sides.keys() == {"ours", "eager"} and model["ratio"]["least"] <= model["ratio"]["median"]
        for side in sides.values():
            assert side["last_loss"] < side["first_loss"] and side["tokens_a_second"]["least"] > 0
        # from the same tokens, both near the entropy of the uniform guess
        assert abs(sides["ours"]["first_loss"] - sides["eager"]["first_loss"]) < 0.1


@pytest.mark.exhaustive  # a benchmark, run where its figures are made
def test_the_overhead_of_checkpoints_is_what_the_stretches_say(capsys, tmp_path):
    words = [*TOY, "--steps", "2", "--every", "5", "--workdir", str(tmp_path), "--json", "--output", str(tmp_path)]
    assert bench_checkpoints.main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} == {f"bench_checkpoints_toy.{kind}" for kind in ("json", "md")}
    step = statistics.median(one["seconds"] for one in report["without"]) / 2
    costs = [one["seconds"] - other["seconds"] for one, other in zip(report["saving"], report["without"], strict=True)]
    assert report["overhead"]["median"] == pytest.approx(statistics.median(costs) / (5 * step))
    weights = sum(leaf.size for leaf in jax.tree.leaves(abstract(sizes.plain_form("toy", 0))["params"]))
    assert report["bytes"] >= 12 * weights  # the weights and two moments
    assert all(one["blocked"] == 0 for one in report["without"])
    assert all(0 < one["blocked"] < one["seconds"] for one in report["saving"])
