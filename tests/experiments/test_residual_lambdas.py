"""Several seeds as one program, and what the study of residual lambdas says, told from made-up rows."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest

from experiments import contract, residual_lambdas
from experiments.lambda_study.engine import learned
from experiments.lambda_study.findings import between, summary
from experiments.lambda_study.study import (
    BACKOUT,
    FREE,
    LAMBDAS,
    LONGER,
    PLAIN,
    SCALES,
    TIMES,
    U_SKIPS,
    VARIANTS,
    X0,
    LambdaStudy,
    Wanted,
)
from experiments.several_seeds import fit, held_out_nats, one, stacked
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.errors import Refused
from gt_jax.models.language_model import abstract

STUDY = LambdaStudy(seeds=(0, 1), width=8, length=16, rows=2)


def batches(step, lanes=(0, 0, 1)):
    rows = [np.random.default_rng(100 * lane + step).integers(0, 16, (2, 17)) for lane in lanes]
    return stacked([{"tokens": one[:, :-1], "targets": one[:, 1:], "segment_ids": np.ones((2, 16))} for one in rows])


def test_lanes_are_models_of_their_own_and_what_is_frozen_stays():
    config = STUDY.model(LAMBDAS, 16).replace(layout="A*2")
    scales = (("residual_scale", 0.0), ("x0_scale", 3.0))
    trained = fit(config, seeds=(3, 3, 4), rates=(1e-2, 1e-2, 1e-2), steps=3, batches=batches, scales=scales)
    first, second, third = (flatten(one(trained.variables, lane)["params"]) for lane in range(3))
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[path])
    table = next(path for path in first if path.endswith("table"))
    assert np.abs(first[table] - third[table]).max() > 1e-3 and trained.curve.shape == (3, 3)
    scale, x0 = (next(path for path in first if path.endswith(name)) for name in ("residual_scale", "x0_scale"))
    np.testing.assert_array_equal(first[scale], np.full(first[scale].shape, np.float32(1.1)))
    assert 1e-3 < np.abs(first[x0]).max() < 3 * 3 * 1e-2 * 1.01
    held = {name: array[0] for name, array in batches(0).items()}
    nats = held_out_nats(config, trained.variables, [held, held])
    assert nats[0] == nats[1] != nats[2] and nats[0] < trained.curve[0, 0], "it was trained on these rows"


def test_variants_are_what_they_are_called():
    for name in (*VARIANTS, LONGER):
        config, variant = STUDY.model(name, 16), STUDY.variant(name)
        assert config.stack == variant.stack and config.layout == "A*12"
        assert (variant.stack.kind == "residual") == (name in (PLAIN, LONGER))
    assert STUDY.variant(U_SKIPS).stack.skips == ((0, 11), (1, 10), (2, 9), (3, 8), (4, 7))
    assert STUDY.variant(BACKOUT).stack.skips == ((7, 12),) and dict(STUDY.variant(FREE).scales)["residual_scale"] > 1
    assert STUDY.variant(X0).scales == (("residual_scale", 0.0),) and STUDY.steps_of(LONGER) == 500
    params = abstract(STUDY.model(BACKOUT, 16))["params"]
    filled = jax.tree.map(lambda leaf: np.ones((2, *leaf.shape)), params)
    filled["skips"] = np.array([[-0.25], [0.5]])
    found = learned(STUDY, BACKOUT, filled)
    np.testing.assert_allclose(found["contributions"][0], [0.75] * 8 + [1.0] * 4)
    np.testing.assert_allclose(found["contributions"][1], [1.5] * 8 + [1.0] * 4)
    with pytest.raises(Refused, match="layers is 4"):
        LambdaStudy(layers=4)


def rows(study):
    made = []
    for number, name in enumerate((*VARIANTS, LONGER)):
        for seed in study.seeds:
            nats = 2.0 + 0.1 * seed - (0.02 + 0.001 * seed) * (name == LAMBDAS) - 0.05 * (name == LONGER)
            nats += 0.01 * (-1) ** seed * (number > 1 and name != LONGER)
            made.append({"task": "text", "model": name, "seed": seed, "rate": 4e-3, "steps": study.steps_of(name),
                         "nats": nats, "tuning_nats": nats, "a": [1.0 + 0.01 * number] * 12, "b": [0.1] * 12,
                         "skips": [0.2] * (name == BACKOUT), "contributions": [1.0] * 12, "curve": []})  # fmt: skip
    return made + [{"task": TIMES, "model": name, "seed": 0, "milliseconds": 9.0,
                    "ratios": [1.0, 1.0, 1.0] if name == PLAIN else [1.2, 1.1, 1.0]} for name in VARIANTS]  # fmt: skip


def test_differences_are_paired_and_a_slower_step_is_paid_for(tmp_path, capsys):
    study = SCALES["small"].replace(seeds=(0, 1, 2))
    made = rows(study)
    found = summary(made)["variants"]
    at_once, in_time = (found[LAMBDAS][key] for key in ("at_equal_steps", "at_equal_time"))
    assert at_once["mean"] == pytest.approx(-0.021) and at_once["high"] < 0
    paid = 0.05 * math.log(1.1) / math.log(1.25)
    assert in_time["mean"] == pytest.approx(-0.021 + paid) and found[LAMBDAS]["ratio"] == pytest.approx(1.1)
    short, long = {"nats": 2.0, "steps": 100}, {"nats": 1.9, "steps": 125}
    assert between(short, long, 1.25) == pytest.approx(1.9) and between(short, long, 0.9) == 2.0
    stored = contract.stored(command="python -m x", config=study, machine={"cores": 2}, seconds=60.0, rows=made,
                             summary=summary(made), content="")  # fmt: skip
    contract.write(tmp_path / "residual_lambdas.json", stored)
    assert LambdaStudy.from_json(json.loads((tmp_path / "residual_lambdas.json").read_text())["config"]) == study
    assert residual_lambdas.main(["--render", "--output", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert page == (tmp_path / "residual_lambdas.md").read_text() + "\n"
    assert f"- {LAMBDAS} ends below plain (-0.0210" in page and f"- {X0} and plain cannot be told apart" in page
    assert (tmp_path / "residual_lambdas.png").read_bytes().startswith(b"\x89PNG")


def test_every_variant_has_its_own_rate_and_all_seeds_run_at_it():
    asked: list[list[Wanted]] = []

    class Made:
        def all(self, wanted, alike=None):
            asked.append(list(wanted.values()))
            return {name: {"rows": [{"model": one.variant, "rate": rate, "seed": seed,
                                     "tuning_nats": rate if one.variant == PLAIN else -rate}
                                    for seed, rate in zip(one.seeds, one.rates, strict=True)]}
                    for name, one in wanted.items()}  # fmt: skip

    found = residual_lambdas.all_rows(STUDY, Made())
    tried, final = asked
    each = (0,) * len(STUDY.rates)
    assert all(one.seeds == each and one.rates == STUDY.rates for one in tried) and len(tried) == len(VARIANTS)
    assert final[-1].variant == TIMES and len(found) == 2 * (len(VARIANTS) + 1)
    assert {row["rate"] for row in found if row["model"] in (PLAIN, LONGER)} == {min(STUDY.rates)}
    assert {row["rate"] for row in found if row["model"] == LAMBDAS} == {max(STUDY.rates)}
