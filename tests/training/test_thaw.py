"""Restricted fine-tuning: what is frozen keeps every bit and gathers no momentum, then everything moves; it resumes."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax import train
from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.runs import RunCheckpoints
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs.data import DataConfig
from gt_jax.configs.layout import parse
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.configs.price import opening
from gt_jax.configs.run import RunConfig, TrainConfig, differences
from gt_jax.configs.thaw import ThawConfig
from gt_jax.devices.sharding import Rules, make_mesh, put_like
from gt_jax.errors import Refused
from gt_jax.growth.plan_entries import Demand, Entry, Plan
from gt_jax.growth.provenance import stored_plan
from gt_jax.growth.under_served import under_served
from gt_jax.models.language_model import abstract
from gt_jax.training import loop
from gt_jax.training.loop import make_trainer
from gt_jax.training.thaw import keep_frozen, trainable_mask
from tests.support import perturbed, small_model

MODEL = small_model("G*3", adaptive=False)
THAW = ThawConfig(layers=(1,), steps=2)
TRAIN = TrainConfig(steps=4, thaw=THAW, optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.5))
BLOCK = 1  # of the stacked leaves


def batch(seed: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, 257, (2, 17)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.ones((2, 16), np.int32)}


def frozen_part(path: str, value: np.ndarray) -> np.ndarray:
    """What of a leaf must not move in the restricted phase, as bytes."""
    return (np.delete(value, BLOCK, axis=0) if "/segment0/" in path else value).view(np.uint8)


def host(tree: object) -> dict[str, np.ndarray]:
    return {path: np.array(leaf) for path, leaf in flatten(jax.device_get(tree)).items()}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The states after 0 … 4 steps, the step function, and the place where the state after one step is saved."""
    trainer = make_trainer(MODEL, TRAIN)
    variables = jax.tree.map(jnp.array, perturbed(MODEL))
    table = variables["params"]["embedding"]["table"]
    variables["params"]["embedding"]["table"] = table.at[0, 0].set(-0.0)
    state, place = trainer.new_state(variables), tmp_path_factory.mktemp("thaw")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    seen = [host(state._asdict())]
    for step in range(TRAIN.steps):
        state, _ = trainer.step(state, batch(step))
        seen.append(host(state._asdict()))
        if step == 0:
            RunCheckpoints(place).save(1, state._asdict(), {"config": MODEL.to_json()})
    return seen, trainer, place, shapes


def test_what_is_frozen_keeps_every_bit_and_the_rest_moves(steps):
    seen = steps[0]
    stuck = []
    for path, start in seen[0].items():
        if not path.startswith(("params/", "statistics/")):
            continue
        restricted = seen[THAW.steps][path]
        np.testing.assert_array_equal(frozen_part(path, restricted), frozen_part(path, start), path)
        if "/segment0/" in path and np.array_equal(restricted[BLOCK], start[BLOCK]):
            stuck.append(path)
    assert all("indexer_bias" in path or "head_importance" in path for path in stuck), stuck
    assert np.signbit(seen[THAW.steps]["params/embedding/table"][0, 0]), "-0 is not +0"
    ema = "statistics/segment0/layer0/mixer/variance_ema"
    assert seen[2][ema][1] != seen[0][ema][1] and seen[2][ema][0] == seen[0][ema][0] != seen[3][ema][0]


def test_frozen_tensors_gather_no_momentum(steps):
    seen = steps[0]
    moments = [path for path in seen[0] if path.startswith("optimizer/") and ("/mu/" in path or "/nu/" in path)]
    assert len(moments) >= 2 * len([path for path in seen[0] if path.startswith("params/")])
    for path in moments:
        assert not frozen_part(path, seen[THAW.steps][path]).any(), path
    assert any(seen[THAW.steps][path].any() for path in moments)


def test_everything_moves_after_the_switch_and_nothing_is_compiled_for_it(steps):
    seen, trainer, _, _ = steps
    for path, before in seen[THAW.steps].items():
        if path.startswith("params/") and not ("indexer_bias" in path or "head_importance" in path):
            after = seen[THAW.steps + 1][path]
            assert not np.array_equal(after, before), path
    assert trainer.step._cache_size() == 1


