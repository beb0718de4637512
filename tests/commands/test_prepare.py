"""Text files become a TFDS dataset that training reads; whole or not at all, and never over another."""

import json

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
    with pytest.raises(Refused, match=r"1\.0\.0 exists; a dataset is never overwritten"):
        prepare.main(["stories", str(file), "--tfds-dir", str(tmp_path / "data")])


def test_bad_words_write_nothing(tmp_path):
    with pytest.raises(Refused, match="lower-case letters"):
        prepare.main(["My Stories", "x.txt", "--tfds-dir", str(tmp_path)])
    with pytest.raises(Refused, match=r"x\.txt.*cannot be read"):
        prepare.main(["stories", str(tmp_path / "x.txt"), "--tfds-dir", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_is_no_dataset_and_is_cleared(tmp_path):
    file = tmp_path / "stories.txt"
    file.write_bytes(STORIES[0])
    left = tmp_path / "data" / "stories" / "1.0.0.unfinished"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    with pytest.raises(Refused, match="is not under"):
        tfds_text("stories", str(tmp_path / "data"))
    assert prepare.prepare("stories", [str(file)], tmp_path / "data")["documents"] == 1
    assert not left.exists()
