"""Every kind of plan through the transform: against numpy on tiny trees, and the identity of growth on a DDDG model."""

import jax
import numpy as np
import pytest

from gt_jax.checkpoints.tree_paths import flatten, nest
from gt_jax.configs import layout
from gt_jax.growth.layer_map import read_map
from gt_jax.growth.plan import make_plan
from gt_jax.growth.repetition import from_json, reference
from gt_jax.growth.transform import abstract, grow, match, target_abstract, target_config
from gt_jax.models.language_model import LanguageModel, apply_network, fixed_passes
from tests.support import perturbed, small_model, tokens

SOURCE = layout.parse("DDDG*2")
SHAPES = {"mlp/up/w": (3, 4), "mlp/down/w": (4, 3), "mixer_norm/scale": (3,), "gain": ()}
PLANS = {
    "layer": {}, "split": {}, "stack": {}, "map": {"layers": read_map("1-8,1-4,1-8", 8)},
    "layer from means": {"passes_from": "mean_weight", "round": "nearest"},
}


@pytest.fixture(scope="module")
def source():
    draw = np.random.default_rng(0)
    tree = {f"params/segment0/layer{slot}/{name}": draw.normal(size=(2, *shape)).astype(np.float32)
            for slot in range(4) for name, shape in SHAPES.items()}
    tree["statistics/segment0/layer3/mixer/variance_ema"] = np.asarray([1.0, 2.0], np.float32)
    return tree


def tensor(tree, depth, layer, name):
    """One layer's part of a stacked tensor."""
    segment, block, slot = depth.position(layer)
    return tree[f"params/segment{segment}/layer{slot}/{name}"][block]


@pytest.mark.parametrize("carry", ["weights", "output", "gain"])
@pytest.mark.parametrize("kind", PLANS)
def test_every_layer_is_its_source_layer_at_its_strength(source, kind, carry):
    plan = make_plan(kind.split()[0], reference(), SOURCE, coefficient="schedule", **PLANS[kind])
    grown = flatten(grow(nest(source), plan, carry=carry))
    scaled = {"weights": ("mlp/up/w", "mlp/down/w"), "output": ("mlp/down/w",), "gain": ("gain",)}[carry]
    for target, entry in enumerate(plan.entries):
        for name in SHAPES:
            factor = np.float32(entry.coefficient if name in scaled else 1.0)
            np.testing.assert_array_equal(tensor(grown, plan.target_layout, target, name),
                                          factor * tensor(source, SOURCE, entry.source, name), err_msg=name)
    idle = [target for target, entry in enumerate(plan.entries) if entry.copy == 0]
    assert len(idle) == (4 if kind == "split" else 0)
    for target in idle:
        assert all(not np.any(tensor(grown, plan.target_layout, target, name)) for name in scaled)


def test_layers_that_a_map_leaves_out_are_dropped_by_name(source):
    plan = make_plan("map", reference(), SOURCE, layers=(2, 2), target_layout=layout.parse("D*2"))
    matched = match(abstract(nest(source)), target_abstract(abstract(nest(source)), plan), plan, "gain")
    assert {path.split("/")[2] for path in matched.dropped} == {"layer0", "layer1", "layer3"}
    assert {leaf.path for leaf in matched.leaves} == {f"params/segment0/layer0/{name}" for name in SHAPES}


@pytest.mark.exhaustive  # in the suite: test_identity.py by a block plan, evaluation/test_verify.py by a layer plan
def test_a_layer_plan_with_gain_and_no_noise_is_the_recurrence_unrolled():
    counts = (2, 1, 1, 2)
    config = small_model("DDDG")
    variables = perturbed(config)
    alive = {f"layer{i}": {"k_exec": k, "survival": [1.0] * k + [0.0] * (4 - k)} for i, k in enumerate(counts)}
    plan = make_plan("layer", from_json(alive, "test", config.adaptive.alpha), config.depth)
    child = target_config(config, plan)
    assert child.layout == "D*4,G*2"
    grown = grow(variables, plan, config, carry="gain", noise_std=0.0)

    def logits(config, variables, passes):
        run = jax.jit(lambda v, t, control: apply_network(LanguageModel(config), v, t, control=control).logits)
        return [np.asarray(run(variables, tokens(24), fixed_passes(forced))) for forced in passes]

    want, other = logits(config, variables, (counts, (2, 1, 1, 1)))
    np.testing.assert_allclose(logits(child, grown, (1,))[0], want, atol=1e-5)
    assert np.abs(want - other).max() > 1e-3, "the passes matter, or the test would say nothing"


@pytest.mark.parametrize("kind", ["block", "dealt", "layer", "split", "stack"])
def test_the_same_layers_written_as_one_longer_pattern_grow_into_the_same_child(source, kind):
    restacked = {f"params/segment0/layer{4 * block + slot}/{name}": tensor(source, SOURCE, 4 * block + slot, name)[None]
                 for block in range(2) for slot in range(4) for name in SHAPES}
    restacked |= {f"statistics/segment0/layer{4 * block + 3}/mixer/variance_ema": np.asarray([1.0 + block], np.float32)
                  for block in range(2)}
    made = [make_plan(kind, reference(), notation) for notation in (SOURCE, layout.parse("DDDGDDDG"))]
    children = [flatten(grow(nest(tree), plan)) for tree, plan in zip((source, restacked), made, strict=True)]
    for target in range(len(made[0].entries)):
        for name in SHAPES:
            one, other = (tensor(child, plan.target_layout, target, name)
                          for child, plan in zip(children, made, strict=True))
            np.testing.assert_array_equal(one, other, err_msg=f"{target} {name}")
    if kind != "stack":  # which repeats the stack as it is written
        assert made[0].target_layout == made[1].target_layout and children[0].keys() == children[1].keys()


def test_a_pattern_that_is_cut_grows_into_segments_of_its_parts(source):
    tree = {f"params/segment0/layer{slot}/{name}": source[f"params/segment0/layer{slot}/{name}"]
            for slot in range(4) for name in SHAPES}
    counts = from_json({f"layer{layer}": {"k_exec": k, "p_mu": 0.9} for layer, k in enumerate((2, 2, 2, 3) * 2)})
    plan = make_plan("dealt", counts, layout.parse("DDGD*2"))
    assert str(plan.target_layout) == "DDG*2,D*3,DDG*2,D*3"
    grown = flatten(grow(nest(tree), plan))
    for target, entry in enumerate(plan.entries):
        np.testing.assert_array_equal(tensor(grown, plan.target_layout, target, "mlp/up/w"),
                                      tensor(source, SOURCE, entry.source, "mlp/up/w"))