def test_a_run_resumed_before_the_switch_ends_with_the_same_bytes(steps):
    seen, trainer, place, shapes = steps
    _, tree, _ = RunCheckpoints(place).restore_latest(shapes._asdict())
    state = jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf)), type(shapes)(**tree))  # the program is compiled
    for step in range(1, TRAIN.steps):
        state, _ = trainer.step(state, batch(step))
    for path, value in host(state._asdict()).items():
        np.testing.assert_array_equal(value, seen[-1][path], path)
    assert trainer.step._cache_size() == 1


def test_masks_work_on_sharded_leaves():
    model, thaw = small_model("DG*2", adaptive=False), ThawConfig(layers=(1, 2), steps=2)
    with jax.set_mesh(make_mesh(2, 2, 1, 2)):
        shapes = abstract(model, Rules())["params"]
        old = put_like(perturbed(model)["params"], shapes)
        new = jax.tree.map(lambda leaf: leaf + 1, old)
        run = jax.jit(lambda step, new, old: keep_frozen(thaw, model.depth, step, new, old))
        got, everything = run(jnp.asarray(1), new, old), run(jnp.asarray(2), new, old)
    for path, leaf in flatten(got).items():
        mask = np.broadcast_to(flatten(trainable_mask(shapes, model.depth, thaw.layers))[path], leaf.shape)
        assert mask.any() == ("segment0" in path) and not mask.all()
        if "segment0" in path:  # layer 1 is G of block 0, layer 2 is D of block 1
            assert mask[0].any() == ("layer1" in path) and mask[1].any() == ("layer0" in path)
        np.testing.assert_array_equal(leaf, np.where(mask, flatten(new)[path], flatten(old)[path]), path)
        assert leaf.sharding == flatten(old)[path].sharding
        np.testing.assert_array_equal(flatten(everything)[path], flatten(new)[path])


def test_configs_of_runs_without_it_load_and_differ_by_name():
    run = RunConfig(model=MODEL, train=TRAIN, data=DataConfig())
    stored = run.to_json()
    assert RunConfig.from_json(stored) == run
    del stored["train"]["thaw"]
    old = RunConfig.from_json(stored)
    assert old.train.thaw is None
    assert [line.split(":")[0] for line in differences(old, run)] == ["train.thaw"]
    longer = run.replace(train=TRAIN.replace(thaw=THAW.replace(steps=3)))
    assert differences(run, longer) == ["train.thaw.steps: 2 and 3"]


@pytest.mark.parametrize(("thaw", "said"), [
    ({"layers": ()}, "at least one"), ({"layers": (1, 1)}, "each once"), ({"layers": (-1,)}, "from 0"),
    ({"layers": (1,), "steps": 0}, "at least 1"), ({"layers": (3,), "steps": 1}, "0 to 2"),
    ({"layers": (1,), "steps": 9}, "has 4 steps"),
])  # fmt: skip
def test_wrong_phases_are_refused(thaw, said):
    with pytest.raises(Refused, match=said):
        RunConfig(model=MODEL, train=TRAIN.replace(thaw=ThawConfig(**thaw)))


def test_gates_that_are_still_to_open_are_not_held():
    """Their biases rise by a schedule, of which frozen layers got nothing: they stayed shut for good."""
    model, price = small_model("G*3"), opening(-3.0, 4, "budget", 1.5)
    train_config = TRAIN.replace(price=price)
    with pytest.raises(Refused, match=r"\(--thaw\) holds gates .*gates_opened 5.0 .* after 3 steps, then --start"):
        RunConfig(model=model, train=train_config)
    words = train.parser().parse_args(["run", "--thaw", "1"])
    with pytest.raises(Refused, match="after 280 steps"):
        train.run_config(words, RunConfig(model=model, train=TrainConfig(price=price)))
    assert RunConfig(model=MODEL, train=train_config), "it has no gates"
    assert RunConfig(model=model, train=TRAIN.replace(price=price.after(3, 4, 4))), "they are open"


def plan(*copies: tuple[int, int, float], asked=(3, 1), mass=(2.2, 1.0)) -> Plan:
    layers = parse(f"D*{len(copies)}")
    demands = tuple(Demand(k, float(k), own) for k, own in zip(asked, mass, strict=True))
    return Plan("map", parse("D*2"), layers, tuple(Entry(*copy) for copy in copies), demands)


