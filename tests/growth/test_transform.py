"""Growth on a pytree against numpy: gather, noise, scale; the same bits however the work is cut or sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct
from jax.sharding import PartitionSpec as P

from gt_jax.checkpoints.tree_paths import flatten, nest
from gt_jax.configs import layout, presets
from gt_jax.errors import Refused
from gt_jax.growth import rules, transform
from gt_jax.growth.plan import block_plan, default_layout, identity_plan
from gt_jax.growth.plan_entries import Demand, Entry, Plan
from gt_jax.growth.repetition import from_json, reference
from gt_jax.models import language_model

D, HEADS, KEY, FF, VOCAB = 8, 2, 4, 12, 16
OUTPUT = {"mixer/output/w", "mlp/down/w"}
COPIED = {"mixer_norm/scale", "mlp_norm/scale", "mixer/output_norm/scale"}
SHARED = {"mixer_norm/scale": (D,), "mlp_norm/scale": (D,), "mlp/gate/w": (D, FF), "mlp/up/w": (D, FF),
          "mlp/down/w": (FF, D), "gain": (), "mixer/query/w": (D, HEADS, KEY), "mixer/output/w": (HEADS, KEY, D)}
LAYERS = {
    "D": SHARED | {"mixer/a_log": (HEADS,), "mixer/beta/b": (HEADS,), "mixer/key_conv/w": (4, HEADS, KEY),
                   "mixer/output_norm/scale": (KEY,)},
    "G": SHARED | {"mixer/indexer_bias": (2,), "mixer/value_gate/w": (D, HEADS, KEY)},
}
HALTING = {"halting/hidden/w": (21, 32), "halting/embedding": (16,)}


def made_up(notation="DDDG*2", seed=0, halting=True):
    """A tree with the model's names at small shapes, by path; values from a seed."""
    draw = np.random.default_rng(seed)
    shapes = {"params/embedding/table": (VOCAB, D), "params/final_norm/scale": (D,), "params/unembedding/w": (D, VOCAB)}
    for index, segment in enumerate(layout.parse(notation).segments):
        for slot, kind in enumerate(segment.pattern):
            own = LAYERS[kind] | (HALTING if halting else {})
            shapes |= {f"params/segment{index}/layer{slot}/{name}": (segment.repeats, *shape)
                       for name, shape in own.items()}
            if kind == "G":
                shapes[f"statistics/segment{index}/layer{slot}/mixer/variance_ema"] = (segment.repeats,)
    return {path: draw.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def readme_plan(coefficient="schedule"):
    return block_plan(reference(), default_layout(reference()), coefficient=coefficient)


def few(of="DG*2"):
    """A source with two noisy tensors a layer, of one size (compiling the noise is what takes time)."""
    names = ("mlp/up/w", "mlp/down/w", "mixer_norm/scale", "gain", "variance_ema", "table")
    return {path: value for path, value in made_up(of, halting=False).items() if path.endswith(names)}


def few_plan(of="DG*2"):
    depth = layout.parse(of)
    counts = from_json({f"layer{index}": {"k_exec": 1 + (2 * index >= len(depth))} for index in range(len(depth))})
    return block_plan(counts, depth, coefficient="schedule")


def grown(flat, plan, **options):
    return flatten(transform.grow(nest(flat), plan, **options))


def same(left, right):
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(np.asarray(left[path]), np.asarray(right[path]), err_msg=path)


@pytest.fixture(scope="module")
def source():
    return made_up()


@pytest.mark.parametrize("coefficient", ["schedule", "expected"])
@pytest.mark.parametrize("carry", ["weights", "output", "gain"])
def test_every_tensor_is_the_source_layer_times_what_the_carry_says(source, carry, coefficient):
    plan = readme_plan(coefficient)
    child = grown(source, plan, carry=carry)
    for path in ("params/embedding/table", "params/final_norm/scale", "params/unembedding/w"):
        np.testing.assert_array_equal(child.pop(path), source[path])
    checked = 0
    for target, entry in enumerate(plan.entries):  # layer l of DDDG*n stands at block l // 4, slot l % 4
        block, slot = divmod(target, 4)
        from_block, from_slot = divmod(entry.source, 4)
        for name in LAYERS["DDDG"[slot]]:
            whole = (carry == "weights" and name not in COPIED | {"gain"}) or (carry == "gain" and name == "gain")
            factor = entry.coefficient if whole or (carry == "output" and name in OUTPUT) else 1.0
            want = np.float32(factor) * source[f"params/segment0/layer{from_slot}/{name}"][from_block]
            np.testing.assert_array_equal(child[f"params/segment0/layer{slot}/{name}"][block], want, err_msg=name)
            checked += 1
    statistics = child["statistics/segment0/layer3/mixer/variance_ema"]
    np.testing.assert_array_equal(statistics, source["statistics/segment0/layer3/mixer/variance_ema"][[0, 0, 1, 1, 1]])
    assert checked == 5 * (len(child) - 1)
    assert not [path for path in child if "halting" in path]


def test_a_norm_that_comes_last_carries_in_place_of_the_output():
    """Which it would undo; at coefficient 0 the layer adds nothing, and the norm has a gradient."""
    draw, layer = np.random.default_rng(5), "params/segment0/layer0"
    shapes = {"mixer_post_norm/scale": (D,), "mlp_post_norm/scale": (D,), "mixer/output/w": (HEADS, KEY, D),
              "mlp/down/w": (FF, D), "mlp/up/w": (D, FF), "gain": ()}  # fmt: skip
    source = {f"{layer}/{name}": draw.normal(size=(1, *shape)).astype(np.float32) for name, shape in shapes.items()}
    plan = block_plan(from_json({"layer0": {"k_exec": 2}}), layout.parse("A"), coefficient="schedule")
    factors = np.float32([entry.coefficient for entry in plan.entries])
    assert len(set(factors)) == 2
    scaled = {"output": {name for name in shapes if "post_norm" in name}, "weights": set(shapes) - {"gain"},
              "gain": {"gain"}}  # fmt: skip
    for carry, names in scaled.items():
        child = grown(source, plan, carry=carry)
        for name in shapes:
            old = np.repeat(source[f"{layer}/{name}"], 2, axis=0)
            factor = factors.reshape(-1, *[1] * len(shapes[name])) if name in names else np.float32(1)
            np.testing.assert_array_equal(child[f"{layer}/{name}"], factor * old, err_msg=f"{carry}, {name}")
    for name, norm in (("mixer/output/w", "mixer"), ("mlp/down/w", "mlp"), ("mlp/experts/down/w", "mlp")):
        assert rules.norm_after(f"{layer}/{name}") == f"{layer}/{norm}_post_norm/scale"
    assert rules.norm_after(f"{layer}/mlp/up/w") is None and rules.norm_after(f"{layer}/mixer/query/w") is None


def test_the_identity_plan_changes_nothing(source):
    for carry in ("weights", "output", "gain"):
        child = grown(source, identity_plan(layout.parse("DDDG*2")), carry=carry)
        same(child, {path: value for path, value in source.items() if "halting" not in path})


def test_coefficient_zero_is_a_gain_of_zero(source):
    plan = readme_plan("expected")
    child = grown(source, plan, carry="gain")
    assert plan.entries[5].coefficient == 0  # layer 1 asked for one pass
    assert child["params/segment0/layer1/gain"][1] == 0
    path = "params/segment0/layer1/mlp/up/w"
    np.testing.assert_array_equal(child[path][1], source[path][0])


def test_noise_touches_mixer_and_mlp_alone_and_comes_before_the_coefficient():
    source, plan = few(), few_plan()
    plain = grown(source, plan, carry="gain")
    noisy = {carry: grown(source, plan, carry=carry, noise_std=0.01, seed=3) for carry in ("gain", "weights")}
    for path in plain:
        copied = (np.asarray(noisy["gain"][path]) == np.asarray(plain[path])).all()
        assert copied != path.endswith(("up/w", "down/w")), path
    path = "params/segment0/layer1/mlp/up/w"
    scale = np.asarray([1.0, 1.0, 0.7], np.float32)[:, None, None]
    np.testing.assert_allclose(noisy["weights"][path], scale * np.asarray(noisy["gain"][path]), rtol=1e-6)


def test_noise_has_the_stated_size_and_differs_by_seed_tensor_and_target_layer():
    zeros = ShapeDtypeStruct((2, 64, 64), jnp.float32)
    parts = tuple(transform.Part("w", 0, 1.0, layer) for layer in (0, 4))
    noise = {}
    for seed in (0, 1):
        for name in ("mixer/query/w", "mixer/key/w"):
            leaf = transform.Leaf(f"params/segment0/layer0/{name}", "scaled", parts, (2, 64, 64), np.dtype("float32"),
                                  (2, 64, 64))
            noise[seed, name] = np.asarray(transform.grow_leaf(
                leaf, {"w": np.zeros(zeros.shape, np.float32)}, carry="gain", noise_std=0.5, seed=seed))
    values = np.stack(list(noise.values())).reshape(8, -1)
    np.testing.assert_allclose(values.std(axis=1), 0.5, rtol=0.05)
    np.testing.assert_allclose(values.mean(axis=1), 0, atol=0.03)
    correlation = np.corrcoef(values) - np.eye(8)
    assert np.abs(correlation).max() < 0.06  # 4096 values: four standard errors
    assert np.abs(values).max() <= 0.5 * 3.46


def test_noise_does_not_depend_on_order_slicing_or_compilation():
    source, plan = few(), few_plan()
    options = {"carry": "weights", "noise_std": 1e-3, "seed": 7}
    child = grown(source, plan, **options)
    same(child, grown(source, plan, **options))
    one = {path: value for path, value in source.items() if not path.endswith("down/w")}  # compiling noise takes long
    alone = jax.jit(lambda flat: grown(flat, plan, **options))(one)
    same(alone, {path: child[path] for path in alone})
    shapes = transform.abstract(nest(source))
    matched = transform.match(shapes, transform.target_abstract(shapes, plan), plan, "weights")
    path = "params/segment0/layer1/mlp/down/w"
    leaf = next(leaf for leaf in matched.leaves if leaf.path == path)
    for block in reversed(range(3)):
        part = leaf.parts[block]
        values = source[part.source][part.block]
        np.testing.assert_array_equal(transform.grow_block(leaf, block, values, **options), child[path][block])
        for start, stop in ((0, 1), (7, 40), (40, 96)):
            piece = transform.grow_slice(leaf, block, values.reshape(-1)[start:stop], start, **options)
            np.testing.assert_array_equal(piece, child[path][block].reshape(-1)[start:stop])


def test_a_block_with_more_values_than_positions_is_refused():
    shapes = {path: ShapeDtypeStruct(value.shape, value.dtype) for path, value in few().items()}
    path = "params/segment0/layer1/mlp/up/w"
    shapes[path] = ShapeDtypeStruct((2, 2**17, 2**16), np.float32)
    with pytest.raises(Refused, match="layer1/mlp/up/w has more than 4294967296 values a block"):
        transform.match(shapes, transform.target_abstract(shapes, few_plan()), few_plan(), "gain")


def test_grows_under_eval_shape_into_what_the_model_declares():
    tiny, plan = presets.tiny(), readme_plan()
    tree = language_model.abstract(tiny)
    grow = jax.eval_shape(lambda tree: transform.grow(tree, plan, tiny, noise_std=1e-4, dtype="bfloat16"), tree)
    shapes = transform.abstract(grow)
    follows = transform.target_abstract(transform.abstract(tree), plan)
    assert {path: leaf.shape for path, leaf in shapes.items()} == {path: leaf.shape for path, leaf in follows.items()}
    assert shapes["params/segment0/layer0/mixer/query/w"].dtype == jnp.bfloat16
    assert shapes["params/segment0/layer0/gain"] == ShapeDtypeStruct((5,), jnp.float32)


@pytest.mark.parametrize("wrap", [
    pytest.param(lambda f: f, id="op by op"), pytest.param(jax.jit, id="jit", marks=pytest.mark.exhaustive)])
def test_sharding_of_the_other_axes_is_kept_and_changes_no_bit(wrap):
    noisy = "params/segment0/layer0/mlp/up/w"  # the only tensor of a layer with noise, which takes long to compile
    source = {path: value for path, value in few("D*2").items() if not path.endswith("down/w")}
    plan, options = few_plan("D*2"), {"carry": "weights", "noise_std": 1e-3}
    want = grown(source, plan, **options)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    specs = {path: P(None, "fsdp", "tensor") if path == noisy else P() for path in source}
    with jax.set_mesh(mesh):
        placed = {path: jax.device_put(value, jax.NamedSharding(mesh, specs[path])) for path, value in source.items()}
        child = wrap(lambda flat: grown(flat, plan, **options))(placed)
        assert child[noisy].sharding.spec == P(None, "fsdp", "tensor")
        same(child, want)


def test_segments_are_gathered_across_and_unused_layers_dropped():
    flat = made_up("DG*1,DG*2", halting=False)
    types = layout.parse("DG*1,DG*2")
    entries = tuple(Entry(source, 1, 1.0) for source in (4, 1, 0, 3))
    plan = Plan("map", types, layout.parse("DG*2"), entries, (Demand(1, 1.0, 1.0),) * 6)
    child = grown(flat, plan)
    first, second = flat["params/segment0/layer0/mlp/up/w"], flat["params/segment1/layer0/mlp/up/w"]
    np.testing.assert_array_equal(child["params/segment0/layer0/mlp/up/w"], np.stack([second[1], first[0]]))
    only = Plan("map", types, layout.parse("DG"), (Entry(2, 1, 1.0), Entry(3, 1, 1.0)),
                (Demand(1, 1.0, 1.0),) * 6)
    shapes = transform.abstract(nest(flat))
    matched = transform.match(shapes, transform.target_abstract(shapes, only), only, "gain")
    assert {path.split("/")[1] for path in matched.dropped} == {"segment0"}


def test_dropped_tensors_are_named(source):
    shapes = transform.abstract(nest(source))
    matched = transform.match(shapes, transform.target_abstract(shapes, readme_plan()), readme_plan(), "gain")
    assert matched.dropped == tuple(sorted(path for path in source if "halting" in path))
    assert sum(leaf.nbytes for leaf in matched.leaves) > 0
    leaf = next(leaf for leaf in matched.leaves if leaf.path.endswith("layer0/gain"))
    assert (leaf.old_shape, leaf.shape, leaf.rule) == ((2,), (5,), "gain")
    assert leaf.parts[2] == transform.Part("params/segment0/layer0/gain", 1, 1.0, 8)


def test_all_mismatches_come_in_one_message(source):
    target = transform.target_abstract(transform.abstract(nest(source)), readme_plan())
    broken = dict(source)
    del broken["params/segment0/layer1/mlp/up/w"]
    broken["params/segment0/layer2/mixer/surprise"] = np.zeros(2, np.float32)
    broken["params/segment0/layer0/mlp/down/w"] = np.zeros((2, D, FF), np.float32)
    broken["params/segment0/layer3/gain"] = np.zeros(2, np.int32)
    broken["params/segment0/layer3/mlp_norm/scale"] = np.zeros((3, D), np.float32)
    broken["params/segment1/layer0/gain"] = np.zeros(2, np.float32)
    target |= {"params/segment0/layer0/halting/embedding": ShapeDtypeStruct((5, 16), jnp.float32),
               "params/segment0/layer9/gain": ShapeDtypeStruct((5,), jnp.float32),
               "params/segment0/layer3/mlp/new/w": ShapeDtypeStruct((5,), jnp.float32)}
    with pytest.raises(Refused) as caught:
        transform.match(transform.abstract(nest(broken)), target, readme_plan(), "gain")
    for part in (
        "source tensor params/segment0/layer1/mlp/up/w is missing",
        "source tensor params/segment0/layer2/mixer/surprise matches no rule",
        "source tensor params/segment0/layer0/mlp/down/w of shape (2, 8, 12) gives shape (5, 8, 12)",
        "source tensor params/segment0/layer3/gain is int32",
        "source tensor params/segment0/layer3/mlp_norm/scale has shape (3, 8); its leading axis must be the 2 blocks",
        "source tensor params/segment1/layer0/gain is outside the layout DDDG*2",
        "target tensor params/segment0/layer0/halting/embedding belongs to adaptive depth",
        "target tensor params/segment0/layer9/gain is outside the layout DDDG*5",
        "target tensor params/segment0/layer3/mlp/new/w matches no rule",
    ):
        assert part in str(caught.value)


def test_left_over_tensors_and_lost_coefficients_are_refused(source):
    shapes = transform.abstract(nest(source))
    target = transform.target_abstract(shapes, readme_plan())
    del target["params/segment0/layer0/mlp/up/w"]
    with pytest.raises(Refused, match="layer0/mlp/up/w has no place in the target"):
        transform.match(shapes, target, readme_plan(), "gain")
    without = {path: shape for path, shape in shapes.items() if not path.endswith("layer2/gain")}
    with pytest.raises(Refused, match="segment0/layer2 have no tensor of rule 'gain'"):
        transform.match(without, transform.target_abstract(without, readme_plan()), readme_plan(), "gain")
    with pytest.raises(Refused, match="carry 'somehow'"):
        transform.match(shapes, target, readme_plan(), "somehow")


def test_a_plan_or_dtype_for_another_source_is_refused(source):
    other = presets.tiny().replace(layout="DDDG*3")
    with pytest.raises(Refused, match=r"source of layout DDDG\*2, this source's config says DDDG\*3"):
        transform.target_config(other, readme_plan())
    with pytest.raises(Refused, match="needs the source's config"):
        transform.grow(nest(source), readme_plan(), dtype="bfloat16")
    child = transform.target_config(presets.tiny(), readme_plan(), "bfloat16")
    assert (child.layout, child.adaptive, child.param_dtype) == ("DDDG*5", None, "bfloat16")
