"""The study of text and look-ups in one model: its units, what it asks, and its page from made-up rows."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import contract, mixed_depth
from experiments.mixed_study.engine import make, places, step_flops
from experiments.mixed_study.page import draw, markdown, summary
from experiments.mixed_study.study import ADAPTIVE, LONGER, ONCE, SCALES, MixedStudy, Wanted
from gt_jax.errors import Refused


def row(model, seed, nats, rate=2e-3, flops=8.0):
    of = {str(d): 1.0 for d in (1, 2)}
    found = {"task": "mix", "model": model, "seed": seed, "rate": rate, "steps": 1800, "layers": "D", "flops": flops,
             "parameters": 9 + len(model), "text_nats": nats, "tuning_nats": nats + rate, "answer_nats": 0.1,
             "accuracy": of, "passes": of, "spearman": 0.9}  # fmt: skip
    if model == ADAPTIVE:
        shown = [{"tokens": [65, 256, 36], "passes": [1, 4, 2]}]
        found |= {"text_passes": 2.5, "unasked_passes": 1.0, "text_nats_forced": {"1": nats + 0.25, "2": nats - 0.125},
                  "passes_by_place": {str(k): 2.0 for k in range(5)}, "shown": shown,
                  "nats_by_place": {str(k): 2.0 for k in range(5)}}  # fmt: skip
    return found


def test_the_page_says_what_was_found(tmp_path):
    losses = {ONCE: 1.5, ADAPTIVE: 1.25, LONGER: 1.25}
    rows = [row(model, seed, nats) for model, nats in losses.items() for seed in (0, 1)]
    study = MixedStudy(seeds=(0, 1), text=("b.txt",))
    stored = contract.stored(command="x", config=study, machine={"cores": 2}, seconds=60.0, rows=rows,
                             summary=summary(rows), content="")  # fmt: skip
    page = markdown(stored)
    assert f"Of text, {ADAPTIVE} ends below {ONCE} (-0.2500" in page
    assert "| 1 | 1.5000 (1.5000 to 1.5000) | +0.2500" in page and "| 2 | 1.1250 (1.1250 to 1.1250) | -0.1250" in page
    draw(stored, tmp_path / "passes.png")
    assert (tmp_path / "passes.png").read_bytes().startswith(b"\x89PNG")
    for one in rows:  # a text of other letters than ASCII's
        one.update({key: {"0": 2.0} for key in ("passes_by_place", "nats_by_place") if key in one})
    page = markdown({**stored, "rows": rows, "summary": summary(rows)})
    assert "text: what is no letter" in page and "first letter" not in page


def test_everyone_sees_the_same_rows_and_the_longer_one_costs_as_much():
    """Units are made by their names: the best rate at the first seed goes on, and FLOPs decide how long is longer."""
    study, seen = SCALES["small"].replace(seeds=(0, 1), rates=(2e-3, 4e-3), depths=(2, 4)), []

    class Workers:
        def all(self, wanted):
            seen.append(wanted)
            return {name: row(one.model, one.seed, 1.0, one.rate, 3.5 * study.of.steps * step_flops(
                Wanted(study, ONCE, 0, 1.0, 1), [1.0])) for name, one in wanted.items()}  # fmt: skip

    rows = mixed_depth.all_rows(study, Workers())
    tried, then = seen
    assert len(tried) == 2 * 2 * len(study.layers) and len(rows) == len(then)
    assert {one.rate for one in then.values()} == {2e-3}
    longer = [one for one in then.values() if one.model == LONGER]
    assert [one.steps for one in longer] == [round(3.5 * study.of.steps)] * 2
    assert len({one.data.replace(seed=0) for one in then.values()}) == 1
    assert {one.config for one in longer} == {Wanted(study, ONCE, 0, 1.0, 1).config}
    assert Wanted(study, "4 layers", 0, 1.0, 1).config.layout == "D*4"
    with pytest.raises(Refused, match=r"(?s)share is 1.0.*seeds are \[\].*rates are \[0.0\].*depths are \[1\]"):
        MixedStudy(share=1.0, seeds=(), rates=(0.0,), depths=(1,))


def test_letters_are_counted_within_their_word():
    text = np.frombuffer(b'so "I abcdef', np.uint8).astype(np.int32)[None]
    assert places(text[:, :-1], text[:, 1:]).tolist() == [[2, 0, 0, 1, 0, 1, 2, 3, 4, 4, 4]]


@pytest.mark.exhaustive
def test_a_unit_asks_text_and_answers():
    study = SCALES["minutes"]
    study = study.replace(of=study.of.replace(steps=6, width=8, rows=2, passes=2, held_out_batches=2), share=0.5)
    one, again = (make(Wanted(study, ADAPTIVE, 0, 2e-3, 6)) for _ in range(2))
    for found in (one, again):
        found.pop("seconds"), found.pop("line")
    assert one == again and set(one["text_nats_forced"]) == {"1", "2"} and len(one["shown"]) == 2 + 2
    assert sum(one["text_shares"].values()) == pytest.approx(1.0) and 1 <= one["text_passes"] <= 2
