"""The study of freed gates: its units go on from one model, and its page from made-up rows; no model learns here."""

from __future__ import annotations

import pytest

from experiments import contract, freed_gates
from experiments.freed_study.engine import make, units
from experiments.freed_study.study import FORCED, HARD, SCALES, SOFT, VARIANTS, FreedStudy, Wanted, scaled
from gt_jax.errors import Refused


def row(variant, seed, *nats):
    steps = FreedStudy().looked_at if variant != FORCED else (FreedStudy().forced_steps,)
    figures = {"accuracy_all": 0.9, "accuracy": {"1": 1.0, "2": 0.8}, "passes": {"1": 1.2, "2": 2.1}, "spearman": 0.8}
    curve = [{"step": step, "nats": one, **figures} for step, one in zip(steps, nats, strict=True)]
    return {"task": "variable_chains", "model": variant, "seed": seed, "rate": 2e-3, "curve": curve,
            **{name: figures[name] for name in ("accuracy", "passes", "spearman")}}  # fmt: skip


def test_a_line_a_variant_and_seed(tmp_path):
    study = FreedStudy(seeds=(0, 1))
    rows = [row(FORCED, 0, 0.01), row(FORCED, 1, 0.02), *(row(SOFT, seed, *[0.1] * 6, 0.5) for seed in (0, 1)),
            *(row(HARD, seed, *[0.1] * 6, 0.005) for seed in (0, 1))]  # fmt: skip
    stored = contract.stored(command="x", config=study, machine={"cores": 2}, seconds=60.0, rows=rows,
                             summary=freed_gates.summary(rows), content="")  # fmt: skip
    page = freed_gates.markdown(stored)
    assert "| hard weights | 1 | 0.0200 | 0.1000 |" in page and "| 0.0050 | 80.0 | 1.20 | 2.10 | 0.80 |" in page
    assert stored["summary"][SOFT]["nats"]["mean"] == pytest.approx(0.5)
    alone = {**stored, "rows": stored["rows"][::2], "summary": freed_gates.summary(stored["rows"][::2])}
    assert f"- {HARD}: at the end 0.0050" in freed_gates.markdown(alone), "one seed has no interval"
    freed_gates.draw(stored, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_every_variant_goes_on_from_the_forced_part_with_its_own_gates_and_price():
    study = scaled("small", (0, 1), True)
    first, then = units(study)
    assert [one.variant for one in first] == [FORCED] * 2 and len(then) == 2 * len(VARIANTS)
    assert study.looked_at[0] == study.forced_steps + 20 and study.looked_at[-1] == study.setting.steps
    for one in then:
        adaptive = one.setting.adaptive().adaptive
        assert adaptive.weights == one.variant.partition(" ")[0] and (adaptive.threshold == 0.5) == (
            adaptive.weights == "hard")  # fmt: skip
        assert one.setting.train(0, study.rate).price.value == one.setting.pass_price
        assert one.setting.data(0) == study.setting.data(0)
    with pytest.raises(Refused, match=r"(?s)soon is 0.*variants has 'x'.*seeds are \[1, 1\]"):
        FreedStudy(soon=0, variants=("x",), seeds=(1, 1))


@pytest.mark.exhaustive
def test_units_are_made_from_the_same_model(tmp_path):
    setting = SCALES["minutes"].replace(steps=8, width=8, rows=2, passes=2, held_out_batches=1)
    study = FreedStudy(setting=setting, soon=1, evaluations=1)
    forced = make(tmp_path, Wanted(study, 0, FORCED))
    one, again, other = (make(tmp_path, Wanted(study, 0, variant)) for variant in (SOFT, SOFT, HARD))
    assert len(forced["curve"]) == 1 and [point["step"] for point in one["curve"]] == list(study.looked_at)
    assert one == again and one["curve"] != other["curve"]
