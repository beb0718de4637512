"""The demo, shortened: it tells its story to the end, leaves what it says it leaves, and can be run again.

On a narrower model of half the layers, which compiles in half the time; `make demo` runs the true one.
"""

from __future__ import annotations

import json

import pytest

from gt_jax import checkpoint, demo, presets


@pytest.mark.slow
def test_the_demo_in_a_few_steps_and_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "tiny", lambda: presets.tiny().replace(layout="DG*2", width=48))
    monkeypatch.setattr(demo, "EVALUATION_BATCHES", 2)
    place = tmp_path / "demo"
    words = ["--output", str(place), "--steps", "20", "--more", "2"]
    assert demo.main(words) == 0
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if line.strip()]
    assert len(rows) == 2 + 6 and demo.LAST in shown
    for name in ("growth.png", "depth.png"):
        assert (place / name).read_bytes().startswith(b"\x89PNG")
    report = json.loads((place / "report.json").read_text())
    assert [one["layers"] for one in report["outcomes"]] == [20, 20, 20, 4, 20]
    source, grown = report["source"], report["outcomes"][2]
    assert grown["before"] == pytest.approx(source["loss"], rel=0.05)
    assert report["outcomes"][4]["before"] > 1.2 * source["loss"]
    metadata = checkpoint.describe(place / "grown")[1]
    assert metadata["grown_from"]["plan"]["layout"] == "DG*10"

    before = checkpoint.content_hash(place / "source")
    assert demo.main(words) == 0
    again = capsys.readouterr().out
    losses = [[row.split()[-5:-1] for row in text.rstrip().splitlines()[3:]] for text in (shown, again)]
    assert losses[0] == losses[1]
    assert checkpoint.content_hash(place / "source") == before
