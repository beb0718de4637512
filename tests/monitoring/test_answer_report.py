"""A stored table of answers for readers: every figure in words, and a picture that is the same bytes each time."""

from __future__ import annotations

import json

import pytest

from gt_jax.monitoring.answer_lines import answer_lines
from gt_jax.monitoring.answer_plots import Panel, panel_of, plot_by_difficulty

LIMITS = [0.4, 0.6]
STORED = {
    "answers": 1234, "instances": 56, "confidence": 0.95, "hardest": [7], "nats": 1.0,
    "accuracy": {"1": 0.5, "7": 0.25}, "accuracy_all": 0.375, "accuracy_hardest": 0.25,
    "passes": {"1": 1.5, "7": 2.75}, "passes_by_layer": {"1": [1, 2], "7": [2, 3.5]}, "spearman": 0.7654,
    "accuracy_forced": {"1": {"1": 0.111, "7": 0.0}},
    "forced": {"1": {"accuracy_all": 0.056, "accuracy_hardest": 0.0,
                     "cost": {"value": 0.3195, "low": 0.2, "high": 0.4},
                     "cost_hardest": {"value": 0.25, "low": None, "high": None}}},
    "cuts": [{"layer": 0, "type": "D", "k_exec": 3, "passes_run": 1.876, "accuracy_all": 0.333,
              "cost": {"value": 0.042, "low": -0.01, "high": 0.1},
              "cost_hardest": {"value": 0.021, "low": -0.02, "high": 0.05}}],
    "intervals": {"accuracy": {"1": LIMITS, "7": [None, None]}, "accuracy_all": [0.3, 0.45],
                  "accuracy_hardest": [None, None], "nats": LIMITS, "passes": {"1": [1.25, 1.75], "7": [2.5, 3.0]},
                  "spearman": [0.6, 0.9], "accuracy_forced": {"1": {"1": [0.05, 0.2], "7": [0.0, 0.1]}}},
}  # fmt: skip


def test_every_figure_is_said():
    text = "\n".join(answer_lines(STORED))
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line}
    assert "1,234 answers of 56 instances" in text and "95 % intervals" in text
    assert "50.0 (40.0 to 60.0)" in text and "1.50 (1.25 to 1.75)" in text
    assert rows["7"] == "25.0 0.0 2.75 (2.50 to 3.00)"
    assert rows["all"] == "37.5 (30.0 to 45.0) 5.6 -"
    assert "Spearman's correlation of passes and difficulty: 0.765 (0.600 to 0.900)" in text
    assert "1 pass forced: costs +31.9 (+20.0 to +40.0) points, +25.0 of the hardest" in text
    assert rows["D0"] == "3 1.88 33.3 +4.2 (-1.0 to +10.0) +2.1 (-2.0 to +5.0)"


def test_a_model_without_passes_to_choose_has_neither_correlation_nor_cuts():
    plain = {**STORED, "spearman": None, "forced": {}, "accuracy_forced": {}, "cuts": []}
    text = "\n".join(answer_lines(plain))
    assert "the same for all answers" in text and "forced" not in text and "layer run once" not in text
    assert panel_of(plain, "a").title == "a" and list(panel_of(plain, "a").accuracy) == ["accuracy"]


def test_a_picture_of_one_and_of_several_models(tmp_path):
    panel = panel_of(json.loads(json.dumps(STORED)), "pointer_jumps")
    assert panel.title == "pointer_jumps, Spearman 0.77" and list(panel.accuracy) == ["free passes", "1 pass forced"]
    assert panel.accuracy["free passes"] == {1: (0.5, 0.4, 0.6), 7: (0.25, None, None)}
    for name in ("a.png", "b.png"):
        plot_by_difficulty([panel], tmp_path / name)
    plot_by_difficulty([panel, panel_of({**STORED, "spearman": None}, "p_hop")], tmp_path / "both.png")
    one, same, both = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "both.png"))
    assert one == same and one.startswith(b"\x89PNG") and len(both) > 1.3 * len(one)
    with pytest.raises(ValueError, match="no curve has a point"):
        plot_by_difficulty([Panel("x", {"a": {}}, {})], tmp_path / "none.png")
    with pytest.raises(ValueError, match="no panel"):
        plot_by_difficulty([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
