"""The report: one file that needs nothing else, of finished, running and plain runs; nothing is overwritten unasked."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from gt_jax import report
from gt_jax.configs.data import DataConfig
from gt_jax.errors import Refused
from gt_jax.monitoring import run_page
from gt_jax.monitoring.alerts import Course
from gt_jax.monitoring.metrics import format_value, to_json
from gt_jax.monitoring.run_plots import plot_runs
from tests.monitoring.test_alerts import PLAIN, RUN, at, changed, healthy

PNG = b"\x89PNG"


def write_run(folder, config, records, tail: bytes = b"") -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    lines = [json.dumps({key: to_json(value) if not isinstance(value, list) else value for key, value in one.items()})
             for one in records]  # fmt: skip
    (folder / "metrics.jsonl").write_bytes("".join(line + "\n" for line in lines).encode() + tail)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sick adaptive run that is going on, a plain one, and one that has only begun."""
    place = tmp_path_factory.mktemp("report")
    records = changed(healthy(steps=150), 60, 150, delta_ratio=at(2, 0.0))
    records.insert(50, {"step": 50, "held_out_loss": 3.25, "time_elapsed": 7200.0})
    write_run(place / "sick", RUN, records, tail=b'{"step": 151, "lo')
    plain = PLAIN.replace(train=PLAIN.train.replace(seed=3))
    plain_records = changed(healthy(PLAIN, steps=90), 40, 40, loss=np.nan)
    write_run(place / "a <b> & c", plain, [{k: v for k, v in one.items() if k != "experts"} for one in plain_records])
    (place / "new").mkdir()
    (place / "new" / "config.json").write_text(json.dumps(RUN.to_json()))
    return place


