"""Data: nothing lost, nothing leaked, the same bytes for the same seed, and a restart anywhere."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gt_jax.configs.data import DataConfig
from gt_jax.configs.presets import preset
from gt_jax.configs.run import RunConfig
from gt_jax.errors import Refused
from gt_jax.text import batches as packing
from gt_jax.text import sources
from gt_jax.text.tokenizers import ByteTokenizer

ROW = 16


def config(**changes) -> DataConfig:
    return DataConfig(**{"sequence_length": ROW, "batch_size": 3, "seed": 5, **changes})


def text_file(folder: Path, documents: Sequence[bytes], name: str = "text.txt") -> str:
    path = folder / name
    path.write_bytes(b"<|endoftext|>\n".join(documents))
    return str(path)


def random_documents(count: int, longest: int, seed: int = 0) -> list[bytes]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest, count)
    return [generator.integers(0, 256, length, np.uint8).tobytes() + b"\n" for length in lengths]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> packing.Text:
    path = text_file(tmp_path_factory.mktemp("data"), random_documents(60, 400))
    return packing.open_text(config(text=(path,)))


def pairs(batches: Sequence[packing.Batch]) -> Counter:
    """How often each (token, target) occurs, padding apart."""
    found: Counter = Counter()
    for batch in batches:
        real = batch["segment_ids"] > 0
        found.update(zip(batch["tokens"][real].tolist(), batch["targets"][real].tolist(), strict=True))
    return found


def expected_pairs(text: packing.Text, spans: np.ndarray) -> Counter:
    found: Counter = Counter()
    for start, stop in spans.tolist():
        tokens = text.tokens[start:stop].tolist()
        found.update(zip(tokens, [*tokens[1:], -1], strict=True))
    return found


def test_tokenizer_round_trip():
    tokenizer = ByteTokenizer()
    every = bytes(range(256))
    ids = tokenizer.encode(every)
    assert ids.dtype == np.int32 and ids.tolist() == list(range(256))
    assert tokenizer.decode(np.append(ids, tokenizer.end_of_document)) == every
    assert tokenizer.encode(b"").shape == (0,) and tokenizer.decode(np.array([], np.int32)) == b""
    with pytest.raises(ValueError, match="300"):
        tokenizer.decode(np.array([300]))


def test_split_does_not_depend_on_seed_but_the_order_does(text):
    other = packing.open_text(text.config.replace(seed=6))
    np.testing.assert_array_equal(other.held_out_spans, text.held_out_spans)
    for mine, theirs in zip(text.held_out(), other.held_out(), strict=True):
        np.testing.assert_equal(mine, theirs)
    assert not np.array_equal(next(text.train())["tokens"], next(other.train())["tokens"])


def test_batches_are_well_formed(text):
    stream = text.train()
    for batch in [next(stream) for _ in range(30)] + text.held_out():
        assert set(batch) == {"tokens", "targets", "segment_ids"}
        assert all(value.shape == (3, ROW) and value.dtype == np.int32 for value in batch.values())
        tokens, targets, segments = batch["tokens"], batch["targets"], batch["segment_ids"]
        real = segments > 0
        step = np.diff(segments, axis=1)
        assert ((step == 0) | (step == 1) | ~real[:, 1:]).all(), "segments count up, padding comes last"
        inside = (step == 0) & real[:, 1:]
        np.testing.assert_array_equal(targets[:, :-1][inside], tokens[:, 1:][inside])
        assert (targets[tokens == ByteTokenizer.end_of_document] == -1).all(), "no target crosses documents"
        assert (targets[~real] == -1).all()


def test_each_epoch_holds_every_token_once_in_another_order():
    tokens = np.random.default_rng(0).integers(0, 256, 100 * ROW).astype(np.uint16)
    cuts = np.array([0, 3, 500, 501, 1100, 1600])
    spans = np.stack([cuts[:-1], cuts[1:]], axis=1)
    rows = packing.PackedRows(tokens, spans, ROW, seed=5, endless=True)
    once: Counter = Counter()
    for start, stop in spans.tolist():
        once.update(zip(tokens[start:stop].tolist(), [*tokens[start + 1:stop].tolist(), -1], strict=True))
    epochs = [[rows[i] for i in range(100 * epoch, 100 * (epoch + 1))] for epoch in range(3)]
    for epoch in epochs:
        assert pairs(epoch) == once
    orders = {np.concatenate([row["tokens"] for row in epoch]).tobytes() for epoch in epochs}
    assert len(orders) == 3


def test_epochs_that_end_within_a_row_lose_nothing(text):
    """At the end of a window of rows every pair has been seen once for each whole epoch, and at most once more."""
    rows = packing.PackedRows(text.tokens, text.training_spans, ROW, seed=5, endless=True)
    once, total = expected_pairs(text, text.training_spans), int(np.diff(text.training_spans).sum())
    window = total // ROW
    assert window < 1024 and total % ROW, "the text is one window of rows and a rest"
    for windows in (1, 3):
        seen = pairs([rows[i] for i in range(windows * window)])
        epochs, rest = divmod(windows * window * ROW, total)
        assert seen.total() == epochs * total + rest, "an endless stream has no padding"
        assert all(epochs * count <= seen[pair] <= (epochs + 1) * count for pair, count in once.items())
        assert set(seen) <= set(once)


def test_held_out_holds_every_held_out_token_once(text):
    batches = text.held_out()
    assert pairs(batches) == expected_pairs(text, text.held_out_spans)
    rows = [row.tobytes() for batch in batches for row in batch["tokens"]]
    size = text.config.batch_size
    few = [rows.index(row.tobytes()) for batch in text.held_out(2) for row in batch["tokens"]]
    assert few[0] == 0 and few == sorted(set(few)), "rows of the whole part, in its order"
    assert few[-1] >= len(rows) - size - len(rows) // len(few), "and up to its end"
    assert len(text.held_out(2)) == 2 and len(text.held_out(10_000)) == len(batches)
    np.testing.assert_equal(packing.held_out_batches(text.config, 1), text.held_out(1))


def test_one_document_is_split_into_pieces_without_a_leak(tmp_path):
    # Every token of this text occurs once in 251, so a leaked target would show as a pair that no span holds.
    body = bytes(range(251)) * 40
    text = packing.open_text(config(text=(text_file(tmp_path, [body]),), held_out=0.2))
    assert text.documents == 1
    rows = packing.PackedRows(text.tokens, text.held_out_spans, ROW, seed=0, endless=False)
    assert pairs([rows[i] for i in range(len(rows))]) == expected_pairs(text, text.held_out_spans)
    assert b"".join(ByteTokenizer().decode(text.tokens[a:b]) for a, b in sorted(
        np.concatenate([text.training_spans, text.held_out_spans]).tolist())) == body


def test_neighbouring_rows_come_from_different_places(tmp_path):
    long = np.arange(40 * ROW * packing._PIECE_ROWS) // (ROW * packing._PIECE_ROWS)
    text = packing.open_text(config(text=(text_file(tmp_path, [long.astype(np.uint8).tobytes()]),), batch_size=2))
    stream = text.train()
    same = [len(set(next(stream)["tokens"][:, 0].tolist())) == 1 for _ in range(100)]
    assert sum(same) < 15, "without mixing, most batches of two rows hold one piece"


@pytest.mark.parametrize("stop", [0, 1, 2, 7, 31])
def test_a_restart_goes_on_bit_for_bit(text, stop):
    whole = text.train()
    batches = [next(whole) for _ in range(stop + 6)]
    killed = text.train()
    for _ in range(stop):
        next(killed)
    saved = json.loads(json.dumps(killed.state()))
    assert len(json.dumps(saved)) < 300 + 200  # the second for the one file
    resumed = packing.open_text(text.config).train(saved)
    for batch in batches[stop:]:
        np.testing.assert_equal(next(resumed), batch)
    killed.restore(text.train().state())
    np.testing.assert_equal(next(killed), batches[0])


def test_restoring_does_not_replay(text, monkeypatch):
    stream = text.train()
    calls = Counter()
    get_row = packing.PackedRows.__getitem__
    monkeypatch.setattr(packing.PackedRows, "__getitem__", lambda self, i: (calls.update("r"), get_row(self, i))[1])
    stream.restore({**stream.state(), "batches": 10_000_000})
    next(stream)
    assert calls["r"] == text.config.batch_size
    assert stream.state()["batches"] == 10_000_001


def test_a_large_batch_draws_from_the_whole_text(tmp_path):
    """1,900 pieces of eight rows: a batch of 1,024 rows that is a whole window would hold 128 of them."""
    row, pieces = 16, 1900
    marked = (np.arange(pieces * row * packing._PIECE_ROWS) // (row * packing._PIECE_ROWS)).astype(np.uint16)
    spans = np.array([[0, len(marked)]])
    text = packing.Text(config(batch_size=1024), "marked", marked, spans[:1, 1], ByteTokenizer(), len(marked),
                        spans, spans, spans)  # fmt: skip
    stream = text.train()
    held = [len(np.unique(next(stream)["tokens"])) for _ in range(2)]
    # 1,024 draws of 1,900 hold 1900 (1 - exp(-1024/1900)) = 792 in the mean; a row may hold the ends of two pieces
    assert min(held) > 700
    earlier = dataclasses.replace(text, config=text.config.replace(split="fill")).train()
    assert len(np.unique(next(earlier)["tokens"])) < 140


def test_an_earlier_runs_text_and_position_are_what_they_were(tmp_path):
    """A config or a position that was stored before the split had a name means the rule of its time."""
    path = text_file(tmp_path, random_documents(60, 400))
    stored = {key: value for key, value in config(text=(path,)).to_json().items() if key not in ("split", "tuning")}
    earlier = DataConfig.from_json(stored)
    assert earlier.split == "fill" and DataConfig.from_json(config().to_json()).split == "sample"
    assert RunConfig.from_json({"model": preset("tiny").to_json(), "data": stored}).data == earlier
    text = packing.open_text(earlier)
    position = {key: value for key, value in text.train().state().items() if key not in ("split", "tuning")}
    next(text.train(position))
    new = packing.open_text(config(text=(path,)))
    assert not np.array_equal(new.held_out_spans, text.held_out_spans)
    with pytest.raises(Refused, match="split is 'sample' here and 'fill' in the saved position"):
        new.train(position)


def test_the_tuning_part_is_a_third_one(tmp_path):
    """It takes its tokens from the training part and changes nothing of the held-out part."""
    path = text_file(tmp_path, random_documents(400, 400))
    text, plain = (packing.open_text(config(text=(path,), held_out=0.1, tuning=share)) for share in (0.05, 0.0))
    np.testing.assert_equal(text.held_out(), plain.held_out())
    assert pairs(text.tuning()) == expected_pairs(text, text.tuning_spans)
    every = sum((expected_pairs(text, spans) for spans in
                 (text.training_spans, text.held_out_spans, text.tuning_spans)), Counter())  # fmt: skip
    assert every == expected_pairs(plain, plain.training_spans) + expected_pairs(plain, plain.held_out_spans)
    assert len(text.tuning(1)) == 1
    assert " % for tuning;" in text.summary() and " held out;" in plain.summary()
    with pytest.raises(Refused, match="tuning batches is 0"):
        text.tuning(0)
    with pytest.raises(Refused, match="no tuning part"):
        plain.tuning()
    with pytest.raises(Refused, match=r"one training row and one held-out row and one tuning row .* need 48"):
        packing.open_text(config(text=(text_file(tmp_path, [b"x" * (2 * ROW)]),), tuning=0.1))


def test_a_position_in_another_text_or_shape_is_refused(text, tmp_path):
    state = text.train().state()
    other = packing.open_text(config(text=(text_file(tmp_path, random_documents(60, 400, seed=1)),), batch_size=2))
    with pytest.raises(Refused, match=r"(?s)content.*batch_size is 2 here and 3 in the saved"):
        other.train(state)
    for batches in (None, -1, 1.5, True, "1"):
        with pytest.raises(Refused, match="batches is"):
            text.train({**state, "batches": batches})


@pytest.mark.parametrize("wrong", [{"batches": None}, {"batches": "3"}, {"batches": -3}, {"batch_size": None}])
def test_a_position_that_does_not_say_how_far_it_is_is_refused(text, wrong):
    """To begin at the first batch again would train twice on what was read."""
    with pytest.raises(Refused, match=f"not one: .*{next(iter(wrong))}"):
        text.position_after([{**text.train().state(), **wrong}])


def test_same_seed_same_bytes_across_processes_and_light_imports(text):
    """Importing the module brings neither jax nor grain nor TensorFlow; another process gives the same batches."""
    program = (
        "import sys, hashlib, json\nfrom gt_jax.configs.data import DataConfig\n"
        "from gt_jax.text import batches as packing\n"
        "heavy = {'jax', 'grain', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules); assert not heavy, heavy\n"
        "t = packing.open_text(DataConfig.from_json(json.loads(sys.argv[1]))); s = t.train()\n"
        "assert 'tensorflow' not in sys.modules and 'tensorflow_datasets' not in sys.modules\n"
        "print(t.content_hash(), hashlib.sha256(b''.join(v.tobytes() for v in next(s).values())).hexdigest())\n"
        "import threading; assert threading.active_count() == 1"
    )
    arguments = [sys.executable, "-c", program, json.dumps(text.config.to_json())]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(packing.__file__).parents[2], check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    digest = hashlib.sha256(b"".join(v.tobytes() for v in next(text.train()).values())).hexdigest()
    assert done.stdout.split() == [text.content_hash(), digest]


def test_golden_order():
    """The order of the stream is part of what a checkpoint means: it must not change between versions of anything."""
    tokens = np.arange(24, dtype=np.uint16)
    rows = packing.PackedRows(tokens, np.array([[0, 10], [10, 24]]), 4, seed=1, endless=True)
    assert [rows[i]["tokens"].tolist() for i in range(6)] == GOLDEN


GOLDEN = [[0, 1, 2, 3], [20, 21, 22, 23], [12, 13, 14, 15], [16, 17, 18, 19], [8, 9, 10, 11], [4, 5, 6, 7]]


def test_the_embedded_text_is_the_standard_library():
    text = packing.open_text(DataConfig())
    assert text.documents > 300 and 6e6 < len(text.tokens) <= sources.EMBEDDED_LIMIT + text.documents
    assert Path(json.__file__).read_bytes() in sources.standard_library()[1]
    assert "standard library" in text.summary() and "held out" in text.summary() and "\n" not in text.summary()
    held = np.diff(text.held_out_spans).sum() / len(text.tokens)
    np.testing.assert_allclose(held, 0.05, atol=0.002)
    assert text.content_hash() == packing.open_text(DataConfig(seed=3, sequence_length=64)).content_hash()


def test_no_test_suite_and_no_installed_package_in_the_embedded_text(tmp_path, monkeypatch):
    for path in ("a.py", "json/b.py", "test/c.py", "json/tests/d.py", "site-packages/e.py", "_sysconfigdata_x.py",
                 "config-3.11/f.py", "idlelib/g.py", "lib2to3/h.py", "i.txt", "empty.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("" if path == "empty.py" else path)
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda _: str(tmp_path))
    assert sources.standard_library()[1] == [b"a.py", b"json/b.py"]
    monkeypatch.setattr(sources, "EMBEDDED_LIMIT", 5)
    assert sources.standard_library()[1] == [b"a.py"]
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda _: str(tmp_path / "nowhere"))
    with pytest.raises(Refused, match="name a text file instead"):
        sources.standard_library()


def test_lines_of_endoftext_divide_documents(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_bytes(b"one\n<|endoftext|>\ntwo <|endoftext|> two\r\n<|endoftext|>\r\n"
                     b"<|endoftext|>\nthree\n<|endoftext|>")
    assert sources.text_files([str(path)])[1] == [b"one\n", b"two <|endoftext|> two\r\n", b"three\n"]


def test_bytes_that_are_not_utf8_are_text(tmp_path):
    text = packing.open_text(config(text=(text_file(tmp_path, [b"\x80\xff\xfe" * 200]),)))
    assert "read as bytes as they lie, for it is not UTF-8 (byte 0)" in text.summary()
    assert set(next(text.train())["tokens"].ravel().tolist()) <= {0xFF, 0xFE, 0x80, 256}


def test_unusable_files_are_all_named_at_once(tmp_path):
    empty = text_file(tmp_path, [b""], "empty.txt")
    good = text_file(tmp_path, [b"x" * 1000], "good.txt")
    with pytest.raises(Refused) as error:
        packing.open_text(config(text=(good, empty, str(tmp_path), str(tmp_path / "gone.txt"), "a\0b")))
    message = str(error.value)
    for part in ("empty.txt' is empty", "gone.txt", "No such file", "Is a directory", "a\\x00b"):
        assert part in message
    assert "good.txt" not in message


@pytest.mark.parametrize("size", [1, ROW - 2, ROW, 2 * ROW - 2])
def test_a_text_too_short_is_refused_with_numbers(tmp_path, size):
    path = text_file(tmp_path, [b"x" * size], "short.txt")
    with pytest.raises(Refused, match=rf"short.txt.* too short: {size + 1} tokens \({size} bytes\).*need 32"):
        packing.open_text(config(text=(path,)))


def test_the_shortest_text_that_fits_works(tmp_path):
    text = packing.open_text(config(text=(text_file(tmp_path, [b"x" * (2 * ROW - 1)]),)))
    assert len(text.held_out()) == 1 and next(text.train())["tokens"].shape == (3, ROW)
    assert text.summary().endswith("1 document, 31 bytes, 16 bytes (50.0 %) held out")


def test_config_names_every_problem():
    with pytest.raises(Refused) as error:
        DataConfig(sequence_length=1, batch_size=0, held_out=1.0, seed=-1, text=("a",), tfds="b")
    message = str(error.value)
    assert all(part in message for part in ("sequence_length is 1", "batch_size is 0", "held_out is 1.0", "seed is -1",
                                            "both given"))
    with pytest.raises(Refused, match="tfds_dir"):
        DataConfig(tfds_dir="somewhere")
    with pytest.raises(Refused, match=r"(?s)tuning is 0.6 beside held_out 0.4.*split 'fill' has no tuning part"):
        DataConfig(held_out=0.4, tuning=0.6, split="fill")
    with pytest.raises(Refused, match="held-out batches is 0"):
        packing.open_text(DataConfig()).held_out(0)


def test_config_round_trip():
    before = config(text=("a", "b"), held_out=0.1)
    assert DataConfig.from_json(json.loads(json.dumps(before.to_json()))) == before


def write_tfds(root: Path, name: str, features: dict, examples: list[dict], split: str = "train") -> None:
    """A dataset on disk, as `download_and_prepare` leaves it, without a builder and so without a network."""
    import tensorflow_datasets as tfds

    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name="tests")
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=1000, file_format="array_record")
    writer.initialize_splits([split])
    writer.add_examples({split: examples})
    writer.close_all()


def test_tfds_text_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    documents = [f"document {i} ".encode() * 20 for i in range(40)]
    write_tfds(tmp_path, "lines", {"text": tfds.features.Text()}, [{"text": d.decode()} for d in documents])
    text = packing.open_text(config(tfds="lines", tfds_dir=str(tmp_path)))
    assert sources.tfds_text("lines", str(tmp_path))[1] == documents
    assert text.documents == 40 and "tensorflow" not in sys.modules
    assert b"document" in ByteTokenizer().decode(next(text.train())["tokens"])

    write_tfds(tmp_path, "numbers", {"n": tfds.features.Scalar(np.int64)}, [{"n": 1}])
    write_tfds(tmp_path, "untrained", {"text": tfds.features.Text()}, [{"text": "x"}], split="test")
    write_tfds(tmp_path, "blank", {"text": tfds.features.Text()}, [{"text": ""}])
    write_tfds(tmp_path, "in_order", {"text": tfds.features.Text()}, [{"text": "x"}])
    facts = tmp_path / "in_order" / "1.0.0" / "dataset_info.json"  # a format without random access
    facts.write_text(facts.read_text().replace('"array_record"', '"tfrecord"'))
    for name, message in {"in_order": "file_format='array_record'", "numbers": "no feature 'text'",
                          "untrained": "split 'train'", "blank": "has no text",
                          "missing": "nothing is downloaded", "../x": "cannot be read"}.items():
        with pytest.raises(Refused, match=message):
            packing.open_text(config(tfds=name, tfds_dir=str(tmp_path)))
