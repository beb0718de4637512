"""All the data of a run: shares that are exact, parts in their own order, a restart anywhere, and what is refused."""

import itertools
import json

import numpy as np
import pytest

from gt_jax.configs.data import DataConfig, Weight
from gt_jax.configs.presets import preset
from gt_jax.configs.run import RunConfig
from gt_jax.errors import Refused
from gt_jax.tasks.registry import read_task
from gt_jax.tasks.rows import HELD_OUT, TaskRows
from gt_jax.text.batches import Text, open_text
from gt_jax.text.data import Data, open_data
from gt_jax.text.mixed_rows import BLOCK, MixedRows, quotas
from gt_jax.text.task_part import WHOLE, symbol_ids
from gt_jax.text.tokenizers import ByteTokenizer, open_tokenizer

CHAINS, HOPS = "variable_chains:hardest=3,chains=3", "p_hop:hardest=2,length=31"
ROW = 64


class Numbers:
    """Rows that say their own number."""

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> dict:
        value = np.array([index], np.int32)
        return {"tokens": value, "targets": value, "segment_ids": value, "difficulty": value}


def mixed(seed: int = 0, **shares: float) -> MixedRows:
    return MixedRows([Numbers() for _ in shares], shares, seed)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "story.txt").write_bytes(b"Once upon a time a small net grew deep and was glad of it.\n" * 100)
    lines = [{"prompt": f"{n}+{n}=", "answer": str(2 * n), "difficulty": 1 + n % 2} for n in range(40)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def everything(files, **changes) -> DataConfig:
    return DataConfig(**{
        "text": (str(files / "story.txt"),), "tasks": (CHAINS, HOPS), "json_lines": (str(files / "sums.jsonl"),),
        "mix": (Weight("p_hop", 0.1), Weight("text", 0.5), Weight("variable_chains", 0.25), Weight("sums", 0.15)),
        "sequence_length": ROW, "batch_size": 4, "seed": 5, **changes,
    })  # fmt: skip


@pytest.mark.parametrize("shares", [{"a": 0.5, "b": 0.5}, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3},
                                    {"a": 0.9996, "b": 4e-4}, {"a": 0.61, "b": 0.29, "c": 0.1}])  # fmt: skip
def test_every_window_has_its_shares_and_every_part_its_order(shares):
    rows = mixed(3, **shares)
    places = [rows.place(index) for index in range(2 * BLOCK + 500)]
    parts = np.array([part for part, _ in places])
    for number, share in enumerate(shares.values()):
        own = [rank for part, rank in places if part == number]
        assert own == list(range(len(own))), "a part's rows come in their order, none left out"
        assert abs(np.count_nonzero(parts[:BLOCK] == number) - share * BLOCK) < 1
        before = np.concatenate([[0], np.cumsum(parts == number)])
        for window in (10, 64, 1000, BLOCK):
            found = before[window:] - before[:-window]
            assert np.abs(found - share * window).max() <= 3, (window, "any window of rows, across blocks too")


def test_which_row_is_of_which_part_follows_from_seed_and_number():
    one, again, other = mixed(3, a=0.5, b=0.5), mixed(3, a=0.5, b=0.5), mixed(4, a=0.5, b=0.5)
    here = [one.place(index) for index in (123_456, 5, 20_000)]
    assert here == [again.place(index) for index in (123_456, 5, 20_000)]
    assert [one.place(index) for index in range(50)] != [other.place(index) for index in range(50)]
    assert set(one[7]) == {"tokens", "targets", "segment_ids"}, "what is trained on has no difficulty"
    assert int(one[123_456]["tokens"][0]) == here[0][1]


def test_quotas_add_up():
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    for rows in range(1, 40):
        found = quotas(shares, rows)
        assert sum(found.values()) == rows and all(abs(found[name] - rows * shares[name]) < 1 for name in shares)
    assert quotas(shares, 2, least=1) == {"a": 1, "b": 1, "c": 1}
    assert quotas({"a": 0.95, "b": 0.05}, 8, least=1) == {"a": 7, "b": 1}


