"""What differs between tokens in the weight of a pass: from four means, the same as from every token."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from gt_jax.configs.layout import parse
from gt_jax.errors import Refused
from gt_jax.evaluation.spread import weight_spread
from gt_jax.growth.kept_gates import keeping_gates
from gt_jax.growth.plan import make_plan
from gt_jax.growth.repetition import from_json
from gt_jax.growth.spread import spread_line, whole_spread
from gt_jax.models.layers.pass_statistics import weight_moments

RANDOM = np.random.default_rng(0)
REAL = np.array([[1.0] * 6 + [0.0] * 2, [1.0] * 8])
LAYERS = {"layer0": {"k_exec": 2, "survival": [1.0, 0.5, 0.0, 0.0], "spread": [0.0, 0.5, 0.0, 0.0],
                     "update_square": [3.0, 1.0, 0.0, 0.0]}}  # fmt: skip


@pytest.mark.parametrize("name", ["differs", "same", "nobody"])
def test_four_means_say_what_a_constant_weight_misses(name):
    weight = {"differs": RANDOM.random(REAL.shape), "same": np.full(REAL.shape, 0.3), "nobody": 0 * REAL}[name]
    size = RANDOM.random(REAL.shape)
    of = [np.float32(a) for a in (weight, size, REAL)]
    mean = np.sum(weight * REAL) / REAL.sum()
    found = weight_spread(np.array([[mean]]), np.asarray(weight_moments(*map(jnp.asarray, of)))[None, None])
    w, d = weight[REAL > 0], size[REAL > 0]
    added = np.mean((w * d) ** 2)
    assert found.update_square[0, 0] == pytest.approx(added, rel=1e-5)
    missed = np.mean(((w - mean) * d) ** 2)
    assert found.spread[0, 0] == pytest.approx(missed / added if added else 0.0, abs=1e-5)
    assert found.std[0, 0] == pytest.approx(np.std(w), abs=1e-3)
    assert found.whole == pytest.approx(found.spread[0, 0]) and (found.spread[0, 0] > 0.1) == (name == "differs")


def test_counts_carry_it_and_those_from_before_have_none():
    counts = from_json(LAYERS)
    assert from_json(json.loads(json.dumps(counts.to_json()))) == counts
    assert whole_spread(counts) == pytest.approx(0.5 / 4)
    plan = make_plan("layer", counts, parse("D"))
    said = spread_line(counts, plan)
    assert said is not None and "12 %" in said and "pass 2 of layer 0" in said and "--keep-gates" in said
    assert "--coefficient schedule" not in said and "--coefficient schedule" in str(spread_line(counts, plan, True))
    full = make_plan("layer", counts, parse("D"), coefficient="schedule")
    assert "mean strengths" in said and "mean strengths" not in str(spread_line(counts, full, True))
    assert "the gates keep it" in str(spread_line(counts, keeping_gates(plan, counts.alpha)))
    before = {name: value for name, value in LAYERS["layer0"].items() if name not in ("spread", "update_square")}
    assert whole_spread(from_json({"layer0": before})) is None
    assert spread_line(from_json({"layer0": before}), plan) is None and spread_line(None, plan) is None


@pytest.mark.parametrize("wrong", [[0.5], [-1.0] * 4, "0", None, ["a"] * 4])
def test_lists_that_do_not_fit_are_refused(wrong):
    with pytest.raises(Refused, match="two lists of numbers"):
        from_json({"layer0": {**LAYERS["layer0"], "spread": wrong}})
