"""The GPU benchmark, as far as a machine without a GPU runs it: cases, turns, table, FLA's arguments, refusals."""

from __future__ import annotations

import inspect
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench_gpu
from experiments.gpu_measured import ours, report, theirs, training
from experiments.gpu_measured.cases import Case, cases, make_inputs
from experiments.gpu_measured.timing import Side, rounds
from gt_jax.errors import Failed, Refused
from pallas_kernels.gated_delta_rule.api import gated_delta_rule

TINY = Case(1, 8, 1, 2, 8)


def fla_like(q, k, v, g=None, beta=None, scale=None, initial_state=None, output_final_state=False, **kwargs):
    """With the names of FLA 0.6; by our definition."""
    assert not kwargs
    state = None if initial_state is None else jnp.asarray(initial_state)
    given = {"scale": scale, "initial_state": state, "return_state": True, "implementation": "reference"}
    return gated_delta_rule(*map(jnp.asarray, (q, k, v, g, beta)), **given)


def stand_in(factor=1.0):
    def side(case, inputs, dtype):
        state, given = inputs.state, inputs[:5]
        calls = {"decode": lambda: theirs.token(fla_like, state, *given)} if case.decodes else dict.fromkeys(
            ("forward", "forward and backward"), lambda: factor * theirs.whole(fla_like, *given))  # fmt: skip
        return Side(calls, lambda x: x, ours.output)

    return side


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(ours, "there", lambda: ["xla"])


def test_what_was_asked_for_is_measured():
    found = cases()
    whole = {(case.tokens, case.heads, case.value_heads) for case in found if not case.decodes}
    assert whole == {(t, 16, hv) for t in (2048, 8192, 32768) for hv in (16, 32, 64)}
    assert {case.value_heads for case in found if case.decodes} == {16, 32, 64}
    inputs = make_inputs(TINY)
    assert inputs.v.shape == (1, 8, 2, 8) and inputs.state.shape == (1, 2, 8, 8)
    np.testing.assert_allclose(np.linalg.norm(inputs.k, axis=-1), 1, rtol=1e-5)
    assert (inputs.g <= 0).all() and (inputs.beta >= 0).all() and (inputs.beta < 1).all()


def test_sides_take_turns_and_the_result_is_json_and_a_table(without_kernels):
    rows = bench_gpu.measure(TINY, 2, 1, stand_in(), "float32")
    rows += bench_gpu.measure(TINY._replace(tokens=1), 2, 1, stand_in(), "float32")
    assert [row["pass"] for row in rows] == ["forward", "forward and backward", "decode"]
    for row in rows:
        assert set(row["milliseconds"]) == {"xla", "fla"} and all(len(t) == 2 for t in row["milliseconds"].values())
        assert row["off"]["fla"] < 1e-4  # the arguments go where FLA has them
    result = json.loads(json.dumps({"machine": {"device": "none"}, "rows": rows}, allow_nan=False))
    lines = report.table(result)
    assert len(lines) == 2 + 2 + len(rows) and lines[-1].count("|") == lines[2].count("|")
    assert f"{report.ratio(result['rows'][0]):.2f}" in lines[4]
    del result["rows"][0]["milliseconds"]["fla"]
    assert report.ratio(result["rows"][0]) is None and "| - | - |" in report.table(result)[4]


def test_sides_that_do_not_compute_the_same_are_not_timed(without_kernels):
    with pytest.raises(Failed, match=r"fla 0\.1 off the XLA path"):
        bench_gpu.measure(TINY, 1, 1, stand_in(1.1), "float32")


def test_a_round_is_calls_in_a_row_and_one_wait_by_the_sides_own_clock():
    events = []

    class Ticks:
        def __init__(self):
            events.append("start")

        def milliseconds(self):
            events.append("stop")
            return 6.0

    side = Side({"f": lambda: events.append("call")}, lambda _: events.append("wait"), np.asarray, Ticks)
    assert rounds({"a": side}, "f", 1, 3) == {"a": [2.0]}
    assert events == ["call", "wait", "start", "call", "call", "call", "wait", "stop"]


def test_models_of_the_training_step_are_of_equal_size_and_attend_to_every_key():
    made = training.jobs(16, 1024, ours_alone=False)
    assert set(made["plain"]) == {"xla", "fla"} and set(made["as it is"]) == {"xla"}
    config = made["plain"]["fla"].config
    assert config == made["plain"]["xla"].config and config.adaptive is None
    assert config.gsa.k_min == config.gsa.k_max == 1024 and config.compute_dtype == "bfloat16"
    assert "fla" not in training.jobs(16, 1024, ours_alone=True)["plain"]


def test_without_a_gpu_it_is_refused_in_one_sentence():
    with pytest.raises(Refused, match="JAX finds no GPU on this machine"):
        bench_gpu.main([])


def test_an_older_triton_and_what_is_not_installed_are_refused():
    whole = {"torch": "2.13.0", "triton": "3.7.1", "flash-linear-attention": "0.6.0"}
    assert theirs.problems(whole) == [] == theirs.problems({**whole, "triton": "3.10.0"})
    assert "3.7.1 or newer" in theirs.problems({**whole, "triton": "3.6.0"})[0]
    assert "triton not installed" in theirs.problems({name: "1" for name in whole if name != "triton"})[0]
    fla_names = ("q", "k", "v", "g", "beta", "scale", "initial_state", "output_final_state")
    assert tuple(inspect.signature(fla_like).parameters)[:-1] == fla_names
