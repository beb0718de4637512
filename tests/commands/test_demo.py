"""The demo, shortened: interrupted it goes on, tells its story to the end, leaves what it says it leaves.

On a narrower model of one layer type and on one device, as on most machines, which compiles in a fraction of the time,
and what trains one config is compiled once for both runs; `make demo` runs the true one.
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
    monkeypatch.setattr(demo, "tiny", lambda: presets.tiny().replace(layout="D*4", width=48))
    monkeypatch.setattr(demo, "EVALUATION_BATCHES", 2)
    monkeypatch.setattr(demo, "TARGET_LAYERS", 8)
    monkeypatch.setattr(demo, "mesh_for_rows", lambda rows: mesh_for_rows(1))
    trainers = functools.cache(loop.make_trainer)
    for module in (demo, loop):
        monkeypatch.setattr(module, "make_trainer", trainers)
    place = tmp_path / "demo"
    words = ["--output", str(place), "--steps", "20", "--more", "2"]
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
    outcomes, source = report["outcomes"], report["source"]
    assert [one["layers"] for one in outcomes] == [8, 8, 8, 4, 8]
    assert outcomes[2]["before"] == pytest.approx(source["loss"], rel=0.05)
    assert outcomes[4]["before"] > 1.2 * source["loss"]
    assert checkpoint.describe(place / "grown")[1]["grown_from"]["plan"]["layout"] == "D*8"

    assert [checkpoint.content_hash(place / name) for name in ("source", "grown")] == before
    for first, again in zip(seen, outcomes, strict=False):
        assert (first.name, first.before, first.after) == (again["name"], again["before"], again["after"])
