"""Pictures owe nothing to the user's environment, and names are shown as they are."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from gt_jax.monitoring.answer_plots import Panel, plot_by_difficulty
from gt_jax.monitoring.canvas import own_settings, plain_text
from gt_jax.monitoring.plots import new_figure, plot_growth
from gt_jax.monitoring.run_plots import plot_runs

NAMES = ("runs/lr$3e^$", "_$x_{$", "a <b> & \\$c\\$", "caf\udce9", "100 %\n$\\frac{1}$")
"""Names that are mathematics to matplotlib, hidden from a legend, or no characters."""


def shown(name: str) -> str:
    """What a text in a picture says to whoever looks at it."""
    with own_settings():
        _, axes = new_figure(2.0, 2.0, name)
        words, is_math = axes.title._preprocess_math(axes.get_title(loc="left"))
    assert not is_math
    return words


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is(name):
    assert shown(name).strip() == name.encode("utf-8", "backslashreplace").decode()
    assert not plain_text(name).startswith("_")


def test_every_picture_with_names_of_the_user_is_drawn(tmp_path):
    points = [(0, 2.0), (10, 1.5)]
    plot_growth({name: points for name in NAMES}, tmp_path / "a.png", growth_at=5, title=NAMES[0])
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    plot_runs({name: records for name in NAMES}, tmp_path / "b.png")
    curve = {1: (0.5, None, None)}
    plot_by_difficulty([Panel(NAMES[1], {name: curve for name in NAMES}, {})], tmp_path / "c.png")
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in "abc")


def test_settings_of_the_user_change_no_picture(tmp_path):
    import matplotlib

    def picture() -> bytes:
        target = io.BytesIO()
        plot_runs({"run": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]}, target)
        return target.getvalue()

    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "black", "font.size": 30}):
        asked = picture()
        assert matplotlib.rcParams["text.usetex"] is True  # and the user has them back
    assert asked == picture()


def test_a_backend_that_is_not_installed(tmp_path, monkeypatch):
    """The variable is read when matplotlib is imported, hence a process of its own; a notebook sets it for all."""
    code = ("import os; from gt_jax.monitoring.canvas import own_settings\n"
            "with own_settings(): import matplotlib.figure\n"
            "assert os.environ['MPLBACKEND'] == 'module://nowhere.backend'")
    monkeypatch.setenv("MPLBACKEND", "module://nowhere.backend")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
