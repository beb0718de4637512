"""JSON lines: loss on answers only, no answer without its prompt, no prompt on both sides, every wrong line named."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gt_jax.configs.data import DataConfig
from gt_jax.errors import Refused
from gt_jax.evaluation.answers import asked
from gt_jax.text.data import known_elsewhere, open_data
from gt_jax.text.document_rows import DocumentRows
from gt_jax.text.json_lines import read_documents
from gt_jax.text.json_lines_part import JsonLinesPart
from gt_jax.text.split import HELD_OUT, TRAINING
from gt_jax.text.tokenizers import ByteTokenizer

ROW = 32
BYTES = ByteTokenizer()
END = BYTES.end_of_document


def lines_file(folder: Path, lines: list, name: str = "answers.jsonl") -> str:
    path = folder / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def documents_of(kinds: int = 30, seed: int = 0) -> list[dict]:
    """Of each form; prompts and ids all different, texts up to three rows."""
    generator = np.random.default_rng(seed)
    made: list[dict] = []
    for number in range(kinds):
        made.append({"prompt": f"{number}+{number}=", "answer": str(2 * number), "difficulty": 1 + number % 3})
        made.append({"text": f"text {number} " + "la" * int(generator.integers(0, 40))})
        length = int(generator.integers(2, ROW + 1))
        targets = generator.integers(-1, 200, length)
        targets[-1] = 7
        made.append({"tokens": [number, *generator.integers(0, 257, length - 1).tolist()], "targets": targets.tolist(),
                     "difficulty": generator.integers(0, 5, length).tolist()})  # fmt: skip
    return made


@pytest.fixture
def part(tmp_path):
    path = lines_file(tmp_path, documents_of())
    return JsonLinesPart(path, DataConfig(json_lines=(path,), sequence_length=ROW, batch_size=3, held_out=0.1), BYTES)


def test_the_loss_is_on_what_each_form_asks(tmp_path):
    path = lines_file(tmp_path, [
        {"prompt": "ab", "answer": "cd", "difficulty": 4}, {"text": "abc"}, "",
        {"tokens": [5, 9, 256], "targets": [-1, 7, 0], "difficulty": [3, 2, 1]}, {"tokens": [5], "targets": [0]},
    ])  # fmt: skip
    answer, text, ids, bare = read_documents(path, BYTES, ROW)
    assert answer.tokens.tolist() == [*b"abcd", END] and answer.targets.tolist() == [-1, *b"cd", END, -1]
    assert answer.difficulty.tolist() == [0, 4, 4, 0, 0] and answer.whole
    assert answer.targets[3] == END, "the end is learned, and is no answer that is right or not"
    assert text.tokens.tolist() == [*b"abc", END] and text.targets.tolist() == [*b"bc", END, -1] and not text.whole
    assert ids.tokens.tolist() == [5, 9, 256] and ids.targets.tolist() == [-1, 7, 0]
    assert ids.difficulty.tolist() == [0, 2, 1], "nothing is asked where there is no target"
    assert bare.targets.tolist() == [0] and bare.difficulty.tolist() == [0]


def quadruples(rows) -> Counter:
    """How often each (document's first tokens, place, token, target, difficulty) stands in rows, padding apart."""
    found: Counter = Counter()
    for row in rows:
        real = row["segment_ids"] > 0
        found.update(zip(*(row[name][real].tolist() for name in ("tokens", "targets", "difficulty")), strict=True))
    return found


def test_each_epoch_holds_every_document_once_and_no_answer_is_cut(tmp_path):
    documents = read_documents(lines_file(tmp_path, documents_of()), BYTES, ROW)
    rows = DocumentRows(documents, ROW, seed=3, endless=True)
    once = len(DocumentRows(documents, ROW, seed=3, endless=False))
    expected: Counter = Counter()
    for one in documents:
        expected.update(zip(one.tokens.tolist(), one.targets.tolist(), one.difficulty.tolist(), strict=True))
    epochs = [[rows[i] for i in range(once * epoch, once * (epoch + 1))] for epoch in range(2)]
    whole = {one.tokens.tobytes() for one in documents if one.whole}
    for epoch in epochs:
        assert quadruples(epoch) == expected
        segments = [row["tokens"][row["segment_ids"] == s].tobytes()
                    for row in epoch for s in range(1, int(row["segment_ids"].max()) + 1)]  # fmt: skip
        assert whole <= set(segments)
        assert all((np.diff(row["segment_ids"][row["segment_ids"] > 0]) >= 0).all() for row in epoch)
    tokens = [np.concatenate([row["tokens"] for row in epoch]).tobytes() for epoch in epochs]
    assert tokens[0] != tokens[1], "another order"
    filled = sum(int((row["segment_ids"] > 0).sum()) for row in epochs[0])
    assert filled / (once * ROW) > 0.85, "rows are well filled"
    np.testing.assert_equal(DocumentRows(documents, ROW, seed=3, endless=True)[once + 2], epochs[1][2])


def test_the_held_out_part_is_of_whole_documents_and_no_seed(part):
    batches, units = part.held_out(), part.held_out_units()
    held = {tuple(one.tokens.tolist()) for one in part._of(1)}
    trained = {tuple(one.tokens.tolist()) for one in part._of(0)}
    assert len(held) == 9 and len(trained) == 81 and not held & trained
    assert set(batches[0]) == {"tokens", "targets", "segment_ids", "difficulty", "unit"}
    for batch, unit in zip(batches, units, strict=True):
        np.testing.assert_array_equal(batch["unit"], unit)
    assert all(value.shape == (3, ROW) and value.dtype == np.int32 for batch in batches for value in batch.values())
    other = JsonLinesPart(part.path, part.config.replace(seed=9), BYTES)
    np.testing.assert_equal(other.held_out(), batches)
    assert not np.array_equal(other.training_rows()[0]["tokens"], part.training_rows()[0]["tokens"])
    # a unit is a document: all of its tokens have its number, and no other token has
    by_unit: dict[int, set[int]] = {}
    for batch, of in zip(batches, units, strict=True):
        for row in range(3):
            real = batch["segment_ids"][row] > 0
            for unit, segment in zip(of[row][real].tolist(), batch["segment_ids"][row][real].tolist(), strict=True):
                by_unit.setdefault(unit, set()).add((id(batch), row, segment))
    assert len(by_unit) == 9
    few = part.held_out(1)
    assert len(few) == 1 and few[0]["tokens"][0].tobytes() == batches[0]["tokens"][0].tobytes()
    with pytest.raises(Refused, match="batches is 0"):
        part.held_out(0)


def test_one_prompt_is_never_on_both_sides(tmp_path):
    lines = [{"prompt": f"question {number % 10}?", "answer": f"answer {number}"} for number in range(100)]
    path = lines_file(tmp_path, lines)
    part = JsonLinesPart(path, DataConfig(json_lines=(path,), sequence_length=ROW, held_out=0.2, tuning=0.1), BYTES)
    sides = [{one.key for one in part._of(side)} for side in range(3)]
    assert [len(side) for side in sides] == [7, 2, 1]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    assert len(np.unique(np.concatenate([of[batch["targets"] >= 0] for batch, of in zip(
        part.held_out(), part.held_out_units(), strict=True)]))) == 2, "answers to one prompt are one unit"
    assert len(part.tuning(1)) == 1


def test_what_one_file_holds_out_and_another_trains_on_is_said(tmp_path, capsys):
    lines = [{"prompt": f"question {number}?", "answer": f"answer {number}"} for number in range(100)]
    paths = [tmp_path / name for name in ("all.jsonl", "easy.jsonl", "other.jsonl")]
    for path, some in zip(paths, (lines, lines[::2], [{"text": f"{n}"} for n in range(30)]), strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for line in some))
    config = DataConfig(json_lines=tuple(map(str, paths)), sequence_length=ROW, held_out=0.2)
    parts = open_data(config).parts
    said = [line for line in capsys.readouterr().err.splitlines() if "are trained on in" in line]
    assert len(said) == len(known_elsewhere(parts)) == 2
    known = set(parts["all"].keys[HELD_OUT].tolist()) & set(parts["easy"].keys[TRAINING].tolist())
    assert 0 < len(known) < 20
    assert f"note: {len(known)} of 20 held-out documents of all are trained on in easy" in said[0]


