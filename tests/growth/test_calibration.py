"""Calibration finds gains that are known, never loses ground, moves nothing else, and its columns are derivatives."""

from __future__ import annotations

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax import calibrate
from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.lock import only_writer
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs.data import DataConfig
from gt_jax.configs.layout import parse
from gt_jax.configs.lineage import newest
from gt_jax.configs.model import HyperConfig, MemoryConfig, StackConfig
from gt_jax.devices.sharding import Rules, make_mesh, mesh_for_rows, put_like
from gt_jax.errors import Refused
from gt_jax.growth import calibration, layer_states
from gt_jax.growth.calibration import Sync, calibrate_gains, sync_points
from gt_jax.growth.plan import block_plan, identity_plan, make_plan
from gt_jax.growth.plan_entries import Demand, Entry, Plan
from gt_jax.growth.repetition import from_json
from gt_jax.growth.transform import grow, target_config
from gt_jax.models.language_model import LanguageModel, abstract, fixed_passes, free_passes
from gt_jax.models.memory_chunks import forward_rows
from gt_jax.text.data import open_data
from tests.support import perturbed, small_model

SOURCE = small_model("D*2")
PASSES = (2, 1)
COUNTS = {f"layer{i}": {"k_exec": k, "survival": [1.0] * k + [0.0] * (4 - k)} for i, k in enumerate(PASSES)}
PLAN = make_plan("layer", from_json(COUNTS, "test", SOURCE.adaptive.alpha), SOURCE.depth)
SCRAMBLE = np.array([0.8, 1.4, 1.1], np.float32)


@pytest.fixture(autouse=True)
def mesh():
    """The mesh of the command: its explicit axes are checked, and the programs are shared."""
    with jax.set_mesh(mesh_for_rows(1)):
        yield


def batch(seed: int, rows: int = 2, length: int = 24) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, 257, (rows, length)).astype(np.int32)
    ids = np.ones((rows, length), np.int32)
    ids[-1, -5:] = 0
    return {"tokens": tokens, "segment_ids": ids}


@pytest.fixture(scope="module")
def grown():
    """(source, config of the child, child): the layer plan is exact at fixed passes."""
    child = target_config(SOURCE, PLAN)
    tree = grow(perturbed(SOURCE, 0.3), PLAN, SOURCE)
    with jax.set_mesh(mesh_for_rows(1)):
        return put_like(perturbed(SOURCE, 0.3), abstract(SOURCE)), child, put_like(tree, abstract(child))


def scrambled(child, tree):
    return layer_states.with_gains(child, tree, layer_states.gains_of(child, tree) * SCRAMBLE)


@pytest.fixture(scope="module")
def recovered(grown):
    """The fit of a child whose gains were scrambled, beside the child before the scramble."""
    variables, child, tree = grown
    fit = [batch(1), batch(2)]
    with jax.set_mesh(mesh_for_rows(1)):
        return calibrate_gains(SOURCE, variables, child, scrambled(child, tree), PLAN, fit, objective="blocks",
                               iterations=12, control=fixed_passes(PASSES), held_out=[batch(3)])


def test_scrambled_gains_are_found_again(grown, recovered):
    _, child, tree = grown
    truth = layer_states.gains_of(child, tree)
    np.testing.assert_allclose(layer_states.gains_of(child, recovered.variables), truth, atol=2e-3)
    report = recovered.report
    np.testing.assert_array_equal(report["gains"]["before"], (truth * SCRAMBLE).astype(np.float32))
    for part in (report["fitted"], report["held_out"]):
        assert [(one["target"], one["source"]) for one in part["sync"]] == [(1, 0), (2, 1)]
        assert all(one["after"] < 2e-3 < 0.05 < one["before"] for one in part["sync"])
        assert part["kl"]["after"] < 1e-5 < 1e-3 < part["kl"]["before"]
    assert report["fitted"]["tokens"] == 2 * 43 and report["held_out"]["tokens"] == 43, "padding is no token"


def test_only_gains_change(grown, recovered):
    _, child, tree = grown
    before, after = flatten(scrambled(child, tree)), flatten(recovered.variables)
    assert before.keys() == after.keys()
    for path, leaf in after.items():
        assert (leaf.dtype, leaf.shape) == (before[path].dtype, before[path].shape)
        same = np.array_equal(np.asarray(leaf).reshape(-1).view(np.uint8),
                              np.asarray(before[path]).reshape(-1).view(np.uint8))  # fmt: skip
        assert same != path.endswith("/gain"), path


