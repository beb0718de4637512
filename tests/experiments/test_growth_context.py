"""The study of a source's context: its words, and what its rows say, told from made-up ones; nothing is trained."""

from __future__ import annotations

import json

import pytest

from experiments import contract, growth_context
from experiments.pays_study.context import ContextStudy, scaled, summary
from gt_jax.errors import Refused

STUDY = scaled("small", ("all", "alive"), (0, 1), ())


def row(context, seed, gap):
    """A row as the study makes it."""
    return {"task": "text", "model": context, "seed": seed, "rate": 2e-3, "steps": 587, "nats": 1.75, "recipe": "dealt",
            "child_nats": 1.75 * (1 + gap / 100), "gap_percent": gap, "spread_percent": 0.1, "passes_run": 1.3,
            "passes_computed": 2.0, "mean_weight": 1.2}  # fmt: skip


def test_contexts_are_told_apart_by_the_gap_at_growth(tmp_path, capsys):
    rows = [row("all", 0, 0.1), row("all", 1, 0.3), row("alive", 0, 0.8), row("alive", 1, 2.8)]
    found = summary(rows)
    assert found["all"]["gap_percent"]["mean"] == pytest.approx(0.2) and found["alive"]["gaps"] == [0.8, 2.8]
    stored = contract.stored(command="python -m x", config=STUDY, machine={"cores": 2}, seconds=60.0, rows=rows,
                             summary=found, content="")  # fmt: skip
    contract.write(tmp_path / "growth_context.json", stored)
    assert ContextStudy.from_json(json.loads((tmp_path / "growth_context.json").read_text())["config"]) == STUDY
    assert growth_context.main(["--render", "--output", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert "| `all` | 1.7500" in page and "| +0.10, +0.30 | 0.10 | 1.30 | 2.00 | 1.20 |" in page


def test_sources_differ_in_their_context_alone():
    one, other = (STUDY.setting.replace(context=context) for context in STUDY.contexts)
    assert one.source.adaptive.context == "all" and other.source.adaptive.context == "alive"
    assert one.source.replace(adaptive=other.source.adaptive) == other.source
    with pytest.raises(Refused, match="contexts are"):
        scaled("small", ("none",), (0,), ())
    with pytest.raises(Refused, match="the scales are"):
        scaled("large", ("all",), (0,), ())
