"""Second moments grow with their weights: by name, block by block; training on begins with them."""

import json

import jax
import numpy as np
import pytest

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.moments import stored_moments
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.configs.optimizer import OptimizerConfig
from gt_jax.errors import Refused
from gt_jax.grow import main
from gt_jax.growth.plan import make_plan
from gt_jax.growth.repetition import from_json
from gt_jax.growth.stream import grow_checkpoint
from gt_jax.models.language_model import abstract
from gt_jax.training.moments import carried_moments, lacking_moments
from gt_jax.training.optimizer import make_optimizer
from tests.rarely import rarely
from tests.support import drawn, perturbed, small_model

CONFIG = small_model("DG*2")
OPTIMIZER = make_optimizer(OptimizerConfig(), 10)
COUNTS = from_json({f"layer{n}": {"k_exec": 2, "survival": [1.0, 0.5, 0.0, 0.0]} for n in range(4)})
PLAN = make_plan("dealt", COUNTS, CONFIG.depth)


def state_of(params, seed):
    """An optimizer's state of which every value is another, after 7 updates."""
    shapes = jax.eval_shape(OPTIMIZER.init, params)
    made = flatten(drawn({"optimizer": shapes}, 1.0, seed))
    paths = flatten({"optimizer": shapes})
    values = [np.full((), 7, np.int32) if path.endswith("/count") else made[path] ** 2 for path in paths]
    return jax.tree.unflatten(jax.tree.structure(shapes), values)


@pytest.fixture(scope="module", params=["float32", rarely("bfloat16")])
def folder(request, tmp_path_factory):
    """A training checkpoint and what grows from it."""
    place, config = tmp_path_factory.mktemp("moments"), CONFIG.replace(param_dtype=request.param)
    variables = jax.tree.map(lambda value, leaf: value.astype(leaf.dtype), perturbed(CONFIG), abstract(config))
    state = {"optimizer": state_of(variables["params"], 3), "step": np.int32(7)}
    checkpoint.save(place / "source", {**variables, **state}, {"config": config.to_json(), "kind": "train", "step": 7})
    report = grow_checkpoint(place / "source", place / "grown", plan=PLAN)
    assert report["moments"] > 0
    return place


def child_of(place):
    model = checkpoint.load_model(place)
    params = jax.tree.map(jax.numpy.asarray, model.params)
    return params, OPTIMIZER.init(params)


def test_each_block_has_the_second_moment_of_the_weight_it_is_a_copy_of(folder):
    stored, _ = checkpoint.describe(folder / "grown")
    params, fresh = child_of(folder / "grown")
    source = flatten(checkpoint.load(folder / "source"))
    second = stored_moments(source).second
    got = flatten({"optimizer": carried_moments(fresh, params, folder / "grown", stored)})
    seen = 0
    for path, value in got.items():
        if path.endswith("/count"):
            assert value == 7
        elif "/mu/" in path:
            assert not np.any(value), "the first moments begin at 0"
        elif "/nu/" in path:
            name, seen = path.split("/nu/")[1], seen + 1
            if not name.startswith("segment"):
                np.testing.assert_array_equal(value, source[second[name]])
                continue
            slot, rest = int(name.split("/")[1].removeprefix("layer")), name.split("/", 2)[2]
            for block, row in enumerate(value):
                origin = PLAN.entries[PLAN.target_layout.layer(0, block, slot)].source
                _, there, here = PLAN.source_layout.position(origin)
                np.testing.assert_array_equal(row, source[second[f"segment0/layer{here}/{rest}"]][there])
        elif "/copies/" in path:
            np.testing.assert_array_equal(value, flatten(params)[path.split("/copies/")[1]].astype(np.float32))
    assert seen == len(flatten(params))


def test_the_content_hash_is_of_the_model_alone_and_a_dry_run_says_the_bytes(folder, tmp_path, capsys):
    report = grow_checkpoint(folder / "source", tmp_path / "bare", plan=PLAN, moments=False)
    assert report["moments"] == 0
    plan_file = tmp_path / "plan.json"
    plan_file.write_text(json.dumps(PLAN.to_json()))
    words = [str(folder / "source"), "--dry-run", "--json", "--plan-file", str(plan_file)]
    for more, moments in (((), True), (("--no-moments",), False)):
        assert main([*words, *more]) == 0
        said, whole = json.loads(capsys.readouterr().out), grow_checkpoint(
            folder / "source", tmp_path / f"again{moments}", plan=PLAN, moments=moments)
        assert (said["bytes"], said["moments"]) == (whole["bytes"], whole["moments"])
    places, model = (tmp_path / "bare", folder / "grown"), ("params", "statistics")
    said = [checkpoint.describe(place)[1]["grown_from"]["content_hash"] for place in places]
    assert said == [checkpoint.content_hash(folder / "source", model)] * 2
    assert checkpoint.content_hash(tmp_path / "bare", model) == checkpoint.content_hash(folder / "grown", model)
    params, fresh = child_of(tmp_path / "bare")
    with pytest.raises(Refused, match="no second moments"):
        carried_moments(fresh, params, tmp_path / "bare", checkpoint.describe(tmp_path / "bare")[0])


def test_the_same_model_begins_with_the_whole_state(folder):
    stored, _ = checkpoint.describe(folder / "source")
    params, fresh = child_of(folder / "source")
    got = flatten({"optimizer": carried_moments(fresh, params, folder / "source", stored)})
    for path, value in flatten({"optimizer": checkpoint.load(folder / "source")["optimizer"]}).items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)
    wider = abstract(small_model("DG*2", width=64))["params"]
    assert any("embedding/table in its shape" in line for line in lacking_moments(wider, stored))
