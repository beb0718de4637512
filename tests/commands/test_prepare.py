"""Text files become a TFDS dataset that training reads; whole or not at all, and never over another."""

import json
import os

import pytest

from gt_jax import prepare
from gt_jax.configs.data import DataConfig
from gt_jax.errors import Refused
from gt_jax.text.batches import open_text
from gt_jax.text.sources import tfds_text

STORIES = [f"Story {i}: très deep, {i % 7} passes.\n".encode() * (i + 1) for i in range(9)]


def test_the_documents_come_back_in_order(tmp_path, capsys):
    file = tmp_path / "stories.txt"
    file.write_bytes(b"<|endoftext|>\n".join(STORIES))
    assert prepare.main(["stories", str(file), "--tfds-dir", str(tmp_path / "data"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["documents"] == 9 and said["bytes"] == sum(map(len, STORIES))
    assert tfds_text("stories", str(tmp_path / "data"))[1] == STORIES
    text = open_text(DataConfig(tfds="stories", tfds_dir=str(tmp_path / "data"), sequence_length=16))
    assert text.documents == 9
    with pytest.raises(Refused, match=r"1\.0\.0 exists; what was prepared is never overwritten"):
        prepare.main(["stories", str(file), "--tfds-dir", str(tmp_path / "data")])


def test_bad_words_write_nothing(tmp_path):
    with pytest.raises(Refused, match="lower-case letters"):
        prepare.main(["My Stories", "x.txt", "--tfds-dir", str(tmp_path)])
    with pytest.raises(Refused, match=r"x\.txt.*cannot be read"):
        prepare.main(["stories", str(tmp_path / "x.txt"), "--tfds-dir", str(tmp_path)])
    with pytest.raises(Refused, match=r"(?s)--tokenizer reads JSON lines.*x.jsonl is JSON lines"):
        prepare.main(["stories", "x.jsonl", "--tfds-dir", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_is_no_dataset_and_is_cleared(tmp_path):
    file = tmp_path / "stories.txt"
    file.write_bytes(STORIES[0])
    left = tmp_path / "data" / "stories" / "1.0.0.unfinished"
    left.mkdir(parents=True)
    (left / "stories-train.array_record-00000-of-00001").write_text("")
    with pytest.raises(Refused, match="is not under"):
        tfds_text("stories", str(tmp_path / "data"))
    assert prepare.prepare("stories", [str(file)], tmp_path / "data")["documents"] == 1
    assert not left.exists()


def test_what_no_preparation_has_written_stays(tmp_path):
    file = tmp_path / "stories.txt"
    file.write_bytes(STORIES[0])
    mine = tmp_path / "data" / "stories" / "1.0.0.unfinished" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(Refused, match=r"1\.0\.0\.unfinished holds what no preparation of stories has written"):
        prepare.prepare("stories", [str(file)], tmp_path / "data")
    assert mine.read_text() == "mine"


def test_a_dataset_is_on_the_disk_before_and_after_it_has_its_name(tmp_path, monkeypatch):
    file = tmp_path / "stories.txt"
    file.write_bytes(STORIES[0])
    synced, fsync = [], os.fsync

    def record(descriptor):
        fsync(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", record)
    prepare.prepare("stories", [str(file)], tmp_path / "data")
    place = tmp_path / "data" / "stories" / "1.0.0"
    assert {f"{place}.unfinished/{path.name}" for path in place.iterdir()} <= set(synced)
    assert synced[-1] == str(place.parent)
