"""Benchmarks of passes and mixers: rows whose living tokens are as many as asked for, what proportional means."""

import numpy as np
import pytest

from experiments import bench_mixers, bench_passes
from gt_jax.errors import Refused


def test_rows_have_the_share_of_living_tokens_that_is_asked_for():
    even, uneven = (bench_passes.rows_of(0.25, 6, 200, even) < 128 for even in (True, False))
    np.testing.assert_array_equal(even.sum(1), 50)
    assert len(set(uneven.sum(1))) > 1 and abs(uneven.mean() - 0.25) < 0.04


def test_proportional_lies_on_the_line_from_one_pass_to_all(monkeypatch):
    """A clock that a case moves by its own time: 1 for one pass, 4 for all; 1.75 passes should take 1.75."""
    clock, times = [0.0], {"one": 1.0, "most": 4.0, "all": 4.0, "alive": 2.1}

    def case(layout, name, tokens, options):
        def call():
            clock[0] += times[name]
            return 1.75

        return call

    monkeypatch.setattr(bench_passes, "training", case)
    monkeypatch.setattr(bench_passes.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(bench_passes.time, "process_time", lambda: 2 * clock[0])
    found = bench_passes.measured("D", "step", 0.25, bench_passes.parser().parse_args(["--rounds", "2"]))
    for name, share in (("wall", 1), ("processors", 2)):
        assert found[name]["proportional"] == pytest.approx(1.75 * share)
        assert found[name]["ratio"] == pytest.approx({"all": 4 / 1.75, "alive": 1.2})
    assert bench_passes.rows_of_table(found)[0][-1] == "2.29, 1.20"


def test_arguments_that_cannot_be_measured_are_all_named():
    with pytest.raises(Refused, match=r"--rows 0: at least 1(.|\n)*--shares 1.5: it must lie in 0 to 1"):
        bench_passes.main(["--rows", "0", "--shares", "0.2", "1.5"])


def test_mixers_are_told_by_their_least_time_over_the_first():
    d, b = bench_mixers.lines("forward", {"D": [2.0, 4.0], "B": [1.0, 3.0]})
    assert d.endswith("over D:   1.00 (1.00 .. 1.00)") and b.split()[1:4] == ["B", "1.0", "ms"]
    assert b.endswith("0.50 (0.50 .. 0.75)")
    for width in (64, 128, 192):
        assert {bench_mixers.config(kind, width).layout for kind in bench_mixers.MIXERS} == set(bench_mixers.MIXERS)
    with pytest.raises(Refused, match="--width 100 must be a multiple of 64"):
        bench_mixers.main(["--width", "100"])