WRONG = [
    ('{"prompt": "a"}', "field 'answer' is missing"), ("[1]", "it is no object, but list"), ("{", "it is no JSON"),
    ('{"prompt": "a", "answer": 3}', "field 'answer' is 3; it must be a string"),
    ('{"prompt": "", "answer": "b"}', "field 'prompt' has no token"),
    ('{"prompt": "a", "answer": ""}', "field 'answer' has no token"),
    ('{"text": "a", "id": 4}', "field 'id' is not known"), ("{}", "there is no field"),
    ('{"text": "a", "text": "b"}', "it has 'text' twice"),
    ('{"question": "a"}', "the fields are 'question'"), ('{"text": "\\ud800"}', "field 'text' cannot be encoded"),
    ('{"text": "a", "difficulty": 2}', "field 'difficulty' stands beside a text"),
    ('{"tokens": [1, 2], "targets": [1]}', "'tokens' are 2 and 'targets' 1"),
    ('{"tokens": [1, 257], "targets": [1, 2]}', "field 'tokens' has 257; its numbers lie in 0 … 256"),
    ('{"tokens": [1], "targets": [-2]}', "field 'targets' has -2; its numbers lie in -1 … 256"),
    ('{"tokens": [1, true], "targets": [1, 2]}', "must be a list of whole numbers"),
    ('{"tokens": [1], "targets": [-1]}', "all 'targets' are -1"),
    ('{"tokens": [1, 2], "targets": [1, 2], "difficulty": [1]}', "field 'difficulty' has 1 numbers"),
    ('{"prompt": "a", "answer": "b", "difficulty": "hard"}', "field 'difficulty' is \"hard\""),
    ('{"prompt": "a", "answer": "' + ROW * "b" + '"}',
     f"an answer longer than a row: with its prompt it has {ROW + 2} tokens, rows have {ROW}"),
]  # fmt: skip


