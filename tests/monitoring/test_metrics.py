"""Metrics: valid JSON whatever the values, nothing lost or doubled across a kill, the same pictures."""

import io
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gt_jax.errors import Refused
from gt_jax.monitoring import metrics, plots


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def clock(step: float = 0.5):
    ticks = itertools.count()
    return lambda: next(ticks) * step


def record(path: Path, steps: range, **arguments) -> None:
    with metrics.Recorder(path, show=False, **arguments) as recorder:
        for step in steps:
            recorder.log(step, loss=1 / (step + 1), passes=np.arange(3) * step)


def without_time(path: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith("time_")} for line in metrics.read_metrics(path)]


def test_every_kind_of_value_becomes_strict_json_and_comes_back(tmp_path):
    values = {
        "loss": jnp.float32(0.1), "half": jnp.bfloat16(1.5), "count": np.int64(3), "flag": np.bool_(True),
        "note": "held", "gone": None, "layers": jnp.arange(3, dtype=jnp.float32), "matrix": np.eye(2, dtype=np.int32),
        "empty": [], "nan": jnp.nan, "inf": np.float32("inf"), "mixed": np.array([1.0, -np.inf]), "plain": 2,
        "tuple": (1, 2.5),
    }
    path = tmp_path / "metrics.jsonl"
    with metrics.Recorder(path, show=False) as recorder:
        recorder.log(7, **values)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line["nan"] == "NaN" and line["inf"] == "Infinity" and line["mixed"] == [1.0, "-Infinity"]
    (back,) = metrics.read_metrics(path)
    elapsed = back.pop("time_elapsed")
    assert back.pop("time_begun") == 0.0
    assert isinstance(elapsed, float) and np.isnan(back.pop("nan"))
    assert back == {"step": 7, "loss": float(np.float32(0.1)), "half": 1.5, "count": 3, "flag": True, "note": "held",
                    "gone": None, "layers": [0.0, 1.0, 2.0], "matrix": [[1, 0], [0, 1]], "empty": [], "inf": np.inf,
                    "mixed": [1.0, -np.inf], "plain": 2, "tuple": [1, 2.5]}
    assert [type(back[key]) for key in ("count", "flag", "loss")] == [int, bool, float]


def test_a_line_is_in_the_file_before_the_next_one_is_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics.Recorder(path, show=False) as recorder:
        for step in range(3):
            recorder.log(step, loss=1.0)
            assert [line["step"] for line in metrics.read_metrics(path)] == list(range(step + 1))