@pytest.mark.parametrize(("objective", "ridge"), [("kl", 1e-3), ("kl", 0.0), ("blocks", 1e-3)])
def test_the_loss_never_rises_from_wherever_it_starts(grown, objective, ridge):
    variables, child, tree = grown
    start = layer_states.with_gains(child, tree, np.array([3.0, -2.0, 0.1], np.float32))
    report = calibrate_gains(SOURCE, variables, child, start, PLAN, [batch(1)], objective=objective, ridge=ridge).report
    assert report["iterations"] == len(report["loss"]) - 1 >= 1
    assert np.all(np.diff(report["loss"]) <= 0) and report["loss"][-1] < 0.9 * report["loss"][0]
    reached = report["fitted"]["kl"]["after"]
    assert objective != "kl" or reached == pytest.approx(report["loss"][-1], rel=1e-6)


def test_the_same_inputs_give_the_same_bytes(grown):
    variables, child, tree = grown
    one, two = (calibrate_gains(SOURCE, variables, child, scrambled(child, tree), PLAN, [batch(1)], iterations=2)
                for _ in range(2))  # fmt: skip
    assert json.dumps(one.report) == json.dumps(two.report)


def test_columns_equal_central_differences_in_float64():
    plain = small_model("D*2", adaptive=False)
    config = copy.copy(plain.twice_differentiable)
    for name in ("param_dtype", "compute_dtype"):
        object.__setattr__(config, name, "float64")  # no user can: the products are float32 or bfloat16
    with jax.enable_x64(True):
        drawn = jax.tree.map(lambda a: np.asarray(a, np.float64), perturbed(plain, 0.3))
        variables = put_like(drawn, abstract(plain))
        one = {name: array[:, :16] for name, array in batch(1).items()}

        def state(gains: jax.Array) -> jax.Array:
            own = layer_states.with_gains(config, variables, gains)
            return layer_states.states_after(config, Rules(), own, (0, 1), one, free_passes())

        gains = jnp.asarray([1.1, 0.8], jnp.float64)
        value, columns = jax.jit(lambda g: layer_states.columns(state, g))(gains)
        moved = jax.jit(state)
        assert value.dtype == columns.dtype == np.float64 and columns.shape == (2, 2, 2, 16, 32)
        for layer, column in enumerate(columns):
            step = 1e-5 * jnp.eye(2, dtype=jnp.float64)[layer]
            difference = (moved(gains + step) - moved(gains - step)) / 2e-5
            np.testing.assert_allclose(column, difference, atol=1e-7)
    assert not np.any(columns[1, 0]) and np.all(np.abs(columns[0]).max(axis=(1, 2, 3)) > 0.1)


def test_states_are_those_of_the_model():
    config = small_model("DG", False, hyper=HyperConfig(streams=2), memory=MemoryConfig(chunk=12, stream=1))
    variables, one = put_like(perturbed(config, 0.3), abstract(config)), batch(5)

    def logits(variables, tokens, ids):
        given = {"tokens": tokens, "segment_ids": ids}
        last = layer_states.states_after(config, Rules(), variables, (1,), given, free_passes())[0]
        return LanguageModel(config).apply(variables, jnp.mean(last, axis=2), method=LanguageModel.unembed)

    got = jax.jit(logits)(variables, one["tokens"], one["segment_ids"])
    want = jax.jit(lambda *a: forward_rows(LanguageModel(config), *a, free_passes())[0])(variables, *one.values())
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(want).max() > 0.1


def test_states_of_a_lambda_stack_have_the_embedding_mixed_in():
    config = small_model("DG", False, stack=StackConfig("lambda"))
    variables = put_like(perturbed(config, 0.3), abstract(config))
    one = {name: jnp.asarray(rows) for name, rows in batch(5).items()}
    last = layer_states.states_after(config, Rules(), variables, (0, 1), one, free_passes())[1]
    got = LanguageModel(config).apply(variables, last, method=LanguageModel.unembed)
    want, _ = forward_rows(LanguageModel(config), variables, *one.values(), free_passes())
    np.testing.assert_allclose(got, want, atol=1e-5)


def brute_force(sources: list[int | None], layers: int) -> set[tuple[int, int]]:
    """Cut the list anywhere: left must be all of 0..m, right nothing of it; a cut goes as far right as it can."""
    found = {}
    for cut in range(1, len(sources)):
        left, right = ([s for s in part if s is not None] for part in (sources[:cut], sources[cut:]))
        if right and left and sorted(set(left)) == list(range(max(left) + 1)) and min(right) > max(left):
            found[max(left)] = cut - 1
    return {(target, source) for source, target in found.items()} | {(len(sources) - 1, layers - 1)}


