"""A position in a text knows it by what its files hold: moved text goes on, changed text is refused by its file."""

import pytest

from gt_jax.configs.data import DataConfig
from gt_jax.errors import Refused
from gt_jax.text.batches import open_text


def opened(*paths):
    return open_text(DataConfig(text=tuple(map(str, paths)), sequence_length=16, batch_size=2))


def test_moved_text_goes_on_and_changed_text_is_refused_by_name(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("the mill by the river " * 20)
    second.write_text("turns and turns again " * 20)
    stream = opened(first, second).train()
    next(stream)
    state = stream.state()
    following = next(stream)["tokens"].tolist()
    second = second.rename(tmp_path / "moved.txt")
    assert next(opened(first, second).train(state))["tokens"].tolist() == following
    second.write_text("turns and turns AGAIN " * 20)
    with pytest.raises(Refused) as error:
        opened(first, second).train(state)
    assert f"file {second} is not one that was read before" in str(error.value)
    assert f"file {tmp_path / 'b.txt'} was read before" in str(error.value) and "a.txt" not in str(error.value)
    del state["files"]  # a position of an earlier version knows the whole alone
    with pytest.raises(Refused, match="content is"):
        opened(first, second).train(state)
