"""The demo, shortened: interrupted it goes on, tells its story to the end, leaves what it says it leaves.

On a narrower model of two passes and on one device, as on most machines, and what trains one config is compiled once
for both runs; `make demo` runs the true one.
"""

from __future__ import annotations

import functools
import json

import pytest

from gt_jax import demo
from gt_jax.checkpoints import checkpoint
from gt_jax.configs import presets
from gt_jax.devices.sharding import mesh_for_rows
from gt_jax.training import loop


@pytest.mark.slow
def test_the_demo_in_a_few_steps_interrupted(tmp_path, capsys, monkeypatch):
    whole = presets.one_layer()
    twice = whole.replace(width=16, mlp_width=16, adaptive=whole.adaptive.replace(alpha=(1.0, 1.0)))
    monkeypatch.setattr(demo, "one_layer", lambda: twice)
    monkeypatch.setattr(demo, "TASK", "pointer_jumps:hardest=2,symbols=8,queries=4")
    monkeypatch.setattr(demo, "EVALUATION_BATCHES", 2)
    monkeypatch.setattr(demo, "ROWS", 4)
    monkeypatch.setattr(demo, "NOISE", 0.0)
    monkeypatch.setattr(demo, "mesh_for_rows", lambda rows: mesh_for_rows(1))
    trainers = functools.cache(loop.make_trainer)
    for module in (demo, loop):
        monkeypatch.setattr(module, "make_trainer", trainers)
    place = tmp_path / "demo"
    words = ["--output", str(place), "--steps", "20"]
    true, seen = demo.train_on, []

    def interrupted(one, *rest):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(true(one, *rest))
        return seen[-1]

    monkeypatch.setattr(demo, "train_on", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.main(words)
    before = [checkpoint.content_hash(place / name) for name in ("source", "grown")]
    assert capsys.readouterr().out == "" and not (place / "report.json").exists()

    monkeypatch.setattr(demo, "train_on", true)
    assert demo.main(words) == 0
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if line.strip()]
    assert len(rows) == 2 + 6 and demo.LAST in shown
    for name in ("growth.png", "depth.png"):
        assert (place / name).read_bytes().startswith(b"\x89PNG")
    report = json.loads((place / "report.json").read_text())
    plain, source, mean, full, gates, random = report["outcomes"]
    assert [one["layers"] for one in report["outcomes"]] == [1, 1, 2, 2, 2, 2]
    assert gates["before"]["accuracy"] == source["before"]["accuracy"], "kept gates are the source"
    assert gates["before"]["nats"] == pytest.approx(source["before"]["nats"], abs=1e-5)
    forced = source["before"]["accuracy_forced"]
    assert full["before"]["accuracy"] == forced["2"], "full strength is every pass forced"
    assert list(plain["before"]["accuracy"]) == ["1", "2"] and len(random["curve"]) == len(mean["curve"]) == 3
    assert checkpoint.describe(place / "grown")[1]["grown_from"]["plan"]["layout"] == "D*2"

    assert [checkpoint.content_hash(place / name) for name in ("source", "grown")] == before
    for first, again in zip(seen, (mean, full), strict=True):
        assert (first.name, first.before, first.after) == (again["name"], again["before"], again["after"])