def test_sync_points_against_brute_force():
    rng = np.random.default_rng(0)
    orders = [[0, 1, 0, 1, 2, 3, 2, 3], [0, 0, 1, 2, 2, 3], [0, 1, 2, 3, 0, 1, 2, 3], [1, 2], [0, None, 1]]
    orders += [rng.choice([0, 0, 1, 2, 3], size=6).tolist() for _ in range(30)]
    orders += [sorted(order, key=lambda s: s // 2) for order in orders[-20:]]
    for order in orders:
        entries = tuple(Entry(0, 0, 0.0) if s is None else Entry(s, 1, 1.0) for s in order)
        plan = Plan("map", parse("D*4"), parse(f"D*{len(order)}"), entries, (Demand(1, 1.0, 1.0),) * 4)
        got = sync_points(plan)
        assert set(got) == brute_force(order, 4), order
        assert [one.target for one in got] == sorted(one.target for one in got)


def test_sync_points_of_the_kinds():
    layout, counts = parse("DDDG*2"), {f"layer{i}": {"k_exec": k} for i, k in enumerate((2, 1, 2, 3, 2, 3, 4, 3))}
    repetition = from_json({k: {**v, "survival": [1.0, 0.5, 0.2, 0.1]} for k, v in counts.items()}, "test")
    assert sync_points(block_plan(repetition, layout)) == (Sync(7, 3), Sync(19, 7))
    assert sync_points(identity_plan(layout)) == tuple(Sync(i, i) for i in range(8))
    assert [one.target for one in sync_points(make_plan("layer", repetition, layout))] == [1, 2, 4, 7, 9, 12, 16, 19]
    assert sync_points(make_plan("stack", repetition, layout))[:-1] == ()


def test_models_that_do_not_belong_together_are_refused(grown):
    variables, child, tree = grown
    good = (SOURCE, variables, child, tree, PLAN, [batch(1)])

    def refused(said: str, place: int, value: object, **options: object) -> None:
        with pytest.raises(Refused, match=said):
            calibrate_gains(*good[:place], value, *good[place + 1 :], **options)

    refused("for a source of layout", 0, small_model("D*3"))
    refused("is adaptive", 2, SOURCE)
    refused("have skips between their layers", 2, child.replace(stack=StackConfig("lambda", skips=((0, 2),))))
    refused("not what the plan makes", 2, child.replace(mlp_width=64))
    refused("not what the plan makes", 4, identity_plan(SOURCE.depth))
    refused("no batches", 5, [])
    refused("not one of blocks, final, kl", 5, good[5], objective="mse")
    refused("ridge is -1", 5, good[5], ridge=-1.0)
    refused("at least 1", 5, good[5], iterations=0)
    refused("not finite", 3, layer_states.with_gains(child, tree, np.full(3, np.nan, np.float32)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, grown):
    place = tmp_path_factory.mktemp("calibrate")
    (place / "story.txt").write_bytes(b"Once upon a time a small net grew deep and was glad of it.\n" * 200)
    variables, child, tree = grown
    data = DataConfig(text=(str(place / "story.txt"),), batch_size=2, sequence_length=24).to_json()
    run = {"model": SOURCE.to_json(), "train": {}, "data": data}
    checkpoint.save(place / "source", variables, {"config": SOURCE.to_json(), "step": 7, "run": run})
    whole = checkpoint.content_hash(place / "source", ("params", "statistics"))
    origin = {"source": "somewhere", "step": 7, "plan": PLAN.to_json(), "content_hash": whole}
    metadata = {"config": child.to_json(), "kind": "grown", "step": 0}
    checkpoint.save(place / "grown", scrambled(child, tree), {**metadata, "grown_from": origin})
    checkpoint.save(place / "other", tree, {**metadata, "grown_from": {**origin, "content_hash": "0"}})
    checkpoint.save(place / "plain", tree, metadata)
    return place


def test_the_command_writes_a_checkpoint_that_differs_in_gains_only(folder, capsys, monkeypatch):
    words = [str(folder / name) for name in ("source", "grown", "calibrated")]
    assert calibrate.main([*words, "--batches", "2", "--iterations", "2", "--json"]) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert "step 2/2" in output.err and result["objective"] == "kl" and result["held_out"]["tokens"] > 0
    assert abs(result["losses"]["gap_after"]) < abs(result["losses"]["gap_before"])
    before, after = (flatten(checkpoint.load(folder / name)) for name in ("grown", "calibrated"))
    assert {path for path in before if not np.array_equal(before[path], after[path])} == {
        "params/segment0/layer0/gain"}  # fmt: skip
    assert before.keys() == after.keys()
    (_, old), (_, new) = (checkpoint.describe(folder / name) for name in ("grown", "calibrated"))
    assert newest(new, "grown_from") == old["grown_from"] and new["config"] == old["config"]
    assert new["calibrated"] == {name: value for name, value in result.items() if name != "target"}
    assert "written to" in calibrate.report_lines(new["calibrated"], folder / "calibrated")[-1]
    solved = {**new["calibrated"], "losses": {"source": 0.0, "before": 0.1, "after": 0.1, "gap_before": None,
                                              "gap_after": None}}  # fmt: skip
    assert "0.1000 (no gap to 0)" in calibrate.report_lines(solved, folder / "calibrated")[0]

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match="No space left"):
        calibrate.main([*words[:2], str(folder / "more"), "--batches", "2", "--iterations", "2"])
    said = capsys.readouterr().err.partition("the gains that were fitted, by layer: ")[2].splitlines()[0]
    assert json.loads(said) == result["gains"]["after"]


def test_gains_are_fitted_on_all_difficulties_though_the_source_began_with_the_least(folder, monkeypatch):
    data = DataConfig(tasks=("pointer_jumps:hardest=3,symbols=8,queries=4",), batch_size=2, sequence_length=40)
    metadata = checkpoint.describe(folder / "source")[1]
    run = {**metadata["run"], "data": data.replace(curriculum_rows=10_000).to_json()}
    checkpoint.save(folder / "of_a_task", checkpoint.load(folder / "source"), {**metadata, "run": run})

    class Seen(Exception):
        pass

    def seen(*arguments, **options):
        raise Seen(np.concatenate([np.asarray(batch["tokens"]) for batch in arguments[5]]))

    monkeypatch.setattr(calibration, "calibrate_gains", seen)
    with pytest.raises(Seen) as error:
        calibrate.main([str(folder / name) for name in ("of_a_task", "grown", "fitted")] + ["--batches", "4"])
    stream = open_data(data).train()
    np.testing.assert_array_equal(error.value.args[0], np.concatenate([next(stream)["tokens"] for _ in range(4)]))


def test_the_command_refuses_before_it_writes(folder):
    def refused(said: str, source: str, grown: str, target: str, *words: str) -> None:
        with pytest.raises(Refused, match=said):
            calibrate.main([*(str(folder / name) for name in (source, grown, target)), *words])

    (folder / "taken.unfinished").mkdir()
    (folder / "taken.unfinished" / "notes.txt").touch()
    there = {path.name for path in folder.iterdir()}
    refused("taken.unfinished is nothing that gt_jax has made, and the save of taken needs", "source", "grown", "taken")
    refused("exists", "source", "grown", "plain")
    refused("lies inside", "source", "grown", "grown/deeper")
    refused("their hash differs", "source", "other", "new/deep/fitted")
    refused("was not grown", "source", "plain", "new")
    refused("was not grown from", "grown", "grown", "new")
    refused("does not exist", "nothing", "grown", "new")
    refused("--batches is 0", "source", "grown", "new", "--batches", "0")
    no_text = ("--text", str(folder / "no.txt"))
    refused("does not exist|cannot be read|no file", "source", "grown", "new/deep/fitted", *no_text)
    with only_writer(folder / "new"):  # by another job, whose fit has begun
        refused("new at this moment", "source", "grown", "new")
    assert {path.name for path in folder.iterdir()} == there


@pytest.mark.exhaustive  # what it runs on a mesh, tests of verify, training and evaluation run there too
def test_a_mesh_gives_the_gains_of_one_device(grown, recovered):
    """Weights cut over fsdp and tensor, rows over data and fsdp: the same fit, up to the order of sums."""
    _, child, _ = grown
    tree = grow(perturbed(SOURCE, 0.3), PLAN, SOURCE)
    rules, fit = Rules(), [batch(1, rows=4), batch(2, rows=4)]

    def fitted():
        variables, own = put_like(perturbed(SOURCE, 0.3), abstract(SOURCE, rules)), put_like(
            scrambled(child, tree), abstract(child, rules))  # fmt: skip
        return calibrate_gains(SOURCE, variables, child, own, PLAN, fit, rules, objective="kl", iterations=2,
                               control=fixed_passes(PASSES))  # fmt: skip

    with jax.set_mesh(mesh_for_rows(1)):
        want = fitted()
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        got = fitted()
        cut = flatten(got.variables)["params/segment0/layer0/mixer/query/w"]
        assert len(cut.sharding.device_set) == 8 and not cut.sharding.is_fully_replicated
    np.testing.assert_allclose(got.report["gains"]["after"], want.report["gains"]["after"], atol=2e-4)
    np.testing.assert_allclose(got.report["loss"], want.report["loss"], rtol=1e-3, atol=1e-7)


def test_the_command_refuses_a_mesh_that_cannot_cut_the_rows(folder):
    words = [str(folder / name) for name in ("source", "grown", "uncut")]
    with pytest.raises(Refused, match=r"batch \(rows that run together\)"):
        calibrate.main([*words, "--batches", "1", "--fsdp", "8"])
    assert not (folder / "uncut").exists()
