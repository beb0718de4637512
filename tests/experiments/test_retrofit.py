"""The study of retrofits: what its rows say, told from made-up ones, and how its models are trained; none is here."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments import contract, retrofit
from experiments.retrofit_study.engine import step_flops
from experiments.retrofit_study.findings import summary
from experiments.retrofit_study.study import MODELS, ON, RETROFITTED, SCALES, SOURCE, Study, Wanted, scaled
from gt_jax.errors import Refused
from gt_jax.growth.retrofit import retrofitted_config

STUDY = SCALES["small"]


def row(model, seed, easy, hard, nats, spearman=None):
    """A row as the engine makes it, of two difficulties."""
    forced = {"1": {"1": 1.0, "2": 0.2}, "2": {"1": 1.0, "2": hard}} if model == RETROFITTED else {}
    return {
        "task": "pointer_jumps", "model": model, "seed": seed, "rate": 2e-3, "layers": "D", "steps": 10, "flops": 2e9,
        "accuracy": {"1": easy, "2": hard}, "accuracy_all": (easy + hard) / 2, "accuracy_hardest": hard, "nats": nats,
        "passes": {"1": 1.0, "2": 2.0}, "spearman": spearman, "curve": [], "accuracy_forced": forced,
        "forced": {k: {"accuracy_hardest": one["2"]} for k, one in forced.items()},
    }  # fmt: skip


def rows():
    return [one for seed in (0, 1, 2) for one in (
        row(SOURCE, seed, 1.0, 0.2, 0.9), row(RETROFITTED, seed, 1.0, 0.9 + 0.01 * seed, 0.3, spearman=0.8),
        row(ON, seed, 1.0, 0.3, 0.8))]  # fmt: skip


def test_claims_are_paired_by_seed_and_the_page_comes_from_the_stored_file(tmp_path, capsys):
    found = summary(rows())["figures"]
    assert found["hardest"]["mean"] == pytest.approx(61.0) and found["all"]["mean"] == pytest.approx(30.5)
    assert found["nats"]["mean"] == pytest.approx(-0.5) and found["spearman"]["mean"] == pytest.approx(0.8)
    assert found["one pass"]["mean"] == pytest.approx(71.0)
    assert summary([{**one, "spearman": None} for one in rows()])["figures"]["spearman"]["mean"] == 0.0
    stored = contract.stored(command="python -m x", config=STUDY, machine={"cores": 2}, seconds=60.0, rows=rows(),
                             summary=summary(rows()), content="")  # fmt: skip
    contract.write(tmp_path / "retrofit.json", stored)
    assert Study.from_json(json.loads((tmp_path / "retrofit.json").read_text())["config"]) == STUDY
    assert retrofit.main(["--render", "--output", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert page == (tmp_path / "retrofit.md").read_text() + "\n"
    assert f"| {RETROFITTED} | 10 | 2.0 | 100 | 91 | 0.3000 |" in page and "| retrofitted, 1 pass forced |" in page
    assert "| retrofitted less trained on, loss, nats an answer | -0.500" in page


def test_contenders_go_on_from_the_plateau_and_a_pass_is_charged_when_it_is_computed():
    source = STUDY.source_train(1)
    assert source.optimizer.boundaries(source.steps)[1] >= STUDY.source_steps, "its rate has not fallen"
    opened, on = STUDY.further(1, STUDY.steps, True), STUDY.further(1, 3000, False)
    assert opened.optimizer == on.optimizer.replace(warmup=opened.optimizer.warmup)
    assert opened.optimizer.learning_rate == STUDY.rate and opened.price.forced_passes == 4 and opened.seed == 1
    assert STUDY.adaptive.initial_bias + opened.price.gates_opened == pytest.approx(2.0)
    adaptive = retrofitted_config(STUDY.plain, STUDY.adaptive)
    once, twice = (step_flops(STUDY, adaptive, np.array([passes])) for passes in (1.0, 2.0))
    assert step_flops(STUDY, STUDY.plain, np.ones(1)) == once < twice < 2 * once
    assert Wanted(STUDY, 2).name == "pointer_jumps/seed2" and set(MODELS) == {SOURCE, RETROFITTED, ON}
    with pytest.raises(Refused, match="the scales are minutes, small"):
        scaled("large", (0,))
    with pytest.raises(Refused, match="seeds are"):
        scaled("minutes", (0, 0))
