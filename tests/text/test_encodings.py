"""Text files that are not plain UTF-8: read where it is certain what they are, else refused or said."""

import functools
import gzip
import json

import pytest

from gt_jax.configs.data import DataConfig
from gt_jax.errors import Refused
from gt_jax.text.batches import open_text
from gt_jax.text.encodings import plain
from gt_jax.text.json_lines import read_documents
from gt_jax.text.tokenizers import ByteTokenizer

gzipped = functools.partial(gzip.compress, mtime=0)  # tests are named by these bytes, which no clock may change
WORDS = "die Mühle am Bach – 水車 turns.\n" * 40


@pytest.mark.parametrize(("content", "read_as"), [
    (WORDS.encode(), []), (WORDS.encode("utf-8-sig"), ["UTF-8 with a mark"]), (WORDS.encode("utf-16"), ["UTF-16"]),
    (b"\xfe\xff" + WORDS.encode("utf-16-be"), ["UTF-16"]), (WORDS.encode("utf-32"), ["UTF-32"]),
    (gzipped(WORDS.encode()), ["gzip"]), (gzipped(WORDS.encode("utf-16")), ["gzip", "UTF-16"]),
])  # fmt: skip
def test_what_is_certain_is_read_as_it_is(content, read_as):
    assert plain(content) == (WORDS.encode(), read_as)


@pytest.mark.parametrize(("content", "kind"), [
    (b"PK\x03\x04 a b", "zip archive"), (b"\x28\xb5\x2f\xfd a", "zstd"), (b"PAR1 a", "Parquet"),
    (gzipped(b"PAR1 a"), "Parquet"), (gzipped(WORDS.encode())[:40], "cannot be unpacked"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    ("plain words of some length".encode("utf-16-le"), "UTF-16 without a mark"), (b"\xff\xfea", "not that"),
])  # fmt: skip
def test_what_is_no_text_is_refused_by_name(content, kind, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(Refused, match=rf"(?s)the text cannot be used:.*a\.txt' cannot be read: it .*{kind}"):
        open_text(DataConfig(text=(str(tmp_path / "a.txt"),)))


def test_how_a_file_was_read_is_said_once(tmp_path):
    (tmp_path / "a.txt").write_bytes(gzipped(WORDS.encode()))
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 " * 40 + b"one<|endoftext|>two")
    (tmp_path / "c.txt").write_bytes(WORDS.encode())
    said = open_text(DataConfig(text=tuple(str(tmp_path / name) for name in ("a.txt", "b.txt")))).summary()
    assert said.count("a.txt read as gzip") == said.count("b.txt read as bytes as they lie, for it is not UTF-8") == 1
    assert said.count("<|endoftext|> 1 times within lines") == 1
    plainly = open_text(DataConfig(text=(str(tmp_path / "c.txt"),)))
    assert plainly.summary().endswith("held out")
    packed = open_text(DataConfig(text=(str(tmp_path / "a.txt"),)))
    assert packed.content_hash() == plainly.content_hash()  # a run goes on with the text unpacked, and the other way


def test_json_lines_are_read_so_too(tmp_path):
    lines = b"\xef\xbb\xbf" + json.dumps({"text": "a"}).encode()
    (tmp_path / "a.jsonl").write_bytes(gzipped(lines))
    assert read_documents(str(tmp_path / "a.jsonl"), ByteTokenizer(), 8)[0].tokens.tolist() == [97, 256]
