"""A plain model becomes adaptive: the same bits, gates that are closed and can open, whole or not at all."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax import retrofit as command
from gt_jax import train
from gt_jax.checkpoints import checkpoint, orbax_store
from gt_jax.checkpoints.tree_paths import flatten, nest
from gt_jax.configs.adaptive import AdaptiveConfig
from gt_jax.configs.data import DataConfig
from gt_jax.configs.lineage import LINEAGE, exported, tree_lines
from gt_jax.configs.price import opening
from gt_jax.configs.run import RunConfig, TrainConfig
from gt_jax.configs.standing import with_opening
from gt_jax.errors import Refused
from gt_jax.evaluation import verification
from gt_jax.evaluation.model_files import open_checkpoint
from gt_jax.growth import stream
from gt_jax.growth.retrofit import closed, closed_heads, retrofit, retrofit_checkpoint, retrofitted_config
from gt_jax.models.language_model import abstract
from gt_jax.training.price import phase
from tests.support import perturbed, small_model

PLAIN = small_model("D*2", adaptive=False)
STATE = closed(AdaptiveConfig(alpha=(1.0, 0.5)).seeing_state)
PRICE = opening(STATE.initial_bias, 2, "budget", 1.5, target_of="passes_run")
OPTIONS = {"adaptive": STATE, "price": PRICE, "seed": 3}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A plain run's checkpoint, with an optimizer's second moments."""
    place = tmp_path_factory.mktemp("plain") / "source"
    params = perturbed(PLAIN)["params"]
    nu = {name: np.full(leaf.shape, 0.25, np.float32) for name, leaf in flatten(params).items()}
    tree = {**perturbed(PLAIN), "moments": {"second": nest(nu), "updates": np.int32(7)}}
    run = RunConfig(model=PLAIN, train=TrainConfig(steps=40), data=DataConfig(sequence_length=16)).to_json()
    checkpoint.save(place, tree, {"config": PLAIN.to_json(), "kind": "train", "step": 12, "run": run})
    return place


def bytes_of(folder):
    """What lies in a checkpoint but for its metadata, which name the place of the source."""
    return {file.relative_to(folder): file.read_bytes() for file in (folder / "state").rglob("c*") if file.is_file()}


def test_the_command_writes_a_model_of_the_same_bits_that_training_knows_how_to_open(source, tmp_path, capsys):
    target = tmp_path / "adaptive"
    words = [str(source), str(target), "--strengths", "1,0.5", "--seed", "3", "--json"]
    assert command.main([*words, "--dry-run"]) == 0 and not target.exists()
    planned = json.loads(capsys.readouterr().out)
    assert command.main(words) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["check"]["same_bits"] and shown["check"]["difference"] == 0.0
    assert shown["tensors"] == planned["tensors"] and shown["bytes"] == planned["bytes"]
    before, after = (flatten(checkpoint.load(place)) for place in (source, target))
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)
    heads = set(after) - set(before)
    assert heads and all("/halting/" in path for path in heads)
    assert not any(after[path].any() for path in heads if path.startswith("moments/"))
    metadata = checkpoint.describe(target)[1]
    assert metadata["retrofitted_from"]["price"] == PRICE.to_json() and metadata["kind"] == "retrofitted"
    assert tree_lines(metadata)[0].startswith(f"retrofitted from {source}")
    assert any("trained at step 12" in line for line in tree_lines(metadata))
    config = train.default_config(train.parser().parse_args(["run", "--start", str(target), "--steps", "100"]))
    assert config.train.price == PRICE and config.train.moments == "carried"
    assert config.train.optimizer.halting_scale == 10.0
    curve = verification._training(open_checkpoint(source), open_checkpoint(target), 100)
    assert curve.price == PRICE and curve.optimizer.halting_scale == 10.0, "verify --curve opens the gates too"
    assert config.model == retrofitted_config(PLAIN, STATE)
    moved = {"kind": "converted", "converted_from": {"source": "x"}, LINEAGE: exported(metadata, str(target))}
    assert with_opening(TrainConfig(), moved).price == PRICE, "however often it was written out and read back"
    trained = {"kind": "train", "run": {}, LINEAGE: exported(metadata, str(target))}
    assert with_opening(TrainConfig(), trained) == TrainConfig()
    again = train.parser().parse_args(["run", "--start", str(target), "--price-rule", "ouro"])
    with pytest.raises(Refused, match="make it again with"):
        train.run_config(again, config)
    with pytest.raises(Refused, match="adaptive already"):
        command.main([str(target), str(tmp_path / "twice")])


