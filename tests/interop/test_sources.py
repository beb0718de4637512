"""Shards, indices, folders; half of a set; token files."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from gt_jax.checkpoints import checkpoint
from gt_jax.checkpoints.tree_paths import flatten
from gt_jax.errors import Refused
from gt_jax.interop.shards import Source, open_files
from gt_jax.interop.to_orbax import to_orbax
from gt_jax.text.vocabulary_files import read_tokens
from tests.interop import origin

A, B, C = (np.full(3, number, np.float32) for number in (1, 2, 3))


def shards(folder, *parts, index=None):
    """Files x-00001-of-0000N.safetensors, and an index of where each tensor is."""
    folder.mkdir(exist_ok=True)
    names = {}
    for number, tensors in enumerate(parts, 1):
        file = f"x-{number:05d}-of-{len(parts):05d}.safetensors"
        origin.write(folder / file, tensors)
        names |= dict.fromkeys(tensors, file)
    if index is not None:
        (folder / "x.safetensors.index.json").write_text(json.dumps({"weight_map": names | index}))
    return folder


def refused(*paths):
    with pytest.raises(Refused) as caught:
        Source(list(paths))
    return str(caught.value)


def test_a_set_of_shards_however_it_is_named(tmp_path):
    folder = shards(tmp_path / "s", {"a": A}, {"b": B}, {"c": C}, index={})
    first, second, third = sorted(folder.glob("x-*"))
    for paths in ([folder], [folder / "x.safetensors.index.json"], [second], [first, third], [third, second, first]):
        found = Source(paths)
        assert {name: found.read(name)[0] for name in found.tensors} == {"a": 1, "b": 2, "c": 3}
        assert len(found.files) == 3
    (folder / "x.safetensors.index.json").unlink()
    assert len(Source([folder]).tensors) == 3


def test_files_without_numbers(tmp_path):
    paths = [origin.write(tmp_path / name, {name[0]: A}) for name in ("a.safetensors", "b.safetensors")]
    assert set(Source(paths).tensors) == set(Source([tmp_path]).tensors) == {"a", "b"}


def test_half_of_the_shards(tmp_path):
    folder = shards(tmp_path / "s", {"a": A}, {"b": B}, {"c": C}, {"d": A}, index={})
    for path in sorted(folder.glob("x-*"))[:2]:
        path.unlink()
    said = refused(folder)
    assert said.count("is not there, but x.safetensors.index.json names it") == 2 and "x-00001-of-00004" in said
    (folder / "x.safetensors.index.json").unlink()
    assert refused(folder).count("belongs to the same set") == 2


def test_an_index_that_does_not_fit(tmp_path):
    wrong = {"b": "x-00001-of-00002.safetensors", "z": "x-00002-of-00002.safetensors"}
    folder = shards(tmp_path / "s", {"a": A}, {"b": B}, index=wrong)
    said = refused(folder)
    assert "b is not in x-00001-of-00002.safetensors" in said and "z is not in x-00002-of-00002" in said
    assert "b in x-00002-of-00002.safetensors is not in x.safetensors.index.json" in said
    index = folder / "x.safetensors.index.json"
    for text, words in (("{", "no index"), ("{}", "no index"), ('{"weight_map": {"a": "../x"}}', "elsewhere"),
                        ('{"weight_map": {"a": 1}}', "no index")):
        index.write_text(text)
        assert words in refused(folder)


def test_folders_that_are_not_clear(tmp_path):
    (tmp_path / "both").mkdir()
    origin.write(tmp_path / "both" / "a.safetensors", {"a": A})
    (tmp_path / "both" / "b.pt").write_bytes(b"PK")
    assert "holds both a.safetensors and b.pt" in refused(tmp_path / "both")
    (tmp_path / "a.index.json").write_text("{}")
    (tmp_path / "b.index.json").write_text("{}")
    assert "2 indices" in refused(tmp_path)
    origin.write(tmp_path / "y-3-of-2.safetensors", {"a": A})
    assert "number outside of its set" in refused(tmp_path / "y-3-of-2.safetensors")
    many = origin.write(tmp_path / "z-1-of-99999999999.safetensors", {"a": A})
    assert "one of 99999999999 files; at most 100000" in refused(many)  # their names would not fit into memory
    (tmp_path / "_CHECKPOINT_METADATA").write_text("{}")
    assert "--to safetensors" in refused(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model"])
def test_a_header_whose_length_begins_like_an_archive_is_a_header(tmp_path, name):
    """19,280 bytes, as a little-endian number, begin with the letters PK."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode().ljust(19_280)
    content = len(header).to_bytes(8, "little") + header + np.array([1, 2], np.float32).tobytes()
    assert content.startswith(b"PK")
    (tmp_path / name).write_bytes(content)
    [file], _ = open_files([tmp_path / name])
    np.testing.assert_array_equal(file.read("a"), [1, 2])