class Page(html.parser.HTMLParser):
    """Tags that balance, their attributes, and the text of each cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.attributes, self.rows, self.images = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.attributes += attributes
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        (found,) = [row[1:] for row in self.rows if row and row[0] == name]
        return found


def test_a_page_that_needs_no_other_file(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    target, png = tmp_path / "out.html", tmp_path / "out.png"
    assert report.main(["sick", "a <b> & c", "-o", str(target), "--png", str(png)]) == 0
    text = target.read_text()
    page = Page(text)
    outside = re.sub(r"base64,[^\"]*", "", text)
    assert page.open == [] and not re.search(r"https?:|//[a-z]|url\(|<script|<link", outside)
    (image,) = [value for name, value in page.attributes if name == "src"]
    assert base64.b64decode(image.removeprefix("data:image/png;base64,")) == png.read_bytes()
    assert png.read_bytes().startswith(PNG)
    assert page.row("") == ["sick", "a <b> & c"]
    assert page.row("steps") == ["150 of 400", "90 of 400"]
    assert page.row("held-out loss") == ["3.25 at step 50", "-"] and page.row("hours") == ["2.00", "0.00"]
    assert page.row("train.seed") == ["0", "3"] and page.row("alerts")[0] == "1"
    assert page.row("price") == ["0.0001", "-"] and page.row("passes run a layer")[1] == "-"
    assert page.row("the price aims at") == ["mean weight a layer: 1.3", "-"]
    for row in ("mean weight a layer", "passes run a layer"):
        assert 1 < float(page.row(row)[0]) < 4
    mean = np.mean([record["loss"] for record in healthy(steps=150)[-20:]])
    assert page.row("loss")[0] == f"{mean:.4g}"
    assert "model.adaptive" in outside and "model.width" not in outside
    assert "layer 2 does nothing" in text and "layer 2 does nothing" in capsys.readouterr().err
    again = tmp_path / "again.html"
    report.main(["sick", "a <b> & c", "-o", str(again)])
    assert again.read_bytes() == target.read_bytes()


def test_a_run_that_has_only_begun(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    report.main(["new", "-o", str(tmp_path / "new.html")])
    text = (tmp_path / "new.html").read_text()
    assert "no metrics yet" in text and "<img" not in text and Page(text).row("steps") == ["0 of 400"]
    assert Page(text).row("model.width") == [str(RUN.model.width)]  # one run: its whole config
    with pytest.raises(Refused, match=r"--png .* no run has metrics"):
        report.main(["new", "-o", str(tmp_path / "b.html"), "--png", str(tmp_path / "b.png")])
    assert not (tmp_path / "b.html").exists()


def test_nothing_is_overwritten_unasked(folder, tmp_path):
    target, png = tmp_path / "out.html", tmp_path / "out.png"
    target.write_text("mine")
    png.write_text("mine too")
    words = [str(folder / "new"), "-o", str(target)]
    with pytest.raises(Refused, match=r"(?s)out.html exists.*out.png exists.*--overwrite"):
        report.main([*words, "--png", str(png)])
    assert target.read_text() == "mine" and png.read_text() == "mine too"
    report.main([*words, "--overwrite"])
    assert target.read_text().startswith("<!DOCTYPE html>") and sorted(p.name for p in tmp_path.iterdir()) == [
        "out.html", "out.png"]  # fmt: skip


def test_what_is_replaced_is_a_file_and_a_link_to_one_stays(folder, tmp_path):
    page, link, pipe = tmp_path / "www" / "page.html", tmp_path / "link.html", tmp_path / "pipe.html"
    page.parent.mkdir()
    page.write_text("old")
    link.symlink_to(page)
    os.mkfifo(pipe)
    words = [str(folder / "new"), "--overwrite", "-o"]
    report.main([*words, str(link)])
    assert link.is_symlink() and page.read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(Refused, match=r"pipe.html is a pipe or a device, which nothing can replace"):
        report.main([*words, str(pipe)])
    assert pipe.is_fifo() and sorted(one.name for one in tmp_path.iterdir()) == ["link.html", "pipe.html", "www"]


def test_the_page_knows_where_in_its_curriculum_a_run_began(tmp_path):
    """Where its questions become harder, told as a divergence otherwise."""
    data = DataConfig(tasks=("pointer_jumps:hardest=3,symbols=8,queries=4",), batch_size=4, curriculum_rows=4 * 200)
    solved = changed(healthy(PLAIN, steps=300), 1, 300, loss=lambda loss: 1e-5 * loss)
    write_run(tmp_path / "run", PLAIN.replace(data=data, start="run/60"), changed(solved, 41, 70, loss=2.0))
    words = [str(tmp_path / "run"), "-o", str(tmp_path / "page.html"), "--overwrite"]
    assert len(report.write_report([tmp_path / "run"], tmp_path / "page.html")[0].found) > 0
    (tmp_path / "run" / "100").mkdir()
    own = {"custom_metadata": {"data": {"batches": 160}}}
    (tmp_path / "run" / "100" / "_CHECKPOINT_METADATA").write_text(json.dumps(own))
    assert report.main(words) == 0 and report.write_report([tmp_path / "run"], tmp_path / "b.html")[0].found == []


@pytest.mark.parametrize(("words", "says"), [
    (("gone",), "gone does not exist; name a directory"),
    (("new/config.json",), "is no run directory: it has no config.json"),
    (("new", "new"), "new is named twice"),
    (("new", "-o", "x.png"), "name it x.html"),
    (("new", "--png", "x.jpg"), "name it x.png"),
    (("new", "-o", "new"), "new is a folder"),
    (("new", "-o", "gone/x.html"), "gone is not a folder"),
    (("new", "-o", "step/x.html"), "it would lie in the checkpoint .*step, which goes when it is old"),
    (("broken",), "metrics.jsonl', line 1: not a JSON object"),
    (("strange",), "strange.config.json cannot be read"),
    (("edited",), r"(?s)edited.config.json cannot be read as a run's config: .*'init_std'"),
    (("null",), r"(?s)null.metrics.jsonl' holds what no run writes:.*has delta_ratio \[null"),
    (("huge",), r"(?s)huge.metrics.jsonl' holds what no run writes:.*has loss 1000.*, no number"),
])  # fmt: skip
def test_what_cannot_be_reported_is_refused(folder, monkeypatch, words, says):
    monkeypatch.chdir(folder)
    if not (folder / "broken").exists():
        write_run(folder / "broken", RUN, [], tail=b"rubbish\n{}\n")
        write_run(folder / "strange", RUN, [])
        (folder / "strange" / "config.json").write_text("{")
        (folder / "step").mkdir()
        (folder / "step" / "_CHECKPOINT_METADATA").touch()
        made = RUN.to_json()
        write_run(folder / "edited", RUN, [])
        (folder / "edited" / "config.json").write_text(json.dumps({**made, "model": {**made["model"], "init_std": []}}))
        write_run(folder / "null", RUN, changed(healthy(steps=3), 2, 2, delta_ratio=[None] * 8))
        write_run(folder / "huge", RUN, healthy(steps=3), tail=b'{"step": 4, "loss": 1%s}\n' % (b"0" * 400))
    before = sorted(folder.rglob("*"))
    with pytest.raises(Refused, match=says):
        report.main([*words, *([] if "-o" in words else ["-o", "page.html"])])
    assert sorted(folder.rglob("*")) == before


def test_a_run_from_before_weight_and_passes_had_their_names_is_reported_alike(folder, monkeypatch):
    monkeypatch.chdir(folder)
    config = RUN.to_json()
    del config["train"]["price"]["target_of"]
    lines = (folder / "sick" / "metrics.jsonl").read_text()
    (folder / "earlier").mkdir(exist_ok=True)
    (folder / "earlier" / "config.json").write_text(json.dumps(config))
    earlier = lines.replace('"mean_weight"', '"expected_k"').replace('"passes_run"', '"executed"')
    (folder / "earlier" / "metrics.jsonl").write_text(earlier)
    earlier, sick = (run_page.read_run(Path(name)) for name in ("earlier", "sick"))
    assert run_page.summary(earlier) == run_page.summary(sick) and earlier.found == sick.found
    assert run_page.drawable(earlier) == run_page.drawable(sick)


def test_config_fields_that_differ():
    a, b = {"x": 1, "deep": {"y": [1], "z": None}}, {"x": 1, "deep": {"y": [2], "w": "v"}}
    assert run_page.config_differences([a, b, a]) == [
        ("deep.y", ["[1]", "[2]", "[1]"]), ("deep.z", ["null", "-", "null"]), ("deep.w", ["-", '"v"', "-"])]
    assert run_page.config_differences([a, a]) == []


def test_curves_leave_out_audits_and_what_there_is_not():
    course = Course(RUN)
    run = run_page.Run("r", RUN, healthy(steps=200), [])
    drawn = run_page.drawable(run)
    assert [r["step"] for r in drawn if "mean_weight" not in r] == [s for s in range(1, 201) if course.audit(s)]
    assert all("loss" in record for record in drawn)
    plain = run_page.Run("p", PLAIN, healthy(PLAIN, steps=30), [])
    assert not any("mean_weight" in record or "price" in record for record in run_page.drawable(plain))
    with pytest.raises(ValueError, match="no run has a value to draw; runs are a"):
        plot_runs({"a": [{"step": 1, "loss": np.nan}]}, io.BytesIO())
    target = io.BytesIO()
    plot_runs({"one record": [{"step": 1, "loss": 2.0, "experts": [[0.5, 0.5]], "delta_ratio": [0.0, np.inf]}]}, target)
    assert target.getvalue().startswith(PNG)


def test_tokens_a_second_are_those_of_the_last_line(folder):
    """Each line's are a mean over the steps before it: their mean would count the first steps again and again."""
    run = run_page.read_run(folder / "sick")
    lines = [{**line, "time_tokens_per_second": 1000.0 / (1 + step)} for step, line in enumerate(run.records)]
    told = run_page.summary(run._replace(records=lines))["tokens a second"]
    assert told == format_value(lines[-1]["time_tokens_per_second"]) and "loss" in lines[-1]