def test_resumed_after_a_cut_anywhere_equals_uninterrupted(tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    record(whole, range(6), clock=clock())
    content = whole.read_bytes()
    for size in range(0, len(content) + 1, 3):
        cut.write_bytes(content[:size])
        lines = metrics.read_metrics(cut)
        checkpoint = min(2, len(lines) - 1)  # a checkpoint is never ahead of the lines
        record(cut, range(checkpoint + 1, 6), resume_step=checkpoint, clock=clock())
        assert without_time(cut) == without_time(whole)
    assert sorted(os.listdir(tmp_path)) == ["cut.jsonl", "whole.jsonl"]


def test_several_lines_of_the_last_step_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics.Recorder(path, show=False) as recorder:
        for step, values in [(1, {"loss": 3.0}), (1, {"held_out": 3.5}), (2, {"loss": 2.0})]:
            recorder.log(step, **values)
    record(path, range(0), resume_step=1)
    assert [sorted(set(line) - {"time_elapsed", "time_begun"}) for line in metrics.read_metrics(path)] == [
        ["loss", "step"], ["held_out", "step"]]


def test_lines_that_a_power_cut_took_are_said_to_be_lost(tmp_path, monkeypatch):
    path, synced = tmp_path / "metrics.jsonl", []
    monkeypatch.setattr(os, "fsync", synced.append)
    record(path, range(1, 4))
    for resume, words in ((3, ""), (5, f"{path} ends at step 3, the checkpoint is of step 5: the lines between were")):
        stream = io.StringIO()
        with metrics.Recorder(path, stream=stream, resume_step=resume) as recorder:
            synced.clear()
            recorder.sync()
        assert len(synced) == 1 and stream.getvalue().startswith(words) and bool(stream.getvalue()) == bool(words)


@pytest.mark.parametrize("first", [90, 5])
def test_the_time_of_a_run_counts_every_start_from_its_beginning(tmp_path, first):
    """Whether the first line after a resume is later by its own clock than the last one before, or not."""
    path = tmp_path / "metrics.jsonl"
    for resume, at in ((None, (0, 10, 50)), (2, (0, first, 100))):
        record(path, range(1, 3) if resume is None else range(3, 5), resume_step=resume, clock=iter(at).__next__)
    assert metrics.seconds_of(metrics.read_metrics(path)) == 50 + 100
    older = [{key: value for key, value in line.items() if key != "time_begun"} for line in metrics.read_metrics(path)]
    assert metrics.seconds_of(older) == (100 if first == 90 else 150)


def test_what_cannot_be_read_is_refused_and_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for broken in (b'{"step": 1}\nrubbish\n{"step": 2}\n', b'{"step": 1}\n[2]\n', b'{"loss": 1}\n', b'{"step": 1}\n\n',
                   b'{"step": 1%s}\n{"step": 2}\n' % (b"0" * 400)):
        path.write_bytes(broken)
        with pytest.raises(Refused, match=r"metrics.jsonl', line [12]: not a JSON object"):
            record(path, range(2, 3), resume_step=1)
        assert path.read_bytes() == broken
    with pytest.raises(Refused, match=r"gone.jsonl' cannot be read: No such file"):
        metrics.read_metrics(tmp_path / "gone.jsonl")


def test_another_runs_lines_are_not_overwritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    record(path, range(3))
    before = path.read_bytes()
    with pytest.raises(Refused, match="another run"):
        record(path, range(3))
    assert path.read_bytes() == before
    record(path, range(2), resume_step=-1)
    assert [line["step"] for line in metrics.read_metrics(path)] == [0, 1]
    record(tmp_path / "new.jsonl", range(2), resume_step=5)
    assert len(metrics.read_metrics(tmp_path / "new.jsonl")) == 2


def test_a_failed_cut_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    record(path, range(5))
    before = path.read_bytes()

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        metrics.truncate_after(path, 2)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_cut_is_on_the_disk_with_its_name(tmp_path, monkeypatch):
    record(tmp_path / "metrics.jsonl", range(5))
    synced, fsync = [], os.fsync

    def remember(descriptor):
        fsync(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", remember)
    metrics.truncate_after(tmp_path / "metrics.jsonl", 2)
    assert synced[-1] == str(tmp_path)


def test_plain_lines_in_a_pipe():
    stream = io.StringIO()
    with metrics.Recorder(None, total_steps=25, tokens_per_step=1000, stream=stream, clock=clock()) as recorder:
        for step in range(1, 26):
            recorder.log(step, loss=1 / step, layers=[1, 2], time_compile=3.0)
        recorder.message("checkpoint written")
    lines = stream.getvalue().splitlines()
    assert lines == [
        "step 1/25  loss 1",
        "step 10/25  loss 0.1  2.0k tokens/s  0:08 left",
        "step 20/25  loss 0.05  2.0k tokens/s  0:02 left",
        "step 25/25  loss 0.04  2.0k tokens/s",
        "checkpoint written",
    ]


def test_utilisation_is_written_where_it_is_known(tmp_path):
    stream, path = io.StringIO(), tmp_path / "m.jsonl"

    def share(rate, values):
        return rate / 8000 * values["passes_run"] if "passes_run" in values else None

    with metrics.Recorder(path, tokens_per_step=1000, stream=stream, every=1, clock=clock(), utilisation=share) as one:
        for step in (1, 2):
            one.log(step, passes_run=2.0)
        one.log(2, held_out_loss=1.0)
    first, second, held_out = metrics.read_metrics(path)
    assert "time_mfu" not in first and "time_mfu" not in held_out  # no rate yet; no training step
    assert second["time_mfu"] == 0.5 and stream.getvalue().splitlines()[1].endswith("50.0 % MFU")


def test_a_plain_line_is_due_although_steps_are_skipped():
    stream = io.StringIO()
    with metrics.Recorder(None, every=10, stream=stream, resume_step=100) as recorder:
        for step in (101, 104, 108, 112, 116, 124):
            recorder.log(step, loss=1.0)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["101", "112", "124"]


def test_a_held_out_loss_is_shown_though_its_step_was_shown_before():
    stream = io.StringIO()
    with metrics.Recorder(None, total_steps=100, stream=stream) as recorder:
        for step in (49, 50):
            recorder.log(step, loss=1.0)
        recorder.log(50, held_out_loss=2.0)
    assert stream.getvalue().splitlines()[-1].startswith("step 50/100  held_out_loss 2")


def test_a_bar_on_a_terminal(tmp_path):
    stream = Terminal()
    with metrics.Recorder(tmp_path / "m.jsonl", total_steps=40, tokens_per_step=512, resume_step=10, stream=stream,
                          clock=clock()) as recorder:
        for step in range(11, 41):
            recorder.log(step, loss=jnp.float32(2.5))
        recorder.message("held-out loss 2.4")
    shown = stream.getvalue()
    assert "40/40" in shown and "100%" in shown and "loss 2.5" in shown and "1.0k tokens/s" in shown
    assert "held-out loss 2.4\n" in shown
    assert len(metrics.read_metrics(tmp_path / "m.jsonl")) == 30
    assert not [thread for thread in threading.enumerate() if "tqdm" in type(thread).__module__]


def test_silence(capsys):
    with metrics.Recorder(None, show=False, stream=Terminal()) as recorder:
        recorder.log(1, loss=1.0)
        recorder.message("unheard")
    with metrics.Recorder(None, total_steps=1) as recorder:
        recorder.log(1, loss=1.0)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "step 1/1  loss 1\n"


def test_the_file_is_closed_after_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(KeyError), metrics.Recorder(path, show=False) as recorder:
        recorder.log(1, loss=1.0)
        raise KeyError("loop")
    assert len(metrics.read_metrics(path)) == 1 and recorder._file is None


def test_table_aligns_names_left_and_numbers_right():
    rows = [["grown, gain", 2.13456, "1.2 %", np.int64(20), None], ["random", 5.6, "130.5 %", 8, 3.0]]
    assert metrics.table(rows, ["model", "loss", "gap", "layers", "seconds"]).splitlines() == [
        "model         loss      gap  layers  seconds",
        "-----------  -----  -------  ------  -------",
        "grown, gain  2.135    1.2 %      20        -",
        "random         5.6  130.5 %       8        3",
    ]
    assert metrics.table([], ["a", "bc"]) == "a  bc\n-  --"
    assert metrics.table([[jnp.float32(0.5), True]], ["x", "y"]).splitlines()[-1] == "0.5  True"
    with pytest.raises(ValueError, match="row 1 has 1 cells"):
        metrics.table([[1, 2], [1]], ["a", "b"])


CURVES = {"source": [(step, 5 / (step + 1)) for step in range(20)], "grown": [(20 + s, 0.5 - s / 99) for s in range(9)],
          "lost": [(20, np.nan)], "one point": [(25.0, np.float32(0.4))]}


def draw(folder: Path) -> list[bytes]:
    plots.plot_growth(CURVES, folder / "growth.png", growth_at=20, title="Growth", smooth=5, ylim=(0, 4))
    return [(folder / "growth.png").read_bytes()]


def test_pictures_are_the_same_bytes_each_time_in_each_process_without_pyplot(tmp_path):
    first = draw(tmp_path)
    assert all(content.startswith(b"\x89PNG") and b"Software" not in content for content in first)
    assert draw(tmp_path) == first
    program = ("import sys; from gt_jax.monitoring import plots; assert 'matplotlib' not in sys.modules\n"
               "plots.plot_growth({'a': [(0, 1.0), (1, 2.0)]}, sys.argv[1], growth_at=1)\n"
               "assert 'matplotlib.pyplot' not in sys.modules")
    target = tmp_path / "other.png"
    done = subprocess.run([sys.executable, "-c", program, str(target)], capture_output=True, text=True, check=False,
                          cwd=Path(metrics.__file__).parents[2])
    assert done.returncode == 0, done.stderr
    plots.plot_growth({"a": [(0, 1.0), (1, 2.0)]}, tmp_path / "mine.png", growth_at=1)
    assert target.read_bytes() == (tmp_path / "mine.png").read_bytes()


def test_pictures_refuse_what_they_cannot_show(tmp_path):
    with pytest.raises(ValueError, match="curves are empty, nan"):
        plots.plot_growth({"empty": [], "nan": [(0, np.nan)]}, tmp_path / "x.png", growth_at=0)
    assert not (tmp_path / "x.png").exists()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(heights=st.lists(st.floats(0, 1), min_size=1, max_size=8).map(sorted), gap=st.floats(0.01, 0.2))
def test_labels_do_not_overlap_and_stay_where_there_is_room(heights, gap):
    placed = plots._spread(heights, gap)
    assert len(placed) == len(heights)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(placed))
    np.testing.assert_allclose(sum(placed), sum(heights), atol=1e-9)
    if all(b - a >= gap for a, b in itertools.pairwise(heights)):
        np.testing.assert_allclose(placed, heights, atol=1e-9)


def test_the_average_keeps_level_start_and_length():
    noisy = np.random.default_rng(0).normal(size=400) + 3
    smooth = plots.average(noisy.tolist(), 50)
    assert len(smooth) == 400 and smooth[0] == noisy[0] and np.std(smooth[50:]) < 0.25 * np.std(noisy)
    np.testing.assert_allclose(plots.average([2.0] * 9, 4), 2.0)
    line = np.arange(30.0)
    np.testing.assert_allclose(plots.average(line.tolist(), 6)[:27], line[:27], atol=1e-9)  # no lag
    assert plots.average([1.0, 5.0], 0) == [1.0, 5.0]
    spike = [0.5] * 5 + [3e16] + [0.5] * 6  # a gradient norm before it is clipped
    assert plots.average(spike, 0) == spike and plots.average(spike, 2)[7:] == [0.5] * 5
