"""The study of gates on text: what is compared with what, told from made-up rows."""

from __future__ import annotations

import json
import math

import pytest

from experiments import contract, text_gates
from experiments.text_study import findings
from experiments.text_study.engine import make, step_flops
from experiments.text_study.findings import summary
from experiments.text_study.study import (
    ADAPTIVE,
    DEFAULT,
    EQUAL,
    PLAIN,
    PRICED,
    SCALES,
    TARGET,
    TextGates,
    Wanted,
    scaled,
)
from gt_jax.configs.model import AdaptiveConfig
from gt_jax.configs.price import PriceConfig
from gt_jax.errors import Failed, Refused

STUDY = TextGates()
MODELS = STUDY.models
NATS = {PLAIN: 2.0, EQUAL: 1.8, DEFAULT: 1.9, TARGET: 1.95, PRICED: 1.99}


def row(model, seed):
    """A row as the engine makes it."""
    found = {"task": "text", "model": model, "seed": seed, "rate": 2e-3, "steps": 300, "layers": "DDDG", "flops": 2e12,
             "processor_seconds_a_step": 0.05, "seconds": 20.0, "nats": NATS[model] + 0.01 * seed,
             "tuning_nats": 1.0}  # fmt: skip
    if model in ADAPTIVE:
        found |= {"mean_weight": 1.3, "passes_run": 2.0, "passes_computed": 2.5, "nats_once": 1.01 * found["nats"]}
    return found


def test_losses_are_compared_seed_by_seed_and_the_page_comes_from_the_stored_file(tmp_path, capsys):
    rows = [row(model, seed) for model in MODELS for seed in STUDY.seeds]
    pairs = {(one["model"], one["other"]): one["mean"] for one in summary(rows)["pairs"]}
    assert pairs[DEFAULT, PLAIN] == pytest.approx(-0.1) and pairs[DEFAULT, EQUAL] == pytest.approx(0.1)
    stored = contract.stored(command="python -m x", config=STUDY, machine={"cores": 2}, seconds=60.0, rows=rows,
                             summary=summary(rows), content="")  # fmt: skip
    contract.write(tmp_path / "text_gates.json", stored)
    assert TextGates.from_json(json.loads((tmp_path / "text_gates.json").read_text())["config"]) == STUDY
    assert text_gates.main(["--render", "--output", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert page == (tmp_path / "text_gates.md").read_text() + "\n"
    assert f"| {DEFAULT} | 0.002 | 300 | 2.000 | 1.9100" in page and "| 2.00 | 1.30 | 2.50 | +1.00" in page
    assert f"- {DEFAULT} ends below {PLAIN} (-0.1000" in page and f"- {TARGET} ends above {DEFAULT}" in page


def test_the_longer_plain_model_costs_what_the_presets_rule_did():
    asked = []
    plain = STUDY.model(PLAIN)
    step = step_flops(STUDY, plain, [1.0] * 4)

    class Made:
        def all(self, wanted):
            asked.extend(wanted.values())
            return {name: {"tuning_nats": one.rate, "nats": nats[one.model], "name": name,
                           "flops": 2.5 * step * one.steps}
                    for name, one in wanted.items()}  # fmt: skip

    nats = NATS
    found = text_gates.all_rows(STUDY, Made())
    assert len(found) == len(MODELS) * len(STUDY.seeds) and all("at 0.002" in one["name"] for one in found)
    assert {one.steps for one in asked if one.model == EQUAL} == {750}
    assert {one.steps for one in asked if one.model != EQUAL} == {300}
    nats = {**NATS, PLAIN: 1.0}
    asked.clear()
    found = text_gates.all_rows(STUDY, Made())
    assert not any(one.model == EQUAL for one in asked), "plain is ahead with as many steps, and so with more"
    lost = {(DEFAULT, 2e-3), (EQUAL, 4e-3)}  # diverges at the last seed

    class Breaks(Made):
        def all(self, wanted):
            asked.extend(wanted.values())
            return {name: {**super(Breaks, self).all({name: one})[name], "at": (one.model, one.rate),
                           "diverged": (one.model, one.rate) in lost and one.seed == 2} for name, one in wanted.items()}

    nats = NATS
    taken = {row["at"] for row in text_gates.all_rows(STUDY, Breaks())}
    assert (DEFAULT, 4e-3) in taken and not taken & lost and (EQUAL, 2e-3) in taken
    lost.add((DEFAULT, 4e-3))
    with pytest.raises(Failed, match=f"{DEFAULT} diverged at every rate that was tried"):
        text_gates.all_rows(STUDY, Breaks())
    assert "was not given more" in findings._equal(summary([row(m, s) for m in MODELS if m != EQUAL for s in (0, 1)]))


def test_the_models_are_the_presets_rule_and_rule_budget():
    assert STUDY.model(DEFAULT).adaptive == AdaptiveConfig() and STUDY.train(DEFAULT, 9).price == PriceConfig()
    assert STUDY.model(EQUAL) == STUDY.model(PLAIN) and STUDY.model(PLAIN).adaptive is None
    for model in (TARGET, PRICED):
        assert STUDY.model(model).adaptive.state_width and STUDY.train(model, 9).optimizer.halting_scale == 10.0
    assert STUDY.train(PRICED, 9).price.target is None and STUDY.train(TARGET, 9).price.target == STUDY.target
    with pytest.raises(Refused, match="the scales are minutes, small, accelerator"):
        scaled("large", (0,), ())
    assert SCALES["small"].models == (PLAIN, EQUAL, DEFAULT, TARGET)
    with pytest.raises(Refused, match="adaptive is"):
        STUDY.replace(adaptive=(TARGET,))
    with pytest.raises(Refused, match="seeds are"):
        scaled("small", (0, 0), ())


@pytest.mark.exhaustive
def test_a_row_says_what_the_passes_are_good_for():
    small = SCALES["minutes"].replace(layout="D", steps=3)
    found = make(Wanted(small, TARGET, 0, 4e-3, 3))
    assert math.isfinite(found["nats"]) and found["nats"] != found["nats_once"]
    assert 1 <= found["passes_run"] <= found["passes_computed"] <= 4 and len(found["by_layer"]) == 1
    assert step_flops(small, small.model(TARGET), [1.0]) * 3 < found["flops"]
