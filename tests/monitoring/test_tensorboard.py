"""TensorBoard: every number once at its step, whichever package is there; none is a clear refusal."""

from __future__ import annotations

import sys
import types
from typing import ClassVar

import numpy as np
import pytest

from gt_jax.errors import Refused
from gt_jax.monitoring.metrics import Recorder
from gt_jax.monitoring.tensorboard import TensorBoard, scalars


class Writer:
    """Stands for the writers of both packages: what it was made with, and what it was given."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, folder: str, **options: object) -> None:
        self.folder, self.options, self.given, self.closed = folder, options, [], False
        Writer.made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.given.append((tag, value, step))

    def close(self) -> None:
        self.closed = True


@pytest.fixture(params=["tensorboardX", "tensorboard.summary"])
def package(request, monkeypatch):
    """Only this package is installed, with a writer that remembers."""
    Writer.made = []
    module = types.ModuleType(request.param)
    module.SummaryWriter = module.Writer = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, request.param, module)
    return request.param


def test_every_number_has_a_tag():
    record = {"step": 3, "loss": 1.5, "flag": True, "mean_weight": [1.0, 2.0], "experts": [[0.5, 0.5]], "note": "x",
              "gone": None, "time_elapsed": 2, "empty": [], "bad": float("nan"), "part": [1.0, float("inf")]}
    assert dict(scalars(record)) == {"loss": 1.5, "flag": 1.0, "mean_weight/0": 1.0, "mean_weight/1": 2.0,
                                     "time/elapsed": 2.0, "part/0": 1.0}  # fmt: skip


def test_a_recorder_writes_both(package, tmp_path):
    with Recorder(tmp_path / "m.jsonl", show=False, also=TensorBoard(tmp_path / "tb", 4), resume_step=4) as recorder:
        assert not Writer.made  # nothing is opened before there is something to write
        for step in (5, 6):
            recorder.log(step, loss=np.float32(2.0 / step), mean_weight=np.ones(2))
    (writer,) = Writer.made
    assert writer.closed and writer.folder == str(tmp_path / "tb")
    values = {(tag, step): value for tag, value, step in writer.given if not tag.startswith("time/")}
    assert values == {("loss", 5): pytest.approx(0.4), ("loss", 6): pytest.approx(1 / 3),
                      **{(f"mean_weight/{layer}", step): 1.0 for layer in (0, 1) for step in (5, 6)}}  # fmt: skip
    assert writer.options.get("purge_step") == (5 if package == "tensorboardX" else None)


def test_without_a_package_nothing_begins(tmp_path, monkeypatch):
    from gt_jax import train

    for name in ("tensorboardX", "tensorboard", "tensorboard.summary"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Refused, match="pip install tensorboardX"):
        TensorBoard(tmp_path / "tb")
    with pytest.raises(Refused, match="pip install tensorboardX"):
        train.main([str(tmp_path / "run"), "--tensorboard", "--layout", "DG"])
    assert not (tmp_path / "run").exists() and not (tmp_path / "tb").exists()
    assert list(tmp_path.iterdir()) == []