def test_plain_text_is_what_it_was(files):
    config = DataConfig(text=(str(files / "story.txt"),), sequence_length=ROW, batch_size=4)
    data = open_data(config)
    assert isinstance(data, Text) and data.parts == {"text": data}
    mine, theirs = data.train(), open_text(config).train()
    for _ in range(3):
        np.testing.assert_equal(next(mine), next(theirs))
    assert mine.state() == theirs.state() and "parts" not in mine.state()
    np.testing.assert_equal(data.held_out_by_part(2)["text"], data.held_out(2))


def test_a_mix_goes_on_anywhere(files):
    data = open_data(everything(files))
    assert list(data.parts) == ["text", "variable_chains", "p_hop", "sums"]
    stream = data.train()
    batches = [next(stream) for _ in range(3)]
    state = json.loads(json.dumps(stream.state()))
    after = [next(stream) for _ in range(3)]
    resumed = open_data(everything(files)).train(state)
    np.testing.assert_equal([next(resumed) for _ in range(3)], after)
    assert all(set(batch) == {"tokens", "targets", "segment_ids"} for batch in batches)
    assert all(value.shape == (4, ROW) and value.dtype == np.int32 for batch in batches for value in batch.values())
    assert {**data.position_after([None, {}, state]), "files": data.files()} == state
    halved = open_data(everything(files, batch_size=8)).position_after([state])
    assert halved["batches"] == 2 and halved["batch_size"] == 8
    for other in (everything(files, tasks=(HOPS, "variable_chains:hardest=4,chains=3")), everything(files, seed=6),
                  everything(files, curriculum_rows=100),
                  everything(files, mix=(Weight("p_hop", 0.2), *everything(files).mix[1:3], Weight("sums", 0.05)))):
        assert open_data(other).position_after([state]) is None
        with pytest.raises(Refused, match="does not fit"):
            open_data(other).train(state)


def test_each_part_of_a_mix_reads_as_it_would_alone(files):
    """Row k of a part is the same row whatever it is mixed with: a share changes how fast a part is read, no more."""
    data = open_data(everything(files))
    alone = {name: part.training_rows() for name, part in data.parts.items()}
    rows = MixedRows(list(alone.values()), data.config.shares, data.config.seed)
    for index in range(40):
        part, number = rows.place(index)
        expected = list(alone.values())[part][number]
        np.testing.assert_equal(rows[index], {name: expected[name] for name in ("tokens", "targets", "segment_ids")})
    text = open_text(data.config.replace(tasks=(), json_lines=(), mix=()))
    assert alone["text"][7]["tokens"].tobytes() == text.training_rows()[7]["tokens"].tobytes()


def test_held_out_batches_are_of_one_part_each_and_say_how_hard_an_answer_is(files):
    data, quick = open_data(everything(files)), open_data(everything(files, held_out=0.4))
    assert data.held_out_counts(8) == {"text": 4, "variable_chains": 2, "p_hop": 1, "sums": 1}
    assert set(data.held_out_counts(1).values()) == {1}, "at least one of each"
    batches = data.held_out(8)
    by_part = data.held_out_by_part(8)
    np.testing.assert_equal(batches, [batch for of_part in by_part.values() for batch in of_part])
    assert set(by_part["text"][0]) == {"tokens", "targets", "segment_ids"}
    for name, hardest in (("variable_chains", 3), ("p_hop", 2), ("sums", 2)):
        for batch in by_part[name]:
            difficulty, targets = batch["difficulty"], batch["targets"]
            assert difficulty.dtype == np.int32 and difficulty.shape == (4, ROW) and difficulty.max() == hardest
            ends = (targets == data.tokenizer.end_of_document) & (name == "sums")  # learned, and no answer
            assert ((difficulty > 0) == (targets >= 0) & ~ends).all() and ends.any() == (name == "sums")
    other = open_data(everything(files, seed=9, curriculum_rows=1000))
    np.testing.assert_equal(other.held_out(8), batches)
    assert sum(len(batch["tokens"]) for batch in quick.parts["variable_chains"].held_out()) == WHOLE


def test_the_curriculum_is_of_the_rows_of_the_whole_mix(files):
    """A task with a quarter of the rows has come to its hardest difficulty when the mix has run its curriculum."""
    rows = open_data(everything(files, curriculum_rows=800)).parts["variable_chains"].training_rows()
    assert [rows.hardest(index) for index in (0, 99, 100, 199, 200, 10**9)] == [1, 1, 2, 2, 3, 3]