def test_every_wrong_line_is_named_at_once(tmp_path):
    path = lines_file(tmp_path, [{"text": "right"}, *(line for line, _ in WRONG)])
    with pytest.raises(Refused) as error:
        read_documents(path, BYTES, ROW)
    said = str(error.value).splitlines()[1:]
    assert len(said) == len(WRONG)
    for number, (line, (_, says)) in enumerate(zip(said, WRONG, strict=True), 2):
        assert line.startswith(f"  - {path}, line {number}: ") and says in line


def test_a_long_list_is_cut_and_its_length_said(tmp_path):
    path = lines_file(tmp_path, ["{}"] * 50)
    with pytest.raises(Refused) as error:
        read_documents(path, BYTES, ROW)
    assert len(str(error.value).splitlines()) == 22 and str(error.value).endswith("and 30 more lines")


def test_files_without_documents_are_refused(tmp_path):
    path = lines_file(tmp_path, [""])
    with pytest.raises(Refused, match="has no document; a line is one of"):
        read_documents(path, BYTES, ROW)
    with pytest.raises(Refused, match="cannot be read"):
        read_documents(str(tmp_path / "missing.jsonl"), BYTES, ROW)
    path = lines_file(tmp_path, [{"prompt": "a", "answer": "b"}] * 5)
    with pytest.raises(Refused, match="has 1 different documents; there must be at least 2"):
        open_data(DataConfig(json_lines=(path,), sequence_length=ROW))


def test_answers_to_one_prompt_are_one_instance(tmp_path):
    """Of the loss and of right answers alike: a prompt that is asked ten times says no more than its answers do."""
    lines = [{"prompt": f"{n // 2}?", "answer": str(n), "difficulty": 1} for n in range(80)]
    path = lines_file(tmp_path, lines)
    config = DataConfig(json_lines=(path,), sequence_length=ROW, batch_size=3, held_out=0.2)
    part = JsonLinesPart(path, config, BYTES)
    batches = part.held_out()
    found, units = asked(batches), part.held_out_units()
    here = np.concatenate([unit[(batch["difficulty"] > 0) & (batch["targets"] >= 0)]
                           for batch, unit in zip(batches, units, strict=True)])  # fmt: skip
    np.testing.assert_array_equal(np.unique(here, return_inverse=True)[1], found.instance)
    assert len(np.unique(found.instance)) * 2 <= len(found.instance)