@pytest.mark.exhaustive  # growth and conversion are killed in theirs
def test_killed_before_it_has_its_name_it_is_no_checkpoint_and_goes_on(source, tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_store, "CHUNK", 512)
    retrofit_checkpoint(source, tmp_path / "whole", **OPTIONS)

    def full(folder):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stream, "note_files", full)
        with pytest.raises(OSError, match="killed; make room, then finish with --resume"):
            retrofit_checkpoint(source, tmp_path / "killed", **OPTIONS)
    assert not (tmp_path / "killed").exists()
    with pytest.raises(Refused, match="a retrofit of killed was interrupted"):
        retrofit_checkpoint(source, tmp_path / "killed", **OPTIONS)
    with pytest.raises(Refused, match=r"belongs to another retrofit(.|\n)*seed: 3 there, 4 now"):
        retrofit_checkpoint(source, tmp_path / "killed", **{**OPTIONS, "seed": 4}, resume=True)
    report = retrofit_checkpoint(source, tmp_path / "killed", **OPTIONS, resume=True)
    assert report["kept"] > 0 and bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


def test_the_heads_are_what_the_config_declares_and_say_the_same_to_everyone():
    config = retrofitted_config(PLAIN, STATE)
    made = flatten(retrofit(PLAIN, perturbed(PLAIN), STATE).variables)
    declared = flatten(abstract(config))
    assert {path: leaf.shape for path, leaf in made.items()} == {path: leaf.shape for path, leaf in declared.items()}
    heads = closed_heads(config, 0)
    assert all(not leaf.any() for path, leaf in heads.items() if path.endswith("output/w"))
    bias = next(leaf for path, leaf in heads.items() if path.endswith("output/b"))
    assert np.all(1 / (1 + np.exp(-bias)) < STATE.threshold)
    other = closed_heads(config, 1)
    name = next(path for path in heads if path.endswith("hidden/w"))
    assert not np.array_equal(heads[name], other[name]) and not np.array_equal(heads[name][0], heads[name][1])


def test_what_cannot_be_retrofitted_is_said():
    with pytest.raises(Refused, match=r"adaptive already(.|\n)*strength of pass 1 would be 0\.5"):
        retrofitted_config(small_model("D"), AdaptiveConfig(alpha=(0.5, 0.5)))
    bound = AdaptiveConfig().seeing_state.replace(logit_bound=2.0)
    with pytest.raises(Refused, match=r"with logit_bound 2 no gate says less than 0\.119, .* threshold 0\.1"):
        retrofitted_config(PLAIN, bound)
    assert retrofitted_config(PLAIN, bound.replace(threshold=0.12)).adaptive.logit_bound == 2.0
    with pytest.raises(Refused, match="exclude each other"):
        retrofitted_config(PLAIN.replace(stack=PLAIN.stack.replace(kind="midpoint")), AdaptiveConfig())
    with pytest.raises(Refused, match=r"needs price rule(.|\n)*no list of numbers"):
        command.main(["a", "b", "--strengths", "1,x", "--price-rule", "ouro", "--pass-price", "0.1"])
    with pytest.raises(Refused, match="target-of mean_weight says what a target is the mean of; a pass price"):
        command.main(["a", "b", "--pass-price", "0.1", "--target-of", "mean_weight"])
    settings = [command._settings(command.parser().parse_args(["a", "b", *words]))[1].target_of
                for words in ([], ["--target-of", "mean_weight"])]  # fmt: skip
    assert settings == ["passes_run", "mean_weight"]
    with pytest.raises(Refused, match=r"--target is 9; .* a layer runs 4 times at most"):
        command.main(["a", "b", "--target", "9"])
    with pytest.raises(Refused, match="nowhere"):
        command.main(["nowhere", "there"])


def test_the_schedule_opens_closed_gates_while_all_passes_are_forced():
    steps = 100
    now = jax.vmap(lambda step: phase(PRICE, step, steps, 2))(jnp.arange(steps))
    counts = now.control.forced.tolist()
    assert set(counts[:70]) == {2} and not any(counts[71:]) and not now.opens[71:].any()
    assert STATE.initial_bias + float(now.opens.sum()) == pytest.approx(2.0, abs=0.15)
    left = PRICE.after(35, steps, 65)
    assert left.gates_opened == pytest.approx(PRICE.gates_opened / 2) and left.forced_until == pytest.approx(35 / 65)
    assert PRICE.after(75, steps, 25).gates_opened == 0.0
    with pytest.raises(Refused, match="gates open while passes are forced"):
        PRICE.replace(forced_until=0.0, price_from=0.0, clipped_until=0.0)