def test_the_parts_and_their_shares():
    assert DataConfig().parts == ("text",) and DataConfig(tfds="stories").parts == ("text",)
    assert DataConfig(tasks=(HOPS,)).parts == ("p_hop",), "a task alone needs no text"
    both = DataConfig(tasks=(HOPS,), text=("a.txt",))
    assert both.shares == {"text": 0.5, "p_hop": 0.5}
    library = DataConfig(tasks=(HOPS,), mix=(Weight("p_hop", 0.3), Weight("text", 0.7)))
    assert library.parts == ("text", "p_hop") and library.shares == {"text": 0.7, "p_hop": 0.3}
    thirds = [Weight(name, 0.333) for name in ("text", "p_hop", "variable_chains")]
    assert sum(DataConfig(tasks=(HOPS, CHAINS), mix=tuple(thirds)).shares.values()) == pytest.approx(1)
    assert DataConfig.from_json(library.to_json()) == library
    old = {"text": ["x.jsonl"], "split": "sample", "tuning": 0.0}
    assert DataConfig.from_json(old).parts == ("text",), "a file of this ending was plain text before there were others"


@pytest.mark.parametrize(("changes", "says"), [
    ({"mix": (Weight("p_hop", 0.5), Weight("text", 0.4))}, "the weights of mix sum to 0.9; they must sum to 1"),
    ({"mix": (Weight("p_hop", 0.5), Weight("addition", 0.5))}, "mix names addition, which is not given; the parts are"),
    ({"mix": (Weight("text", 1.0),)}, "mix has no weight for p_hop"),
    ({"mix": (Weight("p_hop", 0.5), Weight("p_hop", 0.5))}, "mix weighs p_hop twice"),
    ({"tasks": (HOPS, "p_hop:hardest=4")}, "two parts are named p_hop"),
    ({"json_lines": ("p_hop.jsonl",)}, "two parts are named p_hop"),
    ({"json_lines": ("in/text.jsonl",)}, "in/text.jsonl would be the part text"),
    ({"tasks": (), "curriculum_rows": 3}, "curriculum_rows is 3; it is for tasks"), ({"curriculum_rows": -1}, "is -1"),
])  # fmt: skip
def test_what_is_no_mix_is_refused(changes, says):
    with pytest.raises(Refused) as error:
        DataConfig(**{"tasks": (HOPS,), **changes})
    assert says in str(error.value)
    with pytest.raises(Refused, match=r"the weight of p_hop is 0\.0; it must be above 0"):
        Weight("p_hop", 0.0)


def test_tasks_that_do_not_fit_are_refused_when_they_are_opened():
    for words, says in (("jumps", "task 'jumps' is not known"), ("p_hop:hardest=12", "hardest is 12"),
                        ("p_hop", "rows of 32 tokens are too short"), ("group_words:group=Z2,hardest=1", "too little")):
        with pytest.raises(Refused, match=says):
            open_data(DataConfig(tasks=(words,), sequence_length=32, held_out=1e-6))
    with pytest.raises(Refused, match="the weight of p_hop in the mix is 1e-05"):
        open_data(DataConfig(tasks=(HOPS, CHAINS), sequence_length=ROW, mix=(
            Weight("p_hop", 0.00001), Weight("variable_chains", 0.99999)))).train()
    with pytest.raises(Refused, match="need 257"):
        RunConfig(model=preset("tiny").replace(vocab=128), data=DataConfig(tasks=(HOPS,)))


class Letters(ByteTokenizer):
    """A tokenizer with the letters' tokens elsewhere, and none for "Q"."""

    vocab_size, end_of_document = 300, 299

    def texts(self) -> list[bytes]:
        return [b"<%d>" % i for i in range(40)] + [b"R" if i == 81 else bytes([i]) for i in range(256)] + [b"."] * 4


