"""Tokens on the disk are the text that they were made of: same rows, same hash; killed, moved, damaged, mixed."""

import gzip
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from gt_jax import prepare, train
from gt_jax.checkpoints import checkpoint
from gt_jax.configs.data import DataConfig
from gt_jax.configs.presets import preset
from gt_jax.configs.run import RunConfig
from gt_jax.errors import Refused
from gt_jax.evaluation.held_out_rows import held_out_rows
from gt_jax.evaluation.loading import data_config, text_note
from gt_jax.models.language_model import abstract
from gt_jax.text.batches import PackedRows, open_text
from gt_jax.text.data import open_data
from gt_jax.text.flags import NOTHING
from gt_jax.text.token_folder import changed_content, own_tokenizer, read_folder
from gt_jax.text.token_writer import write_tokens
from tests.support import small_model

ROW = 16
WORDS = [f"Tale {i}: " + "deep " * (i % 23) + "end.\n" for i in range(90)]


def config(**changes) -> DataConfig:
    return DataConfig(**{"sequence_length": ROW, "batch_size": 3, "seed": 5, **changes})


def text_file(folder: Path, documents: list[bytes], name: str) -> str:
    (folder / name).write_bytes(b"<|endoftext|>\n".join(documents))
    return str(folder / name)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> str:
    """A small byte-level BPE, by its path."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(WORDS, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=letters, show_progress=False))  # fmt: skip
    path = str(tmp_path_factory.mktemp("bpe") / "tokenizer.json")
    made.save(path)
    return path


def files(folder: Path) -> list[str]:
    """Two text files."""
    made = [word.encode() for word in WORDS]
    return [text_file(folder, made[:70], "a.txt"), text_file(folder, made[70:], "b.txt")]


def assert_same_text(one, other) -> None:
    assert one.content_hash() == other.content_hash() and one.documents == other.documents
    for batches in (lambda text: itertools.islice(text.train(), 40), lambda text: text.held_out(3),
                    lambda text: text.tuning(1)):  # fmt: skip
        for mine, theirs in zip(batches(one), batches(other), strict=True):
            for key in mine:
                np.testing.assert_array_equal(mine[key], theirs[key])
    for mine, theirs in zip(held_out_rows(one, 3).units, held_out_rows(other, 3).units, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_folder_of_tokens_is_the_text_that_it_was_made_of(tmp_path, bpe, kind):
    tokenizer, paths = ("bytes" if kind == "bytes" else bpe), files(tmp_path)
    write_tokens(tmp_path / "tokens", paths, tokenizer)
    own = own_tokenizer([str(tmp_path / "tokens")])
    assert own == ("bytes" if kind == "bytes" else str(tmp_path / "tokens"))
    read = open_text(config(text=tuple(paths), tokenizer=tokenizer, tuning=0.1))
    mapped = open_text(config(text=(str(tmp_path / "tokens"),), tokenizer=own, tuning=0.1))
    assert isinstance(mapped.tokens, np.memmap)
    assert_same_text(read, mapped)
    position = read.train().state()
    mapped.train(position)  # a run goes on with the tokens of its text
    moved = (tmp_path / "tokens").rename(tmp_path / "elsewhere")
    mapped.train(position)
    assert open_text(config(text=(str(moved),), tokenizer=str(moved) if kind == "bpe" else "bytes", tuning=0.1))


def test_a_checkpoint_knows_its_text_by_text_and_by_tokens(tmp_path):
    """The files that tokens are of are what a training of either kind has read."""
    paths = files(tmp_path)
    for name, of in (("both", paths), ("first", paths[:1]), ("second", paths[1:])):
        write_tokens(tmp_path / name, of, "bytes")
    both, first, second = (str(tmp_path / name) for name in ("both", "first", "second"))

    def trained(read):
        run = RunConfig(model=preset("tiny"), data=read.config).to_json()
        state = read.train().state()
        return {"kind": "train", "config": run["model"], "run": run, "files": read.files(), "data": state}

    def metadata(*text):
        return trained(open_text(config(text=text, held_out=0.2)))

    def read(known, *text):
        named = {**NOTHING, "text": text, "tokenizer": None}
        data = data_config(known, named, "CHECKPOINT")
        return data, text_note(known, open_data(data), "CHECKPOINT", True)

    for known in (metadata(*paths), metadata(both), metadata(first, second)):
        for text in ((both,), (first, second), (second, first), tuple(paths[::-1])):
            data, note = read(known, *text)
            assert data.held_out == 0.2 and data.text in {(both,), (first, second), tuple(paths)}
            assert note is None or "part of this text" in note
        for part in (first, paths[0]):
            with pytest.raises(Refused, match=r"is (of )?one of the 2 files of a training"):
                read(known, part)
    assert read(metadata(*paths), both)[1] is read(metadata(both), *paths)[1] is None
    with pytest.raises(Refused, match="both is of one of the 1 files of a training"):
        read(metadata(paths[0]), both)
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": word}) + "\n" for word in WORDS))
    write_tokens(tmp_path / "lines", [str(tmp_path / "c.jsonl")], "bytes")
    known = trained(open_data(config(json_lines=(str(tmp_path / "c.jsonl"),), sequence_length=64)))
    assert "a part of this text" in read(known, str(tmp_path / "lines"))[1]


def test_several_folders_are_one_text(tmp_path):
    paths = files(tmp_path)
    for name, path in zip("xy", paths, strict=True):
        write_tokens(tmp_path / name, [path], "bytes")
    whole = open_text(config(text=tuple(paths), tuning=0.1))
    joined = open_text(config(text=(str(tmp_path / "x"), str(tmp_path / "y")), tuning=0.1))
    assert joined.content_hash() != whole.content_hash()  # that of a text is one of all its tokens
    assert [file["path"] for file in joined.files()] == [str(tmp_path / "x"), str(tmp_path / "y")]
    np.testing.assert_array_equal(np.asarray(joined.tokens), whole.tokens)
    for spans in ("training_spans", "held_out_spans", "tuning_spans"):
        np.testing.assert_array_equal(getattr(joined, spans), getattr(whole, spans))
    for mine, theirs in zip(itertools.islice(joined.train(), 60), whole.train(), strict=False):
        np.testing.assert_array_equal(mine["targets"], theirs["targets"])
    seam = len(read_folder(str(tmp_path / "x")).tokens)
    with pytest.raises(IndexError, match="lie in two arrays"):
        joined.tokens[seam - 1:seam + 1]


def test_pieces_of_a_span_are_even_and_cover_it():
    spans = np.array([[0, 1], [1, 129], [129, 258], [258, 1000]])
    rows = PackedRows(np.zeros(1000, np.uint16), spans, ROW, 0, endless=False)
    lengths = rows._stops - rows._starts
    np.testing.assert_array_equal(rows._starts[1:], rows._stops[:-1])
    assert lengths.max() <= 8 * ROW and rows._starts[0] == 0 and rows._stops[-1] == 1000
    for start, stop in spans.tolist():
        of = lengths[(rows._starts >= start) & (rows._stops <= stop)]
        assert of.sum() == stop - start and of.max() - of.min() <= 1 and len(of) == -(-(stop - start) // (8 * ROW))


class Killed(Exception):
    pass


def begin(tmp_path: Path, paths: list[str], monkeypatch) -> Path:
    """A preparation that ends behind its first file: what it left."""

    def die(line: str) -> None:
        raise Killed(line)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "say", die)
        with pytest.raises(Killed, match="1 of 2 files"):
            prepare.tokens(tmp_path / "tokens", paths, "bytes")
    return tmp_path / "tokens.unfinished"


def test_a_preparation_that_is_killed_goes_on_behind_its_last_whole_file(tmp_path, monkeypatch, capsys):
    paths = files(tmp_path)
    assert prepare.main([str(tmp_path / "whole"), *paths, "--tokenizer", "bytes"]) == 0
    left = begin(tmp_path, paths, monkeypatch)
    with open(left / "tokens.bin", "ab") as stream:  # half of the next file
        stream.write(b"half a file")
    with pytest.raises(Refused, match=r"tokens\.unfinished was begun"):
        open_text(config(text=(str(tmp_path / "tokens"),)))
    with pytest.raises(Refused, match=r"file 1 was .*a\.txt .*now it is .*b\.txt"):
        prepare.tokens(tmp_path / "tokens", paths[::-1], "bytes")
    capsys.readouterr()
    prepare.tokens(tmp_path / "tokens", paths, "bytes")
    said = capsys.readouterr().err
    assert "holds 1 of 2 files" in said and "2 of 2 files" in said and not left.exists()
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {"tokens.bin", "ends.bin", "keys.bin", "tokens.json"}
    (tmp_path / "whole" / "progress.json").write_text("{}")  # a kill right behind the rename
    with pytest.raises(Refused, match="never overwritten"):
        prepare.tokens(tmp_path / "whole", paths[:1], "bytes")
    assert prepare.main([str(tmp_path / "whole"), *paths, "--tokenizer", "bytes"]) == 0
    for name in names:
        assert (tmp_path / "tokens" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_was_begun_otherwise_is_refused_and_what_is_not_ours_stays(tmp_path, bpe, monkeypatch):
    paths = files(tmp_path)
    left = begin(tmp_path, paths, monkeypatch)
    with pytest.raises(Refused, match=r"its tokenizer is bytes, SHA-256 None; this one is tokenizer\.json"):
        prepare.tokens(tmp_path / "tokens", paths, bpe)
    (left / "tokens.bin").write_bytes(b"")
    with pytest.raises(Refused, match=r"tokens\.bin has 0 bytes, progress\.json says"):
        prepare.tokens(tmp_path / "tokens", paths, "bytes")
    (left / "progress.json").write_text("{}")
    with pytest.raises(Refused, match=r"(?s)cannot be gone on with.*'tokens' is missing"):
        prepare.tokens(tmp_path / "tokens", paths, "bytes")
    assert prepare.main([str(tmp_path / "whole"), *paths, "--tokenizer", "bytes"]) == 0
    (tmp_path / "whole").rename(tmp_path / "again.unfinished")
    with pytest.raises(Refused, match="holds tokens that are whole"):
        prepare.tokens(tmp_path / "again", paths, "bytes")
    (tmp_path / "early.unfinished").mkdir()  # killed before all arrays were there
    (tmp_path / "early.unfinished" / "tokens.bin").touch()
    assert prepare.tokens(tmp_path / "early", paths, "bytes")["documents"] == 90
    (tmp_path / "mine.unfinished").mkdir()
    (tmp_path / "mine.unfinished" / "tokenizer.json").write_text("mine")
    with pytest.raises(Refused, match="is not what a preparation leaves"):
        prepare.tokens(tmp_path / "mine", paths, "bytes")
    assert (tmp_path / "mine.unfinished" / "tokenizer.json").read_text() == "mine"
    (left / "mine.txt").write_text("mine")
    with pytest.raises(Refused, match="holds what no preparation has written"):
        prepare.tokens(tmp_path / "tokens", paths, "bytes")
    (tmp_path / "there").mkdir()
    with pytest.raises(Refused, match="never overwritten"):
        prepare.tokens(tmp_path / "there", paths, "bytes")
    with pytest.raises(Refused, match=r"(?s)nothing\.txt.*cannot be read.*it is a folder"):
        prepare.tokens(tmp_path / "more", [str(tmp_path / "nothing.txt"), str(tmp_path)], "bytes")
    assert not (tmp_path / "more.unfinished").exists()


def test_json_lines_and_parquet_give_their_texts(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"très {i}\u2028deep\nand on" for i in range(3000)]
    lines = "\n".join(json.dumps({"text": text, "url": "x"}, ensure_ascii=False) for text in (*texts, "")).encode()
    (tmp_path / "c.jsonl").write_bytes(lines)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    with arrow.output_stream(str(tmp_path / "c.jsonl.zst"), compression="zstd") as stream:
        stream.write(lines)
    parquet.write_table(arrow.table({"url": ["x"] * 3001, "text": [*texts, ""]}), tmp_path / "c.parquet")
    (tmp_path / "D.JSON.gz").write_bytes(lines)  # by what it holds, not by its name
    paths = [str(tmp_path / name) for name in ("c.jsonl", "c.jsonl.gz", "c.jsonl.zst", "D.JSON.gz", "c.parquet")]
    for number, path in enumerate(paths):
        made = write_tokens(tmp_path / str(number), [path], "bytes")
        assert made.documents == 3000 and made.bytes == sum(len(text.encode()) for text in texts)
        assert made.sha256 == read_folder(str(tmp_path / "0")).manifest.sha256
    text = open_text(config(text=(str(tmp_path / "4"),)))
    assert text.tokenizer.decode(text.tokens[text.ends[6]:text.ends[7]]) == texts[7].encode()


def test_what_is_no_corpus_is_refused_by_line_row_and_column(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    lines = '{"text": "fine"}', '{"text": 5}', '{"words": "x"}', "no JSON", "[]", '{"text": "\\ud800"}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    parquet.write_table(arrow.table({"text": ["fine", None]}), tmp_path / "b.parquet")
    parquet.write_table(arrow.table({"words": ["fine"]}), tmp_path / "c.parquet")
    parquet.write_table(arrow.table({"text": [1]}), tmp_path / "d.parquet")
    (tmp_path / "e.parquet").write_bytes(b"no Parquet")
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 999)[:40])
    (tmp_path / "g.jsonl.zst").write_bytes(b"no zstd")
    (tmp_path / "h.jsonl").write_text('{"text": ""}\n')
    for name, words in (("a.jsonl", r"(?s)line 2: .*is int.*line 3: .*'text' is missing.*line 4: .*line 5: .*line 6: "),
                        ("b.parquet", r"b\.parquet, row 2: its text is null"),
                        ("c.parquet", r"no column 'text'; its columns are words"),
                        ("d.parquet", r"column 'text' is int64"), ("e.parquet", r"e\.parquet' cannot be read"),
                        ("f.jsonl.gz", r"f\.jsonl\.gz' cannot be read"), ("g.jsonl.zst", r"zst' cannot be read"),
                        ("h.jsonl", r"h\.jsonl' has no document")):  # fmt: skip
        with pytest.raises(Refused, match=words):
            write_tokens(tmp_path / "tokens", [str(tmp_path / name)], "bytes")
        assert not (tmp_path / "tokens").exists()


def test_damage_is_named_and_check_finds_what_sizes_do_not_tell(tmp_path, capsys):
    paths, place = files(tmp_path), tmp_path / "tokens"
    assert prepare.main([str(place), *paths, "--tokenizer", "bytes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 90
    assert prepare.main([str(place), "--check"]) == 0 and changed_content(str(place)) == []
    content = bytearray((place / "tokens.bin").read_bytes())
    content[100] ^= 1
    (place / "tokens.bin").write_bytes(content)
    assert prepare.main([str(place), "--check"]) == 1
    said = capsys.readouterr().out
    assert "tokens.bin does not hold what was written" in said and "NOT as they were written" in said
    with pytest.raises(Refused, match=r"tokens\.bin \(sample\) does not hold what was written"):
        read_folder(str(place))  # of a small file the sample is all
    (place / "tokens.bin").write_bytes(content[:-2])
    (place / "keys.bin").unlink()
    assert prepare.main([str(place), "--check"]) == 1
    with pytest.raises(Refused, match=r"(?s)tokens\.bin has \d+ bytes, tokens\.json says .*keys\.bin cannot be read"):
        read_folder(str(place))
    (place / "tokens.json").write_text('{"format": 2}')
    with pytest.raises(Refused, match=r"(?s)tokens\.json is not what .*'tokens' is missing"):
        read_folder(str(place))


def test_a_manifest_and_ends_that_cannot_be_are_refused(tmp_path):
    write_tokens(tmp_path / "t", files(tmp_path), "bytes")
    place = tmp_path / "t" / "tokens.json"
    good = json.loads(place.read_text())
    for change, words in (({"format": 2}, "format is 2; this program reads 1"), ({"tokens": -1}, "tokens is -1"),
                          ({"documents": 1e9}, "'documents': 1000000000.0 is not int"), ({"more": 1}, "unknown field"),
                          ({"dtype": "int8"}, "'int8' is not one of"), ({"end_of_document": 257}, "an id below it"),
                          ({"tokenizer": {"name": "bytes"}}, "field 'sha256' is missing")):  # fmt: skip
        place.write_text(json.dumps(good | change))
        with pytest.raises(Refused, match=words):
            read_folder(str(tmp_path / "t"))
    place.write_text(json.dumps(good))
    ends = np.fromfile(tmp_path / "t" / "ends.bin", "<i8")
    ends[[3, 4]] = ends[[4, 3]]
    ends.tofile(tmp_path / "t" / "ends.bin")
    with pytest.raises(Refused, match=r"ends\.bin does not hold what was written"):
        read_folder(str(tmp_path / "t"))


def test_tokens_and_text_and_tokens_of_another_tokenizer_are_not_mixed(tmp_path, bpe):
    paths = files(tmp_path)
    write_tokens(tmp_path / "x", paths, "bytes")
    write_tokens(tmp_path / "y", paths, bpe)
    with pytest.raises(Refused, match=r"names tokens .*and files .*a\.txt"):
        open_text(config(text=(str(tmp_path / "x"), paths[0])))
    with pytest.raises(Refused, match=r"y holds tokens of tokenizer\.json .*--tokenizer .*y"):
        open_text(config(text=(str(tmp_path / "x"), str(tmp_path / "y"))))
    with pytest.raises(Refused, match="it tells of a folder of tokens; name the folder"):
        open_text(config(text=(str(tmp_path / "x" / "tokens.json"),)))
    (tmp_path / "y" / "tokenizer.json").write_text("{}")
    with pytest.raises(Refused, match=r"y/tokenizer\.json is not the tokenizer of these tokens"):
        open_text(config(text=(str(tmp_path / "y"),), tokenizer=bpe))
    assert prepare.main([str(tmp_path / "y"), "--check"]) == 1
    with pytest.raises(Refused, match=r"Is a directory, without tokens of"):
        open_text(config(text=(str(tmp_path),)))


def test_a_new_run_takes_the_tokenizer_of_its_tokens(tmp_path, bpe, monkeypatch):
    write_tokens(tmp_path / "y", files(tmp_path), bpe)
    monkeypatch.chdir(tmp_path)
    base = RunConfig(model=preset("tiny"))
    arguments = train.parser().parse_args(["run", "--text", "y"])
    assert train.run_config(arguments, base).data.tokenizer == str(tmp_path / "y")
    arguments = train.parser().parse_args(["run", "--text", "y", "--tokenizer", bpe])
    assert train.run_config(arguments, base).data.tokenizer == bpe
    model = small_model("D", False, vocab=512)  # of a checkpoint that knows none, as one converted without
    values = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract(model))
    checkpoint.save(tmp_path / "start", values, {"config": model.to_json(), "kind": "converted"})
    arguments = train.parser().parse_args(["run", "--start", "start", "--text", "y"])
    assert train.run_config(arguments, train.default_config(arguments)).data.tokenizer == str(tmp_path / "y")


def test_a_text_of_any_bytes_comes_back_and_says_how_it_was_read(tmp_path):
    draws = np.random.default_rng(0)
    made = [draws.integers(0, 256, length, np.uint8).tobytes() + b"\n" for length in draws.integers(1, 300, 40)]
    path = text_file(tmp_path, made, "bytes.txt")
    write_tokens(tmp_path / "t", [path], "bytes")
    mapped, read = (open_text(config(text=(place,), tuning=0.1)) for place in (str(tmp_path / "t"), path))
    assert_same_text(read, mapped)
    assert "bytes as they lie" in mapped.summary() and mapped.summary().endswith(read.told)