def test_under_served_by_copies_or_by_mass():
    short = plan((0, 1, 1.0), (0, 2, 1.2), (1, 1, 1.0))
    assert [(one.source, one.children) for one in under_served(short)] == [(0, (0, 1))]
    light = plan((0, 1, 1.0), (0, 2, 0.7), (0, 3, 0.5), (1, 1, 0.9))
    assert [(one.source, one.children) for one in under_served(light)] == [(1, (3,))]
    assert "1 copies, got 1, keeps 90% of" in str(under_served(light)[0])
    idle = plan((0, 1, 1.0), (0, 0, 0.0), (0, 2, 0.7), (1, 1, 1.0))
    assert under_served(idle)[0].children == (0, 2), "a slot without a copy is nobody's child"
    assert not under_served(plan((0, 1, 1.0), (0, 2, 0.7), (0, 3, 0.5), (1, 1, 1.0)))
    assert not under_served(plan((1, 1, 1.0), asked=(3, 1))), "nothing was left of layer 0 to train"
    assert stored_plan({"grown_from": {"plan": short.to_json()}}, "x") == short
    with pytest.raises(Refused, match="was not grown"):
        stored_plan({}, "x")


def test_start_is_one_step_of_a_run_for_all_that_is_read_of_it(tmp_path, monkeypatch):
    """The run saves on, another plan and all, between the reading of the plan, the config and the values."""
    child, run, configs = small_model("D*3", adaptive=False), tmp_path / "from", []
    short, whole = plan((0, 1, 1.0), (0, 2, 1.2), (1, 1, 1.0)), plan((0, 1, 2.2), (1, 1, 1.0), asked=(1, 1))

    def save(step: int, of: Plan) -> None:
        checkpoint.save(run / str(step), perturbed(child), {"config": child.to_json(), "step": step,
                                                            "grown_from": {"plan": of.to_json()}})

    def meanwhile(arguments):
        save(2, whole)
        return default_config(arguments)

    save(1, short)
    default_config = train.default_config
    monkeypatch.setattr(train, "default_config", meanwhile)
    monkeypatch.setattr(loop, "train_run", lambda run, config, **rest: configs.append(config))
    words = [str(tmp_path / "run"), "--start", str(run), "--thaw", "under-served"]
    assert train.main(words) == 0
    assert configs[0].start == str(run / "1") and configs[0].train.thaw.layers == (0, 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(configs[0].to_json()))
    for start in (run, run / "1", run / "2"):  # the flags again, to resume: the step that it began with, or another
        again = [str(tmp_path / "run"), "--resume", "--start", str(start)]
        assert train.start_folder(train.parser().parse_args(again)) == str(run / ("2" if start == run / "2" else "1"))


def test_the_flags(tmp_path, capsys):
    short, whole = plan((0, 1, 1.0), (0, 2, 1.2), (1, 1, 1.0)), plan((0, 1, 2.2), (1, 1, 1.0), asked=(1, 1))
    child = small_model("D*3", adaptive=False)
    for name, grown in (("short", {"grown_from": {"plan": short.to_json()}}), ("plain", {}),
                        ("whole", {"grown_from": {"plan": whole.to_json()}})):  # fmt: skip
        checkpoint.save(tmp_path / name, perturbed(child), {"config": child.to_json(), "step": 0, **grown})

    def asked(*words: str) -> ThawConfig | None:
        arguments = train.parser().parse_args([str(tmp_path / "run"), *words])
        return train.run_config(arguments, train.default_config(arguments)).train.thaw

    start = ("--start", str(tmp_path / "short"))
    assert asked(*start, "--thaw", "under-served") == ThawConfig(layers=(0, 1), steps=200)
    assert "source layer 0 asked for 3 copies, got 2" in capsys.readouterr().err
    assert asked(*start, "--thaw", "2,0", "--thaw-steps", "7") == ThawConfig(layers=(2, 0), steps=7)
    assert asked(*start) is None
    for words, said in ((("--thaw", "under-served"), "--start"), ((*start, "--thaw", "deep"), "neither"),
                        ((*start, "--thaw-steps", "5"), "--thaw"), ((*start, "--thaw", "3"), "0 to 2"),
                        (("--start", str(tmp_path / "plain"), "--thaw", "under-served"), "was not grown"),
                        (("--start", str(tmp_path / "whole"), "--thaw", "under-served"), "what it asked for")):
        with pytest.raises(Refused, match=said):
            asked(*words)
