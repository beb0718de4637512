"""One row a batch, of one document: every source gives it, and goes on after it."""

import json

import numpy as np
import pytest

from gt_jax.configs.data import DataConfig
from gt_jax.text.data import open_data

WORDS = "one row at a time, please. " * 40
TASK = "pointer_jumps:symbols=6,hardest=4,queries=2"


@pytest.mark.parametrize("kind", ["text", "documents", "task", "mix"])
def test_a_batch_of_one_row(tmp_path, kind):
    (tmp_path / "a.txt").write_text(WORDS)
    lines = [json.dumps({"prompt": f"{i} and {i}", "answer": f"{2 * i}"}) for i in range(60)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n")
    fields = {"text": {"text": (str(tmp_path / "a.txt"),)}, "documents": {"json_lines": (str(tmp_path / "b.jsonl"),)},
              "task": {"tasks": (TASK,)}}  # fmt: skip
    fields["mix"] = {**fields["text"], **fields["task"]}
    data = open_data(DataConfig(sequence_length=64, batch_size=1, **fields[kind]))
    stream = data.train(None)
    first, second = next(stream), next(stream)
    assert first["tokens"].shape == (1, 64) and (first["segment_ids"] > 0).any()
    again = data.train(stream.state() | {"batches": 1})
    np.testing.assert_array_equal(next(again)["tokens"], second["tokens"])
    assert all(len(batch["tokens"]) == 1 for batch in data.held_out(2))
