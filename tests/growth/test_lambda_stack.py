"""Growth of a lambda stack: the recurrence at fixed passes, copies that add nothing, and what becomes of skips."""

import dataclasses

import jax
import numpy as np
import pytest

from gt_jax.configs.layout import parse
from gt_jax.configs.model import StackConfig
from gt_jax.errors import Refused
from gt_jax.growth import slices_on_host
from gt_jax.growth.kept_gates import keeping_gates
from gt_jax.growth.lambda_stack import cannot_keep_skips, grown_skips
from gt_jax.growth.plan import make_plan
from gt_jax.growth.repetition import from_json
from gt_jax.growth.transform import abstract as shapes_of
from gt_jax.growth.transform import child_abstract, grow, match, target_config
from gt_jax.models.language_model import LanguageModel, apply_network, fixed_passes
from tests.support import RESOLVENT, perturbed, small_model

K_EXEC = (2, 1, 3)
SKIPS = ((0, 1), (0, 2), (2, 3))
SOURCE = small_model("B*3", resolvent=RESOLVENT, stack=StackConfig("lambda", skips=SKIPS))


def plan_of(kind, counts=K_EXEC, layout="B*3", coefficient="expected", **options):
    layers = {f"layer{i}": {"k_exec": k, "survival": [1.0] * k + [0.0] * (4 - k)} for i, k in enumerate(counts)}
    given = from_json(layers, "test", SOURCE.adaptive.alpha)
    return make_plan(kind, given, parse(layout), coefficient=coefficient, **options)


def silenced(plan):
    """The same layers, all but the first copies at strength 0."""
    entries = tuple(dataclasses.replace(one, coefficient=float(one.copy == 1)) for one in plan.entries)
    return dataclasses.replace(plan, entries=entries)


def logits(config, variables, passes):
    tokens = jax.random.randint(jax.random.key(2), (1, 12), 0, 257)
    run = jax.jit(lambda v, control: apply_network(LanguageModel(config), v, tokens, control=control).logits)
    return np.asarray(run(variables, fixed_passes(passes)))


@pytest.mark.parametrize(("plan", "passes", "skips"), [
    (plan_of("layer"), K_EXEC, ((1, 2), (1, 3), (5, 6))),
    (silenced(plan_of("stack", (2, 2, 2))), (1, 1, 1), ((0, 1), (0, 2), (5, 6))),
], ids=["the recurrence", "copies of strength 0"])  # fmt: skip
def test_the_child_equals_its_source(plan, passes, skips):
    variables, child = perturbed(SOURCE), target_config(SOURCE, plan)
    assert child.layout == "B*6" and child.stack == StackConfig("lambda", skips=skips)
    tree = grow(variables, plan, SOURCE, carry="gain")
    wanted = logits(SOURCE, variables, passes)
    np.testing.assert_allclose(logits(child, tree, (1,) * 6), wanted, atol=1e-5)
    layer = tree["params"]["segment0"]["layer0"]
    dealt = {**layer, "x0_scale": layer["x0_scale"] * 0.9}
    wrong = {**tree, "params": {**tree["params"], "segment0": {"layer0": dealt}}}
    assert np.abs(logits(child, wrong, (1,) * 6) - wanted).max() > 1e-3


@pytest.mark.parametrize("carry", ["gain", "weights", "output"])
def test_the_first_copy_mixes_and_the_others_do_not(carry):
    variables, plan = perturbed(SOURCE), plan_of("layer")
    grown = grow(variables, plan, SOURCE, carry=carry, noise_std=0.1)["params"]
    old, new = (tree["segment0"]["layer0"] for tree in (variables["params"], grown))
    first = [0, 2, 3]
    for name, neutral in (("residual_scale", 1.0), ("x0_scale", 0.0)):
        np.testing.assert_array_equal(new[name][np.asarray(first)], old[name])
        assert all(float(new[name][at]) == neutral for at in (1, 4, 5))
    np.testing.assert_array_equal(grown["skips"], variables["params"]["skips"])
    leaves = match(shapes_of(variables), child_abstract(SOURCE, plan), plan, carry).leaves
    leaf = next(leaf for leaf in leaves if leaf.path.endswith("/residual_scale"))
    one = slices_on_host.grow_slice(leaf, 4, np.asarray([0.5], np.float32), carry=carry, noise_std=0.1, seed=0)
    assert one.tolist() == [1.0]


def test_every_layer_once_is_the_source_as_it_is():
    variables, plan = perturbed(SOURCE), plan_of("layer", (1, 1, 1))
    grown = grow(variables, plan, SOURCE)["params"]
    assert target_config(SOURCE, plan) == SOURCE.plain
    for name in ("residual_scale", "x0_scale", "gain"):
        old, new = (tree["segment0"]["layer0"][name] for tree in (variables["params"], grown))
        np.testing.assert_array_equal(new, old)


def test_skips_stay_in_a_group_start_at_its_end_and_may_enter_it():
    plan = plan_of("block", (1, 2, 2, 2, 1), "B,DGB,B")
    assert [entry.source for entry in plan.entries] == [0, 1, 2, 3, 1, 2, 3, 4]
    assert grown_skips([(1, 3), (3, 4), (0, 2), (0, 4)], plan) == ((1, 3), (6, 7), (0, 2), (0, 7))


def test_skips_that_leave_what_is_copied_together_are_refused_by_name():
    plan = plan_of("block", (1, 2, 2, 2, 1), "B,DGB,B")
    wrong = cannot_keep_skips([(1, 4), (1, 3), (2, 4)], plan)
    assert [line[:24] for line in wrong] == ["stack.skips has [1, 4]: ", "stack.skips has [2, 4]: "]
    assert "among those of layers 2, 3" in wrong[0] and "--plan layer" in wrong[0]
    source = SOURCE.replace(layout="B,DGB,B", stack=StackConfig("lambda", skips=((1, 4),)))
    with pytest.raises(Refused, match=r"skips has \[1, 4\]: it leaves the part"):
        target_config(source, plan)
    listed = plan_of("map", (1, 1, 1), layers=(2, 0, 0))
    assert cannot_keep_skips([(0, 1), (0, 2)], listed) == [
        "stack.skips has [0, 1]: layer 1 has no first copy in the plan",
        "stack.skips has [0, 2]: in the plan layer 0 is done at 2, after layer 2 begins at 0",
    ]


def test_gates_are_not_kept_in_a_lambda_stack():
    with pytest.raises(Refused, match="stack is 'lambda'"):
        target_config(SOURCE, keeping_gates(plan_of("layer"), SOURCE.adaptive.alpha))