def test_a_symbol_is_the_token_of_its_byte(files):
    tokenizer = Letters()
    task = open_data(DataConfig(tasks=(HOPS,), sequence_length=ROW)).parts["p_hop"].task
    ids = symbol_ids(task, tokenizer, "letters")
    assert [tokenizer.texts()[i] for i in ids[list(task.alphabet)]] == [bytes([symbol]) for symbol in task.alphabet]
    chains = open_data(DataConfig(tasks=(CHAINS,), sequence_length=ROW)).parts["variable_chains"].task
    with pytest.raises(Refused, match=r"each of its 62 symbols; tokenizer letters has none for 1 .*'Q'"):
        symbol_ids(chains, tokenizer, "letters")


def test_the_rows_of_another_tokenizer_are_the_same_instances(tmp_path):
    import tokenizers

    letters = {bytes([symbol]).decode(): 1 + number for number, symbol in enumerate(b"DCBA9876543210abc")}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({**letters, "<|endoftext|>": 0}, unk_token="0"))
    model.save(str(tmp_path / "tokenizer.json"))
    config = DataConfig(tasks=(HOPS,), sequence_length=ROW)
    named = config.replace(tokenizer=str(tmp_path))
    rows, plain = (open_data(one).parts["p_hop"].training_rows()[2] for one in (named, config))
    texts = open_tokenizer(str(tmp_path)).texts()
    real = plain["segment_ids"] > 0
    for name in ("tokens", "targets"):
        there = rows[name][real & (plain[name] >= 0)].tolist()
        assert b"".join(texts[i] for i in there) == bytes(plain[name][real & (plain[name] >= 0)].tolist())
    for name in ("segment_ids", "difficulty"):
        np.testing.assert_array_equal(rows[name], plain[name])
    assert ((rows["targets"] < 0) == (plain["targets"] < 0)).all()


def test_the_summary_and_the_files_name_every_part(files):
    data = open_data(everything(files))
    summary = data.summary()
    for words in ("50 % text file", "10 % task p_hop:easiest=1,hardest=2", "15 % JSON-lines file", "held out"):
        assert words in summary
    assert [file["path"] for file in data.files()] == [str(files / "story.txt"), str(files / "sums.jsonl")]
    single = open_data(DataConfig(tasks=(HOPS,), sequence_length=ROW))
    assert isinstance(single, Data) and single.summary().startswith("task p_hop:") and single.files() == []
    hashes = {open_data(everything(files, **change)).content_hash() for change in
              ({}, {"tasks": (CHAINS, "p_hop:hardest=1,length=31")}, {"curriculum_rows": 8})}  # fmt: skip
    assert len(hashes) == 3


def test_units_of_a_task_are_its_instances(files):
    part = open_data(everything(files)).parts["p_hop"]
    batches, units = part.held_out(2), part.held_out_units(2)
    found = [(int(unit), batch["tokens"][row][of[row] == unit].tobytes())
             for batch, of in zip(batches, units, strict=True) for row in range(4) for unit in np.unique(of[row])]
    assert sorted(unit for unit, _ in found) == list(range(len(found))) and len(found) == 16
    assert all(len(tokens) == 4 * 32 for _, tokens in found)
    assert len({tokens for _, tokens in found}) == 16
    for batch, of in itertools.islice(zip(batches, units, strict=True), 1):
        assert ((np.diff(of[0]) != 0) == (np.diff(batch["segment_ids"][0]) != 0)).all()


def test_copies_of_an_instance_are_one_unit():
    part = open_data(DataConfig(tasks=("group_words:group=Z2,hardest=8",), sequence_length=64, batch_size=8)).parts
    (words,) = part.values()
    batches, units = words.held_out(4), words.held_out_units(4)
    there = {bytes(batch["tokens"][row][batch["segment_ids"][row] == segment].astype(np.uint8))
             for batch in batches for row in range(8) for segment in range(1, batch["segment_ids"][row].max() + 1)}
    asked = np.concatenate([of[batch["targets"] >= 0] for batch, of in zip(batches, units, strict=True)])
    assert len(np.unique(asked)) == len(there) < sum(int(batch["segment_ids"].max(axis=1).sum()) for batch in batches)


def test_a_small_share_is_looked_for_as_long_as_it_takes():
    rows = TaskRows(read_task(CHAINS), 64, 0, 1e-3, part=HELD_OUT)
    assert rows._tries == 40_000
    assert TaskRows(read_task(CHAINS), 64, 0, 0.05, part=HELD_OUT)._tries == 10_000