def test_every_truncated_file_is_named(tmp_path):
    paths = [origin.write(tmp_path / f"{name}.safetensors", {name: A}) for name in "abc"]
    for path in paths[:2]:
        path.write_bytes(path.read_bytes()[:-1])
    said = refused(*paths)
    assert "a.safetensors is truncated" in said and "b.safetensors is truncated" in said and "c.saf" not in said


def test_names_in_two_files_must_agree(tmp_path):
    paths = [origin.write(tmp_path / "1.safetensors", {"layers.0.x": A, "layers.1.x": B}),
             origin.write(tmp_path / "2.safetensors", {"stack.bootstrap_layer.x": A, "stack.mid_layers.0.block.x": C})]
    source = Source(paths)
    assert source.aliases() == 2 and source.differing_aliases() == [
        "layers.1.x (1.safetensors) and stack.mid_layers.0.block.x (2.safetensors) name one tensor, but their values "
        "differ"]


def test_a_checkpoint_in_shards_under_its_second_names(tmp_path):
    state = origin.state()
    renamed = {}
    for name, value in state.items():
        if name.startswith("layers.0."):
            name = "stack.bootstrap_layer." + name.removeprefix("layers.0.")
        elif name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            name = f"stack.mid_layers.{int(layer) - 1}.block.wrapper.layer.{rest}"
        renamed[name.replace("mtp_block.attn_block.sublayer.", "mtp_block.attn.")] = value
    names = sorted(renamed)
    parts = [{name: renamed[name] for name in names[start::3]} for start in range(3)]
    one = origin.write(tmp_path / "one.safetensors", state)
    to_orbax([one], tmp_path / "a", overrides=origin.OVERRIDES)
    to_orbax([shards(tmp_path / "shards", *parts, index={})], tmp_path / "b", overrides=origin.OVERRIDES)
    a, b = (flatten(checkpoint.load(tmp_path / name)) for name in "ab")
    assert a.keys() == b.keys() and all(a[path].tobytes() == b[path].tobytes() for path in a)


def test_token_files(tmp_path):
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(["a", "é", ""]))
    assert read_tokens(path) == [b"a", "é".encode(), b""]
    vocabulary = {"model": {"vocab": {"Ġthe": 1, "Ã": 0}}, "decoder": {"type": "ByteLevel"},
                  "added_tokens": [{"id": 2, "content": "<s>"}]}
    path.write_text(json.dumps(vocabulary))
    assert read_tokens(path) == [b"\xc3", b" the", b"<s>"]
    path.write_text(json.dumps({"model": {"vocab": [["x", -1.0], ["Ġ", -2.0]]}}))
    assert read_tokens(path) == [b"x", "Ġ".encode()]
    for text, words in (("{", "cannot be read"), ("[]", "neither"), ("[1]", "neither"), ("{}", "no vocabulary"),
                        ('{"model": {"vocab": {"a": 0, "b": 2}}}', "id 1 has no token")):
        path.write_text(text)
        with pytest.raises(Refused, match=words):
            read_tokens(path)


def test_tokens_become_the_bytes_of_the_embedding(tmp_path):
    source = origin.write(tmp_path / "a.safetensors", origin.state())
    texts = [b"<%d>" % token for token in range(264)]
    with pytest.raises(Refused, match="there are 265 token texts; the model has a vocabulary of 264"):
        to_orbax([source], tmp_path / "ours", tokens=[*texts, b"one more"])
    said: list[str] = []
    to_orbax([source], tmp_path / "default", progress=said.append)
    assert sum("nothing says which bytes the tokens have" in line for line in said) == 1
    # those of the tokenizer that is named, and behind its tokens what fills a padded vocabulary
    file = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer(BPE(vocab={letter: n for n, letter in enumerate("cab")}, merges=[]))
    tokenizer.save(str(file))
    to_orbax([source], tmp_path / "named", tokenizer=str(file))
    found = checkpoint.load(tmp_path / "named")["statistics"]["embedding"]
    assert bytes(found["token_bytes"][:3, 0]) == b"cab" and bytes(found["token_bytes"][97])[:1] == b"a"
    to_orbax([source], tmp_path / "ours", tokens=texts)
    found = checkpoint.load(tmp_path / "ours")["statistics"]["embedding"]
    assert bytes(found["token_bytes"][17]) == b"<17>" + bytes(28) and found["token_length"][17] == 4
    table = origin.CONFIG.replace(layout="DDDG", embedding=origin.CONFIG.embedding.replace(kind="table"))
    source = origin.write(tmp_path / "b.safetensors", origin.state(table))
    with pytest.raises(Refused, match="plain table"):
        to_orbax([source], tmp_path / "none", tokens=texts)
